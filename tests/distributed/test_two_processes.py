"""Two real processes over gloo, started from the launch files, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import arguments_for
from tests.parity.test_experts import write_a14b
from wantrain.engine import checkpoint

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 4


@pytest.fixture(scope="module")
def launched(clips, cache_dir, cached, tmp_path_factory):
    """launched("ddp", overrides...) -> run folder after a training started with launch/ddp.yaml (None: no launcher)."""
    root = tmp_path_factory.mktemp("launched")

    def call(file, *overrides, run=None, verb="train"):
        run_dir = root / (run or f"{file}_{len(list(root.iterdir()))}")
        launcher = [] if file is None else ["-m", "accelerate.commands.launch", "--config_file",
                                            str(LAUNCH / f"{file}.yaml")]
        command = [sys.executable, *launcher, "-m", "wantrain", verb, *arguments_for(clips, cache_dir, run_dir),
                   "train.micro_batch_size=2", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return run_dir

    return call


@pytest.fixture(scope="module")
def alone(launched):
    return launched(None)


def numbers(run, key):
    return torch.tensor([json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines()])


def final(run):
    progress, tensors = checkpoint.load(checkpoint.steps_on_disk(run / "checkpoints")[-1], None)
    return progress.step, tensors


def assert_same_training(one, two, rtol):
    """Losses, gradient norms and AdamW's first moments agree (the moments are sums of gradients, values are not)."""
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(numbers(two, key), numbers(one, key), rtol=rtol, atol=0)
    (step_one, a), (step_two, b) = final(one), final(two)
    assert step_one == step_two == STEPS
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        scale = float(tensor.abs().max())
        if name.endswith("|exp_avg"):
            torch.testing.assert_close(b[name], tensor, rtol=0, atol=2e-3 * scale + 1e-9)


@pytest.mark.parametrize("file", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does_and_resume_in_one(launched, alone, file):
    """Steps 1 and 2 under two processes, 3 and 4 in one that goes on from their checkpoint."""
    parts = launched(file, "train.num_steps=2", run=f"{file}_parts")
    header = json.loads((parts / "run.json").read_text())
    assert header["num_processes"] == 2
    assert header["engine"] == {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED"}[file]
    launched(None, run=parts.name)
    assert json.loads((parts / "run.json").read_text())["start_step"] == 2
    assert_same_training(alone, parts, rtol=2e-5)


@pytest.mark.slow
def test_zero3_trains_as_one_process_does(launched, alone):
    assert_same_training(alone, launched("zero3"), rtol=2e-4)


@pytest.fixture(scope="module")
def forked(forker, clips, cache_dir, cached, tmp_path_factory):
    """forked("ZeRO-2", overrides...) -> run folder after a training under that engine (None: one process)."""
    root = tmp_path_factory.mktemp("forked")

    def call(engine, *overrides, verb="train"):
        run_dir = root / f"run_{len(list(root.glob('*.log')))}"
        forker.run([verb, *arguments_for(clips, cache_dir, run_dir), "train.micro_batch_size=2", *overrides],
                   run_dir.with_suffix(".log"), 2 if engine else 1, engine)
        return run_dir

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rtol"), [("DDP", 2e-5), ("ZeRO-3", 2e-4)])
def test_the_base_answers_in_two_processes_as_in_one(forked, engine, rtol):
    """The plain clips are preserved and one clip has class words: some processes have nothing to ask in some steps."""
    own = ["data.sources.regularisation.preserve=true", "data.trigger=number 1", "loss.class_words=shape",
           "optim.lr=0.02"]
    forked(None, *own, verb="cache")
    assert_same_training(forked(None, *own), forked(engine, *own), rtol)


@pytest.mark.slow
def test_two_processes_build_the_cache_that_one_builds(launched, cache_dir, tmp_path):
    launched("ddp", f"data.cache_dir={tmp_path}", verb="cache")

    def entries(folder):
        files = [p for kind in ("latents", "text") for p in (folder / kind).rglob("*.safetensors")]
        return {p.relative_to(folder): p.read_bytes() for p in files}

    own, other = entries(tmp_path), entries(cache_dir)
    assert len(own) == 10 + 11
    assert own == {name: other[name] for name in own}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2", "ZeRO-3"])
def test_both_experts_train_one_after_the_other(forked, tmp_path, engine):
    """A second engine in the same processes: the same numbers as from one process."""
    own = ["model.variant=tiny_wan_a14b", f"model.path={write_a14b(tmp_path)}"]
    one, two = forked(None, *own), forked(engine, *own)
    for expert in ("high", "low"):
        assert_same_training(one / expert, two / expert, rtol=2e-5)
