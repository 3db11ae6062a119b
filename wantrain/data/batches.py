"""The order of samples and the batches of a step, as functions of (seed, step): nothing to save, nothing to drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from wantrain.flow import generator_for
from wantrain.terms import Batch, PlannedClip

Fetch = Callable[[PlannedClip, str], tuple[torch.Tensor, torch.Tensor]]
"""(clip, caption) -> (latents_CTHW, text_LD padded): from the cache, or straight from the file when streaming."""


@dataclass(slots=True)
class Order:
    """Which clips make the global batch of each step.

    Each bucket is an endless row of shuffled epochs, so no clip is dropped or doubled to fill a batch; steps are
    dealt to buckets in proportion to their clips, the one furthest behind first. A pure function of (seed, step).
    """

    planned: Sequence[PlannedClip]
    global_batch_size: int
    seed: int
    _rows: list[list[int]] = field(init=False)
    _done: list[int] = field(init=False)
    _turns: list[tuple[int, int]] = field(init=False, default_factory=list)
    _epochs: dict[tuple[int, int], list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows: dict[str, list[int]] = {}
        for i, p in enumerate(self.planned):
            rows.setdefault(str(p.bucket), []).extend([i] * p.clip.repeats)
        self._rows = [rows[name] for name in sorted(rows)]
        self._done = [0] * len(self._rows)

    def samples(self, step: int) -> list[PlannedClip]:
        """The global batch of `step`, all of one bucket."""
        while len(self._turns) <= step:
            self._deal()
        bucket, turn = self._turns[step]
        row = self._rows[bucket]
        picked = []
        for position in range(turn * self.global_batch_size, (turn + 1) * self.global_batch_size):
            epoch, offset = divmod(position, len(row))
            picked.append(self.planned[row[self._shuffled(bucket, epoch)[offset]]])
        return picked

    def _shuffled(self, bucket: int, epoch: int) -> list[int]:
        if (bucket, epoch) not in self._epochs:
            generator = generator_for(self.seed, "order", bucket, epoch)
            self._epochs[bucket, epoch] = torch.randperm(len(self._rows[bucket]), generator=generator).tolist()
            self._epochs.pop((bucket, epoch - 2), None)
        return self._epochs[bucket, epoch]

    def _deal(self) -> None:
        step, total = len(self._turns), sum(map(len, self._rows))
        done = self._done
        behind = [len(row) / total * (step + 1) - turns for row, turns in zip(self._rows, done, strict=True)]
        bucket = behind.index(max(behind))
        self._turns.append((bucket, done[bucket]))
        done[bucket] += 1


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


def caption_for(planned: PlannedClip, seed: int, step: int, index: int, dropout: float) -> str:
    """The clip's caption, or the empty one for a share `dropout` of samples."""
    draw = torch.rand((), generator=generator_for(seed, step, "caption", index))
    return "" if draw < dropout else planned.clip.caption


def micro_batches(order: Order, split: Split, step: int, dropout: float, fetch: Fetch) -> list[Batch]:
    """This process's micro-batches of `step`."""
    samples = order.samples(step)
    batches = []
    for micro_step in range(split.num_micro_steps):
        index_B = split.indices(micro_step)
        pairs = [fetch(samples[i], caption_for(samples[i], order.seed, step, i, dropout)) for i in index_B]
        latents, texts = zip(*pairs, strict=True)
        batches.append(Batch(torch.stack(latents), torch.stack(texts), index_B, [samples[i].clip.id for i in index_B]))
    return batches


def ahead(steps: range, make: Callable[[int], list[Batch]], threaded: bool) -> Iterator[list[Batch]]:
    """The batches of each step; with `threaded` the next step's are read while this one computes."""
    if not threaded:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for step in steps:
            following = pool.submit(make, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
