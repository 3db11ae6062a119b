"""Sampling: one loop for every task.

The scheduler, VAE and encoders are those of diffusers and transformers. The loop is ours because what a task gives the
transformer must be what training gave it (wantrain.models.conditioning), and because Fun-Control has no pipeline;
tests/parity/test_tasks.py holds it against diffusers' pipeline of every task that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from wantrain import flow, lora
from wantrain.models import caching, conditioning
from wantrain.models.conditioning import Encoders, Frames
from wantrain.models.encode import pad_text, predict_velocity
from wantrain.models.profiles import PROFILES, Solver, Steps
from wantrain.models.variants import Variant
from wantrain.terms import NUM_TIMESTEPS, Bucket


@dataclass(frozen=True, slots=True)
class Settings:
    """How to denoise: steps, classifier-free guidance scale, timestep shift, size, negative prompt.

    `guidance` is (low noise, high noise); where there is one transformer the first counts. `strength` is how much of
    the schedule a video that is given to start from goes through (Meng et al. 2022, SDEdit). `profile` is the tool
    whose sigmas and noise these are (PROFILES); `solver` one of its solvers, None for its own choice.
    `first_block_cache` is the threshold of wantrain.models.caching, None for none.
    """

    num_steps: int
    guidance: tuple[float, float]
    shift: float
    bucket: Bucket
    negative_prompt: str
    strength: float = 1.0
    profile: str = "official"
    solver: str | None = None
    first_block_cache: float | None = None

    @property
    def num_steps_from_video(self) -> int:
        """The number of steps that remain where sampling starts from a video."""
        return int(self.num_steps * self.strength)

    @property
    def tool_solver(self) -> Solver:
        """The solver as the profile's tool runs it."""
        return PROFILES[self.profile].solver(self.solver)

    @property
    def sigmas(self) -> np.ndarray:
        """Where the steps begin, and where the last one ends: float64, one more than steps."""
        return self.tool_solver.sigmas(self.num_steps, self.shift)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Loaded parts: one transformer, or (high, low) noise; what gives a caption's features; VAE and CLIP tower.

    `dtype` is what the transformers are stored in and are given. Where `in_turn`, the device has no room for both: the
    one that does not work waits in the memory of the host.
    """

    variant: Variant
    transformers: Sequence[torch.nn.Module]
    text: Callable[[str], torch.Tensor]
    encoders: Encoders
    dtype: torch.dtype
    in_turn: bool = False

    @property
    def device(self) -> torch.device:
        """Where all of it works."""
        return self.encoders.vae.device

    def at(self, timestep: float) -> tuple[torch.nn.Module, bool]:
        """(the transformer for this timestep, True where it is the low noise expert or the only transformer)."""
        if self.variant.is_high(timestep):
            return self.transformers[0], self.variant.boundary is None
        return self.transformers[1], True

    def put_to_work(self, transformer: torch.nn.Module) -> None:
        """Bring it to the device, where the others make room first."""
        for other in self.transformers if self.in_turn else ():
            if other is not transformer:
                other.to("cpu")
        if self.in_turn:
            transformer.to(self.device)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a sample is made from besides its prompt, as pixels of the sample's size: `frames` by the names of
    wantrain.models.conditioning, `video` frames_FCHW to start from.
    """

    frames: Frames = field(default_factory=dict)
    video: torch.Tensor | None = None


def set_strength(pipeline: Pipeline, strength: float) -> None:
    """Scale the loaded LoRAs; 0 computes as the base."""
    for transformer in pipeline.transformers:
        lora.set_strength(transformer, strength)


@torch.no_grad()
def sample(pipeline: Pipeline, prompt: str, seed: int, settings: Settings, inputs: Inputs | None = None
           ) -> torch.Tensor:
    """One video, frames_FCHW uint8. The same seed starts from the same noise as in the tool of the settings' profile.

    FloatingPointError where the latents, or what the VAE makes of them, are not finite.
    """
    noise, given = begin(pipeline, prompt, seed, settings, inputs or Inputs())
    return finish(pipeline, settings, denoise(pipeline, settings, noise, given))


def begin(pipeline: Pipeline, prompt: str, seed: int, settings: Settings, inputs: Inputs
          ) -> tuple[torch.Tensor, DenoisingInputs]:
    """The noise of a seed, and all that denoising works from."""
    device = pipeline.device
    bucket, variant = settings.bucket, pipeline.variant
    shape = (variant.architecture.out_channels, *variant.latent_THW(bucket))
    clean = torch.zeros(shape) if inputs.video is None else pipeline.encoders.latents(inputs.video)
    first = inputs.frames.get("first")
    if first is not None:
        clean[:, :1] = pipeline.encoders.latents(first)
    encoded = conditioning.encode(variant, pipeline.encoders, inputs.frames, bucket)
    condition, clean, known_T = conditioning.arrange(variant, encoded, clean, first is not None, pipeline.text)
    drawn_on = device if PROFILES[settings.profile].draws_on_device else torch.device("cpu")
    noise = torch.randn(1, *clean.shape, device=drawn_on, generator=torch.Generator(drawn_on).manual_seed(seed))
    return noise.to(device), DenoisingInputs(
        clean.to(device)[None], known_T.to(device)[None] if known_T is not None else None,
        {name: tensor.to(device)[None] for name, tensor in condition.items()},
        [pad_text(pipeline.text(text)).to(device, pipeline.dtype)[None]
         for text in (prompt, settings.negative_prompt)], inputs.video is not None)


