"""The modules that Wan2.2-S2V adds to Wan, on diffusers' transformer: each under its official name.

Source: Wan2.2 `wan/modules/s2v` (docs/facts.md, "Sound"). tests/parity/test_speech.py holds the class against another
forward pass. What is not here: tokens of motion frames, by which a long video continues an earlier part. The first part
of a video is sampled, and DiffSynth trains, without them; their module, `frame_packer`, only keeps its weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.normalization import AdaLayerNorm
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from wantrain.models.variants import SpeechSizes

_PUBLISHED = SpeechSizes()

REFERENCE_PLACE = 30
"""The place in time of the reference's tokens; the video's begin at 0."""

BEFORE = 73, 19
"""Frames of the first sound that stand before the clip's for the causal convolutions, and the latent frames of these.
"""

VIDEO, REFERENCE = 0, 1
"""Rows of trainable_cond_mask; its third is for motion frames."""


class WanSpeechTransformer3DModel(WanTransformer3DModel):  # type: ignore[misc]
    """With `casual_audio_encoder` (sic), which makes tokens of each latent frame's sound; `audio_injector`, attention
    to them behind some blocks; `cond_encoder` for a pose; `trainable_cond_mask`, which tells a reference from video.
    """

    def __init__(self, *args: Any, audio_dim: int = _PUBLISHED.audio_dim, audio_states: int = _PUBLISHED.audio_states,
                 audio_tokens: int = _PUBLISHED.audio_tokens, audio_layers: Sequence[int] = _PUBLISHED.audio_layers,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_to_config(audio_dim=audio_dim, audio_states=audio_states, audio_tokens=audio_tokens,
                                audio_layers=list(audio_layers))
        patches, channels = self.patch_embedding, self.config.out_channels
        dim = patches.out_channels
        self.cond_encoder = torch.nn.Conv3d(channels, dim, patches.kernel_size, patches.stride)
        self.casual_audio_encoder = AudioEncoder(audio_states, audio_dim, audio_tokens, dim)
        self.audio_injector = AudioInjector(len(audio_layers), dim, self.config.num_attention_heads)
        self.trainable_cond_mask = torch.nn.Embedding(3, dim)
        self.frame_packer = FramePacker(channels, patches)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, *,
                audio_hidden_states: torch.Tensor, pose_hidden_states: torch.Tensor, return_dict: bool = False
                ) -> tuple[torch.Tensor]:
        """hidden_states [B, C, 1 + T, H, W], of which the first frame is the reference, clean; timestep [B] or one a
        token; audio_hidden_states [B, states, D, 4 T]; pose_hidden_states [B, C, T, H, W], zeros where there is none.
        Answers as diffusers' with return_dict=False, with zeros for the reference.
        """
        size = frames, height, width = [side // patch for side, patch in zip(hidden_states.shape[2:],
                                                                             self.config.patch_size, strict=True)]
        each = height * width
        whole, local = self.casual_audio_encoder(audio_hidden_states)
        kinds = self.trainable_cond_mask.weight
        tokens = self.patch_embedding(hidden_states)
        more = self.cond_encoder(pose_hidden_states) + kinds[VIDEO].view(-1, 1, 1, 1)
        reference = kinds[REFERENCE].view(-1, 1, 1, 1).expand_as(tokens[:, :, :1])
        x = (tokens + torch.cat([reference, more], dim=2)).flatten(2).transpose(1, 2).contiguous()
        told = timestep[:, -1] if timestep.ndim == 2 else timestep
        temb, rows, text, _ = self.condition_embedder(
            torch.stack([torch.zeros_like(told), told], dim=1).flatten(), encoder_hidden_states, timestep_seq_len=2)
        is_video = torch.arange(frames * each, device=x.device).ge(each).long()
        rows = rows.unflatten(2, (6, -1))[:, is_video]
        turns = self._turns(hidden_states, frames, each)
        saves = torch.is_grad_enabled() and self.gradient_checkpointing
        for number, block in enumerate(self.blocks):
            x = self._gradient_checkpointing_func(block, x, text, rows, turns) if saves else block(x, text, rows, turns)
            if number in self.config.audio_layers:
                own = self.config.audio_layers.index(number)
                x = checkpoint(self.audio_injector, own, x, whole, local, use_reentrant=False) \
                    if torch.is_grad_enabled() else self.audio_injector(own, x, whole, local)
        shift, scale = (self.scale_shift_table + temb[:, 1:]).chunk(2, dim=1)
        x = (self.norm_out(x.float()) * (1 + scale) + shift).type_as(x)
        cells = self.proj_out(x).unflatten(1, size).unflatten(-1, (*self.config.patch_size, -1))
        video = cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return (functional.pad(video[:, :, 1:], (0, 0, 0, 0, 1, 0)),)

    def _turns(self, like: torch.Tensor, frames: int, each: int) -> list[torch.Tensor]:
        """cos and sin of rotary embedding, of the reference at its place and of the video from 0 on."""
        most = max(REFERENCE_PLACE + 1, frames - 1)
        found = self.rope(like.new_empty(1, 1, most, *like.shape[3:]))
        places = [REFERENCE_PLACE, *range(frames - 1)]
        return [one.unflatten(1, (most, each))[:, places].flatten(1, 2) for one in found]


class CausalConv(torch.nn.Module):
    """A convolution over time that sees the past alone; before the first moment stands the first."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(channels, out, 3, stride)

    def forward(self, given_BCT: torch.Tensor) -> torch.Tensor:
        """[B, C, T] -> [B, C out, T / stride]."""
        found: torch.Tensor = self.conv(functional.pad(given_BCT, (2, 0), mode="replicate"))
        return found


