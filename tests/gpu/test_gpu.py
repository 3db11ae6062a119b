"""What only a GPU can show. Skipped without one; with --require-gpu a skip is a failure."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_training_on_the_gpu_gives_the_losses_of_the_cpu(wantrain, tmp_path, monkeypatch):
    def losses(run):
        assert wantrain("train", f"run.dir={tmp_path / run}", "model.dtype=float32") == 0
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    on_gpu = losses("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu == pytest.approx(losses("cpu"), rel=1e-3)


def test_bfloat16_trains_and_its_loss_is_near_float32(wantrain, tmp_path):
    def last(dtype):
        run = tmp_path / dtype
        assert wantrain("cache", f"run.dir={run}", f"model.dtype={dtype}") == 0
        assert wantrain("train", f"run.dir={run}", f"model.dtype={dtype}") == 0
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]

    assert last("bfloat16") == pytest.approx(last("float32"), rel=0.02)
