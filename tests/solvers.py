"""Solvers of the flow's ODE in float64, written from their papers: what the sampler must give with diffusers'.

A sample at sigma is alpha * clean + sigma * noise with alpha = 1 - sigma (the flow), or alpha = 1 where a tool takes it
for a variance exploding one. `velocity(x, sigma)` gives clean = x - sigma * velocity either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from wantrain.models import sampling
from wantrain.models.conditioning import Encoders
from wantrain.models.variants import VARIANTS

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def level(sigma: float, *, exploding: bool) -> float:
    """log(alpha / sigma)."""
    if sigma == 0:
        return math.inf
    alpha = 1.0 if exploding else 1 - sigma
    return math.log(alpha / sigma) if alpha else -math.inf


def euler(velocity: Velocity, noise: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    x = noise.double()
    for sigma, then in pairwise(sigmas):
        x = x + (then - sigma) * velocity(x, sigma)
    return x


def dpmpp(velocity: Velocity, noise: torch.Tensor, sigmas: Sequence[float], *, exploding: bool = False) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); a step to sigma 0 is of order 1."""
    x, levels, cleans = noise.double(), [level(s, exploding=exploding) for s in sigmas], []
    for i, (sigma, then) in enumerate(pairwise(sigmas)):
        cleans.append(x - sigma * velocity(x, sigma))
        h, clean = levels[i + 1] - levels[i], cleans[-1]
        if i and then:
            clean = clean + (cleans[-1] - cleans[-2]) * h / (levels[i] - levels[i - 1]) / 2
        x = then / sigma * x + (1.0 if exploding else 1 - then) * -math.expm1(-h) * clean
    return x


def unipc(velocity: Velocity, noise: torch.Tensor, sigmas: Sequence[float], *, order: int = 2, exploding: bool = False,
          bh1: bool = False) -> torch.Tensor:
    """UniPC (Zhao et al. 2023), which predicts with the last `order` clean predictions and corrects with one more; the
    first and the last steps are of lower order.
    """
    def step(x: torch.Tensor, window: Sequence[float], seen: Sequence[torch.Tensor], here: int) -> torch.Tensor:
        """To the last of the window; `seen` are predictions at its beginning, of which `here` is where x is."""
        levels = [level(s, exploding=exploding) for s in window]
        h, alpha = levels[-1] - levels[here], 1.0 if exploding else 1 - window[-1]
        moved = window[-1] / window[here] * x
        if len(seen) == 1:
            return moved - alpha * math.expm1(-h) * seen[0]
        places = [(lv - levels[here]) / h for lv in levels[: len(seen)]]
        if len(seen) == 2:  # one difference, which counts half times B(h): the paper's remark on orders 1 and 2
            other = 1 - here
            weight = (h if bh1 else -math.expm1(-h)) / 2 / places[other]
            return moved - alpha * (math.expm1(-h) * seen[here] - weight * (seen[other] - seen[here]))
        # else B(h) cancels: the integral over the step of the polynomial through the predictions, times e^level
        moments = [-math.expm1(-h)]
        for k in range(1, len(seen)):
            moments.append(1 - k * moments[-1] / h)
        powers = torch.tensor([[place ** k for k in range(len(seen))] for place in places], dtype=torch.float64)
        weights = torch.linalg.solve(powers.T, torch.tensor(moments, dtype=torch.float64)).tolist()
        return moved + alpha * sum(w * clean for w, clean in zip(weights, seen, strict=True))

    x, cleans, before = noise.double(), [], None
    for i, sigma in enumerate(sigmas[:-1]):
        cleans.append(x - sigma * velocity(x, sigma))
        if before is not None:  # correct the step that led here, now that its end is known
            x = step(before[0], sigmas[i - before[1] : i + 1], cleans[-before[1] - 1 :], before[1] - 1)
        used = min(order, i + 1, len(sigmas) - 1 - i)
        before = (x, used)
        x = step(x, sigmas[i - used + 1 : i + 2], cleans[-used:], used - 1)
    return x


class Field(torch.nn.Module):
    """A smooth velocity that bends, as a transformer: towards data that depends on where one is and on the timestep."""

    def __init__(self, centre=0.3):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(centre))
        self.told = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.told.append(float(timestep[0]))
        return (self.at(hidden_states, timestep.double()[0] / 1000).to(hidden_states.dtype),)

    def at(self, x, sigma):
        return x - self.scale.item() - 0.5 * torch.sin(2 * x + 3 * sigma)


def sampled(variant: str, models: Sequence[torch.nn.Module], settings: sampling.Settings, noise: torch.Tensor,
            film: torch.Tensor | None = None) -> torch.Tensor:
    """What the sampler makes of this noise with these models in the place of the variant's transformers."""
    pipeline = sampling.Pipeline(VARIANTS[variant], models, None, Encoders(None, None), torch.float32)
    texts = [torch.zeros(1, 4, 8)] * 2
    given = sampling.DenoisingInputs(noise if film is None else film, None, {}, texts, film is not None)
    with torch.no_grad():
        return sampling.denoise(pipeline, settings, noise, given)
