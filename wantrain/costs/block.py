"""What one block of the transformer keeps for the backward pass, and takes while it is computed.

The counts are of tensors of tokens x width, and of tokens x feed-forward width, in the dtype of the computation; they
were found by counting every allocation (tests/memory_oracle.py), which a test does again.
"""

from __future__ import annotations

from dataclasses import dataclass

KEEPS = ("all", "inputs")
"""What a block keeps, the fastest first: all that its backward pass needs; its input, from which it is recomputed."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """Numbers of tensors of tokens x width and of tokens x feed-forward width."""

    width: float
    feed_forward: float

    def nbytes(self, tokens: int, dim: int, ffn_dim: int, itemsize: int) -> int:
        """Bytes of these tensors."""
        return round(tokens * itemsize * (self.width * dim + self.feed_forward * ffn_dim))


KEPT = {"all": Tensors(25.1, 2.04), "inputs": Tensors(1.0, 0.0)}
"""Kept from a block's forward to its backward."""

WORKING = {"all": Tensors(4.9, 3.1), "inputs": Tensors(33.0, 5.15)}
"""The most beyond what all blocks keep, while the last one goes backward."""
