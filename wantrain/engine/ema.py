"""An average of the adapter over its steps, beside the training: it never feeds back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator

from wantrain.engine.states import parameters_of, whole


def share_at(step: int, mean_age: float) -> float:
    """What of the average the values of step `step` (from 1) become.

    So each step counts as step^g in the average, whose mean age is 1 / (g + 2) of the steps so far (Karras et al. 2024,
    section 3.1: a power function). It needs no length of the training, and forgets the start, where an adapter has no
    effect, at any length.
    """
    return 1 - (1 - 1 / step) ** (1 / mean_age - 1)


class Ema:
    """Whole float32 averages by parameter's name, on the device, the same on every process.

    Each process keeps its own from the values that all of them share after a step, so no engine has to send any:
    under ZeRO-3 and FSDP2 alone the adapter is gathered at each step.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, mean_age: float) -> None:
        self._accelerator, self._parameters, self._mean_age = accelerator, parameters_of(accelerator, model), mean_age
        with whole(accelerator, self._parameters) as values:
            self.tensors = {name: value.float().clone() for name, value in values.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the values after step `step` (from 1). Every process must call it."""
        share = share_at(step, self._mean_age)
        with whole(self._accelerator, self._parameters) as values:
            for name, average in self.tensors.items():
                average.lerp_(values[name], share)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put averages back, by name."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
