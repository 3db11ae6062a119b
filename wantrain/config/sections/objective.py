"""The loss: how sigma is drawn, what is compared, and the losses on clips never trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from wantrain.config.sections.parts import FloatAbove0, FloatFrom0, IntFrom0, Rule, Section, Share
from wantrain.density import Density
from wantrain.models.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from wantrain.config.schema import Config


class Distribution(Enum):
    uniform = "uniform"
    logit_normal = "logit_normal"
    mode = "mode"
    beta = "beta"


class LossKind(Enum):
    mse = "mse"
    huber = "huber"
    pseudo_huber = "pseudo_huber"


class Weighting(Enum):
    none = "none"
    sigma_sqrt = "sigma_sqrt"
    cosmap = "cosmap"
    min_snr = "min_snr"
    bell = "bell"


@dataclass(slots=True)
class Sigma(Section):
    distribution: Distribution | None = None
    """How sigma is drawn before the shift: uniform, logit_normal, mode or beta (docs/losses.md says when which); null:
    uniform, but logit_normal and no shift for text-to-video with one transformer."""
    shape: list[float] = field(default_factory=list)
    """logit_normal: [mean, std]; mode: [scale]; beta: [alpha, beta]; empty takes [0, 1], [1.29], [2, 2]."""
    shift: FloatAbove0 | None = None
    """Timestep shift of the draw; null takes the variant's inference shift."""
    by_resolution: bool = False
    """Multiply the shift by sqrt(tokens of the bucket / tokens of the model's native size)."""
    range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """[low, high) of the sigmas that are drawn; an expert's own range narrows it."""

    def drawn(self, variant: Variant) -> tuple[str, float]:
        """The name of the distribution and the shift after it, of a training of this variant."""
        is_plain = self.distribution is None and variant.task == "t2v" and not variant.experts
        distribution = self.distribution or (Distribution.logit_normal if is_plain else Distribution.uniform)
        return distribution.name, self.shift or (1.0 if is_plain else variant.shift)

    def rules(self, config: Config) -> Iterator[Rule]:
        yield len(self.range) == 2 and 0 <= self.range[0] < self.range[1] <= 1, "sigma.range", self.range, \
            "[low, high] in [0, 1]: sigma, and not timesteps (sigma = timestep / 1000)"
        name, _ = self.drawn(VARIANTS[config.model.variant])
        if name == "uniform" and not self.shape and self.range == [0, 1]:
            return  # right with every shift
        try:
            Density(name, tuple(self.shape), 1.0 if self.shift is None else self.shift,
                    (self.range[0], self.range[1]))
        except ValueError as error:
            yield False, "sigma", {"shape": self.shape, "shift": self.shift, "range": self.range}, str(error)


@dataclass(slots=True)
class Loss(Section):
    kind: LossKind = LossKind.mse
    """mse, huber or pseudo_huber; the last two count far outliers less."""
    delta: FloatAbove0 = 0.1
    """Error from which huber and pseudo_huber grow linearly."""
    weighting: Weighting = Weighting.none
    """Weight by sigma: none, sigma_sqrt, cosmap, min_snr or bell."""
    min_snr_gamma: FloatAbove0 = 5.0
    """Where min_snr cuts the signal-to-noise ratio."""
    mask_background: Share = 0.0
    """Weight of the loss outside a clip's mask, 1 inside; clips without a mask count everywhere."""
    mask_preserve: FloatFrom0 = 0.0
    """Weight of what is outside a clip's mask to be as the frozen base predicts it; 0 leaves it free to change."""
    class_words: str | None = None
    """What the trigger is one of (`cartoon`): captions with these instead of it must give what the base gives."""
    class_weight: FloatAbove0 = 1.0
    """Weight of that loss (differential output preservation) beside the clip's own."""

    def rules(self, config: Config) -> Iterator[Rule]:
        yield not self.class_words or bool(config.data.trigger), "loss.class_words", self.class_words, \
            "only with data.trigger, in whose place they stand"


UNRELATED = ("a bowl of oranges on a wooden table", "waves breaking on a rocky shore", "a city street in the rain",
             "a person reading a newspaper")


@dataclass(slots=True)
class Validation(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    every_steps: IntFrom0 = 0
    """Steps between validation losses on data.heldout; 0 turns them off."""
    sigmas: list[float] | None = None
    """The fixed noise levels; null: the nine deciles of the sigmas that the task samples at (of each expert)."""
    unrelated: list[str] = field(default_factory=lambda: list(UNRELATED))
    """Captions that have nothing to do with the training, to measure how far it moves them; [] measures no drift."""
    budget_pct: FloatAbove0 = 5.0
    """Share of the run's forward passes to spend on it, in percent; the least is two clips and each sigma once."""

    def rules(self, config: Config) -> Iterator[Rule]:
        if self.sigmas is not None:
            yield bool(self.sigmas) and all(0 < s <= 1 for s in self.sigmas), "validation.sigmas", self.sigmas, \
                "in (0, 1]: sigma, and not timesteps"
            yield len(set(self.sigmas)) == len(self.sigmas), "validation.sigmas", self.sigmas, "each once"
        yield self.every_steps == 0 or config.data.heldout is not None, "validation.every_steps", self.every_steps, \
            "0 when data.heldout is not set"
        yield all(text.strip() for text in self.unrelated), "validation.unrelated", self.unrelated, \
            "captions that are not empty"
