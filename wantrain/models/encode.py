"""Pixels to latents and back, captions to text features, and the transformer's one door."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import PreTrainedTokenizerBase

from wantrain.flow import timestep
from wantrain.models import vae as tiled
from wantrain.models.loading import let_go
from wantrain.models.vae import to_pixels
from wantrain.terms import TEXT_LEN, Bucket


def _mean_std(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
                 for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, frames_FCHW: torch.Tensor, limit_bytes: float = math.inf) -> torch.Tensor:
    """Pixels of one clip, uint8 or float32 in [-1, 1] -> latents_CTHW float32: (mode of the posterior - mean) / std.

    One clip at a time, so that a clip's latents do not depend on what else is encoded. In tiles where the whole would
    take more than `limit_bytes`: that changes no number beyond rounding.
    """
    given_BCFHW = frames_FCHW.to(vae.device).movedim(0, 1).unsqueeze(0)
    tiles = tiled.tiles_for(vae, Bucket(*given_BCFHW.shape[2:]), limit_bytes)
    latents_BCTHW = tiled.encode(vae, given_BCFHW, tiles).float()
    mean, std = _mean_std(vae, latents_BCTHW)
    return ((latents_BCTHW - mean) / std)[0].cpu()


def pool_mask(frames_FCHW: torch.Tensor, bucket: Bucket, spatial_px: int) -> torch.Tensor:
    """uint8 pixels of a mask (white: look here) -> mask_1THW float32 in [0, 1]: the mean over what each latent covers,
    spatial_px x spatial_px pixels of the first frame and then of every four. One frame stands for all.
    """
    mask_F1HW = frames_FCHW.float().mean(1, keepdim=True) / 255
    pooled_FHW = torch.nn.functional.avg_pool2d(mask_F1HW, spatial_px)[:, 0].expand(bucket.num_frames, -1, -1)
    later = pooled_FHW[1:].reshape(-1, 4, *pooled_FHW.shape[1:]).mean(1)
    return torch.cat([pooled_FHW[:1], later]).unsqueeze(0)


@torch.no_grad()
def decode_latents(vae: AutoencoderKLWan, latents_CTHW: torch.Tensor, limit_bytes: float = math.inf) -> torch.Tensor:
    """Normalised latents of one clip -> frames_FCHW uint8, in tiles as `encode_frames`. FloatingPointError where the
    VAE's answer is not finite.
    """
    latents_BCTHW = latents_CTHW.to(vae.device, torch.float32).unsqueeze(0)
    mean, std = _mean_std(vae, latents_BCTHW)
    given_BCTHW = (latents_BCTHW * std + mean).to(vae.dtype)
    tiles = tiled.tiles_for(vae, tiled.pixel_size(vae, given_BCTHW.shape[2:]), limit_bytes, decoding=True)
    frames_BCFHW, finite = tiled.decode(vae, given_BCTHW, tiles)
    if not finite:
        raise FloatingPointError("the VAE's pixels are not finite, though the latents are")
    return frames_BCFHW[0].movedim(0, 1).cpu()


@torch.no_grad()
def encode_text(text: WanPipeline, caption: str) -> torch.Tensor:
    """One caption -> text_LD of its true length, on the CPU, in the encoder's dtype. `pad_text` restores TEXT_LEN."""
    text_BLD, _ = text.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_LEN)
    used = text_BLD[0].ne(0).any(-1).nonzero()
    return text_BLD[0, : int(used.max()) + 1].cpu().clone()


class Texts:
    """Text features of captions, by a text encoder that is loaded for those not met before, and let go at once."""

    def __init__(self, load: Callable[[], WanPipeline]) -> None:
        self._load = load
        self._known: dict[str, torch.Tensor] = {}

    def prepare(self, captions: Iterable[str]) -> None:
        """Encode all of these together."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            text = self._load()
            self._known |= {caption: encode_text(text, caption) for caption in new}
            del text
            let_go()

    def __call__(self, caption: str) -> torch.Tensor:
        """text_LD of `encode_text`."""
        self.prepare([caption])
        return self._known[caption]


def pad_text(text_LD: torch.Tensor) -> torch.Tensor:
    """Zero-pad text features to TEXT_LEN tokens: the transformer attends to these zeros, so all of them are needed."""
    return torch.nn.functional.pad(text_LD, (0, 0, 0, TEXT_LEN - text_LD.shape[0]))


def count_tokens(tokenizer: PreTrainedTokenizerBase, caption: str) -> int:
    """Tokens of a caption, end mark included, before any truncation to TEXT_LEN."""
    return len(tokenizer(prompt_clean(caption)).input_ids)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """In the block, a bfloat16 base computes in bfloat16 (adapters stay float32); a float32 base is left alone."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


_ARGUMENTS = {"pose": "pose_hidden_states", "vace": "control_hidden_states", "reference": "reference_hidden_states",
              "audio": "audio_hidden_states", "driving": "driving_hidden_states", "driving_text": "driving_text"}
"""What a transformer calls the latents of a condition, a sound's features, and the text of a driving video."""

_TOKENS = {"image": "encoder_hidden_states_image", "driving_image": "driving_image"}
"""What it calls CLIP tokens."""


def predict_velocity(transformer: torch.nn.Module, noisy_BCTHW: torch.Tensor, sigma: torch.Tensor,
                     text_BLD: torch.Tensor, condition: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The transformer's velocity_BCTHW. The timestep, 1000 * sigma in float32, is formed here and nowhere else.

    `sigma` is sigma_B, or sigma_BT where latent frames differ: every token is then told its own timestep. `condition`
    is that of wantrain.models.conditioning, stacked.
    """
    given = dict(condition or {})
    more: dict[str, Any] = {}
    if (channels := given.get("channels")) is not None:
        noisy_BCTHW = torch.cat([noisy_BCTHW, channels.to(noisy_BCTHW.dtype)], dim=1)
    if (face := given.get("face")) is not None:
        more["face_pixel_values"] = to_pixels(face).to(noisy_BCTHW.dtype)
    if (camera := given.get("camera")) is not None:
        more["camera_hidden_states"] = camera  # float32: its rays are made of it
    if "unprompted" in given:
        more["unprompted"] = True
    more |= {argument: given[name].to(text_BLD.dtype).flatten(0, 1)  # diffusers' way with two images of a sample
             for name, argument in _TOKENS.items() if name in given}
    more |= {argument: given[name].to(noisy_BCTHW.dtype) for name, argument in _ARGUMENTS.items() if name in given}
    if sigma.ndim == 2:
        sigma = sigma.repeat_interleave(noisy_BCTHW.shape[3] * noisy_BCTHW.shape[4] // 4, dim=1)
    return transformer(hidden_states=noisy_BCTHW, timestep=timestep(sigma), encoder_hidden_states=text_BLD,
                       return_dict=False, **more)[0]
