"""Which way of saving memory is the fastest that fits, and which come before and after it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from wantrain.costs.devices import Card
from wantrain.costs.memory import BASES, Job, MemoryPolicy, device_parts, host_peak, peak
from wantrain.costs.savers import shrunk
from wantrain.costs.seconds import micro_step_s

HOST_BYTES = 64 * 2**30
"""Host memory for one process, where nobody says."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy with the peak of device memory in bytes, and the seconds of a micro-step."""

    policy: MemoryPolicy
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """`best` is the fastest that fits, None where nothing does. `faster` needs more memory than there is; `smaller` is
    the next that needs less than `best` (or, where nothing fits, the one that needs least).
    """

    best: Candidate | None
    faster: Candidate | None
    smaller: Candidate | None


@dataclass(frozen=True, slots=True)
class Fixed:
    """What of a policy is set already; None is free. With `may_mix`, which no key of the config says, blocks may keep
    differently: then those that keep more are the last, whose backward pass comes first.
    """

    base: str | None = None
    keep: str | None = None
    swap: int | None = None
    offload: bool | None = None
    may_mix: bool = False


def policies(job: Job, fixed: Fixed) -> Iterator[MemoryPolicy]:
    """Every policy that is weighed, those that change least first."""
    size, can_move = job.num_blocks, job.block.is_lora
    eighths = sorted({round(size * n / 8) for n in range(9)})
    mixed = [(less,) * (size - n) + (more,) * n for more, less in itertools.pairwise(job.keeps) for n in eighths]
    whole = [(keep,) * size for keep in ([fixed.keep] if fixed.keep else job.keeps)]
    keeps = dict.fromkeys([*whole, *(mixed if fixed.may_mix and not fixed.keep else ())])
    bases = (fixed.base,) if fixed.base else BASES if job.adapter.kind != "dora" else BASES[:1]
    swaps = (eighths if can_move else [0]) if fixed.swap is None else [fixed.swap]
    offloads = (False, True)[:1 + can_move] if fixed.offload is None else (fixed.offload,)
    for base, keep, swap, offload in itertools.product(bases, keeps, swaps, offloads):
        yield MemoryPolicy(base, keep, swap, offload)


def frontier(job: Job, card: Card, host_bytes: float, fixed: Fixed) -> list[Candidate]:
    """The policies within the host's memory of which no other is as fast and as small, the fastest first."""
    every = [Candidate(policy, peak(device_parts(job, policy)), micro_step_s(job, policy, card))
             for policy in policies(job, fixed) if host_peak(job, policy, host_bytes) <= host_bytes]
    kept: list[Candidate] = []
    for one in sorted(every, key=lambda candidate: (candidate.seconds, candidate.nbytes)):
        if not kept or one.nbytes < kept[-1].nbytes:
            kept.append(one)
    return kept


def choose(job: Job, card: Card, budget_bytes: float, host_bytes: float = HOST_BYTES, fixed: Fixed | None = None
           ) -> Choice:
    """The fastest policy within the budgets of device and host memory by the model of time, with its neighbours."""
    candidates = frontier(job, card, host_bytes, fixed or Fixed())
    place = next((i for i, one in enumerate(candidates) if one.nbytes <= budget_bytes), None)
    if place is None:
        return Choice(None, None, candidates[-1] if candidates else None)
    return Choice(candidates[place], candidates[place - 1] if place else None,
                  candidates[place + 1] if place + 1 < len(candidates) else None)


def relieved(job: Job, card: Card, budget_bytes: float, host_bytes: float = HOST_BYTES, fixed: Fixed | None = None
             ) -> tuple[list[str], Choice] | None:
    """The settings of the least change that makes a job fit, and what is chosen then. None where no change does."""
    for settings, smaller in shrunk(job):
        if (choice := choose(smaller, card, budget_bytes, host_bytes, fixed)).best:
            return settings, choice
    return None


def overrides(policy: MemoryPolicy) -> list[str]:
    """The policy as keys of the config."""
    return [f"memory.base={policy.base}", f"memory.keep={policy.keep[0]}", f"memory.swap={policy.swap}",
            f"memory.offload={str(policy.offload).lower()}"]
