"""The order of samples and the batches of a step, as functions of (seed, step): nothing to save, nothing to drift."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from wantrain.data.plan import num_tokens
from wantrain.flow import Density, draw_noise, draw_sigma, generator_for
from wantrain.terms import Batch, Bucket, Clip, PlannedClip, Sample, UserError

Fetch = Callable[[PlannedClip, str, bool], Sample]
"""(window, caption, whether its first frame is given, where that is open) -> sample."""


@dataclass(slots=True)
class Order:
    """Which windows make the global batch of each step.

    Each bucket (PlannedClip.kind) is an endless row of shuffled epochs, so no clip is dropped or doubled to fill a
    batch; steps are dealt to buckets in proportion to what they need, the one furthest behind first. A batch has
    `global_batch_size` samples, times the bucket's factor in `factors`. An epoch shows a clip `repeats` times; of a
    clip with 0.5, every second epoch. A pure function of (seed, step).
    """

    planned: Sequence[PlannedClip]
    global_batch_size: int
    seed: int
    factors: Mapping[Bucket, int] = field(default_factory=dict)
    _rows: list[_Row] = field(init=False)
    _turns: list[tuple[int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rows: dict[str, list[int]] = {}
        for i, p in enumerate(self.planned):
            rows.setdefault(p.kind, []).append(i)
        self._rows = [
            _Row(number, members, [Fraction(self.planned[i].clip.repeats).limit_denominator(1000) for i in members],
                 self.global_batch_size * self.factors.get(self.planned[members[0]].bucket, 1), self.seed)
            for number, (_, members) in enumerate(sorted(rows.items()))]

    def samples(self, step: int) -> list[PlannedClip]:
        """The global batch of `step`, all of one bucket."""
        while len(self._turns) <= step:
            self._deal()
        number, turn = self._turns[step]
        return [self.planned[i] for i in self._rows[number].batch(turn)]

    def _deal(self) -> None:
        step, total = len(self._turns), sum(row.steps for row in self._rows)
        behind = [row.steps / total * (step + 1) - row.turns for row in self._rows]
        number = behind.index(max(behind))
        self._turns.append((number, self._rows[number].turns))
        self._rows[number].turns += 1


@dataclass(slots=True)
class _Row:
    """The endless row of one bucket; `members` are places in the plan."""

    number: int
    members: list[int]
    repeats: list[Fraction]
    batch_size: int
    seed: int
    turns: int = 0
    _starts: list[int] = field(default_factory=lambda: [0])
    _shuffled: dict[int, list[int]] = field(default_factory=dict)

    @property
    def steps(self) -> Fraction:
        """Batches that an epoch needs."""
        return sum(self.repeats, Fraction(0)) / self.batch_size

    def batch(self, turn: int) -> list[int]:
        """The `turn`th batch of the bucket."""
        first = turn * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + sum(self._counts(len(self._starts) - 1)))
        epoch = bisect.bisect_right(self._starts, position) - 1
        if epoch not in self._shuffled:
            row = [i for i, count in zip(self.members, self._counts(epoch), strict=True) for _ in range(count)]
            generator = generator_for(self.seed, "order", self.number, epoch)
            self._shuffled = {e: r for e, r in self._shuffled.items() if abs(e - epoch) < 2}
            self._shuffled[epoch] = [row[k] for k in torch.randperm(len(row), generator=generator).tolist()]
        return self._shuffled[epoch][position - self._starts[epoch]]

    def _counts(self, epoch: int) -> list[int]:
        """How often each member stands in this epoch; of those with 1/2, one half in one epoch, the others in the next.
        """
        def until(epoch: int, k: int, share: Fraction) -> int:
            return (epoch * share.numerator + k % share.denominator) // share.denominator

        return [until(epoch + 1, k, share) - until(epoch, k, share) for k, share in enumerate(self.repeats)]


def batch_factors(buckets: Iterable[Bucket], global_batch_size: int, max_tokens: int | None, multiple_px: int
                  ) -> dict[Bucket, int]:
    """How many times global_batch_size samples of each bucket fit into a step of `max_tokens` transformer tokens.

    Whole multiples, so that any split over processes and accumulation stays even. UserError where once is too much.
    """
    if max_tokens is None:
        return {}
    factors = {b: max_tokens // (global_batch_size * num_tokens(b, multiple_px)) for b in buckets}
    if too_large := [b for b, factor in factors.items() if not factor]:
        needed = max(global_batch_size * num_tokens(b, multiple_px) for b in too_large)
        raise UserError(f"data.max_tokens_per_batch = {max_tokens}, but data.batch_size = {global_batch_size} of "
                        f"bucket {too_large[0]} has {global_batch_size * num_tokens(too_large[0], multiple_px)} tokens",
                        f"data.max_tokens_per_batch={needed} or more, or a smaller data.batch_size")
    return factors


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
        """The same deal of a batch that is a whole number of times as large: as many micro-steps, each larger."""
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


def captions_of(clip: Clip, tag_orders: int) -> list[str]:
    """Every text that a sample of this clip may be given: its captions, each with so many other orders of its tags.

    Tags are separated by commas; the first, where the trigger stands, keeps its place.
    """
    found: dict[str, None] = {}
    for caption in (clip.caption, *clip.more_captions):
        first, *tags = re.split(r"\s*,\s*", caption)
        found[caption] = None
        for number in range(tag_orders if len(tags) > 1 else 0):
            order = torch.randperm(len(tags), generator=generator_for("tags", caption, number)).tolist()
            found[", ".join([first, *(tags[i] for i in order)])] = None
    return list(found)


def caption_for(planned: PlannedClip, seed: int, step: int, index: int, draws: Draws) -> str:
    """One of the clip's captions, or the empty one for a share `dropout` of samples."""
    generator = generator_for(seed, step, "caption", index)
    if torch.rand((), generator=generator) < draws.dropout:
        return ""
    choices = captions_of(planned.clip, draws.tag_orders)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def is_given_first_frame(seed: int, step: int, index: int, share: float) -> bool:
    """Whether this sample is of the share that is given its first frame."""
    return bool(torch.rand((), generator=generator_for(seed, step, "first frame", index)) < share)


