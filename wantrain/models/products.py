"""Frozen Linears with a LoRA on them, multiplied without autograd: forward, and the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional

from wantrain import lora
from wantrain.models import quantised


@dataclass(slots=True)
class Product:
    """A frozen Linear, and the LoRA on it: down [rank, in] and up [out, rank], None where there is none."""

    linear: torch.nn.Linear
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.down is None else len(self.down)


def product_of(layer: torch.nn.Module) -> Product | None:
    """The layer as a Product; None where its adapter is of another kind than a LoRA."""
    if isinstance(layer, torch.nn.Linear):
        return Product(layer)
    pair = lora.pair_of(layer)
    return None if pair is None else Product(*pair)


class Products:
    """Linears with one input in common, and one product for the down halves of all their LoRAs, `low`, which a backward
    pass that follows takes.
    """

    def __init__(self, products: Sequence[Product], dtype: torch.dtype) -> None:
        self.products, self.dtype = products, dtype
        self.linears = [p.linear for p in products]
        self.is_adapted = any(p.rank for p in products)
        self.low: torch.Tensor | None = None

    def downs(self) -> torch.Tensor:
        """The down halves, one under the other, [sum of ranks, in]."""
        own = [p.down.to(self.dtype) for p in self.products if p.down is not None]
        return own[0] if len(own) == 1 else torch.cat(own)

    def halves(self) -> Iterator[tuple[int, Product, slice]]:
        """The adapted products, with their numbers and their rows of `downs`."""
        at = 0
        for number, p in enumerate(self.products):
            if p.rank:
                yield number, p, slice(at, at + p.rank)
            at += p.rank

    def forward(self, given: torch.Tensor) -> list[torch.Tensor]:
        """[..., in] -> [..., out] of each."""
        outputs = quantised.products(given, self.linears, self.dtype)
        if self.is_adapted:
            self.low = functional.linear(given, self.downs()).flatten(0, -2)
            for number, p, rows in self.halves():
                outputs[number].flatten(0, -2).addmm_(self.low[:, rows], up_of(p, self.dtype).T, alpha=p.scale)
        return outputs

    def backward(self, gradients: Sequence[torch.Tensor], given: torch.Tensor | None, asks_input: bool
                 ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """The gradient for the input (None unless asked for), and for down and up of each product.

        `given` is the input, which only a LoRA needs.
        """
        low_gradient = self.low_gradient(gradients)
        total = self.input_gradient(gradients, low_gradient) if asks_input else None
        return total, self.weight_gradients(gradients, low_gradient, given)

    def low_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The gradient for what the down halves answered, [all tokens, sum of ranks]."""
        found = [(gradients[number].flatten(0, -2) @ up_of(p, self.dtype)).mul_(p.scale)
                 for number, p, _ in self.halves()]
        return found[0] if len(found) == 1 else torch.cat(found, 1) if found else None

    def input_gradient(self, gradients: Sequence[torch.Tensor], low_gradient: torch.Tensor | None) -> torch.Tensor:
        """The gradient for the input, [..., in]."""
        total = quantised.input_gradient(gradients, self.linears, self.dtype)
        if low_gradient is not None:
            total.flatten(0, -2).addmm_(low_gradient, self.downs())
        return total

    def weight_gradients(self, gradients: Sequence[torch.Tensor], low_gradient: torch.Tensor | None,
                         given: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradients for down and up of each product."""
        weights: list[torch.Tensor | None] = [None] * (2 * len(self.products))
        if low_gradient is None:
            return weights
        assert given is not None, "a LoRA's gradient takes its input"
        inputs = given.flatten(0, -2)
        low = functional.linear(inputs, self.downs()) if self.low is None else self.low
        of_downs = low_gradient.T @ inputs
        for number, p, rows in self.halves():
            up, flat = cast("torch.Tensor", p.up), gradients[number].flatten(0, -2)
            weights[2 * number + 1] = (flat.T @ low[:, rows]).mul_(p.scale).to(up.dtype)
            weights[2 * number] = of_downs[rows].to(cast("torch.Tensor", p.down).dtype)
        self.low = None
        return weights


def up_of(product: Product, dtype: torch.dtype) -> torch.Tensor:
    """The up half of an adapted product, [out, rank]."""
    assert product.up is not None, "a down half has its up half"
    return product.up.to(dtype)
