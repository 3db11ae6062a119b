"""Checkpoints that belong to no engine and no number of processes.

Per trainable tensor: its float32 value and AdamW's two moments, by name. With the step and the config's fingerprint
that is all, because order, sigma, noise and learning rate are functions of (seed, step).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from wantrain.engine import is_deepspeed
from wantrain.files import digest_file, write_json
from wantrain.tensors import read_tensors, write_tensors
from wantrain.terms import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
TENSORS, STATE = "training.safetensors", "state.json"


def _named(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}


def gather(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Whole float32 values and moments on the CPU under `name|value`, `name|exp_avg`, `name|exp_avg_sq`.

    Every process must call it. Moments are absent before the first step.
    """
    tensors = {}
    for name, parameter in _named(accelerator, model).items():
        if is_deepspeed(accelerator):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            tensors[f"{name}|value"] = safe_get_full_fp32_param(parameter)
            for moment in MOMENTS:
                tensors[f"{name}|{moment}"] = safe_get_full_optimizer_state(parameter, moment)
        else:
            tensors[f"{name}|value"] = parameter.detach()
            for moment in MOMENTS:
                if moment in optimizer.optimizer.state[parameter]:
                    tensors[f"{name}|{moment}"] = optimizer.optimizer.state[parameter][moment]
    return {key: t.detach().float().cpu().clone() for key, t in tensors.items() if t is not None}


def values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only the parameters' values, by name."""
    return {key.removesuffix("|value"): t for key, t in tensors.items() if key.endswith("|value")}


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, tensors: Mapping[str, torch.Tensor],
            step: int) -> None:
    """Put values and moments back under whatever engine runs now. Every process must call it."""
    named = _named(accelerator, model)
    if set(named) != set(values(tensors)):
        raise UserError("the checkpoint's tensors are not this adapter's", "use the lora.* settings it was made with")
    if is_deepspeed(accelerator):
        _restore_deepspeed(optimizer, named, tensors, step)
        return
    for name, parameter in named.items():
        parameter.data.copy_(tensors[f"{name}|value"])
        optimizer.optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{moment: tensors[f"{name}|{moment}"].to(parameter.device) for moment in MOMENTS},
        }


def _restore_deepspeed(optimizer: Any, named: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor],
                       step: int) -> None:
    """ZeRO keeps flat float32 partitions: give them moments first, then set each tensor, then the model's own copy."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = optimizer.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    flats = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {"step": torch.zeros(()), **{m: torch.zeros_like(flat) for m in MOMENTS}}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in named.items():
        value = tensors[f"{name}|value"].to(parameter.device)
        safe_set_full_fp32_param(parameter, value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, tensors[f"{name}|{moment}"].to(parameter.device), moment)
    for state in zero.optimizer.state.values():
        state["step"] = torch.tensor(float(step))


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


def load(path: Path, fingerprint: Mapping[str, Any] | None) -> tuple[int, dict[str, torch.Tensor]]:
    """(step, tensors) of a checkpoint; refuses a damaged one, and one whose fingerprint differs.

    `fingerprint` None skips the comparison (export needs none).
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
        old = state["fingerprint"]
        changed = [f"{k}: {old.get(k)} -> {fingerprint.get(k)}" for k in sorted({*old, *fingerprint})
                   if old.get(k) != fingerprint.get(k)]
        if changed:
            raise UserError("the config is not the one this run was started with:\n  " + "\n  ".join(changed),
                            "set these back, or start a new run: run.name=ANOTHER")
    tensors, _ = read_tensors(path / TENSORS)
    return state["step"], tensors
