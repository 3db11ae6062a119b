"""Sampling: one loop for every task.

The scheduler, VAE and encoders are those of diffusers and transformers. The loop is ours because what a task gives the
transformer must be what training gave it (wantrain.models.conditioning), and because Fun-Control has no pipeline;
tests/parity/test_tasks.py holds it against diffusers' pipeline of every task that has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from wantrain import flow, lora
from wantrain.models import conditioning
from wantrain.models.conditioning import Encoders, Frames
from wantrain.models.encode import decode_latents, encode_frames, encode_text, pad_text, predict_velocity
from wantrain.models.variants import Variant
from wantrain.terms import NUM_TIMESTEPS, Bucket

UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True, slots=True)
class Settings:
    """How to denoise: steps, classifier-free guidance scale, timestep shift, size, negative prompt.

    `guidance` is (low noise, high noise); where there is one transformer the first counts. `strength` is how much of
    the schedule a video that is given to start from goes through (Meng et al. 2022, SDEdit).
    """

    num_steps: int
    guidance: tuple[float, float]
    shift: float
    bucket: Bucket
    negative_prompt: str
    strength: float = 1.0

    @property
    def num_steps_from_video(self) -> int:
        """The number of steps that remain where sampling starts from a video."""
        return int(self.num_steps * self.strength)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Loaded parts: one transformer, or (high, low) noise; tokenizer and text encoder; VAE and CLIP tower.

    `dtype` is what the transformers are stored in and are given.
    """

    variant: Variant
    transformers: Sequence[torch.nn.Module]
    text: WanPipeline
    encoders: Encoders
    dtype: torch.dtype

    def at(self, timestep: float) -> tuple[torch.nn.Module, bool]:
        """(the transformer for this timestep, True where it is the low noise expert or the only transformer)."""
        boundary = self.variant.boundary
        if boundary is None or timestep >= boundary * NUM_TIMESTEPS:
            return self.transformers[0], boundary is None
        return self.transformers[1], True


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a sample is made from besides its prompt, as pixels of the sample's size: `frames` by the names of
    wantrain.models.conditioning, `video` frames_FCHW to start from.
    """

    frames: Frames = field(default_factory=dict)
    video: torch.Tensor | None = None


def scheduler_for(shift: float, num_steps: int, device: torch.device | None = None) -> UniPCMultistepScheduler:
    """UniPC, the official sampler, with this timestep shift, about to denoise in `num_steps` at the official sigmas;
    diffusers' own grid, from 1 to 0.001, differs.
    """
    scheduler = UniPCMultistepScheduler.from_config(UNIPC, flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.array(flow.inference_sigmas(num_steps)), device=device)
    return scheduler


def set_strength(pipeline: Pipeline, strength: float) -> None:
    """Scale the loaded LoRAs; 0 computes as the base."""
    for transformer in pipeline.transformers:
        lora.set_strength(transformer, strength)


@torch.no_grad()
def sample(pipeline: Pipeline, prompt: str, seed: int, settings: Settings, inputs: Inputs | None = None
           ) -> torch.Tensor:
    """One video, frames_FCHW uint8. The same seed starts from the same noise on every device.

    FloatingPointError where the latents, or what the VAE makes of them, are not finite.
    """
    inputs = inputs or Inputs()
    device = next(pipeline.transformers[0].parameters()).device
    bucket, variant = settings.bucket, pipeline.variant
    shape = (variant.architecture.out_channels, *variant.latent_THW(bucket))
    clean = torch.zeros(shape) if inputs.video is None else encode_frames(pipeline.encoders.vae, inputs.video)
    first = inputs.frames.get("first")
    if first is not None:
        clean[:, :1] = encode_frames(pipeline.encoders.vae, first)
    encoded = conditioning.encode(variant, pipeline.encoders, inputs.frames, bucket)
    condition, clean, known_T = conditioning.arrange(variant, encoded, clean, first is not None)
    noise = torch.randn(1, *clean.shape, generator=torch.Generator().manual_seed(seed))
    given = DenoisingInputs(
        clean.to(device)[None], known_T.to(device)[None] if known_T is not None else None,
        {name: tensor.to(device)[None] for name, tensor in condition.items()},
        [pad_text(encode_text(pipeline.text, text)).to(device, pipeline.dtype)[None]
         for text in (prompt, settings.negative_prompt)], inputs.video is not None)
    latents = denoise(pipeline, settings, noise.to(device), given)
    num_before = clean.shape[1] - shape[1]
    return decode_latents(pipeline.encoders.vae, latents[0, :, num_before:])


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
    """Latents from noise by UniPC, or from a video at the settings' strength; known frames stay as they are."""
    scheduler = scheduler_for(settings.shift, settings.num_steps, noise_BCTHW.device)
    num_skipped = settings.num_steps - settings.num_steps_from_video if given.from_video else 0
    scheduler.set_begin_index(num_skipped)
    latents = noise_BCTHW
    if given.from_video:
        start = scheduler.sigmas[num_skipped].to(noise_BCTHW.device)
        latents = flow.mix(given.clean_BCTHW, noise_BCTHW, start.expand(1))
    for timestep in scheduler.timesteps[num_skipped:]:
        latents = given.keep(latents)
        sigma = (timestep.float() / NUM_TIMESTEPS).expand(len(latents))
        if given.known_BT is not None:
            sigma = sigma[:, None] * (1 - given.known_BT)
        transformer, is_low = pipeline.at(float(timestep))
        guidance = settings.guidance[0 if is_low else 1]
        velocity = guided(transformer, latents.to(pipeline.dtype), sigma, given, guidance)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if not latents.isfinite().all():
            raise FloatingPointError(f"the latents are not finite at timestep {int(timestep)} of 1000")
    return given.keep(latents)


def guided(transformer: torch.nn.Module, latents: torch.Tensor, sigma: torch.Tensor, given: DenoisingInputs,
           guidance: float) -> torch.Tensor:
    """Velocity by classifier-free guidance (Ho & Salimans 2021); at 1 or below the prompt alone."""
    prompt_BLD, negative_BLD = given.texts_BLD
    with_prompt = predict_velocity(transformer, latents, sigma, prompt_BLD, given.condition)
    if guidance <= 1:
        return with_prompt
    without = predict_velocity(transformer, latents, sigma, negative_BLD,
                               conditioning.without_prompt(given.condition))
    return without + guidance * (with_prompt - without)
