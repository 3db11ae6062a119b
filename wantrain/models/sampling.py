"""Sampling through the diffusers pipeline, with a LoRA file of any format in its transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from wantrain import lora
from wantrain.models.lora_updates import read_adapter
from wantrain.terms import TEXT_LEN, Bucket

__all__ = ["Settings", "WanPipeline", "build", "load_lora", "sample", "set_strength", "transformers_of"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to denoise: steps, classifier-free guidance scale, timestep shift, size, negative prompt.

    `guidance` is (low noise, high noise); where there is one transformer the first counts.
    """

    num_steps: int
    guidance: tuple[float, float]
    shift: float
    bucket: Bucket
    negative_prompt: str


def build(transformers: Sequence[WanTransformer3DModel], vae: AutoencoderKLWan, text: WanPipeline,
          scheduler: UniPCMultistepScheduler, boundary: float | None = None) -> WanPipeline:
    """A full pipeline over parts that are already loaded: one transformer, or (high, low) and their boundary sigma."""
    second = transformers[1] if len(transformers) > 1 else None
    pipeline = WanPipeline(tokenizer=text.tokenizer, text_encoder=text.text_encoder, transformer=transformers[0],
                           transformer_2=second, boundary_ratio=boundary, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformers_of(pipeline: WanPipeline) -> list[WanTransformer3DModel]:
    """The one transformer, or the high and the low noise expert."""
    return [t for t in (pipeline.transformer, pipeline.transformer_2) if t is not None]


def load_lora(transformer: WanTransformer3DModel, path: Path) -> None:
    """Put a LoRA file of any format into a transformer, as an adapter that `set_strength` scales.

    Raises UserError for a file that is damaged, of another variant, or more than an adapter.
    """
    lora.attach(transformer, read_adapter(path, transformer))


def set_strength(pipeline: WanPipeline, strength: float) -> None:
    """Scale the loaded LoRAs; 0 computes as the base."""
    for transformer in transformers_of(pipeline):
        lora.set_strength(transformer, strength)


@torch.no_grad()
def sample(pipeline: WanPipeline, prompt: str, seed: int, settings: Settings) -> torch.Tensor:
    """One video, frames_FCHW uint8. The same seed starts from the same noise on every device."""
    has_two = pipeline.transformer_2 is not None
    low, high = settings.guidance if has_two else (settings.guidance[0],) * 2
    video_BFHWC = pipeline(
        prompt=prompt, negative_prompt=settings.negative_prompt, height=settings.bucket.height,
        width=settings.bucket.width, num_frames=settings.bucket.num_frames, num_inference_steps=settings.num_steps,
        guidance_scale=high, guidance_scale_2=low if has_two else None, generator=torch.Generator().manual_seed(seed),
        max_sequence_length=TEXT_LEN, output_type="np",
    ).frames
    return (torch.from_numpy(video_BFHWC[0]).movedim(-1, 1).clamp(0, 1) * 255).round().to(torch.uint8)
