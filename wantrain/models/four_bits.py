"""nf4 by bitsandbytes: four bits a weight (QLoRA, Dettmers et al. 2023), each 64 of a row with a scale of their own."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from wantrain.terms import UserError

if TYPE_CHECKING:  # whether it can be had is told without torch
    import torch

RUN = 64
"""Weights with a scale in common, by bitsandbytes' default."""


def fault(form: str) -> UserError | None:
    """Why the form cannot be had here, if it cannot."""
    if form != "nf4" or importlib.util.find_spec("bitsandbytes"):
        return None
    return UserError("memory.base = nf4 needs the package bitsandbytes, which is not installed",
                     "pip install 'wantrain[nf4]', or set memory.base=int8")


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [out, in] -> two weights a byte, int8 [out, in / 2], and the scales, float32 [out, in / RUN]."""
    import torch
    from bitsandbytes import functional

    out, width = weight.shape
    assert width % RUN == 0, f"rows of {width} have no whole runs of {RUN}"
    stored, state = functional.quantize_4bit(weight.contiguous(), blocksize=RUN, quant_type="nf4")
    return stored.view(torch.int8).view(out, -1), state.absmax.view(out, -1)


def unpacked(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `packed` made, as what it stands for, [out, in] in `dtype`."""
    import torch
    from bitsandbytes import functional

    shape = torch.Size((len(stored), 2 * stored.shape[1]))
    state = functional.QuantState(scale.flatten(), shape, blocksize=RUN, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(stored.view(torch.uint8).view(-1, 1), state)
