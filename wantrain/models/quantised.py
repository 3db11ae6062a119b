"""Linears of a frozen transformer or encoder in a byte a weight, each row with a scale of its own, or in four bits.

Files that hold such numbers give them as they are, with scales for runs of a row where they have those. A product
multiplies either by what the stored numbers stand for, cast to the dtype of its input, or in bytes (`products`): the
input is put into bytes by rows as the weights are, the product is that of the bytes, and both scales multiply what
comes out. The gradient for the input is computed in the same way: the scales of the weight's rows, over which that
product sums, first go into the gradient. Autograd keeps the stored numbers, which are there anyway, and nothing else.
Embeddings, norms, modulation and the head stay as they are. What the kernels ask for: docs/facts.md, "Products in few
bits".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.nn import functional

from wantrain.models import four_bits

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of the forms of a byte: whole ones, and float8_e4m3fn (4 bits of exponent, 3 of mantissa)."""

NUMBERS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What the bytes of these forms are."""

FILED = {"int8": (torch.int8,), "fp8": (torch.float8_e4m3fn, torch.float8_e5m2)}
"""What a file may hold to be taken as it is."""

SLICE = 2048
"""Rows of an input that are multiplied in bytes at once: what that takes beside the result does not grow with it."""

_LEAST_ROWS = 17
"""torch._int_mm on CUDA takes no fewer."""

_MULTIPLE = 16
"""Of both sizes of a weight: what the kernels of CUDA take."""

_IN_BLOCKS = re.compile(r"((vace_)?blocks|encoder\.block|(vision_model\.)?encoder\.layers)\.\d+\..+")
"""Modules whose Linears are stored so: of the transformer's blocks, of umT5's and of CLIP's."""


def has_products(form: str, device: torch.device) -> bool:
    """Whether the device multiplies bytes of this form: int8 everywhere, fp8 from compute capability 8.9 on."""
    return form == "int8" or (form == "fp8" and device.type == "cuda"
                              and torch.cuda.get_device_capability(device) >= (8, 9))


def by_rows(matrix: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, n] -> numbers of the form, and what a step of each row is, float32 [rows, 1]; the largest of each row is
    exact. A row that is not finite has a scale that is not.
    """
    largest = torch.linalg.vector_norm(matrix, torch.inf, 1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST[form]).clamp_min(torch.finfo(torch.float32).tiny)
    steps = matrix / scale
    return (steps.round_() if form == "int8" else steps).to(NUMBERS[form]), scale


class QuantisedLinear(torch.nn.Linear):
    """A frozen Linear: `weight` holds the bytes as int8, [out, in] or, in nf4, [out, in / 2]; `scale` [out, runs] what
    a step is of each run of a row. Runs are whole rows, but in nf4 and of some files.

    `may_use_bytes`: products may be computed in bytes where the device has them. `relative_error` is the L2 norm of
    what storing changed, over that of the weight.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, form: str, may_use_bytes: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.form, self.may_use_bytes = form, may_use_bytes
        self.number = NUMBERS.get(form, torch.int8)
        self.relative_error = 0.0
        self.register_buffer("scale", torch.ones(out_features, 1), persistent=False)  # no file has it

    @torch.no_grad()
    def store(self, weight: torch.Tensor) -> torch.nn.Parameter:
        """Take the weight, float32 [out, in]; returns the bytes."""
        kept = self.keep(*(four_bits.packed(weight) if self.form == "nf4" else by_rows(weight, self.form)))
        norm = weight.norm()
        self.relative_error = float((self.dequantised(torch.float32) - weight).norm() / norm) if norm else 0.0
        return kept

    def keep(self, numbers: torch.Tensor, scale: torch.Tensor) -> torch.nn.Parameter:
        """Take stored numbers and their scales as they are; returns the bytes."""
        self.number, self.scale = numbers.dtype, scale
        self.weight = kept = torch.nn.Parameter(numbers.view(torch.int8), requires_grad=False)
        return kept

    @property
    def numbers(self) -> torch.Tensor:
        """The stored numbers, [out, in]."""
        return self.weight.view(self.number)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the stored numbers stand for, [out, in] in `dtype`."""
        if self.form == "nf4":
            return four_bits.unpacked(self.weight, self.scale, dtype)
        runs = self.numbers.float().view(*self.scale.shape, -1)
        return runs.mul_(self.scale[..., None]).view(len(runs), -1).to(dtype)

    def uses_bytes(self, device: torch.device) -> bool:
        """Whether its products are computed in bytes."""
        return (self.may_use_bytes and has_products(self.form, device) and self.scale.shape[1] == 1
                and self.number == NUMBERS[self.form]
                and self.in_features % _MULTIPLE == self.out_features % _MULTIPLE == 0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in autocast's dtype where that is on."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return _product(input.to(dtype), self)


class _Product(torch.autograd.Function):
    """What a layer answers; its weight needs no gradient, and nothing is saved that is not there anyway."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        answer, = products(input, [layer], input.dtype)
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return input_gradient(gradients, [ctx.layer], gradients[0].dtype), None


_product = cast("Callable[..., torch.Tensor]", _Product.apply)


