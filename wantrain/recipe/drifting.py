"""How far a LoRA moves what it was not trained for: its velocity against the base's, for captions that have nothing to
do with the training.

The base goes its own way from fixed noise, in Euler steps over the sigmas of validation, told such a caption; at each
sigma of that way both are asked. No clip's picture is in it, so what the LoRA should learn from those does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from wantrain import flow, lora
from wantrain.models.encode import autocast, pad_text, predict_velocity
from wantrain.recipe.samples import Encode
from wantrain.recipe.training import Training
from wantrain.terms import Sample
from wantrain.validation import SEED, HeldOut

Squares = list[list[float]]
"""Mean squares of a difference of velocities, by caption and sigma."""


@dataclass(frozen=True, slots=True)
class Way:
    """The base's way with one caption: what the transformer is told, where it was at each sigma, and its velocity."""

    text_LD: torch.Tensor
    states_SCTHW: torch.Tensor
    base_SCTHW: torch.Tensor


@dataclass(slots=True)
class Drift:
    """The ways of this process's captions, over `sigmas` from high to low. `scale` is what the base's own velocity
    changes when the caption is taken away.
    """

    training: Training
    sigmas: list[float]
    heldout: HeldOut
    sample: Sample
    num_captions: int
    ways: list[Way]
    scale: Squares

    def measure(self) -> Squares:
        """What the adapter as it is now changes; every process must call it."""
        squares = [[self.square(self.velocity(self.training.model, state, sigma, way.text_LD) - base)
                    for state, base, sigma in zip(way.states_SCTHW, way.base_SCTHW, self.sigmas, strict=True)]
                   for way in self.ways]
        return self.gathered(squares)

    def velocity(self, model: torch.nn.Module, state_CTHW: torch.Tensor, sigma: float, text_LD: torch.Tensor
                 ) -> torch.Tensor:
        """The model's velocity_CTHW there, float32 on the CPU."""
        device, dtype, known = self.training.device, self.training.recipe.dtype, self.sample.known_T
        sigma_B = torch.tensor([sigma])
        told = sigma_B if known is None else sigma_B[:, None] * (1 - known)
        condition = {name: tensor[None].to(device) for name, tensor in self.sample.condition.items()}
        with torch.no_grad(), autocast(device, dtype):
            return predict_velocity(model, state_CTHW[None].to(device, dtype), told.to(device),
                                    text_LD[None].to(device, dtype), condition)[0].float().cpu()

    def square(self, change_CTHW: torch.Tensor) -> float:
        """The mean square over the latent frames that are not given clean."""
        own = change_CTHW if self.sample.known_T is None else change_CTHW[:, self.sample.known_T == 0]
        return float(own.double().square().mean())

    def gathered(self, own: Squares) -> Squares:
        """The rows of all captions, from those of each process."""
        share = self.heldout.share
        values = share.gather(torch.tensor(own, dtype=torch.float64).flatten())
        rows = values.view(share.num_processes, -1, len(self.sigmas)).transpose(0, 1).flatten(0, 1)
        return rows[: self.num_captions].tolist()

    def start(self, captions: list[str], source: Encode) -> None:
        """Let the base go its ways."""
        unwrapped = self.training.accelerator.unwrap_model(self.training.model)
        empty, scale = pad_text(source.text("")), []
        with lora.switched_off(unwrapped):
            for caption in captions:
                text, state = pad_text(source.text(caption)), self.noise(caption)
                states, velocities, squares = [], [], []
                for sigma, following in zip(self.sigmas, [*self.sigmas[1:], 0.0], strict=True):
                    states.append(state)
                    velocities.append(self.velocity(unwrapped, state, sigma, text))
                    squares.append(self.square(velocities[-1] - self.velocity(unwrapped, state, sigma, empty)))
                    state = self.given(state + (following - sigma) * velocities[-1])
                self.ways.append(Way(text, torch.stack(states), torch.stack(velocities)))
                scale.append(squares)
        self.scale = self.gathered(scale)

    def noise(self, caption: str) -> torch.Tensor:
        """Where a caption's way begins: noise at the highest sigma, a function of the caption."""
        shape = self.sample.latents_CTHW.shape
        noise = torch.randn(*shape, generator=flow.generator_for(SEED, "drift", caption))
        return self.given(self.sigmas[0] * noise)

    def given(self, state_CTHW: torch.Tensor) -> torch.Tensor:
        """With the latent frames that the task is given clean."""
        if self.sample.known_T is None:
            return state_CTHW
        return torch.where(self.sample.known_T[None, :, None, None] > 0, self.sample.latents_CTHW, state_CTHW)


def open_drift(training: Training, source: Encode, heldout: HeldOut, max_rows: int) -> Drift | None:
    """Ready to measure on as many of validation.unrelated as the budget has rows for; None where there are none."""
    sigmas, captions = sorted(heldout.sigmas, reverse=True), training.config.validation.unrelated
    captions = captions[: max(1, max_rows // len(sigmas))]
    if not captions:
        return None
    px = training.recipe.variant.multiple_px
    smallest = min(range(len(heldout.clips)), key=lambda place: heldout.clips[place].bucket.num_tokens(px))
    mine = [number for (number, _, _), in heldout.share.of([[(number, 0, 0)] for number in range(len(captions))])]
    made = Drift(training, sigmas, heldout, heldout.sample(smallest), len(captions), [], [])
    made.start([captions[number] for number in mine], source)
    return made


def shares(squares: Squares, scale: Squares) -> tuple[list[float], float]:
    """(drift at each sigma, drift over all): the root of what changed over what taking the captions away changes."""
    def root(above: float, below: float) -> float:
        return math.sqrt(above / below) if below else math.nan

    changed, whole = ([sum(row[s] for row in own) for s in range(len(own[0]))] for own in (squares, scale))
    return [root(*pair) for pair in zip(changed, whole, strict=True)], root(sum(changed), sum(whole))
