"""`wantrain runs`: what it says of runs in every state, from their folders alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from wantrain import cli, lock


def a_run(folder, step, num_steps=10, command=("recipe=demo_anime", "data.trigger=two words"), loss=None):
    """The folder of a training that has come to `step`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train: {{num_steps: {num_steps}}}\n")
    (folder / lock.NAME).write_text(json.dumps({"host": "h", "pid": 1, "since": "now",
                                                "command": ["wantrain", "train", *command]}))
    if step:
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{step:06d}" / "training.safetensors").write_bytes(b"x" * 2**20)
    lines = [{"step": 1, "loss": 1.0}, *([{"step": 2, "validation_loss": loss}] if loss else []), {"step": 3}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "validation_loss": 0.1')
    return folder


def export_of(run, name, seconds_later):
    (run / "export").mkdir(exist_ok=True)
    (run / "export" / name).write_bytes(b"x")
    newest = max(path.stat().st_mtime for path in run.rglob("step_*"))
    os.utime(run / "export" / name, (newest + seconds_later,) * 2)


@pytest.fixture
def told(capsys, monkeypatch, tmp_path):
    """told(folders...) -> the two lines of each run by its name."""
    monkeypatch.chdir(tmp_path)

    def call(*folders):
        assert cli.main(["runs", *folders]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0]: (line, following.strip()) for line, following in zip(lines[::2], lines[1::2],
                                                                                      strict=True)}

    return call


def test_every_state_with_what_to_do_next(told, tmp_path):
    runs = tmp_path / "runs"
    a_run(runs / "begun", 0)
    a_run(runs / "stopped", 4, loss=0.25)
    a_run(runs / "done", 10)
    export_of(a_run(runs / "old_export", 10), "old_export.safetensors", -5)
    export_of(a_run(runs / "exported", 10), "exported.safetensors", 5)
    found = told()
    arguments = "recipe=demo_anime 'data.trigger=two words'"
    for name, state, verb in (("begun", "no checkpoint yet", "train"), ("stopped", "stopped", "train"),
                              ("done", "finished", "export"), ("old_export", "finished", "export"),
                              ("exported", "exported", "evaluate")):
        line, following = found[name]
        assert f"  {state}" in line, name
        assert following == f"next: wantrain {verb} {arguments}"
        assert "recipe=demo_anime" in line
    assert "4 of 10 steps" in found["stopped"][0]
    assert found["stopped"][0].endswith("held-out loss 0.2500"), "the last whole line that has one"
    assert "held-out" not in found["done"][0]
    (runs / "stopped" / "judgement.json").write_text('{"verdict": {"best": 3, "from": 2, "to": null}}')
    assert told()["stopped"][0].endswith("held-out loss 0.2500, usable from step 2 to now, best 3")
    assert "1.0 MiB" in found["done"][0]


def test_both_experts_a_bare_recipe_name_and_a_runs_own_folder(told, tmp_path):
    run = tmp_path / "runs" / "two"
    a_run(run / "high", 10, command=["motion", "run.name=two"])
    a_run(run / "low", 3, command=["motion", "run.name=two"])
    export_of(run, "two_high_noise.safetensors", 5)
    found = told("runs")
    assert "  exported" in found["two/high"][0]
    assert "  stopped" in found["two/low"][0]
    assert "recipe=motion" in found["two/low"][0]
    assert {name for name in told(str(run))} == {"high", "low"}


def test_a_training_at_work_is_seen_and_left_alone(told, tmp_path):
    run = a_run(tmp_path / "runs" / "busy", 4)
    code = ("import sys, pathlib; from wantrain import lock\n"
            "with lock.held(pathlib.Path(sys.argv[1]), ['wantrain', 'train', 'recipe=x']):\n"
            "    print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            line, following = told()["busy"]
            assert f"training now: process {holder.pid} on" in line
            assert following == "next: tail -f runs/busy/logs/process_0.log"
        holder.stdin.close()
    assert "  stopped" in told()["busy"][0]


def test_what_is_broken_or_none_is_told(told, tmp_path, capsys):
    run = a_run(tmp_path / "runs" / "odd", 4)
    (run / "config.yaml").write_text("train: [")
    (run / lock.NAME).write_text("cut off")
    line, following = told()["odd"]
    assert "4 of ? steps" in line
    assert following == "next: wantrain export recipe=NAME run.dir=runs/odd"
    assert cli.main(["runs", "nowhere"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", "empty"]) == 0
    assert "no run in empty" in capsys.readouterr().out
