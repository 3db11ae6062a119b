"""What one block of the transformer keeps for the backward pass, takes while it is computed, and moves.

Counts are of tensors of tokens x width, and of tokens x feed-forward width, as wantrain.models.block makes them: what
is kept follows from what it says, and the rest was counted (tests/memory_oracle.py), which a test does again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tensors:
    """Numbers of tensors of tokens x width and of tokens x feed-forward width."""

    width: float
    feed_forward: float = 0.0

    def __sub__(self, other: Tensors) -> Tensors:
        return Tensors(self.width - other.width, self.feed_forward - other.feed_forward)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one block: `tokens` and `text` (with those of an image) of all rows at once, its widths, bytes of a number,
    and whether its adapter is a LoRA, which wantrain.models.block trains.
    """

    tokens: int
    text: int
    dim: int
    ffn_dim: int
    num_heads: int
    itemsize: int
    is_lora: bool = True

    def nbytes(self, tensors: Tensors) -> float:
        """Bytes of these tensors."""
        return self.tokens * self.itemsize * (tensors.width * self.dim + tensors.feed_forward * self.ffn_dim)


KEPT = {"all": Tensors(8, 1), "attention": Tensors(2), "inputs": Tensors(1)}
"""all: the input, q, k, v, what self-attention answered, the sum after it, q of cross-attention, the sum after that,
the feed-forward's inner values. attention: the input, and what self-attention answered."""

OTHER_KEPT = {"all": Tensors(39.4, 4.04), "inputs": Tensors(1)}
OTHER_WORKING = {"all": Tensors(11.5, 4.61), "inputs": Tensors(54.7, 8.34)}
"""The same for other adapters, which are trained through diffusers' blocks and PEFT: counted for DoRA in bfloat16,
taken for LoHa and LoKr too.
"""

KEEPS = tuple(KEPT)
"""What a block may keep, the fastest first."""

BACKWARD = {2: Tensors(4, 2), 4: Tensors(2, 2)}
"""The most that a block takes while it goes backward, besides what it keeps and computes again, by bytes of a number:
gradients are summed in float32. It is when the feed-forward's inner values are raised again."""

CASTING = {2: 6, 4: 4}
"""Bytes that a weight of fp8 takes while it is cast, by bytes of a number: in float32, and as it will be."""

SLICE = 2048
"""Tokens that a product in bytes takes at once, at the most: in nearly equal parts (wantrain.models.quantised)."""

INT8_SLICE_BYTES = 9
"""Of each of these tokens, and of each number of the widest input or answer: one byte, and two numbers of four."""

MOVED = {"all": Tensors(345, 8), "attention": Tensors(409, 8), "inputs": Tensors(441, 8)}
"""What its elementwise operations read and write, forward and backward."""


def kept_bytes(own: Sizes, keep: str) -> float:
    """From a block's forward to its backward: tensors, and the log-sum-exp of attention."""
    if not own.is_lora:
        return own.nbytes(OTHER_KEPT[keep])
    return own.nbytes(KEPT[keep]) + (4 * own.tokens * own.num_heads if keep != "inputs" else 0)


def text_bytes(own: Sizes) -> float:
    """Keys and values of the text: a block keeps them too, and always on the device."""
    return 2.0 * own.itemsize * own.text * own.dim if own.is_lora else 0.0


def working_bytes(own: Sizes, keep: str, form: str) -> float:
    """The most beyond that while it goes backward; what is computed again is there whole.

    A product in int8 takes its weight turned round, and its sums and answer a slice of tokens at a time. Weights of
    other forms are cast for each product (fp8 on any card, as this does not know which can do without), and both
    moments count: while the largest is cast, by way of a float32 tensor, and after it, with the product's answer.
    """
    if not own.is_lora:
        return own.nbytes(OTHER_WORKING[keep])
    weight, inner, most = own.dim * own.ffn_dim, own.nbytes(Tensors(0, 1)), own.nbytes(BACKWARD[own.itemsize])
    if form == "int8":
        at_once = math.ceil(own.tokens / math.ceil(own.tokens / SLICE))
        most = max(most, most - inner + weight + INT8_SLICE_BYTES * own.ffn_dim * at_once)
    elif form != "dtype":
        casting = CASTING[own.itemsize] if form == "fp8" else 0
        most = max(most, most - inner + own.itemsize * weight, most - 2 * inner + casting * weight)
    return most + own.nbytes(KEPT["all"] - KEPT[keep])


def products_again(own: Sizes, keep: str) -> float:
    """Operations of the products that the backward pass computes again: all but the feed-forward's second."""
    return 0.0 if keep == "all" else 2.0 * own.tokens * own.dim * (6 * own.dim + own.ffn_dim)


def attentions_again(keep: str) -> tuple[int, int]:
    """How often self-attention and cross-attention are computed again."""
    return {"all": (0, 1), "attention": (0, 2), "inputs": (1, 2)}[keep]
