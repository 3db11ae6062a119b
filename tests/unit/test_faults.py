"""What happens to runs: numbers that are not finite, signals, no memory, a lost folder; and what a run tells."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import opened
from tests.runs import lines, losses, same_bits, state
from wantrain import logs
from wantrain.data import batches
from wantrain.data.cache import LATENTS, TEXT
from wantrain.engine import checkpoint, saved
from wantrain.engine.checkpoint import Writer
from wantrain.engine.saved import CheckpointStore, Progress, Record
from wantrain.engine.stopping import Stopper
from wantrain.metrics import Trackers
from wantrain.recipe.training import Training
from wantrain.stages import cache, train
from wantrain.terms import EXIT_INTERRUPTED, Bucket, Clip, MediaInfo, PlannedClip, UserError


@pytest.fixture
def poison(monkeypatch):
    """poison(*steps): the loss of one sample is not a number in these steps, counted from 0."""
    plain = Training.losses

    def call(*steps):
        def poisoned(training, batch):
            loss_B = plain(training, batch)
            bad = training.progress.step in steps and 1 in batch.index_B
            return loss_B * torch.tensor([math.nan if bad and i == 1 else 1.0 for i in batch.index_B])

        monkeypatch.setattr(Training, "losses", poisoned)

    return call


# Losses and gradients that are not finite


def test_a_skipped_step_leaves_the_update_out_and_is_counted(trained, poison):
    before = state(trained("run", "train.num_steps=2"))[1]
    poison(2)
    run = trained("run", "train.num_steps=3", "train.on_nonfinite=skip")
    progress, after = checkpoint.load(run / "checkpoints" / "step_000003", None)
    assert (progress.step, progress.skipped) == (3, 1)
    assert same_bits(before, after)
    assert lines(run)[2]["loss"] is None
    assert lines(run)[2]["skipped"] == 1
    note = json.loads((run / "nonfinite_000003_process_0.json").read_text())
    assert [loss == "nan" for loss in note["losses"]] == [False, True, False, False]
    assert note["what"] == "loss"
    assert note["places_in_batch"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_run_with_a_skipped_step_resumes_bitwise(trained, poison):
    """Also the number of updates, by which AdamW corrects its moments."""
    poison(1)
    own = ["train.on_nonfinite=skip", "train.micro_batch_size=2", "optim.ema=0.3"]
    whole = trained("whole", *own)
    trained("parts", *own, "train.num_steps=2")
    parts = trained("parts", *own)
    assert same_bits(state(whole)[1], state(parts)[1])
    assert losses(whole) == losses(parts)
    assert len(losses(whole)) == 4


def test_more_skips_than_allowed_stop_the_run(trained, wantrain, tmp_path, poison, capsys):
    trained("run", "train.num_steps=1")
    poison(1, 2)
    assert wantrain("train", f"run.dir={tmp_path / 'run'}", "train.on_nonfinite=skip", "train.max_skips=1") == 2
    told = capsys.readouterr().err
    assert "step 3: the loss is not finite" in told
    assert "1 updates were left out before it (train.max_skips = 1)" in told
    assert state(tmp_path / "run")[0] == 1


@pytest.mark.parametrize("way", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_leaves_the_update_out(trained, wantrain, tmp_path, monkeypatch, way):
    before = state(trained("run", "train.num_steps=2"))[1]
    plain = Training.losses

    def overflowing(training, batch):
        loss_B = plain(training, batch)
        loss_B.register_hook(lambda grad_B: grad_B * math.inf)
        return loss_B

    monkeypatch.setattr(Training, "losses", overflowing)
    code = wantrain("train", f"run.dir={tmp_path / 'run'}", "train.num_steps=3", f"train.on_nonfinite={way}")
    step, after = state(tmp_path / "run")
    assert (code, step) == ((2, 2) if way == "stop" else (0, 3))
    assert same_bits(before, after)
    assert json.loads((tmp_path / "run" / "nonfinite_000003_process_0.json").read_text())["what"] == "gradient norm"


# Checkpoints: which stay, the mirror


def written(place: CheckpointStore, *steps: int) -> None:
    for step in steps:
        checkpoint.save(place, Progress(step), {"a|value": torch.full((2,), float(step))}, Record({}))


def test_the_newest_and_every_so_many_stay(tmp_path):
    written(CheckpointStore(tmp_path, keep=2, keep_every=4), *range(1, 12))
    assert [saved.step_of(p.name) for p in saved.steps_on_disk(tmp_path)] == [4, 8, 10, 11]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    written(CheckpointStore(tmp_path, keep=3), 999_999, 1_000_000)
    found = checkpoint.newest_whole(CheckpointStore(tmp_path), {})
    assert found is not None
    assert found.progress.step == 1_000_000


def test_b2sum_reads_the_checksums(tmp_path):
    written(CheckpointStore(tmp_path), 1)
    done = subprocess.run(["b2sum", "-l", "128", "-c", saved.CHECKSUMS], cwd=tmp_path / "step_000001",
                          capture_output=True, text=True, check=True)
    assert done.stdout == "training.safetensors: OK\nstate.json: OK\n"


@pytest.mark.slow
def test_a_run_goes_on_from_its_mirror_where_the_folder_is_lost(trained, tmp_path, capsys):
    own = [f"train.mirror=file://{tmp_path / 'mirror'}", "train.save_every=1", "train.keep_every=2"]
    whole = trained("whole")
    run = trained("run", *own, "train.num_steps=3")
    assert sorted(p.name for p in (tmp_path / "mirror").iterdir()) == ["step_000002", "step_000003"]
    shutil.rmtree(run)
    run = trained("run", *own)
    assert f"going on from {run / 'checkpoints' / 'step_000003'}" in capsys.readouterr().out
    assert same_bits(state(whole)[1], state(run)[1])
    assert sorted(p.name for p in (tmp_path / "mirror").iterdir()) == ["step_000002", "step_000003", "step_000004"]


def test_the_mirror_stands_in_for_a_damaged_checkpoint(tmp_path):
    place = CheckpointStore(tmp_path / "run", str(tmp_path / "mirror"), keep=2)
    writer = Writer(place)
    for step in (1, 2):
        writer.write(Progress(step), {"a|value": torch.full((2,), float(step))}, Record({}))
    writer.close()
    (place.folder / "step_000002" / saved.TENSORS).write_bytes(b"cut")
    found = checkpoint.newest_whole(place, {})
    assert found is not None
    assert found.progress.step == 2
    assert torch.equal(found.tensors["a|value"], torch.full((2,), 2.0))
    assert "step_000002 is damaged" in found.passed[0]


def test_a_mirror_that_cannot_be_written_is_told_and_caught_up(tmp_path):
    blocked = tmp_path / "mirror"
    blocked.write_text("a file where a folder should be")
    writer = Writer(CheckpointStore(tmp_path / "run", str(blocked), keep=3))
    tensors = {"a|value": torch.zeros(2)}
    writer.write(Progress(1), tensors, Record({}))
    writer.finish()
    assert "train.mirror" in writer.news()
    assert writer.news() == ""
    assert "train.mirror" in writer.close()
    blocked.unlink()
    writer.write(Progress(2), tensors, Record({}))
    assert writer.close() == ""
    assert sorted(p.name for p in blocked.iterdir()) == ["step_000001", "step_000002"]


def test_an_address_that_no_file_system_knows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.mirror = nosuch://bucket"):
        checkpoint.newest_whole(CheckpointStore(tmp_path, "nosuch://bucket/run"), {})


def test_the_writer_writes_what_was_given_though_training_goes_on(tmp_path):
    writer, tensors = Writer(CheckpointStore(tmp_path, keep=9)), {"a|value": torch.ones(3)}
    progress = Progress(1, run_id="x")
    writer.write(progress, tensors, Record({}))
    progress.step = 2
    writer.finish()
    assert checkpoint.load(tmp_path / "step_000001", {})[0] == Progress(1, run_id="x")


@pytest.mark.slow
def test_the_trackers_run_goes_on_under_its_id(trained, monkeypatch):
    given = []
    monkeypatch.setattr(Trackers, "open", lambda self, *_, **own: given.append(own))
    trained("run", "train.num_steps=1")
    trained("run", "train.num_steps=2")
    first, second = given
    assert first["run_id"] == second["run_id"] != ""
    assert (first["first_step"], second["first_step"]) == (1, 2)


# Signals


@pytest.fixture
def stopping(arguments, cached, tmp_path):
    """A training of its own process with endless steps, once it trains."""
    command = [sys.executable, "-m", "wantrain", "train", *arguments, "train.num_steps=100000", "train.save_every=1000"]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a terminal has it: a shell's background job ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    signal.signal(signal.SIGINT, before)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_two_signals_at_once_are_one_and_the_step_is_saved(stopping, tmp_path):
    """A terminal sends Ctrl-C to all processes, and their launcher passes it on."""
    stopping.send_signal(signal.SIGINT)
    time.sleep(0.05)
    stopping.send_signal(signal.SIGTERM)
    told, _ = stopping.communicate(timeout=60)
    assert stopping.returncode == EXIT_INTERRUPTED
    assert "saved in" in told
    step, _ = state(tmp_path / "run")
    assert step == len(lines(tmp_path / "run"))
    assert f"stopped after step {step}" in (tmp_path / "run" / logs.name_of(0)).read_text()


@pytest.mark.slow
def test_a_console_that_nobody_reads_any_more_costs_no_save(stopping, tmp_path):
    """As in `wantrain train ... 2>&1 | tee file`: tee ends of the same Ctrl-C."""
    stopping.stdout.close()
    stopping.send_signal(signal.SIGINT)
    assert stopping.wait(timeout=60) == EXIT_INTERRUPTED
    step, _ = state(tmp_path / "run")
    assert step == len(lines(tmp_path / "run"))


def test_printing_fails_for_a_full_disk_but_not_for_a_reader_that_is_gone():
    code = ("import os, sys; from wantrain import logs\n"
            "with logs.lasting_console():\n"
            "    for _ in range(3): print('told', flush=True)\n"
            "    os.write(1, b'told')\n"
            "print('end', file=sys.stderr)")
    for full in (False, True):
        reader, writer = os.pipe()
        os.close(reader)
        with Path("/dev/full").open("wb") as disk:
            done = subprocess.run([sys.executable, "-c", code], stdout=disk if full else writer, stderr=subprocess.PIPE,
                                  text=True, check=False)
        os.close(writer)
        assert ("No space left" in done.stderr) is full
        assert (done.returncode, done.stderr) == (0, "end\n") or full


@pytest.mark.slow
def test_one_more_signal_ends_a_step_that_does_not_end():
    """The handler alone, in a process that hangs."""
    code = ("import time; from wantrain.engine import stopping; stopping.ONE_PRESS_S = 0.2\n"
            "with stopping.Stopper(): print('ready', flush=True); [time.sleep(1) for _ in range(60)]")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == EXIT_INTERRUPTED


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopper.asked
        assert signal.signal(signal.SIGHUP, signal.SIG_DFL) is signal.SIG_IGN
        with Stopper() as stopper:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopper.asked
    finally:
        signal.signal(signal.SIGHUP, before)


# Memory, precision


def exhausted(*_: object) -> torch.Tensor:
    return torch.empty(1 << 55)  # torch's own complaint on the CPU


def refused(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")


@pytest.mark.parametrize("what", [exhausted, refused])
def test_no_memory_tells_the_peak_and_three_settings(wantrain, monkeypatch, capsys, what):
    monkeypatch.setattr(Training, "losses", what)
    assert wantrain("train", "memory.gib=8") == 2
    told = capsys.readouterr().err
    assert "out of memory, with " in told
    assert " GiB in use at the most, where 0." in told  # what was planned: the margin, most of it
    assert "the largest clips are 5f 32x48 (12 tokens), 4 at once" in told
    offers = told.partition("one of:\n")[2].strip().splitlines()
    assert [offer.strip().partition("    ")[0] for offer in offers] == [
        "memory.keep=attention", "memory.keep=inputs", "train.micro_batch_size=2"]


@pytest.mark.parametrize("fails", ["once", "always"])
def test_where_memory_ends_it_goes_on_once_with_what_needs_less(wantrain, tmp_path, monkeypatch, capsys, fails):
    """On a CPU nothing was chosen before: now blocks keep less, and the losses are those of an undisturbed run."""
    more = ["train.num_steps=3", "train.save_every=2", "train.log_every=1"]
    if fails == "once":
        assert wantrain("train", *more, f"run.dir={tmp_path / 'whole'}") == 0
    steps, own = [], train.train_step

    def step(training, number, batches):
        steps.append((number, training.memory.keep[0]))
        if number == 2 and (fails == "always" or len(steps) == 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(training, number, batches)

    monkeypatch.setattr(train, "train_step", step)
    assert wantrain("train", *more, f"run.dir={tmp_path / 'run'}") == (0 if fails == "once" else 2)
    assert [number for number, _ in steps] == [0, 1, 2, 2]  # from the checkpoint of step 2
    assert [keep == "all" for _, keep in steps] == [True, True, True, False]
    told = capsys.readouterr().err
    assert told.count("goes on by itself, this once, from the last checkpoint") == 1
    if fails == "once":
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    else:
        assert "one of:\n" in told


def test_settings_that_are_in_use_already_are_not_offered(wantrain, monkeypatch, capsys):
    monkeypatch.setattr(Training, "losses", refused)
    assert wantrain("train", "memory.keep=inputs", "train.micro_batch_size=1") == 2
    told = capsys.readouterr().err
    assert "memory.keep" not in told
    assert "micro_batch_size=0" not in told
    assert "data.max_tokens_per_clip=9 " in told


def test_another_fault_stays_what_it_is(wantrain, monkeypatch):
    monkeypatch.setattr(Training, "losses", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        wantrain("train")


@pytest.mark.parametrize(("asked", "why"), [("fp16", "bfloat16 has float32's range"), ("bf16", "its own autocast")])
def test_a_launch_that_asks_for_another_precision_is_refused_with_a_reason(wantrain, monkeypatch, capsys, asked, why):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert wantrain("train") == 2
    told = capsys.readouterr().err
    assert f"mixed_precision = {asked}" in told
    assert why in told


# What a run tells


@pytest.mark.slow
def test_the_log_holds_what_the_console_showed_and_what_ended_the_run(trained, wantrain, tmp_path, capfd):
    run = trained("run", "train.num_steps=1")
    log = run / logs.name_of(0)
    assert "trained 1 steps" in capfd.readouterr().out
    assert "trained 1 steps" in log.read_text()
    assert wantrain("train", f"run.dir={run}", "lora.rank=8") == 2
    assert "UserError: the config is not the one" in log.read_text()
    assert log.read_text().count("--- 20") == 2


def test_a_later_process_prints_into_its_log_alone(tmp_path):
    code = ("import os, sys; from pathlib import Path; from wantrain import logs\n"
            f"with logs.kept(Path({str(tmp_path)!r}), 3, ['wantrain']):\n"
            "    print('by print'); os.system('echo by another program'); print('an error', file=sys.stderr)\n"
            "print('after')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("after\n", "")
    log = (tmp_path / logs.name_of(3)).read_text()
    assert {"by print", "by another program", "an error"} < set(log.splitlines())


def test_the_run_says_how_much_each_process_did_and_waited(trained):
    run = trained("run")
    row, = json.loads((run / "processes.json").read_text())
    assert row["tokens"] == 4 * 4 * Bucket(5, 32, 48).num_tokens(16)
    assert row["seconds"] > row["waited_for_clips_s"] > 0
    assert row["waited_for_others_s"] == 0


def window(number: int, num_frames: int, side: int) -> PlannedClip:
    clip = Clip(str(number), Path(f"{number}.mp4"), "x", "style")
    return PlannedClip(clip, Bucket(num_frames, side, side), MediaInfo(), 16.0)


def test_windows_are_dealt_to_caching_processes_by_tokens_and_not_by_number():
    windows = [window(0, 81, 64), *(window(i, 5, 64) for i in range(1, 12))]
    entries = {Path(f"{kind} {w.clip.id}"): (kind, w) for w in windows for kind in (LATENTS, "mask")}
    entries |= {Path(f"text {i}"): (TEXT, f"text {i}") for i in range(4)}
    dealt = cache.shares(entries, 16, 2)
    assert {path: entry for share in dealt for path, entry in share.items()} == entries
    held = [{w.clip.id for kind, w in share.values() if kind != TEXT} for share in dealt]
    assert held[0].isdisjoint(held[1])  # a window's latents and mask are decoded once
    tokens = [sum(w.bucket.num_tokens(16) for kind, w in share.values() if kind == LATENTS) for share in dealt]
    assert tokens == [336, 352]
    assert [sum(kind == TEXT for kind, _ in share.values()) for share in dealt] == [2, 2]


def test_every_process_gets_as_many_tokens_in_every_step(arguments, cached):
    """A step is of one bucket, so that no process waits for another that has longer clips."""
    _, clips = opened([*arguments, "data.num_frames=[1,5]", "data.resolutions=[[32,48],[48,32]]"])
    order = train.order_of(clips)
    for step in range(6):
        tokens = [[p.bucket.num_tokens(16) for micro in batches.mine(order, batches.Split(4, 1, 2, i), step)
                   for _, p in micro] for i in range(2)]
        assert tokens[0] == tokens[1]
