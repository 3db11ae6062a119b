"""What a device reaches, measured in some seconds: products, attention, elementwise traffic, copies from the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from wantrain.models import attention
from wantrain.models.copies import copies_of

SHAPE = (8192, 5120, 24)
"""Tokens, width and heads of what is multiplied and attended to: about a block of a 14B."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second: operations of products in bfloat16 and of attention forward and backward, bytes that elementwise
    operations read and write, bytes that arrive from page-locked host memory.
    """

    products: float
    attention: float
    attention_backward: float
    memory: float
    slot: float


def calibrate(device: torch.device, seconds: float = 20.0, shape: tuple[int, int, int] = SHAPE) -> Rates:
    """The rates of a device, each measured for a fifth of the time."""
    tokens, width, heads = shape
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight, out = torch.randn(width, width, device=device, dtype=torch.bfloat16), torch.empty_like(x)
    name = attention.best(device, lambda: x[:attention.TRIED_TOKENS].view(1, -1, heads, width // heads))
    qkv = [x.clone().view(1, tokens, heads, -1).requires_grad_() for _ in range(3)]
    copies, host = copies_of(device), copies_of(device).host(x.nbytes)
    arrived = torch.empty_like(host, device=device)

    def attended() -> torch.Tensor:
        return attention.attend(name, *qkv)

    def rate(work: Callable[[], object], amount: float) -> float:
        return amount / _seconds(device, work, seconds / 5)

    operations = 4.0 * tokens * tokens * width
    forward = _seconds(device, attended, seconds / 10)
    both = _seconds(device, lambda: torch.autograd.grad(attended(), qkv, qkv[0]), seconds / 5)
    return Rates(rate(lambda: functional.linear(x, weight), 2.0 * tokens * width * width),
                 operations / forward, 2.5 * operations / max(both - forward, 1e-9),
                 rate(lambda: torch.mul(x, x, out=out), 2.0 * x.nbytes),
                 rate(lambda: copies.wait(copies.start(arrived, host)), float(x.nbytes)))


def _seconds(device: torch.device, work: Callable[[], object], limit_s: float) -> float:
    """The median of as many calls as fit, at least three, after one that does not count."""
    taken: list[float] = []
    work()
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < limit_s:
        start = _now(device)
        work()
        taken.append(_now(device) - start)
    return statistics.median(taken)


def _now(device: torch.device) -> float:
    """The clock, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
