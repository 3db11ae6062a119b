"""What a verb cannot end is said before its first heavy step, and `check` says it too."""

from __future__ import annotations

import shlex

import pytest
import torch

from wantrain import cli, config
from wantrain.engine import checkpoint, saved
from wantrain.engine.saved import Record
from wantrain.models.base import Base


@pytest.fixture
def light(monkeypatch):
    """Whatever loads weights fails."""
    for part in ("transformer", "vae", "text"):
        monkeypatch.setattr(Base, part, None)


@pytest.mark.parametrize("verb", ["check", "train"])
def test_no_validation_sigma_in_the_trained_range(wantrain, light, capsys, verb):
    asked = ("validation.every_steps=2", "sigma.range=[0.4,0.6]", "validation.sigmas=[0.1,0.9]")
    assert wantrain(verb, *asked) == 2
    assert "validation.sigmas = [0.1, 0.9]: none is in [0.4, 0.6)" in capsys.readouterr().err
    if verb == "check":
        assert wantrain(verb, *asked, "validation.sigmas=[0.1,0.5]") == 0


@pytest.mark.parametrize(("override", "said"), [
    ("data.trigger=nosuchword", "no training caption holds the trigger 'nosuchword'"),
    ("data.trigger=''", "evaluate needs data.trigger"),
    ("evaluate.prompts=[]", "evaluate needs evaluate.prompts"),
    ("data.heldout=null", "evaluate needs data.heldout"),
])
def test_what_evaluate_lacks_is_told_by_check_and_before_anything_is_loaded(wantrain, light, capsys, override, said):
    assert wantrain("evaluate", override) == 2
    assert said in capsys.readouterr().err
    assert wantrain("check", override) == 0
    assert f"evaluate     not yet: {said}" in capsys.readouterr().out


def test_evaluate_without_a_cache_or_a_lora_says_so_before_anything_is_loaded(wantrain, light, capsys, tmp_path):
    assert wantrain("evaluate", f"data.cache_dir={tmp_path / 'empty'}") == 2
    assert "the cache lacks" in capsys.readouterr().err
    assert wantrain("evaluate") == 2
    assert "no LoRA file" in capsys.readouterr().err


def test_exporting_an_expert_that_was_not_trained_names_the_one_that_was(arguments, tmp_path, capsys):
    own = [*arguments, "model.variant=tiny_wan_a14b"]
    fingerprint = config.resume_keys(config.expert_config(config.load(own), "low"))
    record = Record(fingerprint, "lora", {"blocks.0.attn1.to_q": 1.0})
    pair = {f"blocks.0.attn1.to_q.lora_{x}.default.weight|value": torch.ones(size) for x, size in
            (("A", (4, 96)), ("B", (96, 4)))}
    store = saved.CheckpointStore(tmp_path / "run" / "low" / "checkpoints")
    checkpoint.save(store, saved.Progress(1), pair, record)
    assert cli.main(["export", *own]) == 2
    said = capsys.readouterr().err
    assert f"no checkpoint in {tmp_path / 'run' / 'high' / 'checkpoints'}" in said
    next_command = shlex.split(said.partition("next: wantrain ")[2].partition("    for the low noise expert alone")[0])
    assert cli.main(next_command) == 0
    assert (tmp_path / "run" / "export" / "demo_anime_low_noise.safetensors").exists()
