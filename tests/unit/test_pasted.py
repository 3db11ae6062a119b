"""What a fault says to type next is a whole command: it can be pasted, and what it was about is mended."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wantrain import cli, config, costs, files
from wantrain.engine.saved import damaged
from wantrain.terms import UserError

OWN = ["recipe=demo_anime", "train.num_steps=7"]


def next_of(typed, capsys):
    """The words of the command that a fault ends in, without what stands behind it."""
    assert cli.main(typed) == 2
    return shlex.split(capsys.readouterr().err.partition("\n  next: ")[2].partition("    ")[0])


@pytest.mark.parametrize(("typed", "again"), [
    ([*OWN, "lora.rank=-4"], [*OWN, "lora.rank=32"]),
    (["lora.rnak=4", *OWN], [*OWN, "lora.rank=4"]),
    ([*OWN, "lora.rank", "4"], [*OWN, "lora.rank=4"]),
    (["--lora.rank", "4", *OWN], [*OWN, "lora.rank=4"]),
    (["recipe", "demo_anime", OWN[1]], [OWN[1], "recipe=demo_anime"]),
    (["recipe", "=demo_anime", OWN[1]], [OWN[1], "recipe=demo_anime"]),
    (["recipe", "=", "demo_anime", OWN[1]], [OWN[1], "recipe=demo_anime"]),
    (["--recipe=demo_anime", OWN[1]], [OWN[1], "recipe=demo_anime"]),
    (["demo_anmie", OWN[1]], [OWN[1], "recipe=demo_anime"]),
    (["demo_architecture", OWN[1], "demo_anime"], [OWN[1], "recipe=demo_anime"]),
    ([*OWN, "optim.lr=1e-4, 3e-4"], [*OWN, "optim.lr=1e-4"]),
    ([*OWN, "data.resolutions=[[65,97]]"], [*OWN, "data.resolutions=[[64,96]]"]),
    ([*OWN, "model=wan2.1_t2v_1.3b"], [*OWN, "model=wan21_t2v_1b3"]),
    ([*OWN, "model.parts.transfomer=x"], [*OWN, "model.parts.transformer=x"]),
    ([*OWN, "train.num_steps:5"], ["recipe=demo_anime", "train.num_steps=5"])])
def test_a_fault_of_a_key_ends_in_the_whole_command(typed, again, capsys):
    assert next_of(["check", *typed], capsys) == ["wantrain", "check", *again]
    config.load(again)


@pytest.mark.parametrize(("typed", "again"), [
    (["prune", "cache", "dlete=yes"], ["prune", "cache", "delete=yes"]),
    (["prune", "cache", "--delete", "1"], ["prune", "cache", "delete=yes"]),
    (["plan", *OWN, "--gpu", "rtx5099", "--ram", "64"], ["plan", *OWN, "--ram=64", "--gpu=rtx5090"]),
    (["tune", *OWN, "--over", "optim.lrr=1,2", "--steps", "9"], ["tune", *OWN, "--steps=9", "--over=optim.lr=1,2"]),
    (["new", "a", "--model", "wan21-t2v-1.3b", "--trigger", "it's"],
     ["new", "a", "--trigger=it's", "--model=wan21_t2v_1b3"]),
    (["new", "a b", "--model", "tiny_wan"], ["new", "a b", "--clips", "FOLDER", "--trigger", "my words", "--model",
                                             "tiny_wan"])])
def test_a_fault_of_an_option_ends_in_the_whole_command(typed, again, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if typed[1] == "a b":
        monkeypatch.setattr("wantrain.stages.new.refuse_name", lambda name: None)
    assert next_of(typed, capsys) == ["wantrain", *again]


def test_the_file_that_is_wrong_is_not_left_out_of_the_command(capsys, monkeypatch, tmp_path):
    """There the next step is about the file; and a key inside of a value stands nowhere else."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("# @package _global_\ndefaults: [demo_anime, _self_]\ntrain: {num_step: 5}\n")
    assert "check" not in next_of(["check", "mine.yaml"], capsys)
    assert "+data.sources.mine={paht: x}" not in next_of(["check", *OWN, "+data.sources.mine={paht: x}"], capsys)


def test_a_path_that_is_nearly_there_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("my clips", "other", "run/export"):
        Path(name).mkdir(parents=True)
    Path("run/export/style.safetensors").touch()
    assert files.like("my clip") == "my clips"
    assert files.like("./run/export/style.safetensor") == "run/export/style.safetensors"
    assert files.like("nothing") == files.like("no/such/folder") == files.like("a\0b") == ""
    assert next_of(["check", *OWN, "data.heldout=my clip"], capsys) == ["wantrain", "check", *OWN,
                                                                        "data.heldout=my clips"]
    assert next_of(["new", "a", "--model", "tiny_wan", "--clips", "my clip"], capsys) == [
        "wantrain", "new", "a", "--model=tiny_wan", "--clips=my clips"]
    assert cli.main(["inspect", "run/export/style.safetensor"]) == 2
    assert "and is no model id; did you mean run/export/style.safetensors?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["5", "null", "true", "it's a,b"])
def test_a_recipe_may_have_any_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes", f"{name}.yaml").write_text("# @package _global_\ndefaults: [demo_anime, _self_]\n")
    assert config.load([f"recipe={name}"]).data.trigger == "celanime style"


def test_a_lora_or_another_part_in_place_of_a_part_of_the_base_is_named(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_file({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 192),
               "blocks.0.attn1.to_q.lora_B.weight": torch.zeros(192, 4)}, "a lora.safetensors")
    save_file({"encoder.conv1.weight": torch.zeros(1)}, "vae.safetensors")
    Path("x.yaml").touch()
    for part, file, said in (("transformer", "a lora.safetensors", "is a LoRA, and a transformer is asked for"),
                             ("vae", "a lora.safetensors", "is a LoRA, and a VAE is asked for"),
                             ("text_encoder", "vae.safetensors", "is a VAE, and model.parts.text_encoder is a umT5"),
                             ("text_encoder", "x.yaml", "has the suffix '.yaml'")):
        assert cli.main(["check", *arguments, f"model.parts.{part}={file}"]) == 2
        told = capsys.readouterr().err
        assert said in told, part
        assert "LoRA" not in said or told.endswith("  next: wantrain inspect 'a lora.safetensors'\n")


def test_a_new_recipes_words_are_what_was_meant(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine.yaml", "--clips", "none", "--model", "tiny_wan", "--trigger", "  "]) == 2
    assert "none does not exist" in capsys.readouterr().err
    for text in ("-3gb", "0gb", "gb"):
        with pytest.raises(UserError, match="is not known"):
            costs.card_of(text)
    assert costs.card_of("GeForce RTX-4090").name == costs.card_of("rtx 4090").name


def test_what_to_delete_is_quoted():
    assert shlex.split(damaged(Path("my runs/a/step_000004"), "cut off").next_step.partition("    ")[0]) == [
        "rm", "-r", "my runs/a/step_000004"]
