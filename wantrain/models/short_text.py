"""Cross-attention on the CPU without computing hundreds of equal text tokens.

Text is zero-padded to TEXT_LEN tokens, and Wan attends to the zeros. All of them get the same key and value, so n of
them are one whose logit is raised by log(n): the same numbers, at a few dozen tokens. Only for the CPU: on a GPU the
bias would forbid the flash kernels, and the clip's own tokens outnumber the text's by far.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from wantrain.terms import TEXT_LEN


class ShortText(WanAttnProcessor):  # type: ignore[misc]
    """diffusers' own processor, with `bias_L` added to the logits of cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_L = torch.zeros(1)

    def __call__(self, attn: WanAttention, hidden_states: torch.Tensor,
                 encoder_hidden_states: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                 rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """hidden_states [B, tokens, D], encoder_hidden_states [B, L, D] for cross-attention -> [B, tokens, D]."""
        if encoder_hidden_states is not None:
            attention_mask = self.bias_L.to(hidden_states.dtype).view(1, 1, 1, -1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def shorten_text(transformer: WanTransformer3DModel) -> None:
    """Make every later call of `transformer` keep the longest text of its batch and one token for the zeros behind it.
    """
    processor = ShortText()
    transformer.set_attn_processor(processor)

    def shorten(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        text_BLD = kwargs["encoder_hidden_states"]
        used = text_BLD.ne(0).any(-1).any(0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 0
        if text_BLD.shape[1] != TEXT_LEN or longest >= TEXT_LEN:
            processor.bias_L = torch.zeros(text_BLD.shape[1])
            return args, kwargs
        processor.bias_L = torch.zeros(longest + 1)
        processor.bias_L[-1] = math.log(TEXT_LEN - longest)
        return args, {**kwargs, "encoder_hidden_states": text_BLD[:, : longest + 1]}

    transformer.register_forward_pre_hook(shorten, with_kwargs=True)
