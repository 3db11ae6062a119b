"""All that the next step needs, out of the engine that runs, as whole tensors by name, and back into another engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from wantrain.engine import is_deepspeed
from wantrain.engine.checkpoint import POINT, VALUE, values
from wantrain.engine.ema import Ema
from wantrain.engine.optimizers import OptimizerKind, average, beta_of
from wantrain.engine.states import COUNT, State, inner, is_zero3, link, parameters_of, sharded_like, states
from wantrain.terms import UserError


def gather(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, kind: OptimizerKind, ema: Ema | None
           ) -> dict[str, torch.Tensor]:
    """All that the next step needs, whole and on the CPU; every process must call it.

    `NAME|value` is what the adapter is, `NAME|y` where training goes on if that is an average, `NAME|KEY` each tensor
    that the optimizer keeps for it (absent before the first step); `(group N)|KEY` are the numbers that the optimizer
    keeps for a param group.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value, kept in states(accelerator, model, optimizer):
        own = {VALUE: value, **kept}
        if kind.averages:
            own |= {POINT: value, VALUE: average(value, kept["z"], beta_of(optimizer)) if kept else value}
        elif ema is not None:
            own |= {POINT: value, VALUE: ema.tensors[name]}
        tensors |= {f"{name}|{key}": _saved(tensor) for key, tensor in own.items()}
    for number, group in enumerate(inner(accelerator, optimizer).param_groups):
        for key in kind.scalars:
            number_type = torch.int64 if isinstance(group[key], int) else torch.float64
            tensors[f"(group {number})|{key}"] = torch.tensor(group[key], dtype=number_type)
    return tensors


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, *, kind: OptimizerKind, ema: Ema | None,
            tensors: Mapping[str, torch.Tensor], updates: int) -> None:
    """Put back what `gather` took, under whatever engine runs now, after so many updates. Every process must call it.
    """
    parameters = parameters_of(accelerator, model)
    if set(parameters) != set(values(tensors)):
        raise UserError("the checkpoint's tensors are not this adapter's", "use the lora.* settings it was made with")
    kept: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("|")
        if name in kept and key not in (VALUE, POINT):
            kept[name][key] = tensor
    point = values(tensors, VALUE if ema is None and not kind.averages else POINT)
    found = [State(name, point[name], kept[name]) for name in parameters]
    if is_deepspeed(accelerator):
        _restore_deepspeed(optimizer, parameters, found)
    else:
        for name, value, own in found:
            parameter = parameters[name]
            parameter.data.copy_(sharded_like(value, parameter))
            optimizer.optimizer.state[parameter] = {key: sharded_like(tensor, parameter) for key, tensor in own.items()}
    itself = inner(accelerator, optimizer)
    for state in itself.state.values():
        if state and kind.counter is not None:
            state[COUNT] = kind.counter(updates)
    for number, group in enumerate(itself.param_groups):
        group |= {key: tensors[f"(group {number})|{key}"].item() for key in kind.scalars}
    if ema is not None:
        ema.restore(values(tensors))


def _restore_deepspeed(optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], found: Sequence[State]) -> None:
    """ZeRO keeps flat float32 partitions: give them states first, then set each tensor, then the model's own copy
    (docs/facts.md, "Engines").
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = optimizer.optimizer
    flats = zero.fp32_partitioned_groups_flat if is_zero3(zero) else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in found[0].tensors}
    link(optimizer)
    for name, whole_value, kept in found:
        parameter = parameters[name]
        value = whole_value.to(parameter.device)
        safe_set_full_fp32_param(parameter, value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        for key, tensor in kept.items():
            safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)
