"""What a training holds in device memory, in host memory and on disk, part by part, in bytes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from wantrain.costs.adapter import STATE_BYTES, Adapter
from wantrain.costs.block import KEEPS, OTHER_KEPT, Sizes, Tensors, kept_bytes, text_bytes, working_bytes
from wantrain.models import inventory
from wantrain.models.variants import Variant
from wantrain.terms import TEXT_LEN, Bucket

NUM_BUFFERS = 2
"""Blocks whose weights, or kept tensors, are on the device while others are on their way to it and from it."""

TOKEN_TIMESTEPS = {(2, False): Tensors(6.5), (2, True): Tensors(24.5), (4, False): Tensors(6.5), (4, True): Tensors(15)}
"""What a timestep for each token takes, by bytes of a number and whether its projection is adapted: counted
(tests/memory_oracle.py)."""

ADAPTED_PROJECTIONS = {2: Tensors(2.5), 4: Tensors(0)}
"""What PEFT's layers around a block of VACE keep, by bytes of a number; counted as well."""

TEXT_GRADIENTS = 6
"""Tensors of text tokens x width, counted as well."""

FORM_BYTES = {"int8": (1.0, 0), "fp8": (1.0, 0), "nf4": (0.5, 64)}
"""Where memory.base stores the blocks' Linears otherwise: bytes of a weight, and how many weights of a row have a scale
of four bytes in common (0: all)."""

BASES = ("dtype", "int8")
"""Forms of the base that a plan may choose for speed. fp8, as large as int8 and less exact, and nf4, whose error is the
largest, it takes where they are named."""

BY_ERROR = ("dtype", "int8", "nf4")
"""The forms of each size, the most exact first."""

MARGIN = "allocator's margin"
CONTEXT_BYTES = round(0.75 * 2**30)
FRAGMENTS = 0.04
"""What the driver's context takes, and the share of all else that the allocator cannot use: assumed, not measured."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one process computes at once: samples of a bucket, with `has_class_words` each a second time with these; of
    their tokens one part of `sequence_parallel`.
    """

    bucket: Bucket
    micro_batch_size: int = 1
    has_class_words: bool = False
    sequence_parallel: int = 1

    @property
    def rows(self) -> int:
        return self.micro_batch_size * (1 + self.has_class_words)


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
        """All that run one after the other, VACE's own first."""
        own = self.variant.architecture
        return own.num_layers + len(own.vace_layers)

    @property
    def keeps(self) -> tuple[str, ...]:
        """What a block may keep, the fastest first."""
        return tuple(keep for keep in KEEPS if self.block.is_lora or keep in OTHER_KEPT)

    @property
    def first_adapted(self) -> int:
        """The first block with an adapter: those before it need no backward pass."""
        return _first_adapted(self.adapter, self.variant)

    @property
    def tokens(self) -> int:
        """Tokens of all rows that one process holds."""
        own = self.batch
        streams = 2 if self.variant.architecture.driven else 1
        return streams * own.rows * own.bucket.num_tokens(self.variant.multiple_px) // own.sequence_parallel

    @property
    def block(self) -> Sizes:
        """The sizes of a block's tensors."""
        a = self.variant.architecture
        text = self.batch.rows * (TEXT_LEN + inventory.image_tokens(self.variant))
        return Sizes(self.tokens, text, a.dim, a.ffn_dim, a.num_heads, self.itemsize,
                     self.adapter.kind in ("lora", "rslora") and not a.driven)


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """How memory is saved: `base`, the form of the frozen weights ("dtype": model.dtype); what each block keeps; how
    many blocks' weights stream from host memory; whether what is kept waits there for the backward pass.
    """

    base: str
    keep: tuple[str, ...]
    swap: int = 0
    offload: bool = False


@functools.cache
def _numbers(adapter: Adapter, variant: Variant) -> int:
    return adapter.num_parameters(variant.architecture)


@functools.cache
def _first_adapted(adapter: Adapter, variant: Variant) -> int:
    own = variant.architecture
    names = adapter.ranks(own)
    if any(not inventory.in_block(name) for name in names) and "proj_out" not in names:
        return 0
    numbers = [int(found[2]) + (0 if found[1] else len(own.vace_layers)) for name in names
               if (found := re.match(r"(vace_)?blocks\.(\d+)\.", name))]
    return min(numbers, default=own.num_layers + len(own.vace_layers))