def products(given: torch.Tensor, linears: Sequence[torch.nn.Linear], dtype: torch.dtype) -> list[torch.Tensor]:
    """[..., in] of `dtype` -> [..., out] of each frozen Linear, stored in bytes or not."""
    if not _in_bytes(linears, given.device):
        return [functional.linear(given, weight_of(linear, dtype), None if linear.bias is None else
                                  linear.bias.to(dtype)) for linear in linears]
    layers, flat = cast("Sequence[QuantisedLinear]", linears), given.flatten(0, -2)
    outputs = [flat.new_empty(len(flat), layer.out_features) for layer in layers]
    for rows in _slices(len(flat)):
        numbers, scale = by_rows(flat[rows], layers[0].form)
        for layer, output in zip(layers, outputs, strict=True):
            found = _multiplied(numbers, scale, layer.numbers.T, layer.scale.T)
            output[rows] = found if layer.bias is None else found.add_(layer.bias)
            del found
    return [output.view(*given.shape[:-1], -1) for output in outputs]


def input_gradient(gradients: Sequence[torch.Tensor], linears: Sequence[torch.nn.Linear], dtype: torch.dtype
                   ) -> torch.Tensor:
    """[..., out] for what each frozen Linear answered -> the sum of the gradients for their common input, [..., in]."""
    flat = [gradient.flatten(0, -2) for gradient in gradients]
    shape = (*gradients[0].shape[:-1], -1)
    if not _in_bytes(linears, flat[0].device):
        total = flat[0] @ weight_of(linears[0], dtype)
        for linear, gradient in zip(linears[1:], flat[1:], strict=True):
            total.addmm_(gradient, weight_of(linear, dtype))
        return total.view(shape)
    layers = cast("Sequence[QuantisedLinear]", linears)
    total = flat[0].new_empty(len(flat[0]), layers[0].in_features)
    # CUDA's kernels take the second matrix column by column, and these are not stored so.
    weights = [layer.numbers.T.contiguous().T for layer in layers]
    one = torch.ones(1, layers[0].in_features, device=total.device)
    for rows in _slices(len(total)):
        parts = [_multiplied(*by_rows(gradient[rows] * layer.scale.T, layer.form), weight, one)
                 for gradient, layer, weight in zip(flat, layers, weights, strict=True)]
        for part in parts[1:]:
            parts[0] += part
        total[rows] = parts[0]
        del parts
    return total.view(shape)


def weight_of(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a frozen Linear, stored in bytes or not, [out, in]."""
    return linear.dequantised(dtype) if isinstance(linear, QuantisedLinear) else linear.weight.to(dtype)


def _in_bytes(linears: Sequence[torch.nn.Linear], device: torch.device) -> bool:
    return all(isinstance(linear, QuantisedLinear) and linear.uses_bytes(device) for linear in linears)


def _slices(num_rows: int) -> list[slice]:
    """Nearly equal parts of at most SLICE rows."""
    num_parts = max(1, -(-num_rows // SLICE))
    ends = [num_rows * n // num_parts for n in range(num_parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _multiplied(left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor
                ) -> torch.Tensor:
    """(left * left_scale) @ (right * right_scale) of numbers in bytes, with scales [rows, 1] and [1, columns]; float32.
    """
    if left.dtype is torch.int8:
        short = max(0, _LEAST_ROWS - len(left))
        sums = torch._int_mm(functional.pad(left, (0, 0, 0, short)), right)[:len(left)]
        return sums.mul(left_scale).mul_(right_scale)
    # By rows the kernel answers in bfloat16 alone.
    return torch._scaled_mm(left, right, left_scale, right_scale.contiguous(), out_dtype=torch.bfloat16).float()


def quantise(model: torch.nn.Module, form: str, may_use_bytes: bool = False) -> None:
    """Put a QuantisedLinear in the place of every Linear of the model's blocks, which are on the meta device: loading
    fills them (wantrain.models.loading.load_into). To be called under empty_weights(). Without a form nothing changes.
    Raises UserError where the form needs a package that is not here.
    """
    if fault := four_bits.fault(form):
        raise fault
    for name, linear in list(model.named_modules()) if form else ():
        if isinstance(linear, torch.nn.Linear) and _IN_BLOCKS.fullmatch(name):
            model.set_submodule(name, QuantisedLinear(linear.in_features, linear.out_features,
                                                      linear.bias is not None, form, may_use_bytes))


def relative_errors(transformer: torch.nn.Module) -> dict[str, float]:
    """The mean relative error of the stored weights by kind of layer (`blocks.*.attn1.to_q`); {} where none is.

    To be called before an adapter is injected, which renames the layers that it wraps.
    """
    kinds: dict[str, list[float]] = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, QuantisedLinear):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(layer.relative_error)
    return {kind: sum(errors) / len(errors) for kind, errors in kinds.items()}


def told(errors: Mapping[str, float], form: str, device: torch.device) -> str:
    """The errors, and how products are computed, as one printed line."""
    least, most = min(errors, key=lambda kind: errors[kind]), max(errors, key=lambda kind: errors[kind])
    products = f"in {form}" if has_products(form, device) else "with what it stands for, in model.dtype"
    return (f"base stored in {form}: relative error of the weights from {errors[least]:.2%} ({least}) "
            f"to {errors[most]:.2%} ({most}); products {products}")
