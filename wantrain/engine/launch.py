"""How a launch begins and ends: its processes, the engine that the launch file asks for, and its precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from wantrain.engine import is_fsdp
from wantrain.terms import UserError


def world_size() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, by what the launcher says."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that reads and writes the run folder."""
    return rank() == 0


def device() -> torch.device:
    """The device that this process will have, before accelerate says so."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else \
        torch.device("cpu")


def start(global_batch_size: int, micro_batch_size: int, *, max_grad_norm: float, timeout_s: float,
          sequence_parallel: int = 1) -> Accelerator:
    """The Accelerator for this launch, whose collectives fail after `timeout_s`, and where `sequence_parallel`
    processes compute each sample. Precision stays ours: see `autocast`.

    Raises UserError when the global batch cannot be dealt evenly, when the launcher started processes that accelerate
    does not join (they would train apart from each other without a word), or asks for a precision of its own.
    """
    refuse_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    num_micro_steps = dealt(global_batch_size, micro_batch_size, world_size(), sequence_parallel)
    on_cpu = not torch.cuda.is_available()
    deepspeed, fsdp = (os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
                       for engine in ("DEEPSPEED", "FSDP"))
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for one, and warn
    if deepspeed and on_cpu:
        _without_shared_memory_op()
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed and not fsdp, mixed_precision="no",
        gradient_accumulation_steps=num_micro_steps,
        kwargs_handlers=[InitProcessGroupKwargs("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout_s)),
                         DistributedDataParallelKwargs(broadcast_buffers=False)]  # they are constants
        if "RANK" in os.environ else [],
    )
    if fsdp and not is_fsdp(accelerator):
        raise UserError("the launch asks for FSDP, which accelerate does not have without a GPU: processes would train "
                        "apart", "launch with launch/zero3.yaml, which shards the base on the CPU too")
    if fsdp and sequence_parallel > 1:
        raise UserError(f"train.sequence_parallel = {sequence_parallel} was never tried under FSDP2",
                        "launch with launch/zero3.yaml, which shards the base as well, or set it to 1")
    if accelerator.num_processes != world_size():
        raise UserError(f"the launcher started {world_size()} processes but accelerate sees "
                        f"{accelerator.num_processes}: they would train apart",
                        "launch with a file of launch/, e.g. accelerate launch --config_file launch/ddp.yaml ...")
    if deepspeed:
        settings = AcceleratorState().deepspeed_plugin.deepspeed_config
        settings["train_batch_size"] = global_batch_size * sequence_parallel  # DeepSpeed knows of no groups
        settings["train_micro_batch_size_per_gpu"] = micro_batch_size
        settings["gradient_accumulation_steps"] = num_micro_steps
        settings["gradient_clipping"] = max_grad_norm
    return accelerator


def dealt(global_batch_size: int, micro_batch_size: int, num_processes: int, sequence_parallel: int) -> int:
    """How many micro-batches each process takes for one step, where `sequence_parallel` processes share a sample.

    Raises UserError where the global batch cannot be dealt evenly.
    """
    if num_processes % sequence_parallel:
        raise UserError(f"train.sequence_parallel = {sequence_parallel} does not divide {num_processes} process(es)",
                        f"launch with --num_processes {sequence_parallel} or a multiple, or set it to 1")
    num_groups = num_processes // sequence_parallel
    share = micro_batch_size * num_groups
    if global_batch_size % share:
        each = f" group(s) of {sequence_parallel} processes" if sequence_parallel > 1 else " process(es)"
        raise UserError(f"data.batch_size = {global_batch_size} cannot be dealt to {num_groups}{each} of "
                        f"train.micro_batch_size = {micro_batch_size}",
                        f"set data.batch_size to a multiple of {share}, or change train.micro_batch_size")
    return global_batch_size // share


def refuse_precision(asked: str) -> None:
    """Raise UserError unless the launch file leaves precision to us."""
    if asked == "no":
        return
    why = {"fp16": "float16 ends at 65,504 and needs its loss scaled; bfloat16 has float32's range and needs nothing",
           "bf16": "wantrain keeps the adapter in float32 and computes under its own autocast"}
    raise UserError(f"the launch asks for mixed_precision = {asked}: {why.get(asked, 'wantrain has its own')}",
                    "set mixed_precision: 'no' in the launch file; model.dtype chooses (bfloat16, or float32 where "
                    "the hardware has no bfloat16)")


def end(accelerator: Accelerator, another_follows: bool) -> None:
    """Free the model. The process group ends too, unless another training, or more stages follow in these processes."""
    accelerator.free_memory()
    if not another_follows and not _lasts.get():
        accelerator.end_training()


_lasts: ContextVar[bool] = ContextVar("_lasts", default=False)


@contextlib.contextmanager
def lasting(accelerator: Accelerator) -> Iterator[None]:
    """In the block no training ends the process group: it ends with the block, where nothing goes wrong there."""
    before = _lasts.set(True)
    try:
        yield
    finally:
        _lasts.reset(before)
    accelerator.end_training()


def _without_shared_memory_op() -> None:
    """DeepSpeed on CPU would compile its shared-memory collective at the first run; plain gloo serves."""
    import deepspeed  # heavy, and needed only under its launcher

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
