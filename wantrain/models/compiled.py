"""The operations of wantrain.models.block_operations as kernels that torch compiles: each goes over memory once.

The block's own backward pass stays as it is, so policies, swap and offload are the same with it. A kernel is compiled
for every size of clips (`dynamic=False`): so an operation gives equal numbers whenever it is called for a size, and
what is computed again equals what was there. inductor knows no complex numbers: the rotary embedding is in real ones.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from wantrain.models import block_operations as eager
from wantrain.models.block_operations import CUBIC, EAGER, TANH_SCALE, Operations

MOST_SIZES = 64
"""Sizes that one operation is compiled for; further ones are computed as without a compiler."""


@functools.cache
def operations_for(device: torch.device) -> tuple[Operations, str]:
    """Compiled operations where the device has triton and it works, else those that are not; and which, in words."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return EAGER, "no"
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except RuntimeError as error:  # no triton, or no C compiler, which it needs
        return EAGER, f"no: {str(error).strip().partition(chr(10))[0]}"
    return compiled(), f"elementwise operations, for at most {MOST_SIZES} sizes of clips"


class Count:
    """Counts what is compiled while a training steps."""

    def __init__(self) -> None:
        self._known = _num_kernels()

    def news(self) -> str:
        """What was compiled since the last call; "" where nothing was."""
        before, self._known = self._known, _num_kernels()
        new = self._known - before
        return f"compiled {new} kernels for a new size of clips, {self._known} in all" if new else ""


def _num_kernels() -> int:
    own = sys.modules.get("torch._dynamo.utils")  # which takes seconds to import, and is not there where nothing is
    return int(own.counters["stats"]["unique_graphs"]) if own else 0


@functools.cache
def compiled() -> Operations:
    """All operations compiled, each when it is first called for a size."""
    torch._dynamo.config.recompile_limit = MOST_SIZES
    torch._dynamo.config.accumulated_recompile_limit = 16 * MOST_SIZES
    compile_: Any = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    heads, heads_backward = compile_(_in_heads), compile_(_in_heads_backward)
    return Operations(
        compile_(eager.normed), compile_(eager.normed_backward), compile_(eager.rms_scale),
        lambda x, scale, weight, turns, num: heads(x, scale, weight, _real(turns), num),
        lambda gradient, x, scale, weight, turns: heads_backward(gradient, x, scale, weight, _real(turns)),
        compile_(eager.gated), compile_(_gelu_backward))


def _real(turns: torch.Tensor | None) -> torch.Tensor | None:
    return None if turns is None else torch.view_as_real(turns)


def _turned(x: torch.Tensor, turns: torch.Tensor, sign: float) -> torch.Tensor:
    """[B, L, heads, D / heads], each pair multiplied with that of `turns` [1, L, 1, D / heads / 2, 2], or backward."""
    (a, b), (cos, sin) = x.view(*x.shape[:-1], -1, 2).unbind(-1), turns.unbind(-1)
    sin = sign * sin
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _in_heads(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor | None, heads: int
              ) -> torch.Tensor:
    out = eager.split(x.float() * weight.float() * scale, heads)
    return (out if turns is None else _turned(out, turns, 1)).to(x.dtype)


def _in_heads_backward(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor,
                       turns: torch.Tensor | None) -> torch.Tensor:
    wide, back = x.float(), gradient.float()
    back = (back if turns is None else _turned(back, turns, -1)).flatten(-2) * weight.float() * scale
    along = (back * wide).mean(-1, keepdim=True) * scale.square()
    return (back - wide * along).to(x.dtype)


def _gelu_backward(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    squares = CUBIC * wide * wide
    sigmoid = torch.sigmoid(TANH_SCALE * wide * (1 + squares))
    raised = wide * sigmoid
    slope = sigmoid + raised * (1 - sigmoid) * TANH_SCALE * (1 + 3 * squares)
    return raised.to(x.dtype), gradient.mul_(slope)
