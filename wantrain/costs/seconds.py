"""How long a step takes, by arithmetic: products, attention and elementwise traffic at the rates of a card.

Sources of rates and counts: docs/facts.md, "Cards" and "Arithmetic of a step". Nothing here was measured on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from wantrain.costs.block import MOVED, attentions_again, products_again
from wantrain.costs.devices import MEMORY_SHARE, PCIE_SHARE, Card
from wantrain.costs.memory import Job, MemoryPolicy, kept_in_all, streamed_bytes
from wantrain.models import inventory

CAST_BYTES = 19
"""Bytes that making a weight of a byte ready for one product moves: a read, two float32 tensors, the result. Products
in int8, and in fp8 on cards that have it, need none of that; that they are faster is left out, as what rounding and
scaling move may take as much.
"""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one block: of products, of attention forward, of attention backward."""

    products: float
    attention: float
    attention_backward: float

    @property
    def flops(self) -> float:
        return self.products + self.attention + self.attention_backward


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of one process: seconds, operations and tokens."""

    seconds: float
    flops: float
    tokens: int


@functools.cache
def forward(job: Job) -> Work:
    """A block's forward pass, without its adapter's products: two operations a weight and token, 4 d a pair of tokens.
    """
    own = job.block
    products = 2.0 * own.dim * (own.tokens * (6 * own.dim + 2 * own.ffn_dim) + 2 * own.text * own.dim)
    return Work(products, sum(_attentions(job)), 0.0)


def _attentions(job: Job) -> tuple[float, float]:
    """Operations of self-attention and of cross-attention, forward."""
    own, rows = job.block, job.batch.rows
    length = own.tokens // rows * job.batch.sequence_parallel
    return 4.0 * own.dim * own.tokens * length, 4.0 * own.dim * own.tokens * own.text / rows


@functools.cache
def adapter_forward(job: Job) -> float:
    """Operations of the adapter's products in the mean block, forward."""
    own = job.variant.architecture
    linears, ranks = inventory.linears(own), job.adapter.ranks(own)
    return sum(2.0 * job.tokens * rank * sum(linears[name]) for name, rank in ranks.items()) / job.num_blocks


@functools.cache
def backward(job: Job, keep: str) -> Work:
    """A block's backward pass: gradients of inputs (the base is frozen, so of no weights), what is computed again, and
    the adapter's gradients.
    """
    ahead, (own, cross), again = forward(job), _attentions(job), attentions_again(keep)
    products = ahead.products + products_again(job.block, keep)
    adapter = adapter_forward(job) * (2 + (keep != "all"))
    return Work(products + adapter, own * again[0] + cross * again[1], 2.5 * ahead.attention)


@functools.cache
def _passes(job: Job, base: str, keep: str, card: Card) -> tuple[float, float]:
    """Seconds of a block forward and backward."""
    family, peak, bandwidth = card.family, card.bf16_tflops * 1e12, card.memory_gbs * 1e9 * MEMORY_SHARE
    ahead, back, own = forward(job), backward(job, keep), job.block
    moved = own.nbytes(MOVED[keep])
    is_cast = base not in ("dtype", "int8") and not (base == "fp8" and card.fp8_tflops)
    cast = CAST_BYTES * own.dim * (8 * own.dim + 2 * own.ffn_dim) / bandwidth if is_cast else 0.0

    def arithmetic(work: Work) -> float:
        return (work.products / family.products + work.attention / family.attention
                + work.attention_backward / family.attention_backward) / peak

    first = arithmetic(ahead) + adapter_forward(job) / family.products / peak + moved / 3 / bandwidth + cast
    return (1 + job.asks_base) * first, arithmetic(back) + 2 * moved / 3 / bandwidth + cast * (1 + (keep != "all"))


@functools.cache
def _all_passes(job: Job, base: str, keeps: tuple[str, ...], card: Card) -> tuple[float, float]:
    """Seconds of all blocks forward and backward."""
    passes = [_passes(job, base, keep, card) for keep in keeps]
    return sum(ahead for ahead, _ in passes), sum(back for _, back in passes)


def micro_step_s(job: Job, policy: MemoryPolicy, card: Card) -> float:
    """Seconds of one micro-batch: both passes, each as long as its arithmetic, or as what has to pass the slot. What
    passes it takes its share of the card's memory rate too.
    """
    slot, bandwidth = card.pcie_gbs * 1e9 * PCIE_SHARE, card.memory_gbs * 1e9 * MEMORY_SHARE
    ahead, back = _all_passes(job, policy.base, policy.keep, card)
    weights = policy.swap * streamed_bytes(job.variant, job.itemsize, policy.base)
    kept = kept_in_all(job, policy) if policy.offload else 0.0
    shared = 2 * (weights + kept) / bandwidth
    return shared + max(ahead, weights / slot, kept / slot) + max(back, (weights + kept) / slot)


def step(job: Job, policy: MemoryPolicy, card: Card, num_micro_steps: int) -> Step:
    """One optimizer step: so many micro-steps in each process. Communication between processes is left out."""
    ahead = forward(job).flops + adapter_forward(job)
    operations = sum((1 + job.asks_base) * ahead + backward(job, keep).flops for keep in policy.keep)
    return Step(num_micro_steps * micro_step_s(job, policy, card), num_micro_steps * operations,
                num_micro_steps * job.tokens)
