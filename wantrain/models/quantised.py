"""Linears of a frozen transformer or encoder in a byte a weight, each row with a scale of its own.

The layer multiplies by what its stored numbers stand for, cast to the dtype of its input, forward and in the gradient
for its input; autograd keeps the stored numbers, which are there anyway, and nothing else. So memory is half of
bfloat16's, and a product costs a cast of its weight more. Embeddings, norms, modulation and the head stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of each form: whole numbers of a byte, and float8_e4m3fn (4 bits of exponent, 3 of mantissa)."""

_IN_BLOCKS = re.compile(r"((vace_)?blocks|encoder\.block|(vision_model\.)?encoder\.layers)\.\d+\..+")
"""Modules whose Linears are stored so: of the transformer's blocks, of umT5's and of CLIP's."""


class QuantisedLinear(torch.nn.Linear):
    """A frozen Linear: `weight` [out, in] holds the bytes as int8, `scale` [out, 1] float32 what a step of each row is.

    `relative_error` is the L2 norm of what storing changed, over that of the weight.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, form: str) -> None:
        super().__init__(in_features, out_features, bias)
        self.form = form
        self.relative_error = 0.0
        self.register_buffer("scale", torch.ones(out_features, 1), persistent=False)  # no file has it

    @torch.no_grad()
    def store(self, weight: torch.Tensor) -> torch.nn.Parameter:
        """Take the weight, float32 [out, in], symmetrically by rows, the largest of each exact; returns the bytes."""
        largest = weight.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest / LARGEST[self.form], torch.ones_like(largest))
        steps = weight / scale
        stored = steps.round().to(torch.int8) if self.form == "int8" else steps.to(torch.float8_e4m3fn).view(torch.int8)
        self.weight = kept = torch.nn.Parameter(stored, requires_grad=False)
        self.scale = scale
        norm = weight.norm()
        self.relative_error = float((self.dequantised(torch.float32) - weight).norm() / norm) if norm else 0.0
        return kept

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the stored numbers stand for, [out, in] in `dtype`."""
        stored = self.weight if self.form == "int8" else self.weight.view(torch.float8_e4m3fn)
        return (stored.float() * self.scale).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in autocast's dtype where that is on."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _product(input.to(dtype), bias, self)


class _Product(torch.autograd.Function):
    """input @ weight.T + bias of a layer, whose weight needs no gradient; nothing is saved that is not there anyway."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(input, layer.dequantised(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, = gradients
        return gradient @ ctx.layer.dequantised(gradient.dtype), None, None


_product = cast("Callable[..., torch.Tensor]", _Product.apply)


def quantise(model: torch.nn.Module, form: str) -> None:
    """Put a QuantisedLinear in the place of every Linear of the model's blocks, which are on the meta device: loading
    fills them (wantrain.models.loading.load_into). To be called under empty_weights(). Without a form nothing changes.
    """
    for name, linear in list(model.named_modules()) if form else ():
        if isinstance(linear, torch.nn.Linear) and _IN_BLOCKS.fullmatch(name):
            model.set_submodule(name, QuantisedLinear(linear.in_features, linear.out_features,
                                                      linear.bias is not None, form))


def relative_errors(transformer: torch.nn.Module) -> dict[str, float]:
    """The mean relative error of the stored weights by kind of layer (`blocks.*.attn1.to_q`); {} where none is.

    To be called before an adapter is injected, which renames the layers that it wraps.
    """
    kinds: dict[str, list[float]] = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, QuantisedLinear):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(layer.relative_error)
    return {kind: sum(errors) / len(errors) for kind, errors in kinds.items()}


def told(errors: Mapping[str, float], form: str) -> str:
    """The errors as one printed line."""
    least, most = min(errors, key=lambda kind: errors[kind]), max(errors, key=lambda kind: errors[kind])
    return (f"base stored in {form}, a byte a weight: relative error of the weights from {errors[least]:.2%} ({least}) "
            f"to {errors[most]:.2%} ({most})")
