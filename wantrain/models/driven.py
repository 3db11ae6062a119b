"""Wan-Animate-2: the tensors of image-to-video, and a driving video whose tokens go through every block beside the
clip's own.

diffusers' class of it cannot train on a CPU, and has names for the Linears that no LoRA loader knows; this one is
diffusers' image-to-video transformer with another self-attention. tests/parity/test_driven.py holds it against that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch.utils.checkpoint import checkpoint

LEFT_OUT = 9
"""The block that guidance's call without the prompt leaves out for the clip's own tokens."""

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Streams:
    """What a block needs for its two streams of tokens besides them: where the clip's own and the driving video's stand
    in time and space; the driving video's texts and modulation; whether the prompt is left out.
    """

    own: Rope
    driving: Rope
    text_BLD: torch.Tensor
    modulation_B6D: torch.Tensor
    unprompted: bool


class WanDrivenTransformer3DModel(WanTransformer3DModel):  # type: ignore[misc]
    """Image-to-video whose clip, behind its reference, attends to a driving video of as many frames, frame by frame."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for number, block in enumerate(self.blocks):
            block.__class__ = DrivenBlock
            block.is_left_out = number == LEFT_OUT
            block.attn1.set_processor(BesideDriving())

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, *,
                driving_hidden_states: torch.Tensor, driving_text: torch.Tensor, driving_image: torch.Tensor,
                unprompted: bool = False, **rest: Any) -> tuple[torch.Tensor]:
        """As diffusers' with return_dict=False; driving_hidden_states [B, C, T, H, W] are latents of the driving video,
        one frame fewer than hidden_states, with a text and CLIP tokens of its own. It is given to itself as known, at
        timestep 1.
        """
        latents, num_frames = driving_hidden_states, hidden_states.shape[2]
        words = driving_text.type_as(encoder_hidden_states)
        known = torch.cat([latents, torch.ones_like(latents[:, :4]), latents], dim=1)
        _, modulation, text, image = self.condition_embedder(torch.ones_like(timestep), words, driving_image)
        streams = Streams(self.rope(hidden_states), self._beside(hidden_states), torch.cat([image, text], dim=1),
                          modulation.unflatten(1, (6, -1)), unprompted)
        with edited(self.rope, lambda _: streams):
            output, = super().forward(torch.cat([hidden_states, known], dim=2), timestep, encoder_hidden_states, **rest)
        return (output[:, :, :num_frames],)

    def _beside(self, hidden_states: torch.Tensor) -> Rope:
        """Where the driving video stands: right of the clip, its first frame at the clip's second."""
        num_frames, height, width = hidden_states.shape[2:]
        twice = self.rope(torch.empty(1, 1, num_frames, height, 2 * width, device="meta"))
        grid = (num_frames, height // 2, width)
        cos, sin = (one.unflatten(1, grid)[:, 1:, :, width // 2 :].flatten(1, 3) for one in twice)
        return cos, sin


class DrivenBlock(WanTransformerBlock):  # type: ignore[misc]
    """diffusers' block, for the driving video's tokens and then for the clip's own, which stand before them."""

    is_left_out: bool

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
                rotary_emb: Streams) -> torch.Tensor:
        """[B, own tokens and driving ones, D] -> the same; `rotary_emb` is where diffusers hands through what it does
        not look at.
        """
        number, shared = rotary_emb.own[0].shape[1], list[torch.Tensor]()
        own, driving = hidden_states[:, :number], hidden_states[:, number:]
        driving = super().forward(driving, rotary_emb.text_BLD, rotary_emb.modulation_B6D, (rotary_emb.driving, shared))
        if not (self.is_left_out and rotary_emb.unprompted):
            own = super().forward(own, encoder_hidden_states, temb, (rotary_emb.own, shared))
        return torch.cat([own, driving], dim=1)


class BesideDriving(WanAttnProcessor):  # type: ignore[misc]
    """Self-attention: of the driving video to itself; of each frame of the clip to the whole clip and to the driving
    video's frame at the same time.
    """

    def __call__(self, attn: WanAttention, hidden_states: torch.Tensor, encoder_hidden_states: None = None,
                 attention_mask: None = None, rotary_emb: tuple[Rope, list[torch.Tensor]] | None = None
                 ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]. The list behind the rotary embedding is empty for the driving video, whose keys and
        values are put there for the clip.
        """
        assert rotary_emb is not None, "the block hands it through"
        rope, shared = rotary_emb
        made = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        query, key, value = (one.unflatten(2, (attn.heads, -1)) for one in made)
        query, key = turned(query, rope), turned(key, rope)
        if shared:
            answer = self._of_clip(query, key, value, *shared)
        else:
            shared += key, value
            answer = self._attend(query, key, value)
        answer_BLD: torch.Tensor = attn.to_out[1](attn.to_out[0](answer.flatten(2, 3).type_as(query)))
        return answer_BLD

    def _of_clip(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *driving: torch.Tensor
                 ) -> torch.Tensor:
        """The clip's own tokens; its first frame is the reference, and has no driving one."""
        per_frame = query.shape[1] - driving[0].shape[1]
        first, *later = query.chunk(query.shape[1] // per_frame, dim=1)
        beside = zip(later, *(one.chunk(len(later), dim=1) for one in driving), strict=True)
        # A frame at a time, and computed again backward: keys and values of all frames at once would not fit.
        return torch.cat([self._attend(first, key, value), *(
            checkpoint(self._attend, rows, key, value, *one, use_reentrant=False, preserve_rng_state=False)
            for rows, *one in beside)], dim=1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *driving: torch.Tensor
                ) -> torch.Tensor:
        if driving:
            key, value = torch.cat([key, driving[0]], dim=1), torch.cat([value, driving[1]], dim=1)
        answer: torch.Tensor = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return answer


def turned(x_BLHD: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotary embedding of pairs of numbers, as diffusers has it."""
    first, second = x_BLHD[..., 0::2], x_BLHD[..., 1::2]
    cos, sin = rope[0][..., 0::2], rope[1][..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x_BLHD)


@contextlib.contextmanager
def edited(module: torch.nn.Module, edit: Callable[[Any], Any]) -> Iterator[None]:
    """In the block, what the module answers is edited."""
    handle = module.register_forward_hook(lambda _, __, output: edit(output))
    try:
        yield
    finally:
        handle.remove()
