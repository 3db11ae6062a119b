"""How long a step takes, by arithmetic: products, attention and elementwise traffic at the rates of a card.

Sources of rates and counts: docs/facts.md, "Cards" and "Arithmetic of a step". Nothing here was measured on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from wantrain.costs.devices import FAMILIES, MEMORY_SHARE, Card
from wantrain.costs.memory import Job, MemoryPolicy
from wantrain.models import inventory
from wantrain.terms import TEXT_LEN

TRAFFIC = 654
"""Tensors of tokens x width that the elementwise work of a block's forward reads and writes; backward twice that."""

CAST_BYTES = 19
"""Bytes that making a weight of a byte ready for one product moves: a read, two float32 tensors, the result."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one forward pass: of products, of attention, of the adapter's products."""

    products: float
    attention: float
    adapter: float

@functools.cache
def block_forward(job: Job) -> Work:
    """Of one block, for all rows that one process computes at once."""
    own, tokens = job.variant.architecture, job.tokens
    length = tokens // job.batch.rows * job.batch.sequence_parallel
    others = job.batch.rows * (TEXT_LEN + inventory.image_tokens(job.variant))
    products = 2 * own.dim * (tokens * (6 * own.dim + 2 * own.ffn_dim) + 2 * others * own.dim)
    attention = 4 * own.dim * tokens * (length + others // job.batch.rows)
    return Work(products, attention, _adapter_forward(job))


def _adapter_forward(job: Job) -> float:
    """Of the mean block: both products of each adapted module."""
    own = job.variant.architecture
    linears, ranks = inventory.linears(own), job.adapter.ranks(own)
    return sum(2 * job.tokens * rank * sum(linears[name]) for name, rank in ranks.items()) / job.num_blocks


def _again(job: Job, keep: str) -> float:
    """Forward passes of a block beside the one that every step has."""
    return {"all": 0.0, "inputs": 1.0}[keep] + job.asks_base


def flops(job: Job, keep: str) -> float:
    """Operations of one micro-step in one block: forward, recomputation, gradients of inputs and of the adapter."""
    work = block_forward(job)
    again = _again(job, keep)
    return (work.products * (2 + again) + work.attention * (1 + again + 2.5) + work.adapter * (3 + again))


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of one process: seconds, operations and tokens."""

    seconds: float
    flops: float
    tokens: int


def micro_step_s(job: Job, policy: MemoryPolicy, card: Card) -> float:
    """Seconds of one micro-batch, forward and backward."""
    return sum(_block_s(job, policy.base, keep, card) for keep in policy.keep)


def _block_s(job: Job, base: str, keep: str, card: Card) -> float:
    work, family, peak = block_forward(job), FAMILIES[card.family], card.bf16_tflops * 1e12
    again = _again(job, keep)
    products = (work.products * (2 + again) + work.adapter * (3 + again)) / (peak * family.products)
    attention = work.attention * ((1 + again) / family.attention + 2.5 / family.attention_backward) / peak
    own = job.variant.architecture
    moved = TRAFFIC * (3 + again) * job.tokens * own.dim * job.itemsize
    if base != "dtype":
        moved += CAST_BYTES * (2 + again) * own.dim * (8 * own.dim + 2 * own.ffn_dim)
    return products + attention + moved / (card.memory_gbs * 1e9 * MEMORY_SHARE)


def step(job: Job, policy: MemoryPolicy, card: Card, num_micro_steps: int) -> Step:
    """One optimizer step: so many micro-steps in each process. Communication between processes is left out."""
    operations = sum(flops(job, keep) for keep in policy.keep)
    return Step(num_micro_steps * micro_step_s(job, policy, card), num_micro_steps * operations,
                num_micro_steps * job.tokens)
