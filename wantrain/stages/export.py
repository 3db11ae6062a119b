"""`wantrain export`: the newest checkpoint as a LoRA file, proven by reading it back."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch

from wantrain import __version__, lora
from wantrain import config as schema
from wantrain.config import Config
from wantrain.engine import checkpoint
from wantrain.files import read_tensors, write_tensors
from wantrain.models import base
from wantrain.models.names import transformer_to_official
from wantrain.stages import TORCH_DTYPE, manifest_digest, opened
from wantrain.terms import UserError

PREFIX = "diffusion_model."


def run(config: Config, arguments: Sequence[str]) -> None:
    """Write `export/NAME.safetensors` in the universal format and compare it with the trained deltas."""
    recipe = opened(config, arguments)
    found = checkpoint.steps_on_disk(recipe.run_dir / "checkpoints")
    if not found:
        raise UserError(f"no checkpoint in {recipe.run_dir / 'checkpoints'}", f"wantrain train {' '.join(arguments)}")
    step, tensors = checkpoint.load(found[-1], None)
    state = lora.adapter_state(checkpoint.values(tensors), config.lora.rank, config.lora.alpha)
    exported = universal(state, TORCH_DTYPE[config.export.dtype])
    metadata = {
        "format": "pt", "software": f"wantrain {__version__}", "ss_output_name": config.run.name,
        "ss_base_model_version": "wan", "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.rank), "ss_steps": str(step),
        "ss_learning_rate": str(config.optim.lr), "ss_training_finished_at": str(int(time.time())),
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1", "modelspec.title": config.run.name,
        "modelspec.trigger_phrase": config.data.trigger,
        "wantrain.config_digest": schema.digest(config),
        "wantrain.base_digest": base.digest(recipe.folder, "transformer", recipe.cache.memo),
        "wantrain.manifest_digest": manifest_digest(recipe),
        "wantrain.variant": config.model.variant,
    }
    write_tensors(recipe.export_path, exported, metadata)
    worst = prove(read_tensors(recipe.export_path)[0], state)
    size = recipe.export_path.stat().st_size / 2**20
    print(f"exported {recipe.export_path}: {len(state.pairs)} modules, step {step}, {size:.1f} MiB; "
          f"read back, largest relative error of a delta {worst:.1e}")


def universal(state: lora.AdapterState, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`diffusion_model.<official module>.lora_A/B.weight`, alpha folded into B: the one shape every tool reads right.

    bfloat16 is refused where folding would round (alpha/rank not a power of two): it would cost 2e-3 relative.
    """
    scale = state.alpha / state.rank
    if dtype == torch.bfloat16 and math.frexp(scale)[0] != 0.5:
        raise UserError(f"export.dtype=bfloat16 with alpha/rank = {scale:g}: folding alpha would round the weights",
                        "export.dtype=float32, or train with alpha/rank a power of two")
    exported = {}
    for name, (a, b) in state.pairs.items():
        official = PREFIX + transformer_to_official(name)
        exported[f"{official}.lora_A.weight"] = a.to(dtype)
        exported[f"{official}.lora_B.weight"] = (b * scale).to(dtype)
    return exported


def prove(written: Mapping[str, torch.Tensor], state: lora.AdapterState) -> float:
    """Largest relative L2 error of any module's delta in a written file; refuses what is not the adapter."""
    tensors = dict(written)
    worst = 0.0
    for name, delta in state.deltas():
        official = PREFIX + transformer_to_official(name)
        pair = [tensors.pop(f"{official}.lora_{x}.weight", None) for x in "AB"]
        if pair[0] is None or pair[1] is None:
            raise UserError(f"the exported file has no {official}", "report this as a bug")
        a, b = pair[0], pair[1]
        allowed = 1e-6 if a.dtype == torch.float32 else 1e-2
        error = float((b.float() @ a.float() - delta).norm() / delta.norm().clamp(min=1e-12))
        worst = max(worst, error)
        if error > allowed:
            raise UserError(f"the delta of {name}, read back, differs by {error:.1e}", "report this as a bug")
    if tensors:
        raise UserError(f"the exported file has unexpected tensors {sorted(tensors)[:3]}", "report this as a bug")
    return worst
