"""accelerate and DeepSpeed end in this room. Here: questions about the engine that runs, and what a step asks of it.

torch and accelerate are imported by what needs them: `saved`, beside this, tells of checkpoints without.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wantrain import costs

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator as Accelerator


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


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> float:
    """Clip to the global L2 norm and return the norm before it, the same on every process.

    DeepSpeed has clipped and updated by itself, or left the update out where the norm is not finite.
    """
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    return float(norm) if norm is not None else math.nan


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed is the engine."""
    return accelerator.distributed_type == "DEEPSPEED"


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether FSDP2 is the engine."""
    return accelerator.distributed_type == "FSDP"


def divides(accelerator: Accelerator) -> str:
    """The engine that divides the frozen weights among processes, by its name; "" where each holds them whole."""
    return "ZeRO-3" if zero_stage(accelerator) == 3 else "FSDP2" if is_fsdp(accelerator) else ""


def loading_device(accelerator: Accelerator, *, through_host: bool) -> torch.device:
    """The device to load the base on. FSDP2 takes it block by block from the CPU: no GPU ever holds it whole, and
    neither does one that some of it waits for in host memory (`through_host`).
    """
    import torch

    return torch.device("cpu") if is_fsdp(accelerator) or through_host else accelerator.device


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    return int(accelerator.state.deepspeed_plugin.zero_stage) if is_deepspeed(accelerator) else 0


def shard_parameter(accelerator: Accelerator) -> Callable[[torch.nn.Parameter], None] | None:
    """A function that cuts a parameter, as soon as it is loaded, to this process's share: ZeRO-3 divides the base so.
    None under other engines, where every process holds the whole base.

    Every process must call the function with the same parameters in the same order.
    """
    if zero_stage(accelerator) < 3:
        return None
    import deepspeed
    import torch

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
    """Whether DeepSpeed keeps the optimizer in the memory of the CPU. accelerate then gives it another Adam."""
    if not is_deepspeed(accelerator):
        return False
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return zero.get("offload_optimizer", {}).get("device", "none") != "none"


def host_bytes() -> float:
    """Memory of this machine that a training may take: three quarters of it all; on Windows, which has no sysconf, what
    a plan assumes.
    """
    if not hasattr(os, "sysconf"):
        return costs.HOST_BYTES
    return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: the device's on an accelerator, else the process's resident set; 0 where the system
    does not say (Windows).
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, it does not begin with what the launcher had
        return int(status.read_text("utf-8").partition("VmHWM:")[2].split()[0]) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
