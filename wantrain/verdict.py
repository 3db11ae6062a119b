"""Which checkpoints of a training can be used, from what was measured after its steps. Numbers in, words out.

It says where losses and drift leave no reason to prefer one to another, and nothing of taste.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DRIFT_BAND = 2.5
"""The most drift of a usable checkpoint. Of the tiny base: the demo's LoRA has 1.8, and 2.6 at strength 1.5, where
prompts that have nothing to do with the training are followed as the base follows them; at 2.9 they are not
(benchmarks/drifting.py).
"""

DIVERSITY_BAND = 0.33
"""The least diversity over seeds of a usable checkpoint, as a share of the base's. Of the tiny base: four clips learnt
by heart have 0.4 after 20 passes, 0.28 after 40 and 0.07 after 240 (tests/journey/test_overfitting.py).
"""

MEMORISED_PASSES = 21
"""Passes over each clip after which the clips trained on have half the loss of held-out ones, as shares of the base's:
of the tiny base, at the demo's learning rate. A rough fit: with two seeds 25 and 26 passes over 2 clips, 26 and 26 over
4, 18 and 20 over 8 (benchmarks/memorising.py).
"""

Mean = tuple[float, float | None]
"""A mean, and how far its interval of 95 % goes on both sides (None: unknown)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured after each of `steps`, at least one: held-out loss, its intervals, paired by clip, against the
    lowest of these and against the base; what held-out clips gained less than those trained on (`gap`), drift, and
    diversity over seeds as a share of the base's (None: not sampled yet), where they were measured.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    minus_best: Sequence[Mean]
    minus_base: Sequence[Mean]
    gap: Sequence[Mean] = ()
    drift: Sequence[float] = ()
    diversity: Sequence[float | None] = ()

    def outside(self, place: int) -> str:
        """Which band the step at this place has left, in words; '' where it is in all that were measured."""
        if self.drift and self.drift[place] > DRIFT_BAND:
            return (f"drift is {self.drift[place]:.2f}, above {DRIFT_BAND:g}: from about there on prompts that have "
                    "nothing to do with the training are no longer followed, as measured of the tiny base alone")
        share = self.diversity[place] if self.diversity else None
        if share is not None and share < DIVERSITY_BAND:
            return (f"seeds differ {share:.2f} times as much as the base's, below {DIVERSITY_BAND:g}: one prompt gives "
                    "much the same video whatever the seed, as the tiny base does once it knows its clips by heart")
        return ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best step; the first and the last of the range around it that can be used (None: it has not ended), and from
    where clips are expected to be known by heart.
    """

    best: int
    first: int
    last: int | None
    memorised_from: int | None
    sentences: list[str]


def memorised_from(num_clips: int, samples_per_step: float) -> int:
    """The step from which so many clips are expected to be known by heart, which takes as many passes over few as over
    many (Bonnaire et al. 2025).
    """
    return round(MEMORISED_PASSES * num_clips / samples_per_step)


def verdict(of: Measured, memorised: int | None = None) -> Verdict:
    """The range: the steps around the best one whose held-out loss cannot be told from it, as far as drift and
    diversity are in their bands; the best is of these. It has ended where a later step was measured outside.
    """
    places = range(len(of.steps))
    in_band = [place for place in places if not of.outside(place)]
    best = min(in_band or places, key=lambda place: of.losses[place])
    usable = {place for place in in_band if not is_above(of.minus_best[place])} | {best}
    first = last = best
    while first - 1 in usable:
        first -= 1
    while last + 1 in usable:
        last += 1
    after = last + 1 if last + 1 < len(of.steps) else None
    return Verdict(of.steps[best], of.steps[first], None if after is None else of.steps[last], memorised,
                   [*_of_range(of, best, first, last), _of_end(of, best, after), *_of_overfitting(of),
                    *_of_memorising(memorised)])


def is_above(mean: Mean) -> bool:
    """Whether the whole interval is above 0."""
    value, half = mean
    return half is not None and math.isfinite(half) and value - half > 0


def _of_range(of: Measured, best: int, first: int, last: int) -> list[str]:
    value, half = of.minus_base[best]
    spread = "" if half is None else f" +- {half:.4f}"
    doubt = "" if half is not None and value + half < 0 else ", which is no measured gain"
    steps = f"step {of.steps[first]}" if first == last else f"steps {of.steps[first]} to {of.steps[last]}"
    told = [f"Usable: {steps}. Held-out loss is lowest after step {of.steps[best]}, "
            f"{abs(value):.4f}{spread} {'below' if value < 0 else 'above'} the base{doubt}."]
    if outside := of.outside(best):
        told.append(f"No step has drift and diversity in their bands: after that one {outside}.")
    return told


def _of_end(of: Measured, best: int, after: int | None) -> str:
    if after is None:
        return "The range has not ended: later steps may be as good." + (
            "" if of.diversity else " Whether seeds still differ was not measured: samples in training with two of "
            "sampler.seeds tell.")
    if outside := of.outside(after):
        return f"After step {of.steps[after]} {outside}."
    return (f"After step {of.steps[after]} held-out loss is above its best by "
            f"{of.losses[after] - of.losses[best]:.4f}, and the interval is above 0.")


def _of_overfitting(of: Measured) -> list[str]:
    for step, gap in zip(of.steps, of.gap, strict=False):
        if is_above(gap):
            return [f"Overfitting shows from step {step}: clips that are trained on gain more than held-out ones, by "
                    f"{gap[0]:.4f} +- {gap[1]:.4f}."]
    return []


def _of_memorising(memorised: int | None) -> list[str]:
    if memorised is None:
        return []
    return [f"Clips would be known by heart from about step {memorised} ({MEMORISED_PASSES} passes over each), as "
            "the tiny base roughly did at the demo's learning rate; of other bases it was not measured."]
