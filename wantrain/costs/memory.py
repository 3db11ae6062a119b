"""What a training holds in device memory, in host memory and on disk, part by part, in bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from wantrain.costs.adapter import STATE_BYTES, Adapter
from wantrain.costs.block import KEPT, WORKING, Tensors
from wantrain.models import inventory
from wantrain.models.variants import Variant
from wantrain.terms import TEXT_LEN, Bucket

FORM_BYTES = {"int8": 1.0, "fp8": 1.0}
"""Bytes of a weight of the blocks' Linears where memory.base stores them otherwise; each row has a scale beside."""

CONTEXT_BYTES = round(0.75 * 2**30)
FRAGMENTS = 0.04
"""What the driver's context takes, and the share of all else that the allocator cannot use: assumed, not measured."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one process computes at once: samples of a bucket, and copies of them with other words (`rows`)."""

    bucket: Bucket
    rows: int = 1
    sequence_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """A training of one transformer, as far as costs go. `itemsize` is that of model.dtype; `asks_base`: the frozen
    base is asked as well, without gradients.
    """

    variant: Variant
    batch: MicroBatch
    adapter: Adapter
    itemsize: int = 2
    num_processes: int = 1
    asks_base: bool = False

    @property
    def numbers(self) -> int:
        """Trainable numbers."""
        return _numbers(self.adapter, self.variant)

    @property
    def num_blocks(self) -> int:
        own = self.variant.architecture
        return own.num_layers + len(own.vace_layers)

    @property
    def tokens(self) -> int:
        """Tokens of all rows that one process holds."""
        own = self.batch
        return own.rows * own.bucket.num_tokens(self.variant.multiple_px) // own.sequence_parallel


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """How memory is saved: `base`, the form of the frozen weights ("dtype": model.dtype), and what each block keeps."""

    base: str
    keep: tuple[str, ...]


@functools.cache
def _numbers(adapter: Adapter, variant: Variant) -> int:
    return adapter.num_parameters(variant.architecture)


@functools.cache
def base_bytes(variant: Variant, itemsize: int, form: str) -> int:
    """The frozen transformer."""
    total = 0
    for name, shape in inventory.tensors(variant.architecture).items():
        numbers = math.prod(shape)
        if form != "dtype" and inventory.in_block(name) and name.endswith(".weight") and len(shape) == 2:
            total += round(numbers * FORM_BYTES[form]) + 4 * shape[0]
        else:
            total += numbers * (4 if inventory.is_float32(name) else itemsize)
    return total


def device_parts(job: Job, policy: MemoryPolicy) -> dict[str, int]:
    """The parts of the peak of a training step; their sum is the peak."""
    own, tokens, numbers = job.variant.architecture, job.tokens, job.numbers

    def size(tensors: Tensors) -> int:
        return tensors.nbytes(tokens, own.dim, own.ffn_dim, job.itemsize)

    parts = {
        "base": base_bytes(job.variant, job.itemsize, policy.base),
        "adapter": 4 * numbers * (2 if job.adapter.has_average else 1),
        "gradients": 4 * numbers * (2 if job.num_processes > 1 else 1),
        "optimizer": round(STATE_BYTES[job.adapter.optimizer] * numbers),
        "kept activations": sum(size(KEPT[keep]) for keep in policy.keep),
        "working activations": max(size(WORKING[keep]) for keep in set(policy.keep)),
        "attention's workspace": attention_workspace(job),
    }
    return {**parts, "allocator's margin": CONTEXT_BYTES + round(FRAGMENTS * sum(parts.values()))}


def attention_workspace(job: Job) -> int:
    """What the flash kernel takes in itself going backward: the gradient of the queries in float32, and a number a head
    and token.
    """
    own = job.variant.architecture
    return 4 * job.tokens * (own.dim + own.num_heads)


def cache_bytes(variant: Variant, bucket: Bucket, itemsize: int) -> int:
    """At the most, on disk, of one clip in this bucket with its caption."""
    latents = 4 * variant.architecture.out_channels * math.prod(variant.latent_THW(bucket))
    return latents + inventory.condition_bytes(variant, bucket) + TEXT_LEN * variant.architecture.text_dim * itemsize


def checkpoint_bytes(job: Job) -> int:
    """One checkpoint on disk: the adapter and the optimizer's own."""
    own = job.adapter
    return round(job.numbers * (4 * (2 if own.has_average else 1) + STATE_BYTES[own.optimizer]))


def peak(parts: Mapping[str, int]) -> int:
    """The sum of the parts."""
    return sum(parts.values())


TEXT_ENCODER_NUMBERS = 5_680_910_336
IMAGE_ENCODER_NUMBERS = 632_076_800
VAE_NUMBERS = {"2.1": 126_892_531, "2.2": 704_688_668}
"""Numbers of the encoders (docs/facts.md, "Variants" and "Encoders"): umT5-XXL, CLIP ViT-H, the two VAEs."""

VAE_WORKING = {"2.1": (14_080.0, 15.5), "2.2": (7_163.0, 27.4)}
"""Bytes a pixel of the picture that encoding takes in float32, and more for each frame; counted allocation by
allocation (tests/memory_oracle.py)."""


def encoding_parts(variant: Variant, bucket: Bucket, itemsize: int) -> dict[str, int]:
    """The parts of the peak of `cache`, which holds all encoders while it encodes a clip."""
    each, for_frame = VAE_WORKING[variant.vae]
    parts = {
        "text encoder": TEXT_ENCODER_NUMBERS * itemsize,
        "image encoder": 4 * IMAGE_ENCODER_NUMBERS if variant.architecture.image_dim else 0,
        "VAE": 4 * VAE_NUMBERS[variant.vae],
        "working activations": round(bucket.height * bucket.width * (each + for_frame * bucket.num_frames)),
    }
    return {**parts, "allocator's margin": CONTEXT_BYTES + round(FRAGMENTS * sum(parts.values()))}


LIBRARIES_BYTES = 3 * 2**30
"""What Python, torch and its CUDA libraries take of host memory: assumed, not measured."""


def host_parts(job: Job) -> dict[str, int]:
    """The parts of the peak of one process's memory outside the device."""
    largest = max(math.prod(shape) for shape in inventory.tensors(job.variant.architecture).values())
    return {"libraries": LIBRARIES_BYTES, "a tensor being loaded": 2 * 4 * largest,
            "a checkpoint being written": checkpoint_bytes(job)}
