"""A config as wantrain.costs takes it. No torch: `plan` begins at once."""

from __future__ import annotations

from wantrain import costs
from wantrain.config import Config, Dtype, variant_of
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
    rows = config.train.micro_batch_size * (2 if loss.class_words else 1)
    asks_base = bool(loss.class_words or loss.mask_preserve) or any(s.preserve for s in config.data.sources.values())
    return costs.Job(variant_of(config), costs.MicroBatch(bucket, rows, config.train.sequence_parallel), adapter,
                     itemsize_of(config), num_processes, asks_base)


def itemsize_of(config: Config) -> int:
    """Bytes of a number in model.dtype."""
    return 4 if config.model.dtype is Dtype.float32 else 2


def policy_of(config: Config, job: costs.Job) -> costs.MemoryPolicy:
    """How the config saves memory."""
    keep = "inputs" if config.train.activation_checkpointing else "all"
    return costs.MemoryPolicy(config.memory.base.name, (keep,) * job.num_blocks)
