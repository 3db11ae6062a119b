"""Answers at once: what no verb imports, help by section, Tab completion, a check without the base."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wantrain import cli, config, lora
from wantrain.config import LoraKind
from wantrain.config.help import COMMON
from wantrain.config.known import key_types
from wantrain.models import downloads, inventory, sizes
from wantrain.models.base import Base
from wantrain.models.lora_updates import refuse_unexportable
from wantrain.models.variants import VARIANTS
from wantrain.options import LORA_FORMATS
from wantrain.recipe import recipe as recipes
from wantrain.recipe.recipe import Recipe, outline
from wantrain.stages import completion

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "decord", "deepspeed"}


def imported(arguments, folder, code=0):
    """The heavy packages, and Hydra and OmegaConf, that a command line imports in a process of its own."""
    program = ("import sys, json; from wantrain import cli\ncode = cli.main(json.loads(sys.argv[1]))\n"
               "print('\\n' + json.dumps([code, sorted({n.partition('.')[0] for n in sys.modules})]))")
    done = subprocess.run([sys.executable, "-c", program, json.dumps(arguments)], cwd=folder, text=True, check=True,
                          capture_output=True)
    given, names = json.loads(done.stdout.splitlines()[-1])
    assert given == code, done.stderr
    return set(names) & (HEAVY | {"hydra", "omegaconf"})


@pytest.mark.parametrize(("arguments", "code"), [
    (["--help"], 0), (["train", "--help"], 0), (["check", "--help", "all"], 0), (["chek"], 2),
    (["completion", "zsh"], 0), (["__complete", "wantrain train optim.na"], 0), (["train", "recipe=demo_anmie"], 2),
    (["train", "recipe=demo_anime", "lora.rnak=4"], 2), (["inspect"], 2),
    (["train", "recipe=demo_anime", "lora.rank=0"], 2), (["sample", "--like", "none.mp4"], 2),
    (["doctor", "--jsn"], 2), (["prune", "none"], 2)])
def test_help_faults_and_completion_import_nothing_heavy(tmp_path, arguments, code):
    assert imported(arguments, tmp_path, code) == set()


def test_faults_between_values_import_the_config_library_alone(tmp_path):
    assert imported(["train", "recipe=demo_anime", "optim.weight_decay=1e9"], tmp_path, 2) <= {"hydra", "omegaconf"}


def test_check_imports_neither_torch_nor_a_library_of_models(arguments, tmp_path):
    assert imported(["check", *arguments], tmp_path) == {"hydra", "omegaconf"}


@pytest.mark.parametrize("words", [
    ["inspect", "no.safetensors"], ["merge", "no", "lora.safetensors", "out"],
    ["new", "x", "--clips", "no", "--model", "tiny_wan", "--trigger", "a"], ["inspect", __file__]])
def test_files_that_are_not_there_are_told_without_torch(words, tmp_path):
    assert imported(words, tmp_path, 2) == set()


def test_a_cache_that_lacks_entries_is_told_without_torch(arguments, tmp_path):
    empty = f"data.cache_dir={tmp_path / 'empty'}"
    assert imported(["train", *arguments, empty], tmp_path, 2) == {"hydra", "omegaconf"}
    assert imported(["train", *arguments, "lora.targets=nosuch"], tmp_path, 2) == {"hydra", "omegaconf"}


@pytest.mark.parametrize("words", [
    ["sample", "sampler.loras=[no.safetensors=0.5]"], ["train", f"lora.start_from={__file__}"],
    ["tune", "--over", "optim.lrr=1,2"]])
def test_files_that_are_no_lora_and_keys_to_tune_are_told_without_torch(words, tmp_path):
    assert imported([words[0], "recipe=demo_anime", *words[1:]], tmp_path, 2) <= {"hydra", "omegaconf"}


@pytest.mark.slow
def test_export_and_inspect_import_torch_alone(trained, arguments, tmp_path):
    run = trained("run")
    assert imported(["export", *arguments, f"run.dir={run}"], tmp_path) == {"hydra", "omegaconf", "torch"}
    assert imported(["inspect", str(run / "export" / "demo_anime.safetensors")], tmp_path) == {"torch"}
    assert imported(["runs", str(run)], tmp_path) == set()


def recipe_of(variant, *overrides):
    return Recipe(config.load(["recipe=demo_anime", *overrides]), Base(VARIANTS[variant], {}))


@pytest.mark.parametrize("variant", ["tiny_wan_vace", *(
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in (
        "tiny_wan", "tiny_wan_i2v", "tiny_wan_flf2v"))])
@pytest.mark.parametrize("overrides", [
    (), ("lora.kind=rslora", "lora.targets=[all_linear]"), ("lora.rank_pattern={attn: 3, '.*to_q': 5}",),
    ("optim.lora_plus=16", "optim.lr_factors={attn: 0.5}"), ("lora.targets=[attn, 'proj_out']", "lora.rank=7")])
def test_the_adapter_that_check_tells_is_the_one_that_peft_makes(variant, overrides):
    own = recipe_of(variant, *overrides)
    told = outline(own)
    transformer = own.base.meta_transformer()
    names = lora.inject(transformer, own.config.lora.targets, own.adapter_spec, 0)
    optim = own.config.optim
    factors = set(lora.lr_factors(transformer, optim.lora_plus, optim.lr_factors).values())
    assert told.num_modules == len(names)
    assert told.num_parameters == sum(p.numel() for p in lora.trainable_parameters(transformer).values())
    assert told.rates == sorted(optim.lr * factor for factor in factors)


def test_what_check_takes_as_exportable_is_so_in_every_format():
    """And what it does not, it asks the writer about."""
    for variant, kind in itertools.product(("tiny_wan", "tiny_wan_vace", "tiny_wan_animate"), LoraKind):
        own = recipe_of(variant)
        own = replace(own, config=replace(own.config, lora=replace(own.config.lora, kind=kind, targets=["all_linear"])))
        if not recipes._is_always_expressible(own):
            continue
        adapter = own.meta_adapter()
        for form in LORA_FORMATS:
            refuse_unexportable(adapter, form, "float32")
        assert variant != "tiny_wan_animate"
        assert kind in (LoraKind.lora, LoraKind.rslora)


def test_what_a_checkpoint_takes_is_counted_as_the_libraries_count():
    with torch.device("meta"):
        made = UMT5EncoderModel(UMT5Config(**sizes.UMT5_XXL)), CLIPVisionModel(CLIPVisionConfig(**sizes.CLIP_VIT_H))
    encoders = [sum(p.numel() for p in model.parameters()) for model in made]
    assert inventory.published_gb(VARIANTS["wan21_t2v_1b3"]) == pytest.approx(2e-9 * (1_418_996_800 + encoders[0]))
    assert inventory.published_gb(VARIANTS["wan22_t2v_a14b"]) == pytest.approx(
        2e-9 * (2 * 14_288_491_584 + encoders[0]))
    assert inventory.published_gb(VARIANTS["wan21_i2v_14b_480p"]) == pytest.approx(
        2e-9 * (16_394_878_784 + sum(encoders)))


def test_check_without_the_base_says_what_it_could_not_check(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "downloaded", lambda where: pytest.fail("check downloads nothing"))
    assert cli.main(["check", *arguments, "model.path=some/wan"]) == 0
    said = capsys.readouterr().out
    assert "not here   some/wan, about 11 GB where it is stored in bfloat16" in said
    assert "hf download some/wan\n" in said
    assert "not checked: base not here" in said
    assert "not checked, which are there: base not here" in said
    assert "on 60 modules: 119,808 trainable parameters" in said, "rank 4 of the tiny base"
    assert said.splitlines()[-1].startswith("next: wantrain cache ")
    assert cli.main(["check", *arguments, "model.parts.vae=some/wan/vae"]) == 0
    assert "not here   some/wan/vae\n" in capsys.readouterr().out


def test_help_shows_twenty_keys_each_with_default_unit_and_example(capsys):
    rows = [row for rows in COMMON.values() for row in rows]
    assert len(rows) == 20
    assert {key for key, _, _ in rows} <= key_types().keys()
    assert cli.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for key, unit, example in rows:
        assert re.search(rf"^  {re.escape(key)} = .+    {unit}; e\.g\. '?{re.escape(key)}=", said, re.MULTILINE), key
        config.load(["recipe=demo_anime", "train.micro_batch_size=1", f"{key.replace('NAME', 'style')}={example}"])
    assert said.count("\n  ") < 70


def test_help_of_one_section_and_of_all(capsys):
    for asked in (["--help", "lora"], ["--help=lora"], ["recipe=demo_anime", "-h", "lora"]):
        assert cli.main(["train", *asked]) == 0
        said = capsys.readouterr().out
        keys = set(re.findall(r"^  ([\w.]+) = ", said, re.MULTILINE))
        assert keys == {key for key in key_types() if key.startswith("lora.")}
    assert cli.main(["check", "--help", "all"]) == 0
    assert set(re.findall(r"^  ([\w.]+) = ", capsys.readouterr().out, re.MULTILINE)) == set(key_types())
    assert cli.main(["train", "--help", "lroa"]) == 2
    assert "did you mean lora? There are run, model" in capsys.readouterr().err
    assert cli.main(["train", "--help", "lora.rank=3"]) == 0
    assert "what is trained:" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "wanted"), [
    ("wantrain ex", ["export", "extract"]), ("wantrain train recipe=demo_a", ["recipe=demo_anime",
                                                                              "recipe=demo_architecture"]),
    ("wantrain train optim.sche", ["optim.schedule="]), ("wantrain train optim.schedule=co", [
        "optim.schedule=constant", "optim.schedule=cosine"]),
    ("wantrain train  lo", ["lora=", "low.", "lora.", "loss."]),
    ("wantrain check recipe=x data.allow_drops=t", ["data.allow_drops=true"]), ("wantrain train lora.rank=", []),
    ("wantrain prune cache de", ["delete=no", "delete=yes"]), ("wantrain doctor --", ["--json"]),
    ("wantrain new x --mo", ["--model"]), ("wantrain new x --model wan22_ti", ["wan22_ti2v_5b"]),
    ("wantrain new x --model=wan22_ti", ["--model=wan22_ti2v_5b"]), ("wantrain new x mod", [
        f"model={name}" for name in sorted(path.stem for path in (config.configs_folder() / "model").glob("*.yaml"))]),
    ("wantrain inspect x --norms ", ["summary", "all"]), ("wantrain inspect ", []),
    ("wantrain nosuch x", []), ("wantrain train nosuch=x", [])])
def test_what_tab_offers(line, wanted):
    assert completion.candidates(line, (*cli.VERBS, *completion.OPTION_VERBS)) == wanted


def test_tab_knows_recipes_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert completion.candidates("wantrain train recipe=mi", ["train"]) == ["recipe=mine"]


@pytest.fixture
def on_path(tmp_path):
    """An environment in which `wantrain` is this one."""
    (tmp_path / "wantrain").write_text(f'#!/bin/sh\nexec {sys.executable} -m wantrain "$@"\n')
    (tmp_path / "wantrain").chmod(0o755)
    (tmp_path / "a_file").touch()
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb",
            "PYTHONPATH": str(Path(cli.__file__).parents[1])}


def test_bash_takes_what_the_script_gives(on_path):
    """Bash parts words at the equals sign, so only what stands behind it may be given."""
    ask = ('eval "$(wantrain completion bash)"; for COMP_LINE in "wantrain train optim.schedule=co" '
           '"wantrain train optim.sche" "wantrain exp"; do COMP_POINT=${#COMP_LINE}; COMPREPLY=(); '
           '_wantrain 2>/dev/null; echo "${COMPREPLY[@]}"; done')
    done = subprocess.run(["bash", "-c", ask], text=True, capture_output=True, check=True, env=on_path)
    assert done.stdout.splitlines() == ["constant cosine", "optim.schedule=", "export"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_takes_what_the_script_gives(tmp_path, on_path):
    ask = "; ".join(["wantrain completion fish | source", *(f"echo {line!r}; complete -C {line!r}" for line in (
        "wantrain train optim.schedule=co", "true; A=1 wantrain exp", "wantrain new x --mo", "wantrain inspect a_f"))])
    done = subprocess.run(["fish", "--no-config", "-c", ask], text=True, capture_output=True, check=True, cwd=tmp_path,
                          env=on_path)
    assert done.stdout.splitlines() == [
        "wantrain train optim.schedule=co", "optim.schedule=constant", "optim.schedule=cosine",
        "true; A=1 wantrain exp", "export", "wantrain new x --mo", "--model", "wantrain inspect a_f", "a_file"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_takes_what_the_script_gives(tmp_path, on_path):
    """Tab pressed at a terminal; what completes a key or a section takes no blank behind it."""
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=on_path,
                             start_new_session=True)
    os.close(theirs)
    try:
        for typed, shown in (('autoload -U compinit; compinit -u -D; eval "$(wantrain completion zsh)"; echo re""ady\n',
                              "ready"), ("true; A=1 wantrain train optim.na\t", "optim.name="), ("ad\t", "adamw"),
                             ("\x15wantrain exp\t", "export "), ("\x15wantrain new x --mo\t", "--model "),
                             ("\x15wantrain inspect a_f\t", "a_file ")):
            os.write(ours, typed.encode())
            assert shown in read_until(ours, shown), typed
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def read_until(terminal, shown):
    """What a terminal shows until this is in it, or until a minute has passed."""
    text, until = "", time.monotonic() + 60
    while shown not in text and time.monotonic() < until:
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    return text


def test_every_shell_has_a_script_and_no_other(capsys):
    for shell, script in completion.SCRIPTS.items():
        assert cli.main(["completion", shell]) == 0
        assert capsys.readouterr().out == script
        assert f"wantrain {completion.ASK} " in script
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
