"""What one of two processes meets, both hear of: a loss that is not finite, another config, a damaged file, a stall.

Plain subprocesses with environment variables, over gloo. The script is `wantrain` with faults that the test asks for.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import arguments_for, opened
from wantrain.data.cache import LATENTS
from wantrain.engine import checkpoint, saved
from wantrain.terms import EXIT_STALLED, EXIT_USER_ERROR

pytestmark = pytest.mark.slow

DRIVER = """
import math, os, sys, time
import torch
from wantrain import cli
from wantrain.recipe.training import Training
from wantrain.stages import train

plain, make = Training.losses, train.batch_maker

def poisoned(training, batch):  # of one sample, which one process alone has
    bad = [training.progress.step == 1 and place == 3 for place in batch.index_B]
    return plain(training, batch) * torch.tensor([math.nan if b else 1.0 for b in bad])

def slow(training, source, start):
    made = make(training, source, start)
    late = training.accelerator.process_index == 1
    return lambda step: (time.sleep(2 * late), made(step))[1]

if __name__ == "__main__":
    if "poisoned" in sys.argv[1]:
        Training.losses = poisoned
    if "slow" in sys.argv[1]:
        train.batch_maker = slow
    sys.exit(cli.main(sys.argv[2:]))
"""
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


SKIP = "train.on_nonfinite=skip"


def driven(folder, fault, *arguments, **environment):
    """A process of wantrain with that fault, whose script is put into the folder."""
    (folder / "driver.py").write_text(DRIVER)
    return subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), fault, "train", *arguments, "train.micro_batch_size=2"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                "PYTHONPATH": os.pathsep.join(sys.path), **environment})


@pytest.fixture
def started(clips, cache_dir, cached, tmp_path):
    """started("fault", overrides of process 0, overrides of process 1) -> the two processes."""
    alive = []

    def call(fault, *overrides, engine=None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        for rank, more in enumerate(overrides):
            alive.append(driven(tmp_path, fault, *arguments_for(clips, cache_dir, tmp_path / "run"), *more,
                                RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                                WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **(engine or {})))
        return alive[-len(overrides):]

    yield call
    for process in alive:
        process.kill()
        process.wait()


def ended(processes):
    """[(exit code, what it said)]."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def one_with_a_skip(clips, cache_dir, cached, tmp_path_factory):
    """The run folder of one process alone that leaves the update out."""
    folder = tmp_path_factory.mktemp("alone")
    (code, said), = ended([driven(folder, "poisoned", *arguments_for(clips, cache_dir, folder / "run"), SKIP)])
    assert code == 0, said
    return folder / "run"


@pytest.mark.parametrize("engine", [None, ZERO2], ids=["DDP", "ZeRO-2"])
def test_a_loss_that_is_not_finite_in_one_process_leaves_the_update_out_in_both(started, one_with_a_skip, tmp_path,
                                                                                engine):
    assert [code for code, _ in ended(started("poisoned", [SKIP], [SKIP], engine=engine))] == [0, 0]
    (one, a), (two, b) = (checkpoint.load(run / "checkpoints" / "step_000004", None)
                          for run in (one_with_a_skip, tmp_path / "run"))
    assert (one.skipped, two.skipped) == (1, 1)
    for name, tensor in a.items():
        if name.endswith("|exp_avg"):
            torch.testing.assert_close(b[name], tensor, rtol=0, atol=2e-3 * float(tensor.abs().max()) + 1e-9)
    notes = [json.loads((tmp_path / "run" / f"nonfinite_000002_process_{i}.json").read_text()) for i in range(2)]
    assert [note["losses"].count("nan") for note in notes] == [0, 1]


def test_a_loss_that_is_not_finite_in_one_process_stops_both(started, tmp_path):
    found = ended(started("poisoned", [], []))
    assert [code for code, _ in found] == [EXIT_USER_ERROR] * 2
    assert all("step 2: the loss is not finite" in said for _, said in found)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_process_with_another_config_is_named_with_the_key(started):
    found = ended(started("none", [], ["optim.lr=0.5"]))
    assert [code for code, _ in found] == [EXIT_USER_ERROR] * 2
    assert all("process 1 on" in said and "optim.lr: 0.002 -> 0.5" in said for _, said in found), found


def test_a_fault_of_one_process_ends_the_other_at_once(started, clips, cache_dir, arguments):
    """A damaged entry that process 1 alone reads: it says so, and process 0 does not wait for the time limit."""
    _, clips = opened(arguments)
    path = clips.cache.path_of((LATENTS, next(p for p in clips.planned if p.clip.source == "style")))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        began = time.monotonic()
        found = ended(started("none", ["data.batch_size=16"], ["data.batch_size=16"]))
    finally:
        path.write_bytes(whole)
    assert time.monotonic() - began < 120  # with the imports, on a busy machine
    codes = sorted(code for code, _ in found)
    assert codes in ([EXIT_USER_ERROR, EXIT_STALLED], [EXIT_USER_ERROR] * 2)  # both may read it
    assert any("is damaged" in said for _, said in found)


def test_a_process_that_stands_still_is_named_and_the_run_goes_on_later(started, tmp_path):
    endless = ["train.num_steps=100000", "train.save_every=1", "train.stall_timeout_s=3"]
    first, second = started("none", endless, endless)
    while first.poll() is None and not (tmp_path / "run" / "checkpoints" / "step_000003").exists():
        time.sleep(0.05)
    second.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    (code, said), = ended([first])
    assert time.monotonic() - began < 15
    assert code == EXIT_STALLED
    assert f"(pid {second.pid}) is gone, or did not come within 3 s" in said
    second.send_signal(signal.SIGCONT)
    (code, said), = ended([second])
    assert (code, "error in process 1" in said) == (EXIT_STALLED, True)
    newest = checkpoint.newest_whole(saved.CheckpointStore(tmp_path / "run" / "checkpoints"), None)
    last = [f"train.num_steps={newest.progress.step + 1}"]
    assert [code for code, _ in ended(started("none", last, last))] == [0, 0]


def test_what_each_process_waited_for_is_told(started, tmp_path):
    assert [code for code, _ in ended(started("slow", [], []))] == [0, 0]
    first, second = json.loads((tmp_path / "run" / "processes.json").read_text())
    assert second["waited_for_clips_s"] > 3 > first["waited_for_clips_s"]
    assert first["waited_for_others_s"] > 3 > second["waited_for_others_s"]
    assert first["tokens"] == second["tokens"]
