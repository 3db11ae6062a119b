"""What a user does wrong ends in one clear message, the next command and an exit code that is not 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import arguments_for, write_clips
from wantrain import cli, options
from wantrain.files import write_json
from wantrain.models.lora_formats import GRAMMARS
from wantrain.models.lora_updates import STORAGE
from wantrain.recipe.training import Training


def failing(wantrain, capsys, verb, *overrides):
    """The message of a verb that must fail as a user error."""
    assert wantrain(verb, *overrides) == 2
    shown = capsys.readouterr().err
    assert "\nerror: " in f"\n{shown}"
    assert "\n  next: " in shown
    assert "Traceback" not in shown
    return shown


def test_unknown_verb_and_option(capsys):
    assert cli.main(["tarin"]) == 2
    assert "no verb 'tarin'" in capsys.readouterr().err
    assert cli.main(["train", "--fast"]) == 2
    assert "--fast" in capsys.readouterr().err


def test_help_of_every_verb(capsys):
    for verb in cli.VERBS:
        assert cli.main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "optim.lr" in shown
        assert "demo_anime" in shown
    for verb, told in options.FILE_VERBS.items():
        assert cli.main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"usage: wantrain {verb} " in shown
        assert all(f"--{option.name} VALUE" in shown for option in told.options)
        assert all(name in shown for name, _, _ in told.files)
    assert set(options.LORA_FORMATS) == set(GRAMMARS)
    assert {one for verb in ("convert", "merge", "extract") for option in options.FILE_VERBS[verb].options
            if option.name == "dtype" for one in option.values} == set(STORAGE)


def test_a_missing_video(wantrain, capsys, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": "gone.mp4", "caption": "x"}))
    shown = failing(wantrain, capsys, "cache", f"data.sources.style.path={tmp_path / 'm.jsonl'}")
    assert "line 1: missing file" in shown


def test_an_empty_caption(wantrain, capsys, tmp_path):
    (write_clips(tmp_path / "set", 2, "x") / "clip_1.txt").write_text("")
    assert "clip_1.mp4: empty caption" in failing(wantrain, capsys, "cache",
                                                  f"data.sources.style.path={tmp_path / 'set'}")


def test_a_truncated_mp4(wantrain, capsys, tmp_path):
    path = write_clips(tmp_path / "set", 2, "x") / "clip_1.mp4"
    path.write_bytes(path.read_bytes()[:700])
    assert "clip_1.mp4" in failing(wantrain, capsys, "cache", f"data.sources.style.path={tmp_path / 'set'}")


def test_control_videos_for_a_model_that_takes_none_are_refused_not_ignored(wantrain, capsys, tmp_path):
    folder = write_clips(tmp_path / "set", 2, "x")
    (folder / "control").mkdir()
    shutil.copy(folder / "clip_1.mp4", folder / "control")
    assert "1 clips have a control, such as style/clip_1.mp4" in failing(
        wantrain, capsys, "train", f"data.sources.style.path={folder}")


def test_a_target_that_matches_nothing(wantrain, capsys):
    assert "matches no Linear" in failing(wantrain, capsys, "train", "lora.targets=[to_qq]")


def test_a_cache_made_by_another_vae(wantrain, capsys, tmp_path):
    from wantrain.models import base

    other = tmp_path / "base"
    other.mkdir()
    for part in base.EMBEDDED.iterdir():
        (other / part.name).symlink_to(part)
    (other / "vae").unlink()
    (other / "vae").mkdir()
    (other / "vae" / "diffusion_pytorch_model.safetensors").symlink_to(
        base.EMBEDDED / "vae" / "diffusion_pytorch_model.safetensors")
    config = json.loads((base.EMBEDDED / "vae" / "config.json").read_text())
    write_json(other / "vae" / "config.json", config | {"latents_mean": [0.5] * 16})
    shown = failing(wantrain, capsys, "train", f"model.path={other}")
    assert "the cache lacks" in shown
    assert "wantrain cache" in shown


def test_a_base_that_is_not_there(wantrain, capsys, tmp_path):
    shown = failing(wantrain, capsys, "check", f"model.path={tmp_path / 'none'}")
    assert "model.path: " in shown
    assert "owner/name" in shown
    assert "holds no Wan transformer" in failing(wantrain, capsys, "check", f"model.path={tmp_path}")


def test_base_weights_with_a_tensor_missing(wantrain, capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    from wantrain.models import base

    for part in base.EMBEDDED.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").unlink()
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").symlink_to(base.EMBEDDED / "transformer" / "config.json")
    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(base.EMBEDDED / "transformer" / name)
    tensors.pop("blocks.3.attn1.to_q.weight")
    save_file(tensors, tmp_path / "transformer" / name, {"format": "pt"})
    assert "blocks.3.attn1.to_q.weight" in failing(wantrain, capsys, "train", f"model.path={tmp_path}")


def test_export_and_sample_before_training_name_the_next_command(wantrain, capsys):
    assert "wantrain train" in failing(wantrain, capsys, "export")
    assert "wantrain export" in failing(wantrain, capsys, "sample")


def test_a_batch_that_cannot_be_dealt(wantrain, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert "cannot be dealt to 3 process" in failing(wantrain, capsys, "train")


@pytest.mark.slow
def test_a_full_disk_while_caching_loses_nothing_and_the_same_command_goes_on(clips, tmp_path):
    """A limit on file size makes the kernel refuse every entry above 3000 bytes, as a full disk would."""
    arguments = arguments_for(clips, tmp_path / "cache", tmp_path / "run")
    code = ("import resource, signal, sys; from wantrain import cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.exit(cli.main(['cache', *sys.argv[1:]]))")
    full = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "could not write" in full.stderr
    assert "what was finished is kept" in full.stderr
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(kept) >= 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert cli.main(["cache", *arguments]) == 0
    whole = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert kept.items() <= whole.items()
    assert len(whole) == 10 + 12  # windows; captions, none, and the prompt of samples in training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_in_training_saves_and_goes_on(wantrain, tmp_path, monkeypatch, capsys, number):
    plain, before = Training.losses, signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)  # a shell's background jobs begin with SIGINT ignored, which stays in force

    def stopped(training, batch):
        if training.progress.step == 2:
            os.kill(os.getpid(), number)
        return plain(training, batch)

    monkeypatch.setattr(Training, "losses", stopped)
    try:
        assert wantrain("train", "train.num_steps=5") == 130
    finally:
        signal.signal(number, before)
    assert "next: wantrain train" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"]
    assert wantrain("train", "train.num_steps=5") == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_verb_for_one_process_runs_in_the_first_only(wantrain, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert wantrain("check") == 0
    assert capsys.readouterr().out == ""
