"""Which way of saving memory is the fastest that fits, and which come before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wantrain.costs.block import KEEPS
from wantrain.costs.devices import Card
from wantrain.costs.memory import FORM_BYTES, Job, MemoryPolicy, device_parts, peak
from wantrain.costs.seconds import micro_step_s


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


def policies(num_blocks: int) -> Iterator[MemoryPolicy]:
    """Every policy that the config can name, those that change least first."""
    for base in ("dtype", *FORM_BYTES):
        for keep in KEEPS:
            yield MemoryPolicy(base, (keep,) * num_blocks)


def frontier(job: Job, card: Card) -> list[Candidate]:
    """The policies of which no other is as fast and as small, the fastest first."""
    every = [Candidate(policy, peak(device_parts(job, policy)), micro_step_s(job, policy, card))
             for policy in policies(job.num_blocks)]
    kept: list[Candidate] = []
    for one in sorted(every, key=lambda candidate: (candidate.seconds, candidate.nbytes)):
        if not kept or one.nbytes < kept[-1].nbytes:
            kept.append(one)
    return kept


def choose(job: Job, card: Card, budget_bytes: float) -> Choice:
    """The fastest policy within the budget by the model of time, with its neighbours."""
    candidates = frontier(job, card)
    place = next((i for i, one in enumerate(candidates) if one.nbytes <= budget_bytes), None)
    if place is None:
        return Choice(None, None, candidates[-1])
    return Choice(candidates[place], candidates[place - 1] if place else None,
                  candidates[place + 1] if place + 1 < len(candidates) else None)


def overrides(policy: MemoryPolicy) -> list[str]:
    """The policy as keys of the config."""
    return [f"memory.base={policy.base}", f"train.activation_checkpointing={str(policy.keep[0] == 'inputs').lower()}"]


def largest(jobs: Sequence[Job]) -> Job:
    """The job of most tokens."""
    return max(jobs, key=lambda job: job.tokens)
