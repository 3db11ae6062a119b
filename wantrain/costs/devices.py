"""The cards that a plan may be made for, and the share of their numbers that a training reaches.

Sources: docs/facts.md, "Cards".
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from wantrain.terms import UserError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Family:
    """Shares of the card's bf16 TFLOP/s that large products reach, and attention forward and backward."""

    products: float
    attention: float
    attention_backward: float


@dataclass(frozen=True, slots=True)
class Card:
    """One card: memory in GiB, dense products of bfloat16 (sums in float32) and of fp8 in TFLOP/s (None: no fp8), its
    memory's GB/s, GB/s of its PCIe slot in one direction, what of these a training reaches, and whether all that was
    measured on it.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gbs: float
    pcie_gbs: float
    family: Family
    is_measured: bool = False


FAMILIES = {
    "geforce": Family(0.95, 0.74, 0.70),
    "ampere": Family(0.85, 0.74, 0.70),
    "ada": Family(0.80, 0.70, 0.65),
    "hopper": Family(0.80, 0.60, 0.52),
    "h20": Family(0.95, 0.74, 0.70),
    "blackwell": Family(0.75, 0.60, 0.52),
}

PCIE_SHARE = 0.8
"""Of a slot's GB/s, what copies from pinned memory reach."""
MEMORY_SHARE = 0.8
"""Of the card's memory GB/s, what elementwise kernels reach."""

_X16 = {3: 15.8, 4: 31.5, 5: 63.0}
_CARDS = (
    Card("rtx3060", 12, 25.5, None, 360, _X16[4], FAMILIES["geforce"]),
    Card("rtx3060ti", 8, 32.4, None, 448, _X16[4], FAMILIES["geforce"]),
    Card("rtx3070", 8, 40.6, None, 448, _X16[4], FAMILIES["geforce"]),
    Card("rtx3080", 10, 59.5, None, 760, _X16[4], FAMILIES["geforce"]),
    Card("rtx3080ti", 12, 68.2, None, 912, _X16[4], FAMILIES["geforce"]),
    Card("rtx3090", 24, 71.2, None, 936, _X16[4], FAMILIES["geforce"]),
    Card("rtx4060", 8, 30.2, 60.4, 272, _X16[4] / 2, FAMILIES["geforce"]),
    Card("rtx4060ti", 16, 44.1, 88.2, 288, _X16[4] / 2, FAMILIES["geforce"]),
    Card("rtx4070", 12, 58.3, 116.6, 504, _X16[4], FAMILIES["geforce"]),
    Card("rtx4070ti", 12, 80.2, 160.4, 504, _X16[4], FAMILIES["geforce"]),
    Card("rtx4080", 16, 97.5, 194.9, 717, _X16[4], FAMILIES["geforce"]),
    Card("rtx4090", 24, 165.2, 330.3, 1008, _X16[4], FAMILIES["geforce"]),
    Card("rtx5060", 8, 38.4, 76.8, 448, _X16[5] / 2, FAMILIES["geforce"]),
    Card("rtx5060ti", 16, 47.4, 94.8, 448, _X16[5] / 2, FAMILIES["geforce"]),
    Card("rtx5070", 12, 61.7, 123.5, 672, _X16[5], FAMILIES["geforce"]),
    Card("rtx5070ti", 16, 87.9, 175.8, 896, _X16[5], FAMILIES["geforce"]),
    Card("rtx5080", 16, 112.6, 225.1, 960, _X16[5], FAMILIES["geforce"]),
    Card("rtx5090", 32, 209.5, 419.0, 1792, _X16[5], FAMILIES["geforce"]),
    Card("l4", 22.5, 121, 242, 300, _X16[4], FAMILIES["ada"]),
    Card("a10", 22.5, 125, None, 600, _X16[4], FAMILIES["ampere"]),
    Card("a40", 45, 149.7, None, 696, _X16[4], FAMILIES["ampere"]),
    Card("a6000", 47.5, 154.8, None, 768, _X16[4], FAMILIES["ampere"]),
    Card("l40s", 45, 362, 733, 864, _X16[4], FAMILIES["ada"]),
    Card("a100_40gb", 39.5, 312, None, 1555, _X16[4], FAMILIES["ampere"]),
    Card("a100", 79.2, 312, None, 2039, _X16[4], FAMILIES["ampere"]),
    Card("h20", 95.6, 148, 296, 4000, _X16[5], FAMILIES["h20"]),
    Card("h100", 79.2, 989, 1979, 3350, _X16[5], FAMILIES["hopper"]),
    Card("h200", 139.8, 989, 1979, 4800, _X16[5], FAMILIES["hopper"]),
    Card("b200", 178, 2250, 4500, 8000, _X16[5], FAMILIES["blackwell"]),
)
CARDS = {card.name: card for card in _CARDS}

TYPICAL = {8: "rtx4060", 12: "rtx3060", 16: "rtx4060ti", 24: "rtx3090", 32: "rtx5090", 48: "a6000", 80: "a100",
           141: "h200"}
"""The card whose speed stands for a size of memory in GB: a common one, and not the fastest."""


def card_of(given: str) -> Card:
    """The card of a name such as `RTX 4090`, or of a size of memory such as `24gb` at the speed of a common card."""
    name = re.sub(r"nvidia|geforce|[\s_]|(?<=\w)-", "", given.lower())
    named = {key.replace("_", ""): card for key, card in CARDS.items()}
    if name in named:
        return named[name]
    if (size := re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib|g)", name)) and float(size[1]):
        memory = float(size[1])
        like = CARDS[TYPICAL[min(TYPICAL, key=lambda known: abs(known - memory))]]
        return replace(like, name=f"{memory:g} GiB at the speed of {like.name}", memory_gib=memory)
    close = difflib.get_close_matches(name, named, 1)
    raise UserError(f"gpu = {given!r} is not known; there are {', '.join(CARDS)}, and sizes such as 24gb",
                    f"--gpu {named[close[0]].name if close else '24gb'}")
