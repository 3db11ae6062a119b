"""Whole values and optimizer states by parameter, under every engine. DeepSpeed keeps both in flat partitions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor, distribute_tensor

from wantrain.engine import is_deepspeed, zero_stage

COUNT = "step"
"""The key under which an optimizer holds a parameter's number of updates."""


class State(NamedTuple):
    """One trainable parameter: its whole float32 value and the tensors that the optimizer keeps for it, by key."""

    name: str
    value: torch.Tensor
    tensors: dict[str, torch.Tensor]


def parameters_of(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters with a gradient, by the name that they have without an engine."""
    return {name: p for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}


def inner(accelerator: Accelerator, optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, out of accelerate's and DeepSpeed's wrappers."""
    return optimizer.optimizer.optimizer if is_deepspeed(accelerator) else optimizer.optimizer


@contextlib.contextmanager
def whole(accelerator: Accelerator, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block: the parameters' whole values by name, to be read. Every process must enter it."""
    if zero_stage(accelerator) < 3:
        yield {name: gathered(p.detach()) for name, p in parameters.items()}
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=None):
        yield {name: p.detach() for name, p in parameters.items()}


def fill(accelerator: Accelerator, parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]
         ) -> None:
    """Put whole values, by name, into the model; the optimizer's own are left as they are. Every process must call it.
    """
    if zero_stage(accelerator) < 3:
        for name, value in values.items():
            parameters[name].data.copy_(sharded_like(value, parameters[name]))
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameters[name] for name in values], modifier_rank=0):
        for name, value in values.items():
            parameters[name].data.copy_(value)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, whether it is or FSDP2 has sharded it. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A whole tensor on the parameter's device; this process's share of it where FSDP2 has sharded the parameter."""
    own = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return own
    return distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)


def states(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> Iterator[State]:
    """Each trainable parameter with what the optimizer keeps for it: nothing before the first step, never its COUNT.

    The tensors are the optimizer's own where it has them whole. Every process must exhaust it.
    """
    parameters, kept = parameters_of(accelerator, model), inner(accelerator, optimizer).state
    if is_deepspeed(accelerator):
        yield from _deepspeed_states(optimizer, parameters, kept)
        return
    for name, parameter in parameters.items():
        yield State(name, gathered(parameter.detach()), {
            key: gathered(tensor) for key, tensor in kept.get(parameter, {}).items()
            if key != COUNT and isinstance(tensor, torch.Tensor)})


def _deepspeed_states(optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], kept: Mapping[Any, Any]
                      ) -> Iterator[State]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    keys = sorted({key for flat, state in kept.items() for key, tensor in state.items()
                   if isinstance(tensor, torch.Tensor) and tensor.shape == flat.shape})
    if keys:
        link(optimizer)
    for name, parameter in parameters.items():
        yield State(name, safe_get_full_fp32_param(parameter),
                    {key: safe_get_full_optimizer_state(parameter, key) for key in keys})


def link(optimizer: Any) -> None:
    """Let ZeRO-1 and 2 look up where each parameter's states lie.

    They do so once, after the first param group's step, when the groups behind it have no states yet. ZeRO-3 looks
    them up each time.
    """
    zero = optimizer.optimizer
    if is_zero3(zero):
        return
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def is_zero3(zero: Any) -> bool:
    """Whether DeepSpeed's optimizer is that of stage 3, which keeps its flat partitions elsewhere."""
    return hasattr(zero, "fp32_partitioned_groups_flat")
