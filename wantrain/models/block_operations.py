"""What a transformer block does between its matrix products, without autograd: forward, and the gradient for the input.

Norms, rotary embedding and gates are computed in float32, whatever comes and goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional


def normed(x: torch.Tensor, eps: float, factor: torch.Tensor | None, offset: torch.Tensor | None, dtype: torch.dtype
           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension, times `factor`, plus `offset`; and its mean and 1 / standard deviation.

    `factor` and `offset` broadcast against x; None leaves them out.
    """
    width = x.shape[-1]
    if factor is None or offset is None:
        out, mean, rstd = torch.native_layer_norm(x.float(), [width], None, None, eps)
    elif factor.numel() == width:  # one row for all tokens: fused
        out, mean, rstd = torch.native_layer_norm(x.float(), [width], factor.view(width), offset.view(width), eps)
    else:
        out, mean, rstd = torch.native_layer_norm(x.float(), [width], None, None, eps)
        out = out.mul_(factor).add_(offset)
    return out.to(dtype), mean, rstd


def normed_backward(gradient: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
                    factor: torch.Tensor | None) -> torch.Tensor:
    """float32."""
    width, gradient = x.shape[-1], gradient.float()
    weight = None
    if factor is not None and factor.numel() == width:
        weight = factor.view(width)
    elif factor is not None:
        gradient = gradient * factor
    return torch.ops.aten.native_layer_norm_backward(
        gradient, x.float(), [width], mean, rstd, weight, None, [True, False, False])[0]


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, D] -> [B, L, heads, D / heads]."""
    return x.view(*x.shape[:-1], heads, -1)


def rms_scale(x: torch.Tensor, eps: float | None) -> torch.Tensor:
    """1 / root mean square over the last dimension, kept: [B, L, 1], float32."""
    mean_square = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(torch.finfo(torch.float32).eps if eps is None else eps).rsqrt_()


def in_heads(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor | None, heads: int
             ) -> torch.Tensor:
    """RMSNorm over the width of all heads, then the rotary embedding: [B, L, D] -> [B, L, heads, D / heads], in x's
    dtype.

    `scale` is that of rms_scale. `turns` [1, L, 1, D / heads / 2] complex: what each pair of numbers is multiplied
    with; None turns nothing.
    """
    out = x.float() * weight.float()
    if turns is None:
        return split(out.mul_(scale).to(x.dtype), heads)
    pairs = torch.view_as_complex(split(out, heads).view(*x.shape[:-1], heads, -1, 2))
    pairs.mul_(turns * scale.unsqueeze(-1))
    return split(out.to(x.dtype), heads)


def in_heads_backward(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor,
                      turns: torch.Tensor | None) -> torch.Tensor:
    """The gradient for x, in x's dtype."""
    wide = x.float()
    if turns is None:
        back = (gradient.flatten(-2) * weight.float()).mul_(scale)
    else:
        pairs = torch.view_as_complex(gradient.float().reshape(*gradient.shape[:-1], -1, 2))
        back = torch.view_as_real(pairs * (turns.conj() * scale.unsqueeze(-1))).flatten(-3).mul_(weight.float())
    along = torch.einsum("bld,bld->bl", back, wide).unsqueeze(-1)
    return back.addcmul_(wide, along * scale.square() / x.shape[-1], value=-1).to(x.dtype)


def gated(x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + out * gate, computed in float32, in x's dtype."""
    return torch.addcmul(x.float(), out.float(), gate).to(x.dtype)


TANH_SCALE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
"""GELU's approximation by tanh is x * sigmoid(TANH_SCALE * (x + CUBIC * x^3))."""

_PART = 2 ** 16
"""Numbers that go through all operations of a GELU before the next ones do: on a CPU they stay in its cache."""


def _goes_in_parts(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def gelu_backward(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU (tanh) of x again, and the gradient for x, from one sigmoid. It takes the memory of `gradient`, that for the
    GELU's answer, which is lost.
    """
    if not _goes_in_parts(x):
        torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=gradient)
        return functional.gelu(x, approximate="tanh"), gradient
    raised, one, zero = torch.empty_like(x), torch.ones(()), torch.zeros(())
    sigmoids, slopes = torch.empty(2, min(_PART, x.numel()))  # one memory for all parts
    for part, out, given in zip(*(torch.split(t.view(-1), _PART) for t in (x, raised, gradient)), strict=True):
        wide, sigmoid, slope = part.float(), sigmoids[:len(part)], slopes[:len(part)]
        torch.addcmul(one, wide, wide, value=CUBIC, out=sigmoid)
        torch.addcmul(zero, wide, sigmoid, value=TANH_SCALE, out=sigmoid).sigmoid_()
        torch.addcmul(one, wide, wide, value=3 * CUBIC, out=slope)
        own = torch.mul(wide, sigmoid, out=out if out.dtype == wide.dtype else wide)
        torch.addcmul(zero, own, slope, value=TANH_SCALE, out=slope)
        given.mul_(torch.lerp(slope, one, sigmoid, out=slope))
        out.copy_(own)
    return raised, gradient


@dataclass(frozen=True, slots=True)
class Operations:
    """The functions of this module by name, as they are or compiled (wantrain.models.compiled)."""

    normed: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    normed_backward: Callable[..., torch.Tensor]
    rms_scale: Callable[..., torch.Tensor]
    in_heads: Callable[..., torch.Tensor]
    in_heads_backward: Callable[..., torch.Tensor]
    gated: Callable[..., torch.Tensor]
    gelu_backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]


EAGER = Operations(normed, normed_backward, rms_scale, in_heads, in_heads_backward, gated, gelu_backward)


class _Entry(torch.autograd.Function):
    """A tensor as the start of a graph that does not hold it: `anchor` is there to need a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class Attention:
    """Attention of any back end with its graph, which keeps what its backward pass needs except q, k and v: these are
    handed to `backward` again. `output` [B, L, D] and `kept` may be taken away meanwhile, and given back.
    """

    def __init__(self, qkv: Sequence[torch.Tensor], attend: Callable[..., torch.Tensor]) -> None:
        self.kept: list[torch.Tensor] = []
        self._again: list[torch.Tensor] = []
        storages, dtype = [tensor.untyped_storage()._cdata for tensor in qkv], qkv[0].dtype

        def pack(saved: torch.Tensor) -> tuple[Any, ...]:
            for number, storage in enumerate(storages):
                if saved.untyped_storage()._cdata == storage and saved.dtype == dtype:
                    return number, saved.size(), saved.stride(), saved.storage_offset()
            self.kept.append(saved)
            return (len(self.kept) - 1,)

        def unpack(place: tuple[Any, ...]) -> torch.Tensor:
            number, *where = place
            return self._again[number].as_strided(*where) if where else self.kept[number]

        anchor = torch.zeros((), requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            entries = [_entry(tensor, anchor) for tensor in qkv]
            self._inputs = [torch.autograd.graph.get_gradient_edge(entry) for entry in entries]
            result = attend(*entries)
        self._result, self._shape = torch.autograd.graph.get_gradient_edge(result), result.shape
        self.output = result.detach().flatten(2)

    def backward(self, gradient: torch.Tensor, qkv: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gradients for q, k and v, which are given again as they were. To be called once."""
        self._again = list(qkv)
        given = torch.autograd.grad(self._result, self._inputs, gradient.view(self._shape))
        self._again, self.kept = [], []
        return given


_entry = cast("Callable[..., torch.Tensor]", _Entry.apply)
