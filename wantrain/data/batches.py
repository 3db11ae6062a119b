"""The order of samples and the batches of a step, as functions of (seed, step): nothing to save, nothing to drift."""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from wantrain.data.captions import captions_of
from wantrain.density import Density
from wantrain.flow import draw_noise, draw_sigma, generator_for
from wantrain.terms import Batch, Bucket, PlannedClip, Sample

Fetch = Callable[[PlannedClip, str, bool], Sample]
"""(window, caption, whether its first frame is given, where that is open) -> sample."""


@dataclass(slots=True)
class Order:
    """Which windows make the global batch of each step.

    Each bucket (PlannedClip.kind) is an endless row of shuffled epochs, so no clip is dropped or doubled to fill a
    batch. Steps are dealt to buckets in proportion to what they need: turn t of a bucket that has a share p of the
    steps is due at (t + 1/2) / p, and the earliest comes first (Webster's method). A batch has `global_batch_size`
    samples, times the bucket's factor in `factors`. An epoch shows a clip `repeats` times; of a clip with 0.5, every
    second epoch. A pure function of (seed, step), at the same cost for every step: O(buckets) and the batch, and once
    an epoch of a bucket its permutation.
    """

    planned: Sequence[PlannedClip]
    global_batch_size: int
    seed: int
    factors: Mapping[Bucket, int] = field(default_factory=dict)
    _rows: list[_BucketOrder] = field(init=False)
    _shares: list[int] = field(init=False)

    def __post_init__(self) -> None:
        kinds: dict[str, list[int]] = {}
        for i, p in enumerate(self.planned):
            kinds.setdefault(p.kind, []).append(i)
        self._rows, steps = [], []
        for number, (_, members) in enumerate(sorted(kinds.items())):
            size = self.global_batch_size * self.factors.get(self.planned[members[0]].bucket, 1)
            repeats = [self.planned[i].clip.repeats for i in members]
            self._rows.append(_BucketOrder(number, np.array(members), repeats, size, self.seed))
            steps.append(self._rows[-1].num_samples / size)
        denominator = math.lcm(*(share.denominator for share in steps))
        self._shares = [int(share * denominator) for share in steps]

    def samples(self, step: int) -> list[PlannedClip]:
        """The global batch of `step`, all of one bucket."""
        number, turn = self._turn(step)
        return [self.planned[i] for i in self._rows[number].batch(turn)]

    def _turn(self, step: int) -> tuple[int, int]:
        """(the bucket whose turn `step` is, how many it had before)."""
        whole = sum(self._shares)
        early = max(0, 2 * step - len(self._shares))  # until early / (2 * whole) at most `step` turns are due
        turns = [(share * early + whole) // (2 * whole) for share in self._shares]
        due = [(Fraction(2 * turn + 1, share), row) for row, (turn, share) in
               enumerate(zip(turns, self._shares, strict=True)) if share]
        heapq.heapify(due)
        for _ in range(step - sum(turns)):
            when, row = due[0]
            heapq.heapreplace(due, (when + Fraction(2, self._shares[row]), row))
            turns[row] += 1
        number = due[0][1]
        return number, turns[number]


class _BucketOrder:
    """The endless row of one bucket: `members` [N] are places in the plan, `repeats` how often an epoch has each."""

    def __init__(self, number: int, members: np.ndarray, repeats: Sequence[float], batch_size: int, seed: int) -> None:
        self._number, self._members, self._batch_size, self._seed = number, members, batch_size, seed
        counts = Counter(repeats)
        exact = [Fraction(value).limit_denominator(1000) for value in counts]
        place = {value: number for number, value in enumerate(counts)}
        which = np.array([place[value] for value in repeats])
        self._above, self._below = (np.array(parts, np.int64)[which] for parts in zip(
            *((share.numerator, share.denominator) for share in exact), strict=True))
        self._phase = np.arange(len(members)) % self._below
        # members of one repeat and phase do the same in every epoch: sums over epochs need one of each
        _, first, self._num_alike = np.unique(1000 * which + self._phase, return_index=True, return_counts=True)
        self._alike = self._above[first], self._below[first], self._phase[first]
        self._shuffled: dict[int, np.ndarray] = {}
        self.num_samples = sum((share * count for share, count in zip(exact, counts.values(), strict=True)),
                               Fraction(0))  # of an epoch, the mean over epochs

    def batch(self, turn: int) -> list[int]:
        """The `turn`th batch of the bucket, as places in the plan."""
        found: list[int] = []
        while len(found) < self._batch_size:
            position = turn * self._batch_size + len(found)
            epoch = self._epoch_of(position)
            first = position - self._start(epoch)
            found += self._epoch(epoch)[first : first + self._batch_size - len(found)].tolist()
        return found

    def _epoch_of(self, position: int) -> int:
        """The epoch in which the sample at `position` of the row stands."""
        limit = 1
        while self._start(limit) <= position:
            limit *= 2
        return bisect.bisect_right(range(limit), position, key=self._start) - 1

    def _start(self, epoch: int) -> int:
        """How many samples all epochs before this one have."""
        above, below, phase = self._alike
        return int(((epoch * above + phase) // below) @ self._num_alike)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The epoch's row, shuffled; of clips with 1/2, one half in one epoch, the others in the next."""
        if epoch not in self._shuffled:
            before, until = ((e * self._above + self._phase) // self._below for e in (epoch, epoch + 1))
            row = self._members.repeat(until - before)
            generator = generator_for(self._seed, "order", self._number, epoch)
            self._shuffled = {e: r for e, r in self._shuffled.items() if abs(e - epoch) < 2}
            self._shuffled[epoch] = row[torch.randperm(len(row), generator=generator).numpy()]
        return self._shuffled[epoch]


@dataclass(frozen=True, slots=True)
class Split:
    """How a global batch is dealt to processes and micro-steps."""

    global_batch_size: int
    micro_batch_size: int
    num_processes: int
    process_index: int

    @property
    def num_micro_steps(self) -> int:
        """Micro-steps a process takes for one step (gradient accumulation)."""
        return self.global_batch_size // (self.micro_batch_size * self.num_processes)

    def indices(self, micro_step: int) -> list[int]:
        """Positions in the global batch of this process's samples in `micro_step`."""
        first = (micro_step * self.num_processes + self.process_index) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))

    def of(self, num_samples: int) -> Split:
        """The split of a larger batch, a whole multiple of this one: as many micro-steps, each larger."""
        factor = num_samples // self.global_batch_size
        return replace(self, global_batch_size=num_samples, micro_batch_size=self.micro_batch_size * factor)


@dataclass(frozen=True, slots=True)
class Draws:
    """What is drawn anew for each sample: sigma by the density of the bucket, `dropout` share of empty captions,
    `tag_orders` other orders of tags, and a share `first_frame` of samples that are given theirs.
    """

    density: Callable[[Bucket], Density]
    dropout: float = 0.0
    tag_orders: int = 0
    first_frame: float = 0.0


def caption_for(planned: PlannedClip, seed: int, step: int, index: int, draws: Draws) -> str:
    """One of the clip's captions, or the empty one for a share `dropout` of samples."""
    generator = generator_for(seed, step, "caption", index)
    if torch.rand((), generator=generator) < draws.dropout:
        return ""
    choices = captions_of(planned.clip, draws.tag_orders)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def is_given_first_frame(seed: int, step: int, index: int, share: float) -> bool:
    """Whether this sample is given its first frame: a share `share` of all samples is, drawn by (seed, step, index)."""
    return bool(torch.rand((), generator=generator_for(seed, step, "first frame", index)) < share)


def window_for(planned: PlannedClip, seed: int, step: int, index: int) -> PlannedClip:
    """The window, moved to a random moment where the plan does not fix one (data.extract=random)."""
    if planned.latest_s is None:
        return planned
    share = float(torch.rand((), generator=generator_for(seed, step, "window", index)))
    return planned_at(planned, planned.start_s + share * (planned.latest_s - planned.start_s))


def planned_at(planned: PlannedClip, start_s: float) -> PlannedClip:
    """Move a window, and the same windows of its partners, so that it begins at `start_s`."""
    partners = {name: replace(p, start_s=start_s, latest_s=None) for name, p in planned.partners.items()}
    return replace(planned, start_s=start_s, latest_s=None, partners=partners)


def mine(order: Order, split: Split, step: int) -> list[list[tuple[int, PlannedClip]]]:
    """This process's (index in the global batch, window) of each micro-step of `step`."""
    samples = order.samples(step)
    dealt = split.of(len(samples))
    return [[(i, window_for(samples[i], order.seed, step, i)) for i in dealt.indices(micro_step)]
            for micro_step in range(dealt.num_micro_steps)]


def coming(order: Order, split: Split, steps: Iterable[int]) -> Iterator[PlannedClip]:
    """Every window that `micro_batches` will fetch in these steps, in its order."""
    for step in steps:
        for picked in mine(order, split, step):
            yield from (planned for _, planned in picked)


def micro_batches(order: Order, split: Split, step: int, draws: Draws, fetch: Fetch) -> list[Batch]:
    """This process's micro-batches of `step`, with their noise and sigma."""
    num_samples = len(order.samples(step))
    made = []
    for picked in mine(order, split, step):
        index_B = [i for i, _ in picked]
        samples = [fetch(p, caption_for(p, order.seed, step, i, draws),
                         is_given_first_frame(order.seed, step, i, draws.first_frame)) for i, p in picked]
        shape_CTHW = samples[0].latents_CTHW.shape
        made.append(stack(samples, [p for _, p in picked], draw_noise(order.seed, step, index_B, shape_CTHW),
                          draw_sigma(order.seed, step, index_B, num_samples, draws.density(picked[0][1].bucket)),
                          index_B))
    return made


def stack(samples: Sequence[Sample], planned: Sequence[PlannedClip], noise_BCTHW: torch.Tensor, sigma_B: torch.Tensor,
          index_B: Sequence[int]) -> Batch:
    """Samples of one kind as a batch, with their noise and sigma."""
    latents_BCTHW = torch.stack([sample.latents_CTHW for sample in samples])
    text_BLD = torch.stack([sample.text_LD for sample in samples])
    return Batch(
        latents_BCTHW, text_BLD,
        stacked([s.mask_1THW for s in samples], torch.ones(1, *latents_BCTHW.shape[2:])),
        {name: torch.stack([s.condition[name] for s in samples]) for name in samples[0].condition},
        stacked([s.known_T for s in samples], torch.zeros(latents_BCTHW.shape[2])),
        stacked([s.class_text_LD for s in samples], torch.zeros_like(text_BLD[0])),
        noise_BCTHW, sigma_B, list(index_B), list(planned))


def stacked(tensors: Sequence[torch.Tensor | None], absent: torch.Tensor) -> torch.Tensor | None:
    """Stack the samples' tensors, with `absent` in place of a missing one. None if all are missing."""
    if all(tensor is None for tensor in tensors):
        return None
    return torch.stack([absent if tensor is None else tensor.expand_as(absent) for tensor in tensors])


def pinned(batch: Batch) -> Batch:
    """Move the batch to page-locked memory, from which it is copied to a GPU while the GPU computes."""
    def own(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.pin_memory() if tensor is not None else None

    return replace(batch, latents_BCTHW=batch.latents_BCTHW.pin_memory(), text_BLD=batch.text_BLD.pin_memory(),
                   noise_BCTHW=batch.noise_BCTHW.pin_memory(), sigma_B=batch.sigma_B.pin_memory(),
                   mask_B1THW=own(batch.mask_B1THW), known_BT=own(batch.known_BT),
                   class_text_BLD=own(batch.class_text_BLD),
                   condition={name: tensor.pin_memory() for name, tensor in batch.condition.items()})


def ahead(steps: range, make: Callable[[int], list[Batch]]) -> Iterator[list[Batch]]:
    """The batches of each step; the next step's are made in a thread while this one computes."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for step in steps:
            following = pool.submit(make, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
