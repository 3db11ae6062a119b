"""launch/slurm.sh with stand-ins for Slurm's commands: codes, requeueing, two processes that train as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import arguments_for
from tests.runs import LAUNCH, numbers, state
from wantrain.engine import saved

STEPS = 24

SRUN_STAND_IN = f"""#!{sys.executable}
# A stand-in for srun: SLURM_NTASKS copies of the command. It passes on no signals; as real srun did with
# --kill-on-bad-exit=1, it sends SIGTERM to the others when one ends with a code that is not 0. Its code is the largest.
import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}},
                          start_new_session=True)
         for i in range(int(os.environ["SLURM_NTASKS"]))]
with open(os.environ["PIDS"], "w") as file:
    print(*(task.pid for task in tasks), file=file)
has_ended_all = False
while any(task.poll() is None for task in tasks):
    time.sleep(0.02)
    if not has_ended_all and any(task.poll() for task in tasks):
        has_ended_all = True
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGTERM)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""

SCONTROL_STAND_IN = """#!/bin/sh
# A stand-in for scontrol: knows the hosts, and notes a requeue.
case $1 in
    show) echo localhost ;;
    requeue) echo "$*" >> "$REQUEUED" ;;
esac
"""

SLOW_FSYNC = """
import os, time
if os.environ.get("RANK") == "0":
    fsync = os.fsync
    def slow(file):
        if "training.safetensors" in os.readlink(f"/proc/self/fd/{file}"):
            time.sleep(8)
        return fsync(file)
    os.fsync = slow
"""


class Job:
    """A job under the stand-ins, in a folder of its own."""

    def __init__(self, folder: Path, port: int, *arguments: str, **env: str) -> None:
        self.folder, self.arguments = folder, arguments
        commands = folder / "bin"
        commands.mkdir()
        for name, text in (("srun", SRUN_STAND_IN), ("scontrol", SCONTROL_STAND_IN)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.pids, self._requeued = folder / "pids", folder / "requeued"
        self._env = {**os.environ, "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                     "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parent), "PIDS": str(self.pids),
                     "REQUEUED": str(self._requeued), "SLURM_JOB_ID": str(port - 20000), "SLURM_NTASKS": "2",
                     "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", **env}

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "output.txt").open("ab") as file:
            return subprocess.Popen(["bash", str(LAUNCH / "slurm.sh"), *self.arguments], stdout=file,
                                    stderr=subprocess.STDOUT, env=self._env, cwd=self.folder)

    def signal(self, number: int) -> None:
        """To all processes of its tasks, as Slurm's --signal does; the script and srun get none."""
        for pid in self.pids.read_text().split():
            os.killpg(int(pid), number)

    @property
    def requeued(self) -> list[str]:
        return self._requeued.read_text().splitlines() if self._requeued.exists() else []

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()[-4000:]

    @property
    def checkpoints(self) -> list[Path]:
        return saved.steps_on_disk(self.folder / "run" / "checkpoints")


@pytest.fixture(scope="module")
def training(clips, cache_dir, cached, tmp_path_factory) -> Callable[..., Job]:
    """training(overrides..., ENV=...) -> the job of a small training."""

    def call(*overrides: str, **env: str) -> Job:
        folder = tmp_path_factory.mktemp("job")
        return Job(folder, 20000 + (os.getpid() + len(list(folder.parent.iterdir()))) % 10000, "train",
                   *arguments_for(clips, cache_dir, folder / "run"), "train.micro_batch_size=2",
                   f"train.num_steps={STEPS}", "train.save_every=2", *overrides, **env)

    return call


@pytest.fixture(scope="module")
def undisturbed(training) -> Job:
    job = training()
    assert job.start().wait(240) == 0, job.output
    return job


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the job is over already"
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.long
def test_two_tasks_train_as_one_process_does(undisturbed, launched):
    run, alone = undisturbed.folder / "run", launched(None)
    assert json.loads((run / "run.json").read_text())["num_processes"] == 2
    assert undisturbed.requeued == []
    for key in ("loss", "grad_norm"):
        one = numbers(alone, key)
        torch.testing.assert_close(numbers(run, key)[: len(one)], one, rtol=2e-5, atol=0)


@pytest.mark.slow
@pytest.mark.long
def test_the_warning_saves_and_requeues_and_the_next_run_ends_bitwise(undisturbed, training):
    job = training()
    process = job.start()
    wait_until(lambda: job.checkpoints, process)
    job.signal(signal.SIGUSR1)
    assert process.wait(60) == 130, job.output
    assert job.requeued == [f"requeue {job._env['SLURM_JOB_ID']}"]
    stopped_after = saved.step_of(job.checkpoints[-1].name)
    assert f"stopped after step {stopped_after};" in job.output
    assert stopped_after < STEPS
    assert job.start().wait(240) == 0, job.output
    assert len(job.requeued) == 1
    assert json.loads((job.folder / "run" / "run.json").read_text())["start_step"] == stopped_after
    (step, a), (whole_step, b) = state(job.folder / "run"), state(undisturbed.folder / "run")
    assert step == whole_step == STEPS
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.long
def test_the_last_checkpoint_is_whole_before_any_process_leaves(training, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_FSYNC)
    job = training("train.num_steps=1000000", "train.save_every=1000000",
                   PYTHONPATH=f"{tmp_path}:{LAUNCH.parent}")
    process = job.start()
    metrics = job.folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text(), process)
    job.signal(signal.SIGUSR1)
    assert process.wait(60) == 130, job.output
    assert job.requeued
    assert job.checkpoints, job.output


@pytest.mark.parametrize(("first", "second", "code", "requeues"), [
    ("kill -USR1 $$", "kill -USR1 $$", 138, True),  # before the first step there is no handler, and nothing to lose
    ("exit 2", "exec sleep 60", 2, False),
    ("exec sleep 60", "exit 2", 2, False),
    ("sleep 0.2; exit 75", "exit 2", 2, False),  # who loses a process to a fault takes it for gone
    ("trap 'exit 75' TERM; sleep 60 & wait", "exit 1", 1, False),
    ("exec sleep 60", "exit 130", 130, True),
    ("exec sleep 60", "exit 75", 75, True),
    ("exec sleep 60", "kill -KILL $$", 137, True),
    ("kill -TERM $$", "kill -TERM $$", 143, True),
    ("exit 0", "exit 0", 0, False),
])
def test_one_code_of_two_tasks(tmp_path, first, second, code, requeues):
    """With a shell in python's place."""
    job = Job(tmp_path, 20001, "train")
    (tmp_path / "bin" / "python").write_text(f"#!/bin/bash\nif [ $RANK = 0 ]; then {first}; else {second}; fi\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    assert job.start().wait(60) == code, job.output
    assert job.requeued == ["requeue 1"] * requeues


def test_a_fault_of_the_config_is_not_requeued(tmp_path):
    job = Job(tmp_path, 20001, "train", "recipe=demo_anime", f"run.dir={tmp_path / 'run'}", "optim.lr=-1")
    assert job.start().wait(60) == 2, job.output
    assert "optim.lr" in job.output
    assert job.requeued == []
