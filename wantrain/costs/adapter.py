"""How many numbers an adapter has, and its optimizer keeps: arithmetic over the Linears that it is on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wantrain.models import inventory
from wantrain.models.variants import Architecture
from wantrain.targets import matched, matching

STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "prodigy": 16.0, "schedule_free": 8.0}
"""Bytes of the optimizer's own for each trainable number: two moments; two of a byte, with a scale for 256 of them;
two moments, the start and a sum; a moment and a second point."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """lora.targets, kind and rank of an adapter, its optimizer, and whether an average is kept."""

    targets: tuple[str, ...]
    rank: int
    kind: str = "lora"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    optimizer: str = "adamw"
    has_average: bool = False

    def ranks(self, architecture: Architecture) -> dict[str, int]:
        """The rank of each adapted module by name. Raises UserError where a pattern matches nothing."""
        names = matched(list(inventory.linears(architecture)), self.targets)
        ranks = dict.fromkeys(names, self.rank)
        for target, rank in self.rank_pattern:
            ranks |= dict.fromkeys(matching(names, target, "lora.rank_pattern"), rank)
        return ranks

    def num_parameters(self, architecture: Architecture) -> int:
        """Trainable numbers."""
        linears = inventory.linears(architecture)
        return sum(numbers_of(self.kind, *linears[name], rank) for name, rank in self.ranks(architecture).items())


def numbers_of(kind: str, inputs: int, outputs: int, rank: int) -> int:
    """Trainable numbers of one module's adapter, as PEFT makes it."""
    pair = rank * (inputs + outputs)
    if kind == "lokr":
        (out_l, out_k), (in_l, in_k) = _factors(outputs), _factors(inputs)
        second = rank * (out_k + in_k) if rank < max(out_k, in_k) / 2 else out_k * in_k
        return out_l * in_l + second
    return {"loha": 2 * pair, "dora": pair + outputs}.get(kind, pair)


def _factors(size: int) -> tuple[int, int]:
    """The two factors of a size that are nearest to each other, the smaller first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small
