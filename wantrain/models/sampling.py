"""Sampling through the diffusers pipeline, with a LoRA file of any format in its transformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from wantrain import lora
from wantrain.models.lora_updates import read_adapter
from wantrain.terms import TEXT_LEN, Bucket

__all__ = ["Settings", "WanPipeline", "build", "load_lora", "sample"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to denoise: steps, classifier-free guidance scale, timestep shift, size, negative prompt."""

    num_steps: int
    guidance: float
    shift: float
    bucket: Bucket
    negative_prompt: str


def build(transformer: WanTransformer3DModel, vae: AutoencoderKLWan, text: WanPipeline,
          scheduler: UniPCMultistepScheduler) -> WanPipeline:
    """A full pipeline over parts that are already loaded."""
    pipeline = WanPipeline(tokenizer=text.tokenizer, text_encoder=text.text_encoder, transformer=transformer, vae=vae,
                           scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_lora(pipeline: WanPipeline, path: Path) -> None:
    """Put a LoRA file of any format into the transformer, as an adapter that `lora.set_strength` scales.

    Raises UserError for a file that is damaged, of another variant, or more than an adapter.
    """
    lora.attach(pipeline.transformer, read_adapter(path, pipeline.transformer))


@torch.no_grad()
def sample(pipeline: WanPipeline, prompt: str, seed: int, settings: Settings) -> torch.Tensor:
    """One video, frames_FCHW uint8. The same seed starts from the same noise on every device."""
    video_BFHWC = pipeline(
        prompt=prompt, negative_prompt=settings.negative_prompt, height=settings.bucket.height,
        width=settings.bucket.width, num_frames=settings.bucket.num_frames, num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance, generator=torch.Generator().manual_seed(seed),
        max_sequence_length=TEXT_LEN, output_type="np",
    ).frames
    return (torch.from_numpy(video_BFHWC[0]).movedim(-1, 1).clamp(0, 1) * 255).round().to(torch.uint8)
