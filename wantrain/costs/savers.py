"""What needs less memory, those settings that change least first: told where memory ends, tried where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from wantrain.costs.memory import Job, MemoryPolicy
from wantrain.data.buckets import buckets


@dataclass(frozen=True, slots=True)
class Saver:
    """A setting that needs less memory, a key of the config or words of the command; what it changes; and the job that
    it makes.
    """

    setting: str
    change: str
    job: Job

    def __str__(self) -> str:
        return f"{self.setting}    {self.change}"


def savers(job: Job, policy: MemoryPolicy, zero_stage: int = 0, on_gpu: bool = False) -> list[Saver]:
    """Every setting that needs less than these, those that change least first; `on_gpu`: host memory is another."""
    smaller = (step(job) for step in (_clips, _rank, _moments, _average))
    return [*_same_numbers(job, policy, zero_stage, on_gpu), *filter(None, smaller)]


def _same_numbers(job: Job, policy: MemoryPolicy, zero_stage: int, on_gpu: bool) -> Iterator[Saver]:
    """Those that leave the result as it is, or nearly."""
    own, size = job.batch, job.num_processes
    again = {"attention": "computes each block's products again: same numbers, more time",
             "inputs": "computes each block again: same numbers, about a third more time"}
    for keep in job.keeps[job.keeps.index(policy.keep[0]) + 1:]:
        yield Saver(f"memory.keep={keep}", again[keep], job)
    if own.micro_batch_size > 1 and own.micro_batch_size % 2 == 0:
        half = replace(own, micro_batch_size=own.micro_batch_size // 2)
        yield Saver(f"train.micro_batch_size={half.micro_batch_size}", "accumulates instead: same numbers",
                    replace(job, batch=half))
    if on_gpu and job.block.is_lora and not zero_stage and policy.swap < job.num_blocks:
        yield Saver(f"memory.swap={job.num_blocks}", "blocks wait in host memory for their turn: same numbers", job)
    if on_gpu and job.block.is_lora and not policy.offload:
        yield Saver("memory.offload=true", "what blocks keep waits in host memory: same numbers", job)
    if job.itemsize == 4:
        yield Saver("model.dtype=bfloat16", "half of the base", replace(job, itemsize=2))
    if policy.base == "dtype" and job.adapter.kind != "dora":
        yield Saver("memory.base=int8", "a byte a weight of the base, in a run of its own", job)
    if policy.base in ("int8", "fp8"):
        yield Saver("memory.base=nf4", "half a byte a weight, nearly a tenth off, in a run of its own", job)
    if size > 1 and zero_stage < 3:
        yield Saver("--config_file launch/zero3.yaml", f"each of {size} processes keeps 1/{size} of the base",
                    job)
    if size > 1 and own.sequence_parallel == 1:
        yield Saver("train.sequence_parallel=2", "two processes share each clip's tokens: same numbers",
                    replace(job, batch=replace(own, sequence_parallel=2)))


def _average(job: Job) -> Saver | None:
    return None if not job.adapter.has_average else Saver(
        "optim.ema=null", "no average of the adapter is kept, in a run of its own",
        replace(job, adapter=replace(job.adapter, has_average=False)))


def _clips(job: Job) -> Saver | None:
    bucket, px = job.batch.bucket, job.variant.multiple_px
    most = bucket.num_tokens(px) * 3 // 4
    if most < 1 + (bucket.num_frames - 1) // 4:
        return None
    smaller, = buckets([bucket.num_frames], [[bucket.height, bucket.width]], px, most)
    return Saver(f"data.max_tokens_per_clip={most}", "smaller pictures, in a run of their own",
                 replace(job, batch=replace(job.batch, bucket=smaller)))


def _rank(job: Job) -> Saver | None:
    own = job.adapter
    return None if own.rank == 1 else Saver(
        f"lora.rank={own.rank // 2}", "half of the adapter and its optimizer, in a run of their own",
        replace(job, adapter=replace(own, rank=own.rank // 2)))


def _moments(job: Job) -> Saver | None:
    own = job.adapter
    return None if own.optimizer != "adamw" else Saver(
        "optim.name=adamw_8bit", "moments of a byte, in a run of its own",
        replace(job, adapter=replace(own, optimizer="adamw_8bit")))


def shrunk(job: Job) -> Iterator[tuple[list[str], Job]]:
    """Smaller jobs, those that change least first, with the settings that make them: one alone, then several."""
    for alone in filter(None, (step(job) for step in (_average, _moments, _rank, _clips))):
        yield [alone.setting], alone.job
    settings: dict[str, str] = {}
    for step in (_average, _moments, _rank, _clips, _clips, _clips, _clips):
        if one := step(job):
            settings[one.setting.partition("=")[0]], job = one.setting, one.job
            yield list(settings.values()), job
