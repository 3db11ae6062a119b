"""What to train of a product of settings within a budget, and what the held-out losses say. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from wantrain import validation
from wantrain.terms import UserError
from wantrain.validation import Interval

FEWEST_STEPS = 20
"""No round of a search trains shorter than this: after fewer steps the order of learning rates says nothing."""

Losses = Mapping[str, float]
"""Of one training: by held-out clip."""


@dataclass(frozen=True, slots=True)
class Round:
    """So many settings trained for so many steps with so many seeds; the better half goes on into the next round."""

    num_settings: int
    num_steps: int
    num_seeds: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What trainings take: seconds before and after the steps, seconds of a step, and how many run side by side."""

    beside_s: float
    step_s: float
    num_processes: int

    def seconds(self, rounds: Sequence[Round]) -> float:
        """Of all rounds; the last trains the default as well."""
        last = len(rounds) - 1
        return sum(math.ceil((own.num_settings + (i == last)) * own.num_seeds / self.num_processes)
                   * (self.beside_s + own.num_steps * self.step_s) for i, own in enumerate(rounds))


def rounds(num_settings: int, num_steps: int, num_seeds: int, num_halvings: int) -> list[Round]:
    """`num_halvings` rounds with one seed and a 2nd, 4th, ... of the steps, then what is left with all of both."""
    shorter = [Round(math.ceil(num_settings / 2**i), num_steps // 2 ** (num_halvings - i), 1)
               for i in range(num_halvings)]
    return [*shorter, Round(math.ceil(num_settings / 2**num_halvings), num_steps, num_seeds)]


def fitting(num_settings: int, num_steps: int, num_seeds: int, speed: Speed, budget_s: float) -> list[Round]:
    """The product where the budget holds it, else as few halvings as do. Raises UserError where none does."""
    halvings = [0, *(h for h in range(1, math.ceil(math.log2(max(1, num_settings))) + 1)
                     if num_steps // 2**h >= FEWEST_STEPS)]
    plans = [rounds(num_settings, num_steps, num_seeds, number) for number in halvings]
    for plan in plans:
        if speed.seconds(plan) <= budget_s:
            return plan
    least = min(map(speed.seconds, plans))
    raise UserError(f"{budget_s / 60:.1f} minutes are left and hold no search of {num_settings} settings, "
                    f"{num_steps} steps and {num_seeds} seeds: the shortest takes about {least / 60:.1f}",
                    f"--minutes {math.ceil(least / 60) + 1}, or fewer steps, seeds or values")


def scored(captions: Mapping[str, str], trigger: str) -> tuple[list[str], list[str]]:
    """(the held-out clips that a training is to learn, the plain ones), by the trigger in their captions."""
    learnt = [name for name, caption in captions.items() if trigger and trigger in caption]
    return (learnt, [name for name in captions if name not in learnt]) if learnt else (list(captions), [])


def mean(losses: Losses, clips: Sequence[str]) -> float:
    """The mean of these clips."""
    return sum(losses[name] for name in clips) / len(clips)


def better_half(found: Mapping[str, float], number: int) -> list[str]:
    """The settings with the least losses, the least first."""
    return sorted(found, key=found.__getitem__)[:number]


def change(now: Mapping[int, Losses], before: Mapping[int, Losses], clips: Sequence[str], num_compared: int = 1
           ) -> Interval:
    """How far the losses of one training moved from the other's, paired by seed and clip, over the seeds of both."""
    seeds = sorted(now.keys() & before.keys())
    return validation.crossed(torch.tensor([[now[seed][name] - before[seed][name] for name in clips]
                                            for seed in seeds], dtype=torch.float64), num_compared)