def window_for(planned: PlannedClip, seed: int, step: int, index: int) -> PlannedClip:
    """The window at a moment of its own where the plan leaves that open."""
    if planned.latest_s is None:
        return planned
    share = float(torch.rand((), generator=generator_for(seed, step, "window", index)))
    return planned_at(planned, planned.start_s + share * (planned.latest_s - planned.start_s))


def planned_at(planned: PlannedClip, start_s: float) -> PlannedClip:
    """The same window, and its partners', from `start_s` on."""
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
        latents_BCTHW = torch.stack([sample.latents_CTHW for sample in samples])
        text_BLD = torch.stack([sample.text_LD for sample in samples])
        everywhere = torch.ones(1, *latents_BCTHW.shape[2:])
        made.append(Batch(
            latents_BCTHW, text_BLD, stacked([s.mask_1THW for s in samples], everywhere),
            {name: torch.stack([s.condition[name] for s in samples]) for name in samples[0].condition},
            stacked([s.known_T for s in samples], torch.zeros(latents_BCTHW.shape[2])),
            stacked([s.class_text_LD for s in samples], torch.zeros_like(text_BLD[0])),
            draw_noise(order.seed, step, index_B, latents_BCTHW.shape[1:]),
            draw_sigma(order.seed, step, index_B, num_samples, draws.density(picked[0][1].bucket)),
            index_B, [p for _, p in picked]))
    return made


def stacked(tensors: Sequence[torch.Tensor | None], absent: torch.Tensor) -> torch.Tensor | None:
    """The samples' tensors, `absent` where one has none; None where none has one."""
    if all(tensor is None for tensor in tensors):
        return None
    return torch.stack([absent if tensor is None else tensor.expand_as(absent) for tensor in tensors])


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, which goes to a GPU while that computes."""
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
