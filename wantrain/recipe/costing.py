"""A config as wantrain.costs takes it. No torch: `plan` begins at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from wantrain import costs
from wantrain.config import BaseForm, Config, Dtype, Keep, variant_of
from wantrain.data.buckets import buckets
from wantrain.terms import Bucket


def largest_bucket(config: Config) -> Bucket:
    """The bucket of most transformer tokens that the config allows, whatever the clips are."""
    data, px = config.data, variant_of(config).multiple_px
    return costs.largest_bucket(buckets(data.num_frames, data.resolutions, px, data.max_tokens_per_clip), px)


def job_of(config: Config, bucket: Bucket, num_processes: int) -> costs.Job:
    """The training of one transformer, at its largest clips; `config` is that of its expert."""
    own, loss = config.lora, config.loss
    adapter = costs.Adapter(tuple(own.targets), own.rank, own.kind.name, tuple(own.rank_pattern.items()),
                            config.optim.name.name, config.optim.keeps_average)
    batch = costs.MicroBatch(bucket, config.train.micro_batch_size, bool(loss.class_words),
                             config.train.sequence_parallel)
    asks_base = bool(loss.class_words or loss.mask_preserve) or any(s.preserve for s in config.data.sources.values())
    return costs.Job(variant_of(config), batch, adapter, 4 if config.model.dtype is Dtype.float32 else 2, num_processes,
                     asks_base)


@dataclass(frozen=True, slots=True)
class Room:
    """What a training may take: bytes of device and of host memory, and the card whose speed decides."""

    card: costs.Card
    device_bytes: float
    host_bytes: float = costs.HOST_BYTES


def policy_of(config: Config, job: costs.Job, room: Room | None, can_move: bool = True, base: str | None = None
              ) -> costs.MemoryPolicy:
    """How the training saves memory: what the config sets, and for the rest the fastest that fits the room (where
    nothing does, what needs least). Without a room nothing is saved that is not asked for.

    With `can_move` false, weights and kept tensors cannot wait on the host. What is chosen changes no number, but for
    the form of the base with memory.base=auto: the most exact that fits, unless `base` says it.
    """
    own = config.memory
    known = own.base.name if own.base is not BaseForm.auto else base
    keep = None if own.keep is Keep.auto else own.keep.name
    swap, offload = (own.swap, own.offload) if can_move else (own.swap or 0, own.offload or False)
    if room is None:
        return costs.MemoryPolicy(known or "dtype", (keep or "all",) * job.num_blocks, swap or 0, offload or False)
    found = None
    for form in (known,) if known else costs.BY_ERROR:
        fixed = costs.Fixed(form, keep, swap, offload, may_mix=can_move and job.block.is_lora)
        choice = costs.choose(job, room.card, room.device_bytes, room.host_bytes, fixed)
        found = choice.best or choice.smaller
        if choice.best:
            break
    return found.policy if found else policy_of(config, job, None, base=base)


def told(policy: costs.MemoryPolicy) -> str:
    """A policy in words, e.g. `base int8, of 40 blocks 30 keep inputs and 10 attention, 35 wait on the host`."""
    keeps = " and ".join(f"{number} keep {keep}" for keep, number in Counter(policy.keep).items())
    swap = f", {policy.swap} wait on the host" if policy.swap else ""
    offload = ", what they keep waits there too" if policy.offload else ""
    return f"base {policy.base}, of {len(policy.keep)} blocks {keeps}{swap}{offload}"
