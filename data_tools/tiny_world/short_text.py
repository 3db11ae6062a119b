"""Attention for training the tiny transformer: exact, and without computing 500 equal tokens.

WanPipeline pads text with zeros to 512 tokens, and the model attends to them. All of them have the same key and value,
so n of them equal one whose logit is raised by log(n).
"""

import math

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from data_tools.tiny_world.base import TEXT_LENGTH


class ShortTextAttention:
    """Drop-in processor. The last text token stands for `num_zeros` zero tokens; see `append_zeros`."""

    def __init__(self) -> None:
        self.num_zeros = 1

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (B, L, D), encoder_hidden_states (B, L_text, D); returns (B, L, D)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if rotary_emb is not None:
            cos, sin = (table[0].transpose(0, 1)[None] for table in rotary_emb)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if encoder_hidden_states is not None:
            bias = torch.zeros(logits.shape[-1])
            bias[-1] = math.log(self.num_zeros)
            logits = logits + bias
        out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (even, odd) pairs; cos and sin (1, 1, L, D) with every value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return x * cos + turned * sin


def use_short_text(transformer: WanTransformer3DModel) -> ShortTextAttention:
    """Gives all blocks one shared processor and returns it."""
    processor = ShortTextAttention()
    for block in transformer.blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)
    return processor


def append_zeros(text_BLD: Tensor, processor: ShortTextAttention) -> Tensor:
    """Appends the one zero token; rows shorter than L must be zero behind their end already."""
    processor.num_zeros = TEXT_LENGTH - text_BLD.shape[1]
    return torch.cat([text_BLD, torch.zeros_like(text_BLD[:, :1])], 1)
