"""Checkpoints that belong to no engine and no number of processes.

Per trainable tensor: its float32 value and what the optimizer keeps for it, by name (AdamW: two moments). With the
step and the config's fingerprint that is all, because order, sigma, noise and learning rate are functions of (seed,
step), and every step is one update.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from wantrain.engine import is_deepspeed
from wantrain.engine.ema import Ema
from wantrain.engine.optimizers import Kind, average, beta_of
from wantrain.engine.states import COUNT, State, inner, is_zero3, link, states, trainable
from wantrain.files import digest_file, write_json
from wantrain.tensors import read_tensors, write_tensors
from wantrain.terms import UserError

TENSORS, STATE = "training.safetensors", "state.json"
VALUE, EMA, POINT = "value", "ema", "y"
"""Keys beside those of the optimizer: what the adapter is, its average, and where schedule-free trains on."""


def gather(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, kind: Kind, ema: Ema | None
           ) -> dict[str, torch.Tensor]:
    """All that the next step needs, whole and on the CPU; every process must call it.

    `NAME|value` is what the adapter is, `NAME|KEY` each tensor that the optimizer keeps for it (absent before the
    first step), `NAME|ema` its average; `(group N)|KEY` are the numbers that the optimizer keeps for a param group.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value, kept in states(accelerator, model, optimizer):
        own = {VALUE: value, **kept}
        if kind.averages:
            own |= {POINT: value, VALUE: average(value, kept["z"], beta_of(optimizer)) if kept else value}
        tensors |= {f"{name}|{key}": _saved(tensor) for key, tensor in own.items()}
    if ema is not None:
        tensors |= {f"{name}|{EMA}": _saved(tensor) for name, tensor in ema.tensors.items()}
    for number, group in enumerate(inner(accelerator, optimizer).param_groups):
        for key in kind.scalars:
            number_type = torch.int64 if isinstance(group[key], int) else torch.float64
            tensors[f"(group {number})|{key}"] = torch.tensor(group[key], dtype=number_type)
    return tensors


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()


def values(tensors: Mapping[str, torch.Tensor], key: str = VALUE) -> dict[str, torch.Tensor]:
    """Only the parameters' values (or another key's tensors), by name."""
    return {name.removesuffix(f"|{key}"): t for name, t in tensors.items() if name.endswith(f"|{key}")}


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, *, kind: Kind, ema: Ema | None,
            tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Put back what `gather` took, under whatever engine runs now. Every process must call it."""
    parameters = trainable(accelerator, model)
    if set(parameters) != set(values(tensors)):
        raise UserError("the checkpoint's tensors are not this adapter's", "use the lora.* settings it was made with")
    kept: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("|")
        if name in kept and key not in (VALUE, EMA, POINT):
            kept[name][key] = tensor
    point = values(tensors, POINT if kind.averages else VALUE)
    found = [State(name, point[name], kept[name]) for name in parameters]
    if is_deepspeed(accelerator):
        _restore_deepspeed(optimizer, parameters, found)
    else:
        for name, value, own in found:
            parameters[name].data.copy_(value)
            optimizer.optimizer.state[parameters[name]] = {
                key: tensor.to(parameters[name].device) for key, tensor in own.items()}
    itself = inner(accelerator, optimizer)
    for state in itself.state.values():
        if state and kind.counter is not None:
            state[COUNT] = kind.counter(step)
    for number, group in enumerate(itself.param_groups):
        group |= {key: tensors[f"(group {number})|{key}"].item() for key in kind.scalars}
    if ema is not None:
        ema.restore(values(tensors, EMA))


def _restore_deepspeed(optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], found: Sequence[State]) -> None:
    """ZeRO keeps flat float32 partitions: give them states first, then set each tensor, then the model's own copy."""
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


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], fingerprint: Mapping[str, Any], keep: int
         ) -> Path:
    """Write `step_NNNNNN/` under a temporary name and rename it, then drop all but the newest `keep`.

    `state.json` is written last and holds the digest of the tensors' file: without it a checkpoint is incomplete.
    """
    final = folder / f"step_{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary / TENSORS, tensors, {"step": str(step)})
    write_json(temporary / STATE, {"step": step, "digest": digest_file(temporary / TENSORS),
                                   "fingerprint": dict(fingerprint)})
    temporary.rename(final)
    for old in steps_on_disk(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def steps_on_disk(folder: Path) -> list[Path]:
    """Checkpoints by rising step."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name))


def load(path: Path, fingerprint: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None
         ) -> tuple[int, dict[str, torch.Tensor]]:
    """(step, tensors) of a checkpoint; refuses a damaged one, and one whose fingerprint differs.

    `fingerprint` None skips the comparison (export needs none). A key that the checkpoint's version did not know yet
    counts as its default in `defaults`: the default of a new key is what was done before there was one.
    """
    try:
        state = json.loads((path / STATE).read_text())
        intact = digest_file(path / TENSORS) == state["digest"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"checkpoint {path} is incomplete: {error}", f"rm -r {path} and run again: the one before "
                        "it will be used") from error
    if not intact:
        raise UserError(f"checkpoint {path} is damaged: its tensors are not those that were written",
                        f"rm -r {path} and run again: the one before it will be used")
    if fingerprint is not None:
        known = {key: value for key, value in (defaults or {}).items() if key in fingerprint}
        old = {**known, **state["fingerprint"]}
        changed = [f"{k}: {old.get(k)} -> {fingerprint.get(k)}" for k in sorted({*old, *fingerprint})
                   if old.get(k) != fingerprint.get(k)]
        if changed:
            raise UserError("the config is not the one this run was started with:\n  " + "\n  ".join(changed),
                            "set these back, or start a new run: run.name=ANOTHER")
    tensors, _ = read_tensors(path / TENSORS)
    return state["step"], tensors
