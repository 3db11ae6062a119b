"""An exponential moving average of the adapter, beside the training: it never feeds back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator

from wantrain.engine.states import parameters_of, whole


def decay_at(step: int, decay: float) -> float:
    """The decay of step `step` (from 1): the usual warm-up min(decay, (1 + step) / (10 + step)).

    So that the average leaves the start, where an adapter has no effect, within a few steps, whatever the decay.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Whole float32 averages by parameter's name, on the device, the same on every process.

    Each process keeps its own from the values that all of them share after a step, so no engine has to send any:
    under ZeRO-3 and FSDP2 alone the adapter is gathered at each step.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, decay: float) -> None:
        self._accelerator, self._parameters, self._decay = accelerator, parameters_of(accelerator, model), decay
        with whole(accelerator, self._parameters) as values:
            self.tensors = {name: value.float().clone() for name, value in values.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- average + (1 - decay) (value - average), after step `step` (from 1). Every process must call it.
        """
        share = 1 - decay_at(step, self._decay)
        with whole(self._accelerator, self._parameters) as values:
            for name, average in self.tensors.items():
                average.lerp_(values[name], share)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put averages back, by name."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