class SoundTokens(torch.nn.Module):
    """Three causal convolutions that make a latent frame of four frames of sound: as one token, and as several."""

    def __init__(self, audio_dim: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.conv1_local = CausalConv(audio_dim, dim // 4 * num_tokens)
        self.conv1_global = CausalConv(audio_dim, dim // 4)
        self.conv2 = CausalConv(dim // 4, dim // 2, 2)
        self.conv3 = CausalConv(dim // 2, dim, 2)
        self.final_linear = torch.nn.Linear(dim, dim)
        self.padding_tokens = torch.nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, given_BCF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, D, F] -> one token a latent frame [B, T, dim], and num_tokens and a learned one [B, T, tokens, dim]."""
        whole = self.final_linear(self._rest(self.conv1_global(given_BCF)))
        local = self._rest(self.conv1_local(given_BCF).unflatten(1, (self.num_tokens, -1)).flatten(0, 1))
        local = local.reshape(-1, self.num_tokens, *local.shape[1:]).transpose(1, 2)
        return whole, torch.cat([local, self.padding_tokens.to(local.dtype).expand(*local.shape[:2], 1, -1)], dim=2)

    def _rest(self, made: torch.Tensor) -> torch.Tensor:
        for after in (self.conv2, self.conv3, None):
            made = functional.silu(functional.layer_norm(made.transpose(1, 2), made.shape[1:2], eps=1e-6))
            made = after(made.transpose(1, 2)) if after else made
        return made


class AudioEncoder(torch.nn.Module):
    """The layers of the sound's features, weighted, and made to tokens."""

    def __init__(self, num_states: int, audio_dim: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.encoder = SoundTokens(audio_dim, num_tokens, dim)
        self.weights = torch.nn.Parameter(torch.full((1, num_states, 1, 1), 0.01))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, states, D, 4 T] -> [B, T, dim] and [B, T, tokens + 1, dim]."""
        frames, latent_frames = BEFORE
        weights = functional.silu(self.weights)
        given = (torch.cat([states[..., :1].expand(*states.shape[:3], frames), states], dim=-1) * weights
                 / weights.sum(1, keepdim=True)).sum(1)
        whole, local = self.encoder(given)
        return whole[:, latent_frames:], local[:, latent_frames:]


class AudioInjector(torch.nn.Module):
    """What is added to a latent frame's tokens behind some blocks: attention to the tokens of its sound."""

    def __init__(self, number: int, dim: int, heads: int) -> None:
        super().__init__()
        self.injector = torch.nn.ModuleList(SoundAttention(dim, heads) for _ in range(number))
        self.injector_adain_layers = torch.nn.ModuleList(
            AdaLayerNorm(dim, output_dim=2 * dim, chunk_dim=1) for _ in range(number))

    def forward(self, number: int, x: torch.Tensor, whole: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """x [B, (1 + T) tokens, dim], the reference's first, which stay; whole and local as of AudioEncoder."""
        frames = whole.shape[1]
        reference, video = x.tensor_split([x.shape[1] // (frames + 1)], dim=1)
        by_frame = video.reshape(len(x) * frames, -1, x.shape[2])
        normed = self.injector_adain_layers[number](by_frame, temb=whole.flatten(0, 1))
        heard = self.injector[number](normed, local.flatten(0, 1))
        return torch.cat([reference, video + heard.reshape(video.shape).to(x.dtype)], dim=1)


class SoundAttention(torch.nn.Module):
    """Attention of tokens to those of a sound; queries and keys normed as Wan's."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (torch.nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (torch.nn.RMSNorm(dim, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        """[B, L, dim] and [B, tokens, dim] -> [B, L, dim]."""
        value = self.v(sound)
        q, k, v = (one.to(value.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for one in (self.norm_q(self.q(x)), self.norm_k(self.k(sound)), value))
        found: torch.Tensor = self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class FramePacker(torch.nn.Module):
    """The weights that would make tokens of earlier frames, the older the coarser."""

    def __init__(self, channels: int, patches: torch.nn.Conv3d) -> None:
        super().__init__()
        for name, factor in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
            time, height, width = patches.kernel_size
            sides = factor * time, factor * height, factor * width
            self.add_module(name, torch.nn.Conv3d(channels, patches.out_channels, sides, sides))


def _with_those_of_diffusers(own: Any, inherited: Any) -> inspect.Signature:
    """diffusers reads the keys of a config from the signature."""
    named = [p for p in inspect.signature(own).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return inspect.Signature([*inspect.signature(inherited).parameters.values(), *named])


WanSpeechTransformer3DModel.__init__.__dict__["__signature__"] = _with_those_of_diffusers(
    WanSpeechTransformer3DModel.__init__, WanTransformer3DModel.__init__)
