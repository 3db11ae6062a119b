"""How each tool samples: the sigmas of its steps, its solvers, and where its noise is drawn.

A tool is a row of PROFILES, so that a seed gives here what it gives there. The solvers are those of diffusers. Sources:
docs/facts.md, "Sampler"; tests/parity/test_profiles.py holds every grid and every solver against other arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wantrain import flow
from wantrain.models.variants import Task, Variant
from wantrain.terms import NUM_TIMESTEPS

Grid = Callable[[int, float], np.ndarray]
"""(number of steps, shift) -> where the steps begin, before the shift, from high to low noise: float64."""

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SMALLEST = 1 / NUM_TIMESTEPS


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver as one tool runs it.

    `comfy_name` is what ComfyUI calls it. `last` is the sigma at which it ends. With `is_exploding` it counts steps in
    -log sigma instead of log((1 - sigma) / sigma), as k-diffusion and ComfyUI do whatever the model; diffusers' class
    does so for samples scaled by 1 / sqrt(1 + sigma^2), of which the velocity is the noise.
    """

    scheduler: type[Any]
    options: Mapping[str, object]
    grid: Grid
    whole_timesteps: bool = True
    is_exploding: bool = False
    last: float = 0.0
    comfy_name: str = ""

    def sigmas(self, num_steps: int, shift: float) -> np.ndarray:
        """Where the steps begin, and where the last one ends: float64, one more than steps."""
        before = self.grid(num_steps, shift)
        sigmas = shift * before / (1 + (shift - 1) * before)
        if self.scheduler is UniPCMultistepScheduler and not self.is_exploding:
            sigmas = np.minimum(sigmas, 1 - 1e-6)  # as diffusers: log((1 - sigma) / sigma) must be finite
        return np.append(sigmas, self.last)

    def timesteps(self, sigmas: Sequence[float] | np.ndarray) -> list[float]:
        """What the model is told at each of these sigmas."""
        return [float(int(NUM_TIMESTEPS * s)) if self.whole_timesteps else float(NUM_TIMESTEPS * s) for s in sigmas]


@dataclass(frozen=True, slots=True)
class Profile:
    """A tool: its solvers, of which the first is its own choice; its shift of each task, None for the variant's.

    `draws_on_device`: its noise comes from the accelerator's generator, and not from the CPU's. `restarts`: it has one
    sampler for each expert, and a solver forgets at the boundary what it has seen.
    """

    solvers: Mapping[str, Solver]
    shift: float | None = None
    shifts: Mapping[Task, float] = field(default_factory=dict)
    draws_on_device: bool = False
    restarts: bool = False

    def shift_of(self, variant: Variant) -> float:
        """The shift with which the tool samples a variant unless told otherwise."""
        return self.shifts.get(variant.task, variant.shift if self.shift is None else self.shift)

    def solver(self, name: str | None) -> Solver:
        """The solver of that name, or the tool's own choice."""
        return self.solvers[name or next(iter(self.solvers))]


def _down_to_0(highest: float) -> Grid:
    return lambda num_steps, shift: np.linspace(highest, 0, num_steps + 1)[:-1]


def _official(num_steps: int, shift: float) -> np.ndarray:
    return np.array(flow.inference_sigmas(num_steps))


def _diffusers_unipc(num_steps: int, shift: float) -> np.ndarray:
    return np.linspace(1, SMALLEST, num_steps + 1)[:-1]


def _diffusers_euler(num_steps: int, shift: float) -> np.ndarray:
    """diffusers shifts the ends here, and all again afterwards."""
    return np.linspace(1, shift * SMALLEST / (1 + (shift - 1) * SMALLEST), num_steps)


def _comfy_simple(num_steps: int, shift: float) -> np.ndarray:
    """Every so many of 1000 sigmas, cut to whole numbers: the scheduler that ComfyUI calls `simple`."""
    stride = NUM_TIMESTEPS / num_steps
    return 1 - np.array([int(i * stride) for i in range(num_steps)]) / NUM_TIMESTEPS


def _comfy_unipc(num_steps: int, shift: float) -> np.ndarray:
    """ComfyUI takes one step more of its grid, and leaves the last out."""
    return _comfy_simple(num_steps + 1, shift)[:-1]


_EPSILON = {"prediction_type": "epsilon"}
_UNIPC, _DPMPP, _EULER = UniPCMultistepScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

PROFILES = {
    "official": Profile({"unipc": Solver(_UNIPC, FLOW, _official), "dpmpp": Solver(_DPMPP, FLOW, _down_to_0(1.0))},
                        draws_on_device=True),
    "comfy": Profile({
        "euler": Solver(_EULER, {}, _comfy_simple, False, comfy_name="euler"),
        "unipc": Solver(_UNIPC, {**_EPSILON, "solver_order": 3, "solver_type": "bh1"}, _comfy_unipc, False, True,
                        SMALLEST, comfy_name="uni_pc"),
        "dpmpp": Solver(_DPMPP, {**_EPSILON, "lower_order_final": False}, _comfy_simple, False, True,
                        comfy_name="dpmpp_2m"),
    }, shift=8.0, restarts=True),
    "diffusers": Profile({
        "unipc": Solver(_UNIPC, FLOW, _diffusers_unipc),
        "dpmpp": Solver(_DPMPP, FLOW, _down_to_0(1 - SMALLEST)),
        "euler": Solver(_EULER, {}, _diffusers_euler, False),
    }, shift=3.0, shifts={"flf2v": 16.0, "ti2v": 5.0, "animate": 5.0, "animate2": 5.0}),
}


class Steps:
    """A solver about to go from the first of `sigmas` to the last, by their timesteps."""

    def __init__(self, solver: Solver, sigmas: np.ndarray) -> None:
        options = dict(solver.options)
        if solver.scheduler is _DPMPP and sigmas[-1] > 0:
            options["final_sigmas_type"] = "sigma_min"  # else its last step is of order 1
        self._scheduler = solver.scheduler(**options)
        self._is_exploding = solver.is_exploding
        self.sigmas, self.timesteps = torch.from_numpy(sigmas).float(), solver.timesteps(sigmas[:-1])
        self._scheduler.set_timesteps(len(self.timesteps))
        self._scheduler.sigmas, self._scheduler.timesteps = self.sigmas, torch.tensor(self.timesteps)
        self._scheduler.set_begin_index(0)

    def step(self, velocity: torch.Tensor, i: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents at sigma i + 1, from those at sigma i and their velocity there; float32, any shape."""
        before, after = (1 + self.sigmas[i : i + 2].square()).rsqrt() if self._is_exploding else torch.ones(2)
        stepped: torch.Tensor = self._scheduler.step(velocity, self._scheduler.timesteps[i], latents * before,
                                                     return_dict=False)[0]
        return stepped / after