def finish(pipeline: Pipeline, settings: Settings, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """The frames_FCHW of the first denoised latents, without what stands before them."""
    num_before = latents_BCTHW.shape[2] - pipeline.variant.latent_THW(settings.bucket)[0]
    return pipeline.encoders.frames(latents_BCTHW[0, :, num_before:])


@dataclass(frozen=True, slots=True)
class DenoisingInputs:
    """What denoising works from, on the device: clean latents and which frames of them are known, the condition, the
    texts (prompt, negative prompt), and whether it starts from the clean latents.
    """

    clean_BCTHW: torch.Tensor
    known_BT: torch.Tensor | None
    condition: Mapping[str, torch.Tensor]
    texts_BLD: Sequence[torch.Tensor]
    from_video: bool

    def keep(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Put the clean values of the known frames back into the latents."""
        if self.known_BT is None:
            return latents_BCTHW
        return torch.where(self.known_BT[:, None, :, None, None] > 0, self.clean_BCTHW, latents_BCTHW)


def denoise(pipeline: Pipeline, settings: Settings, noise_BCTHW: torch.Tensor, given: DenoisingInputs) -> torch.Tensor:
    """Latents from noise, or from a video at the settings' strength; known frames stay as they are."""
    latents, _ = cached(pipeline, settings, noise_BCTHW, given)
    return latents


def cached(pipeline: Pipeline, settings: Settings, noise_BCTHW: torch.Tensor, given: DenoisingInputs
           ) -> tuple[torch.Tensor, float]:
    """(the latents of `denoise`, the share of passes that the settings' cache has saved)."""
    latents = noise_BCTHW
    with caching.first_block(pipeline.transformers, settings.first_block_cache) as passes:
        for after_a_step in denoising(pipeline, settings, noise_BCTHW, given):
            latents = after_a_step
    return latents, passes.saved


@torch.no_grad()
def cache_error(pipeline: Pipeline, prompt: str, seed: int, settings: Settings, inputs: Inputs) -> tuple[float, float]:
    """(how far the settings' cache moves the latents of a sample, as a share of their length; the share of passes that
    it saves there), by sampling both ways.
    """
    noise, given = begin(pipeline, prompt, seed, settings, inputs)
    latents, saved = cached(pipeline, settings, noise, given)
    plain = denoise(pipeline, replace(settings, first_block_cache=None), noise, given)
    return float((latents - plain).norm() / plain.norm()), saved


def denoising(pipeline: Pipeline, settings: Settings, noise_BCTHW: torch.Tensor, given: DenoisingInputs
              ) -> Iterator[torch.Tensor]:
    """The latents of `denoise` after each step, so that several samples can be denoised in turn: without a cache."""
    sigmas, latents = settings.sigmas, noise_BCTHW
    if given.from_video:
        sigmas = sigmas[settings.num_steps - settings.num_steps_from_video :]
        latents = flow.mix(given.clean_BCTHW, noise_BCTHW, torch.tensor(sigmas[:1], device=latents.device).float())
    latents = given.keep(latents)
    for steps in parts(pipeline.variant, settings, sigmas):
        for i, timestep in enumerate(steps.timesteps):
            velocity = velocity_at(pipeline, settings, timestep, latents, given)
            latents = given.keep(steps.step(velocity, i, latents))
            if not latents.isfinite().all():
                raise FloatingPointError(f"the latents are not finite at timestep {int(timestep)} of 1000")
            yield latents


def parts(variant: Variant, settings: Settings, sigmas: np.ndarray) -> list[Steps]:
    """The solver over all sigmas, or where the tool has a sampler for each expert, one over each expert's."""
    solver = settings.tool_solver
    first = sum(map(variant.is_high, solver.timesteps(sigmas[:-1])))
    if not PROFILES[settings.profile].restarts or first in (0, len(sigmas) - 1):
        return [Steps(solver, sigmas)]
    return [Steps(solver, sigmas[: first + 1]), Steps(solver, sigmas[first:])]


def velocity_at(pipeline: Pipeline, settings: Settings, timestep: float, latents: torch.Tensor, given: DenoisingInputs
                ) -> torch.Tensor:
    """The guided velocity of the transformer that works at this timestep, float32."""
    sigma = torch.full((len(latents),), timestep, device=latents.device) / NUM_TIMESTEPS
    if given.known_BT is not None:
        sigma = sigma[:, None] * (1 - given.known_BT)
    transformer, is_low = pipeline.at(timestep)
    pipeline.put_to_work(transformer)
    return guided(transformer, latents.to(pipeline.dtype), sigma, given, settings.guidance[0 if is_low else 1])


def guided(transformer: torch.nn.Module, latents: torch.Tensor, sigma: torch.Tensor, given: DenoisingInputs,
           guidance: float) -> torch.Tensor:
    """Velocity by classifier-free guidance (Ho & Salimans 2021), float32; at 1 or below the prompt alone."""
    prompt_BLD, negative_BLD = given.texts_BLD
    with caching.told(transformer, "prompt"):
        with_prompt = predict_velocity(transformer, latents, sigma, prompt_BLD, given.condition).float()
    if guidance <= 1:
        return with_prompt
    with caching.told(transformer, "negative prompt"):
        without = predict_velocity(transformer, latents, sigma, negative_BLD,
                                   conditioning.without_prompt(given.condition)).float()
    return without + guidance * (with_prompt - without)
