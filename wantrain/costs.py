"""What a training costs in transformer tokens, and what saves memory: pure functions of plain values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wantrain.terms import Bucket, PlannedClip


def largest_bucket(planned: Iterable[PlannedClip], multiple_px: int) -> tuple[Bucket, int]:
    """The bucket whose samples have most transformer tokens, and their number."""
    tokens = {p.bucket: p.bucket.num_tokens(multiple_px) for p in planned}
    return max(tokens.items(), key=lambda item: item[1])


def sequence_length(shape_THW: tuple[int, int, int], has_reference: bool) -> int:
    """The tokens that the transformer sees of latents of this shape, in patches of 2 x 2, a reference before them
    included.
    """
    t, h, w = shape_THW
    return (t + has_reference) * h * w // 4


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """What decides how much memory a training takes, besides the base and its clips."""

    micro_batch_size: int
    keep: str
    is_float32: bool
    num_processes: int
    zero_stage: int
    sequence_parallel: int
    rank: int
    is_adamw: bool
    is_quantised: bool = False


def savers(policy: MemoryPolicy, tokens: int) -> list[str]:
    """Settings that need less memory, those that change least first; `tokens` are those of the largest clip."""
    micro, size = policy.micro_batch_size, policy.num_processes
    offers = {
        "memory.keep=attention    computes each block's products again: same numbers, more time": policy.keep == "all",
        "memory.keep=inputs    computes each block again: same numbers, about a third more time":
            policy.keep != "inputs",
        f"train.micro_batch_size={micro // 2}    accumulates instead: same numbers": micro > 1 and micro % 2 == 0,
        "model.dtype=bfloat16    half of the base": policy.is_float32,
        "memory.base=int8    a byte a weight of the base, in a run of its own": not policy.is_quantised,
        f"--config_file launch/zero3.yaml    each of {size} processes keeps 1/{size} of the base":
            size > 1 and policy.zero_stage < 3,
        "train.sequence_parallel=2    two processes share each clip's tokens: same numbers":
            size > 1 and policy.sequence_parallel == 1,
        f"data.max_tokens_per_clip={tokens * 3 // 4}    smaller pictures, in a run of their own": True,
        f"lora.rank={max(1, policy.rank // 2)}    half of the adapter and its optimizer, in a run of their own": True,
        "optim.name=adamw_8bit    moments of a byte, in a run of its own": policy.is_adamw,
    }
    return [offer for offer, applies in offers.items() if applies]
