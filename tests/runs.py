"""Trainings in tests: where their launch files are, and what they left."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from wantrain.engine import checkpoint, saved

LAUNCH = Path(__file__).parents[1] / "launch"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in lines(run)]


def numbers(run, key):
    return torch.tensor([line[key] for line in lines(run)])


def state(run):
    """(step, tensors) of the newest checkpoint."""
    progress, tensors = checkpoint.load(saved.steps_on_disk(run / "checkpoints")[-1], None)
    return progress.step, tensors


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_training(one, two, rtol):
    """Losses, gradient norms and AdamW's first moments agree (the moments are sums of gradients, values are not)."""
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(numbers(two, key), numbers(one, key), rtol=rtol, atol=0)
    (step_one, a), (step_two, b) = state(one), state(two)
    assert step_one == step_two == len(lines(one))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        scale = float(tensor.abs().max())
        if name.endswith("|exp_avg"):
            torch.testing.assert_close(b[name], tensor, rtol=0, atol=2e-3 * scale + 1e-9)