@functools.cache
def _largest_tensor(variant: Variant) -> int:
    return max(math.prod(shape) for shape in inventory.tensors(variant.architecture).values())


@functools.cache
def base_bytes(variant: Variant, itemsize: int, form: str) -> int:
    """The frozen transformer, with its table of rotary embedding."""
    own = variant.architecture
    table_of_turns = 2 * 1024 * own.dim // own.num_heads * 4
    return table_of_turns + sum(_stored(name, shape, itemsize, form)
                                for name, shape in inventory.tensors(own).items())


@functools.cache
def streamed_bytes(variant: Variant, itemsize: int, form: str) -> int:
    """The weights of one block that wait in host memory where it is swapped: those of its Linears."""
    return sum(_stored(name, shape, itemsize, form) for name, shape in inventory.tensors(variant.architecture).items()
               if name.startswith("blocks.0.") and name.endswith(".weight") and len(shape) == 2)


def _stored(name: str, shape: tuple[int, ...], itemsize: int, form: str) -> int:
    numbers = math.prod(shape)
    if form != "dtype" and inventory.in_block(name) and name.endswith(".weight") and len(shape) == 2:
        each, run = FORM_BYTES[form]
        return round(numbers * each) + 4 * (numbers // run if run else shape[0])
    return numbers * (4 if inventory.is_float32(name) else itemsize)


def device_parts(job: Job, policy: MemoryPolicy) -> dict[str, int]:
    """The parts of the peak of a training step; their sum is the peak."""
    kept, working = activations(job, policy)
    numbers, block = job.numbers, streamed_bytes(job.variant, job.itemsize, policy.base)
    streamed = max(0, policy.swap - NUM_BUFFERS)
    parts = {
        "base": base_bytes(job.variant, job.itemsize, policy.base) - streamed * block,
        "adapter": 4 * numbers * (2 if job.adapter.has_average else 1),
        "gradients": 4 * numbers * (2 if job.num_processes > 1 else 1),
        "optimizer": round(STATE_BYTES[job.adapter.optimizer] * numbers),
        "kept activations": round(kept),
        "working activations": round(working),
        "attention's workspace": attention_workspace(job),
    }
    return {**parts, MARGIN: CONTEXT_BYTES + round(FRAGMENTS * sum(parts.values()))}


def in_tensors(parts: Mapping[str, int]) -> int:
    """Of the peak, what torch counts as its tensors: all but the allocator's margin."""
    return sum(size for name, size in parts.items() if name != MARGIN)


def activations(job: Job, policy: MemoryPolicy) -> tuple[float, float]:
    """What the blocks keep, and what else there is while they go backward, where both together are at their most."""
    return _activations(job, policy.keep, policy.offload, policy.base)


@functools.cache
def _activations(job: Job, keeps: tuple[str, ...], offload: bool, form: str) -> tuple[float, float]:
    own, found = job.block, [(0.0, 0.0)]
    kept: list[float] = []
    for keep in keeps[job.first_adapted:]:
        kept.append(kept_bytes(own, keep))
        held = sum(kept[-NUM_BUFFERS:] if offload else kept) + len(kept) * text_bytes(own)
        found.append((held, working_bytes(own, keep, form)))
    most = max(found, key=sum)
    return most[0], most[1] + _beside_blocks(job)


def kept_in_all(job: Job, policy: MemoryPolicy) -> float:
    """What the blocks keep and may wait in host memory."""
    return sum(kept_bytes(job.block, keep) for keep in policy.keep[job.first_adapted:])


def _beside_blocks(job: Job) -> float:
    """What lasts through a step beside what blocks keep: the rotary embedding's factors; gradients for the text where
    its embedding is adapted; what the adapters around VACE's blocks keep; where every token is told its own timestep,
    that in all its forms; what S2V's attention to sound is computed again from.
    """
    a, own = job.variant.architecture, job.block
    adapted = job.adapter.ranks(a)
    size = 12.0 * a.dim // a.num_heads * job.tokens // job.batch.rows
    if "condition_embedder.text_embedder.linear_1" in adapted:
        size += TEXT_GRADIENTS * own.itemsize * own.text * own.dim
    if "vace_blocks.0.proj_out" in adapted:
        size += len(a.vace_layers) * own.nbytes(ADAPTED_PROJECTIONS[own.itemsize])
    if a.speech:
        size += own.nbytes(Tensors(len(a.speech.audio_layers)))
    if job.variant.first_is_clean:
        size += own.nbytes(TOKEN_TIMESTEPS[own.itemsize, "condition_embedder.time_proj" in adapted])
    return size


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
TEXT_EMBEDDING_NUMBERS = 256_384 * 4096
IMAGE_ENCODER_NUMBERS = 632_076_800
VAE_NUMBERS = {"2.1": 126_892_531, "2.2": 704_688_668}
"""Numbers of the encoders (docs/facts.md, "Variants" and "Encoders"): umT5-XXL (of it the embedding of tokens,
which is never stored in a byte), CLIP ViT-H, the two VAEs."""

VAE_WORKING = {"2.1": (14_080.0, 15.5), "2.2": (7_163.0, 27.4)}
"""Bytes a pixel of the picture that encoding takes in float32, and more for each frame; counted allocation by
allocation (tests/memory_oracle.py)."""


def encoding_phases(variant: Variant, bucket: Bucket, itemsize: int, encoders: str, vae_itemsize: int
                    ) -> dict[str, dict[str, int]]:
    """The parts of the peaks of `cache`, which encodes all texts and then all clips, these in tiles where a whole
    picture takes more than the card has. `encoders` is the form of umT5 and CLIP, "dtype" or one of a byte a weight.
    """
    each, for_frame = VAE_WORKING[variant.vae]
    stored = 1 if encoders != "dtype" else itemsize
    text = TEXT_ENCODER_NUMBERS * stored + TEXT_EMBEDDING_NUMBERS * (itemsize - stored)
    image = IMAGE_ENCODER_NUMBERS * (1 if encoders != "dtype" else 4) if variant.architecture.image_dim else 0
    working = bucket.height * bucket.width * (each + for_frame * bucket.num_frames) * vae_itemsize / 4
    audio = 4 * inventory.AUDIO_ENCODER_PARAMETERS if variant.architecture.speech else 0
    phases = {"texts": {"text encoder": text},
              "clips": {"image encoder": image, **({"audio encoder": audio} if audio else {}),
                        "VAE": vae_itemsize * VAE_NUMBERS[variant.vae],
                        "working activations": round(working)}}
    return {name: {**parts, MARGIN: CONTEXT_BYTES + round(FRAGMENTS * sum(parts.values()))}
            for name, parts in phases.items()}


LIBRARIES_BYTES = 3 * 2**30
"""What Python, torch and its CUDA libraries take of host memory: assumed, not measured."""


def host_parts(job: Job, policy: MemoryPolicy, *, mapped: bool = False) -> dict[str, int]:
    """The parts of the peak of one process's memory outside the device. Where the base stays in the file, `mapped`, the
    system can have back what it takes, and blocks on their way are staged.
    """
    kept = kept_in_all(job, policy) if policy.offload else 0.0
    block, whole = streamed_bytes(job.variant, job.itemsize, policy.base), policy.swap and not mapped
    return {"libraries": LIBRARIES_BYTES, "a tensor being loaded": 2 * 4 * _largest_tensor(job.variant),
            "a checkpoint being written": checkpoint_bytes(job),
            "base while it is read": base_bytes(job.variant, job.itemsize, policy.base) if whole else 0,
            "streamed blocks": block * (min(policy.swap, NUM_BUFFERS) if mapped else policy.swap),
            "offloaded activations": round(kept)}


def stays_mapped(job: Job, policy: MemoryPolicy, host_bytes: float) -> bool:
    """Whether blocks that wait on the host do so in the file: their copies take more memory than there is, and the file
    may hold them as they are trained.
    """
    return policy.swap > 0 and policy.base == "dtype" and peak(host_parts(job, policy)) > host_bytes


def host_peak(job: Job, policy: MemoryPolicy, host_bytes: float) -> int:
    """The peak of host memory where there is so much."""
    return peak(host_parts(job, policy, mapped=stays_mapped(job, policy, host_bytes)))
