"""`wantrain run` in one process: its stages, what it leaves out the second time, and its --gpus."""

import sys

import pytest

from wantrain import cli, options, runner
from wantrain.config import load
from wantrain.terms import UserError


def told(capsys):
    """(what was begun, what was left out) of a run's lines."""
    marks = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    return [mark for mark in marks if ":" not in mark], [mark.partition(":")[0] for mark in marks if ":" in mark]


@pytest.mark.slow
def test_stages_follow_each_other_and_what_is_right_is_left_out(wantrain, tmp_path, capsys):
    assert wantrain("run", "train.num_steps=1") == 0
    assert told(capsys) == (["check", "cache", "train", "export", "sample", "evaluate"], [])
    run = tmp_path / "run"
    for file in ("export/demo_anime.safetensors", "samples/contact_sheet.png", "report/report.html"):
        assert (run / file).is_file()
    (run / "report" / "report.html").unlink()
    assert wantrain("run", "train.num_steps=1") == 0
    assert told(capsys) == (["check", "cache", "train", "evaluate"], ["export", "sample"])


def test_what_would_keep_the_last_stage_from_its_end_is_told_first(wantrain, tmp_path, capsys):
    assert wantrain("run", "data.heldout=null") == 2
    assert "evaluate needs data.heldout" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_estimate_is_of_the_same_work_on_the_same_machine(tmp_path, arguments):
    job = runner.open_job(load(arguments), arguments)
    stage = next(stage for stage in runner.STAGES if stage.name == "sample")
    assert runner.seconds_each(job, stage) is None
    beside = tmp_path / "other" / runner.NOTES
    runner.write_json(beside, {"sample": {"seconds": 30.0, "amount": 6, "like": stage.like(job)}})
    assert runner.seconds_each(job, stage) == 5.0
    assert "  sample    about 10 s, as measured before" in runner.forecast(job, [stage])
    runner.write_json(beside, {"sample": {"seconds": 30.0, "amount": 6, "like": "a larger model"}})
    assert runner.seconds_each(job, stage) is None
    assert [runner.told_time(s) for s in (61, 600, 9000)] == ["61 s", "10 min", "2.5 h"]


def test_where_nothing_was_measured_the_plan_says_how_long_a_training_takes(arguments, monkeypatch):
    job = runner.open_job(load(arguments), arguments)
    stage = next(stage for stage in runner.STAGES if stage.name == "train")
    assert "  train     not known yet" in runner.forecast(job, [stage])
    monkeypatch.setattr(runner, "machine", lambda: "NVIDIA GeForce RTX 4090")
    assert runner.forecast(job, [stage])[1].endswith("by the arithmetic of wantrain plan")
    one = runner.planned_step_s(job)
    job.config.data.batch_size *= 2
    assert runner.planned_step_s(job) == pytest.approx(2 * one)


def test_several_gpus_are_a_launch_of_the_same_command(arguments, monkeypatch):
    assert options.processes(["mine", "--gpus", "4", "optim.lr=1"]) == (4, ["mine", "optim.lr=1"])
    assert options.processes(["mine", "--gpus=2"]) == (2, ["mine"])
    for wrong in (["--gpus"], ["--gpus", "0"], ["--gpus=many"]):
        with pytest.raises(UserError, match="a whole number from 1"):
            options.processes(["mine", *wrong])
    became = []
    monkeypatch.setattr(runner.os, "execv", lambda program, words: became.append((program, words)))
    runner.launch_over(load(arguments), 2, ["mine", "optim.lr=1"])
    program, words = became[0]
    assert program == words[0] == sys.executable
    assert words[-5:] == ["-m", "wantrain", "run", "mine", "optim.lr=1"]
    assert words[words.index("--config_file") + 1].endswith("launch/ddp.yaml")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["run", *arguments, "--gpus", "2"]) == 2
