"""First-block cache: a pass whose first block says much the same as before leaves out the other blocks.

What those added the last time is added again. The hooks are diffusers' (after ParaAttention), which know blocks that
follow each other with nothing between them: Variant.has_plain_blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from diffusers import FirstBlockCacheConfig


@dataclass(slots=True)
class Passes:
    """How many passes were asked of the transformers, and how many of these went through all blocks."""

    asked: int = 0
    whole: int = 0

    @property
    def saved(self) -> float:
        """The share of passes that left out all blocks but the first."""
        return 1 - self.whole / self.asked if self.asked else 0.0


@contextlib.contextmanager
def first_block(transformers: Sequence[Any], threshold: float | None) -> Iterator[Passes]:
    """In the block, passes are left out where the first block's change is at most this share of what it was before;
    None leaves out none. For one sample at a time: what is kept is of one prompt, and of one without.
    """
    passes = Passes()
    with contextlib.ExitStack() as stack:
        for transformer in transformers if threshold is not None else ():
            stack.enter_context(_counted(transformer, passes))
            transformer.enable_cache(FirstBlockCacheConfig(threshold))
            stack.callback(transformer.disable_cache)
        yield passes


def told(transformer: torch.nn.Module, text: str) -> AbstractContextManager[Any]:
    """In the block, the transformer's passes are those with this text, of which a cache is kept apart from others."""
    if getattr(transformer, "is_cache_enabled", False):
        return cast("AbstractContextManager[Any]", cast("Any", transformer).cache_context(text))
    return contextlib.nullcontext()


@contextlib.contextmanager
def _counted(transformer: Any, passes: Passes) -> Iterator[None]:
    """In the block, count passes: the last block computes in those that are whole."""
    def count(what: str, computed: Callable[..., Any], *given: Any, **named: Any) -> Any:
        setattr(passes, what, getattr(passes, what) + 1)
        return computed(*given, **named)

    ends = {"asked": transformer.blocks[0], "whole": transformer.blocks[-1]}
    plain = {what: block.forward for what, block in ends.items()}
    for what, block in ends.items():
        block.forward = partial(count, what, plain[what])
    try:
        yield
    finally:
        for what, block in ends.items():
            block.forward = plain[what]
