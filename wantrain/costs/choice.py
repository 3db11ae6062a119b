"""Which way of saving memory is the fastest that fits, and which come before and after it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from wantrain.costs.devices import Card
from wantrain.costs.memory import FORM_BYTES, Job, MemoryPolicy, device_parts, host_parts, peak
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


def policies(job: Job, streams: bool) -> Iterator[MemoryPolicy]:
    """Every policy that is weighed, those that change least first.

    With `streams` blocks may also stream from host memory, what is kept may wait there, and blocks may keep
    differently: then those that keep more are the last, whose backward pass comes first.
    """
    size = job.num_blocks
    eighths = sorted({round(size * n / 8) for n in range(9)}) if streams else [0]
    mixed = [(less,) * (size - n) + (more,) * n for more, less in itertools.pairwise(job.keeps) for n in eighths]
    keeps = dict.fromkeys([*((keep,) * size for keep in job.keeps), *mixed])
    bases = ("dtype", *(FORM_BYTES if job.adapter.kind != "dora" else ()))
    for base, keep, swap in itertools.product(bases, keeps, eighths):
        for offload in (False, True)[:1 + streams]:
            yield MemoryPolicy(base, keep, swap, offload)


def frontier(job: Job, card: Card, host_bytes: float, streams: bool) -> list[Candidate]:
    """The policies within the host's memory of which no other is as fast and as small, the fastest first."""
    every = [Candidate(policy, peak(device_parts(job, policy)), micro_step_s(job, policy, card))
             for policy in policies(job, streams) if peak(host_parts(job, policy)) <= host_bytes]
    kept: list[Candidate] = []
    for one in sorted(every, key=lambda candidate: (candidate.seconds, candidate.nbytes)):
        if not kept or one.nbytes < kept[-1].nbytes:
            kept.append(one)
    return kept


def choose(job: Job, card: Card, budget_bytes: float, host_bytes: float = HOST_BYTES, streams: bool = False) -> Choice:
    """The fastest policy within the budgets of device and host memory by the model of time, with its neighbours."""
    candidates = frontier(job, card, host_bytes, streams)
    place = next((i for i, one in enumerate(candidates) if one.nbytes <= budget_bytes), None)
    if place is None:
        return Choice(None, None, candidates[-1] if candidates else None)
    return Choice(candidates[place], candidates[place - 1] if place else None,
                  candidates[place + 1] if place + 1 < len(candidates) else None)


def relieved(job: Job, card: Card, budget_bytes: float, host_bytes: float = HOST_BYTES, streams: bool = False
             ) -> tuple[list[str], Choice] | None:
    """The settings of the least change that makes a job fit, and what is chosen then. None where no change does."""
    for settings, smaller in shrunk(job):
        if (choice := choose(smaller, card, budget_bytes, host_bytes, streams)).best:
            return settings, choice
    return None


def overrides(policy: MemoryPolicy) -> list[str]:
    """The policy as keys of the config."""
    return [f"memory.base={policy.base}", f"memory.keep={policy.keep[0]}"]
