"""accelerate and DeepSpeed end here: processes, precision, the optimizer, gathering and checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from wantrain.terms import UserError


def world_size() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that reads and writes the run folder, by what the launcher says."""
    return int(os.environ.get("RANK", "0")) == 0


def start(global_batch_size: int, micro_batch_size: int, *, max_grad_norm: float, timeout_s: float,
          sequence_parallel: int = 1) -> Accelerator:
    """The Accelerator for this launch, whose collectives fail after `timeout_s`, and where `sequence_parallel`
    processes compute each sample. Precision stays ours: see `autocast`.

    Raises UserError when the global batch cannot be dealt evenly, when the launcher started processes that accelerate
    does not join (they would train apart from each other without a word), or asks for a precision of its own.
    """
    refuse_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if world_size() % sequence_parallel:
        raise UserError(f"train.sequence_parallel = {sequence_parallel} does not divide {world_size()} process(es)",
                        f"launch with --num_processes {sequence_parallel} or a multiple, or set it to 1")
    num_groups = world_size() // sequence_parallel
    share = micro_batch_size * num_groups
    if global_batch_size % share:
        each = f" group(s) of {sequence_parallel} processes" if sequence_parallel > 1 else " process(es)"
        raise UserError(f"data.batch_size = {global_batch_size} cannot be dealt to {num_groups}{each} of "
                        f"train.micro_batch_size = {micro_batch_size}",
                        f"set data.batch_size to a multiple of {share}, or change train.micro_batch_size")
    on_cpu = not torch.cuda.is_available()
    deepspeed, fsdp = (os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
                       for engine in ("DEEPSPEED", "FSDP"))
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for one, and warn
    if deepspeed and on_cpu:
        _without_shared_memory_op()
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed and not fsdp, mixed_precision="no",
        gradient_accumulation_steps=global_batch_size // share,
        kwargs_handlers=[InitProcessGroupKwargs("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout_s))]
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
        settings["gradient_accumulation_steps"] = global_batch_size // share
        settings["gradient_clipping"] = max_grad_norm
    return accelerator


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
    """Let go of the model; the processes part only when no other training follows in them."""
    accelerator.free_memory()
    if not another_follows:
        accelerator.end_training()


def _without_shared_memory_op() -> None:
    """DeepSpeed on CPU would compile its shared-memory collective at the first run; plain gloo serves."""
    import deepspeed  # heavy, and needed only under its launcher

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """bfloat16 compute over a bfloat16 base (adapters stay float32); float32 is left alone."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def learning_rate(step: int, peak: float, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """The learning rate of `step` (from 0): linear warm-up, then constant, cosine or linear to zero at num_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    shape = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
    return peak * shape[schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every param group: `lr` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up on any process. Every process must call it."""
    return bool(accelerator.gather(torch.tensor([float(flag)], device=accelerator.device)).any())


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> float:
    """Clip to the global L2 norm and return the norm before it, the same on every process.

    DeepSpeed has clipped and updated by itself, or left the update out where the norm is not finite.
    """
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    return float(norm) if norm is not None else math.nan


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed is the engine."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether FSDP2 is the engine."""
    return accelerator.distributed_type == DistributedType.FSDP


def loading_device(accelerator: Accelerator) -> torch.device:
    """Where to load the base: FSDP2 takes it block by block from the CPU, so that no GPU ever holds it whole."""
    return torch.device("cpu") if is_fsdp(accelerator) else accelerator.device


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    return int(accelerator.state.deepspeed_plugin.zero_stage) if is_deepspeed(accelerator) else 0


def keeper_of_shards(accelerator: Accelerator) -> Callable[[torch.nn.Parameter], None] | None:
    """What leaves this process its share of a parameter, for loading under ZeRO-3; None where the base stays whole.

    Every process must give it the same parameters in the same order.
    """
    if zero_stage(accelerator) < 3:
        return None
    import deepspeed

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    first: Any = None

    def keep(parameter: torch.nn.Parameter) -> None:
        nonlocal first
        if first is None:  # its settings serve all: to read them takes DeepSpeed some milliseconds
            deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=settings)
            first = parameter
        else:
            first.convert_to_zero_parameters([parameter])

    return keep


def offloads_optimizer(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed keeps the optimizer outside the accelerator, for which accelerate gives it another Adam."""
    if not is_deepspeed(accelerator):
        return False
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return zero.get("offload_optimizer", {}).get("device", "none") != "none"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: the device's on an accelerator, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, it does not begin with what the launcher had
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
