"""Which kernel computes attention: the fastest of this device that has a backward pass.

Published rates (H100, head of 128): cuDNN reaches 92 % of FlashAttention-3 with nothing to install, FlashAttention-2
half of it. Each is tried on small tensors, forward and backward, before it is taken.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from wantrain.terms import UserError

VARIABLE = "DIFFUSERS_ATTN_BACKEND"
"""With it a user chooses; diffusers reads it when it is imported."""

HAVE_BACKWARD = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math", "flash", "flex",
                 "xformers")
"""diffusers' back ends whose answers have gradients. SageAttention has no backward pass and cuts them in silence."""

HOPPER = (9, 0)
TRIED_TOKENS = 128
SDPA_KERNELS = ("math", "flash", "efficient", "cudnn")
"""What torch's own choice may be, by its number there."""


def choose(transformer: Any, device: torch.device) -> None:
    """Set the kernel of a transformer that is to be trained on this device.

    Raises UserError where the one that the user chose has no backward pass.
    """
    name = best(device, lambda: tried(transformer, device))
    for processor in processors(transformer):
        processor._attention_backend = AttentionBackendName(name)


def best(device: torch.device, like: Callable[[], torch.Tensor]) -> str:
    """The first of the device's candidates that works for tensors like the one that `like` makes, where one is tried.
    """
    return next(own for own in candidates(device) if own == "native" or works(own, like()))


def name_of(transformer: Any, device: torch.device) -> str:
    """The kernel that self-attention is computed with."""
    backend = processors(transformer)[0]._attention_backend
    if backend in (None, AttentionBackendName.NATIVE):
        return f"native ({sdpa_kernel(tried(transformer, device))})"
    return str(backend.value)


def processors(transformer: Any) -> list[Any]:
    """What diffusers' attention layers are computed by."""
    return [own.processor for own in transformer.modules()
            if hasattr(getattr(own, "processor", None), "_attention_backend")]


def tried(transformer: Any, device: torch.device) -> torch.Tensor:
    """A small query, [1, L, heads, D / heads], of the dtype in which the transformer computes."""
    own = transformer.config
    return torch.zeros(1, TRIED_TOKENS, own.num_attention_heads, own.attention_head_dim, device=device,
                       dtype=transformer.patch_embedding.weight.dtype)


def candidates(device: torch.device) -> Iterator[str]:
    """Back ends of diffusers, the fastest first; what the user chose alone."""
    chosen = str(_AttentionBackendRegistry.get_active_backend()[0].value)
    if chosen not in HAVE_BACKWARD:
        raise UserError(f"{VARIABLE} = {chosen} has no backward pass that wantrain knows of: it could cut gradients "
                        f"without a word. Allowed in training: {', '.join(HAVE_BACKWARD)}", f"unset {VARIABLE}")
    if chosen != "native":
        yield chosen
    elif device.type == "cuda" and torch.cuda.is_available():
        if torch.cuda.get_device_capability(device) >= HOPPER:
            yield "_native_cudnn"
        if importlib.util.find_spec("flash_attn"):
            yield "flash"
    if chosen == "native":
        yield chosen


def works(name: str, like: torch.Tensor) -> bool:
    """Whether a back end answers to tensors of this shape, dtype and device, and gives finite gradients."""
    qkv = [like.clone().requires_grad_() for _ in range(3)]
    try:
        with warnings.catch_warnings(action="ignore"):  # torch says why a kernel cannot be had
            gradients = torch.autograd.grad(attend(name, *qkv).sum(), qkv)
    except (RuntimeError, ValueError, TypeError):
        return False
    return all(bool(one.isfinite().all()) for one in gradients)


def attend(name: str, *qkv: torch.Tensor) -> torch.Tensor:
    """[B, L, heads, D / heads] by a back end of diffusers."""
    answer: torch.Tensor = dispatch_attention_fn(*qkv, backend=AttentionBackendName(name))
    return answer


def sdpa_kernel(like: torch.Tensor) -> str:
    """The kernel that torch itself chooses for tensors like this one, [B, L, heads, D / heads]."""
    own = like.transpose(1, 2)
    number = int(torch._fused_sdp_choice(own, own, own))
    return SDPA_KERNELS[number] if 0 <= number < len(SDPA_KERNELS) else "another"
