"""A config as wantrain.costs takes it. No torch: `plan` begins at once."""

from __future__ import annotations

from wantrain import costs
from wantrain.config import Config, Dtype, Keep, variant_of
from wantrain.data.buckets import buckets
from wantrain.terms import Bucket


def largest_bucket(config: Config) -> Bucket:
    """The bucket of most transformer tokens that the config allows, whatever the clips are."""
    data, px = config.data, variant_of(config).multiple_px
    return max(buckets(data.num_frames, data.resolutions, px, data.max_tokens_per_clip),
               key=lambda bucket: bucket.num_tokens(px))


def job_of(config: Config, bucket: Bucket, num_processes: int) -> costs.Job:
    """The training of one transformer, at its largest clips; `config` is that of its expert."""
    own, loss = config.lora, config.loss
    adapter = costs.Adapter(tuple(own.targets), own.rank, own.kind.name, tuple(own.rank_pattern.items()),
                            config.optim.name.name, config.optim.ema_decay is not None)
    batch = costs.MicroBatch(bucket, config.train.micro_batch_size, bool(loss.class_words),
                             config.train.sequence_parallel)
    asks_base = bool(loss.class_words or loss.mask_preserve) or any(s.preserve for s in config.data.sources.values())
    return costs.Job(variant_of(config), batch, adapter, 4 if config.model.dtype is Dtype.float32 else 2, num_processes,
                     asks_base)


def policy_of(config: Config, job: costs.Job, on_cpu: bool = False) -> costs.MemoryPolicy:
    """How the config saves memory."""
    return costs.MemoryPolicy(config.memory.base.name, (keep_of(config, on_cpu),) * job.num_blocks)


def keep_of(config: Config, on_cpu: bool) -> str:
    """What each block keeps for the backward pass."""
    if config.memory.keep is not Keep.auto:
        return config.memory.keep.name
    return "all" if on_cpu else "inputs"
