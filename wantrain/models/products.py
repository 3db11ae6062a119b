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
    """Linears with one input in common, and one product for the down halves of all their LoRAs."""

    def __init__(self, products: Sequence[Product], dtype: torch.dtype) -> None:
        self.products, self.dtype = products, dtype
        self.linears = [p.linear for p in products]
        self.is_adapted = any(p.rank for p in products)

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
            low = functional.linear(given, self.downs()).flatten(0, -2)
            for number, p, rows in self.halves():
                assert p.up is not None, "a down half has its up half"
                outputs[number].flatten(0, -2).addmm_(low[:, rows], p.up.to(self.dtype).T, alpha=p.scale)
        return outputs

    def backward(self, gradients: Sequence[torch.Tensor], given: torch.Tensor | None, asks_input: bool
                 ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """The gradient for the input (None unless asked for), and for down and up of each product.

        `given` is the input, which only a LoRA needs.
        """
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        weights: list[torch.Tensor | None] = [None] * (2 * len(flat))
        total = quantised.input_gradient(flat, self.linears, self.dtype) if asks_input else None
        if self.is_adapted:
            assert given is not None, "a LoRA's gradient takes its input"
            downs, inputs = self.downs(), given.flatten(0, -2)
            low = functional.linear(inputs, downs)
            low_gradient = torch.empty_like(low)
            for number, p, rows in self.halves():
                assert p.up is not None, "a down half has its up half"
                low_gradient[:, rows] = (flat[number] @ p.up.to(self.dtype)).mul_(p.scale)
                weights[2 * number + 1] = (flat[number].T @ low[:, rows]).mul_(p.scale).to(p.up.dtype)
            of_downs = low_gradient.T @ inputs
            for number, p, rows in self.halves():
                weights[2 * number] = of_downs[rows].to(cast("torch.Tensor", p.down).dtype)
            if total is not None:
                total.addmm_(low_gradient, downs)
        return (None if total is None else total.view(*gradients[0].shape[:-1], -1)), weights
