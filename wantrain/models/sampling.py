"""Sampling through the diffusers pipeline, with an exported LoRA file as a user would load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open

from wantrain.terms import TEXT_LEN, Bucket, UserError

__all__ = ["Settings", "WanPipeline", "build", "load_lora", "lora_metadata", "sample", "set_strength"]


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
    """Load a LoRA file; refuse when it leaves the transformer as it was (diffusers only warns)."""
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="lora")
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{path} does not load as a LoRA of this transformer: {error}",
                        "check that the file was trained on this base, or export it again: wantrain export"
                        ) from error
    if not any("lora_B" in name for name, _ in pipeline.transformer.named_parameters()):
        raise UserError(f"{path} changed nothing in the transformer: its tensor names are not Wan's",
                        "export it again: wantrain export ...")


def set_strength(pipeline: WanPipeline, strength: float) -> None:
    """Scale the loaded LoRA; 0 computes as the base."""
    if strength == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters(["lora"], [strength])


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


def lora_metadata(path: Path) -> dict[str, str]:
    """The header of a LoRA file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
