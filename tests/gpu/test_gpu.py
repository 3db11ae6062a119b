"""What only a GPU can show. Skipped without one; with --require-gpu a skip is a failure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import opened
from tests.runs import LAUNCH
from tests.tiny_tasks import write_a14b
from wantrain.engine import checkpoint, saved
from wantrain.models import fit
from wantrain.recipe import passing
from wantrain.recipe.live import open_live
from wantrain.recipe.samples import Cached, prepare_texts
from wantrain.recipe.training import prepare

pytestmark = pytest.mark.gpu


def test_training_on_the_gpu_gives_the_losses_of_the_cpu(wantrain, tmp_path, monkeypatch):
    def losses(run):
        assert wantrain("train", f"run.dir={tmp_path / run}", "model.dtype=float32") == 0
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    on_gpu = losses("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu == pytest.approx(losses("cpu"), rel=1e-3)


@pytest.mark.parametrize("setting", ["keep=attention", "keep=inputs", "swap=3", "offload=true"])
def test_how_memory_is_saved_changes_no_number(wantrain, tmp_path, setting):
    def losses(run, *more):
        assert wantrain("train", f"run.dir={tmp_path / run}", "model.dtype=float32", *more) == 0
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    plain = losses("plain", "memory.keep=all", "memory.swap=0", "memory.offload=false")
    assert losses("spared", f"memory.{setting}") == plain


def test_bfloat16_trains_and_its_loss_is_near_float32(wantrain, tmp_path):
    def last(dtype):
        run = tmp_path / dtype
        assert wantrain("cache", f"run.dir={run}", f"model.dtype={dtype}") == 0
        assert wantrain("train", f"run.dir={run}", f"model.dtype={dtype}") == 0
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]

    assert last("bfloat16") == pytest.approx(last("float32"), rel=0.02)


@pytest.mark.parametrize("file", ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_two_gpus_train_as_one_does_and_resume_bitwise(arguments, cached, tmp_path, file):
    """Every launch file over NCCL; launch/fsdp2.yaml has no other test that starts it as it is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def train(run, *more, launch=()):
        command = [sys.executable, *launch, "-m", "wantrain", "train", *arguments, f"run.dir={tmp_path / run}",
                   "model.dtype=float32", "train.micro_batch_size=2", *more]
        subprocess.run(command, check=True, timeout=600)
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        progress, tensors = checkpoint.load(saved.steps_on_disk(tmp_path / run / "checkpoints")[-1], None)
        return progress.step, [json.loads(line)["loss"] for line in lines], tensors

    launch = ("-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{file}.yaml"))
    whole = train("whole", launch=launch)
    assert whole[1] == pytest.approx(train("alone")[1], rel=1e-3)
    train("parts", "train.num_steps=2", launch=launch)
    parts = train("parts", launch=launch)
    assert (whole[0], whole[1]) == (parts[0], parts[1])
    assert all(torch.equal(tensor, parts[2][name]) for name, tensor in whole[2].items())


def test_an_expert_that_waits_in_host_memory_for_the_other_comes_back_to_the_same_memory(
        arguments, cached, tmp_path, monkeypatch):
    """Where the device has no room for both: its bits, and the bytes that the device holds, are as before."""
    own = [*arguments, "model.variant=tiny_wan_a14b", f"model.path={write_a14b(tmp_path / 'a14b')}"]
    recipe, clips = opened(own)
    prepare_texts(recipe, clips, torch.device("cuda"))
    training = prepare(recipe.trainings()[0], clips)
    sampling = open_live(training, Cached(clips))
    before = {name: p.detach().cpu().clone() for name, p in training.model.named_parameters()}
    seen = []
    monkeypatch.setattr(passing, "free_bytes", lambda *_: 0.0)
    monkeypatch.setattr(passing.fit, "fit", lambda *given, fit=fit.fit, **more: (
        seen.append({p.device.type for p in training.model.parameters() if not p.requires_grad}), fit(*given, **more)))
    sampling.sample(1)
    held = torch.cuda.memory_allocated()
    assert "no samples" not in sampling.sample(2)
    assert seen == [{"cpu"}] * 3  # base and step 1, and step 2
    assert torch.cuda.memory_allocated() == held
    assert all(torch.equal(p.detach().cpu(), before[name]) and p.is_cuda
               for name, p in training.model.named_parameters())
