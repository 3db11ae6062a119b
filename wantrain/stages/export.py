"""`wantrain export`: the newest checkpoint as a LoRA file, proven by reading it back."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from wantrain import __version__, lora
from wantrain import config as schema
from wantrain.config import Config
from wantrain.engine import checkpoint
from wantrain.models import lora_formats
from wantrain.models.lora_formats import LoraPair
from wantrain.models.names import transformer_to_official
from wantrain.stages import TORCH_DTYPE, Opened, manifest_digest, opened
from wantrain.terms import UserError

ALLOWED_ERROR = {"float32": 1e-6, "bfloat16": 1e-2}
"""Largest relative L2 error of a delta by storage: bfloat16 rounds A and B to 8 bits."""


def run(config: Config, arguments: Sequence[str]) -> None:
    """Write `export/NAME.safetensors` in the format asked for, read it back and compare it with the trained deltas."""
    recipe = opened(config, arguments)
    found = checkpoint.steps_on_disk(recipe.run_dir / "checkpoints")
    if not found:
        raise UserError(f"no checkpoint in {recipe.run_dir / 'checkpoints'}",
                        shlex.join(["wantrain", "train", *arguments]))
    step, tensors = checkpoint.load(found[-1], None)
    pairs = official_pairs(lora.adapter_state(checkpoint.values(tensors), config.lora.rank, config.lora.alpha))
    path = recipe.export_path
    lora_formats.write_lora(path, pairs, config.export.format.name, metadata(recipe, step),
                            dtype=TORCH_DTYPE[config.export.dtype])
    worst, module = lora_formats.worst_difference(pairs, lora_formats.read_lora(path).pairs)
    if worst > ALLOWED_ERROR[config.export.dtype.name]:
        raise UserError(f"{path}: read back, the delta of {module} differs by {worst:.1e}", "report this as a bug; "
                        "the checkpoint is untouched")
    print(f"exported {path} ({config.export.format.name}): {len(pairs)} modules, step {step}; "
          f"read back, largest relative error of a delta {worst:.1e}")


def official_pairs(state: lora.AdapterState) -> dict[str, LoraPair]:
    """The adapter under the official module names."""
    return {transformer_to_official(name): LoraPair(a, b, state.alpha) for name, (a, b) in state.pairs.items()}


def metadata(recipe: Opened, step: int) -> dict[str, str]:
    """What the file says of itself: the field's keys (ss_*, modelspec.*) and where it comes from."""
    config = recipe.config
    return {
        "software": f"wantrain {__version__}", "ss_output_name": config.run.name, "ss_base_model_version": "wan",
        "ss_network_dim": str(config.lora.rank), "ss_network_alpha": str(config.lora.alpha), "ss_steps": str(step),
        "ss_learning_rate": str(config.optim.lr), "ss_training_finished_at": str(int(time.time())),
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1", "modelspec.title": config.run.name,
        "modelspec.trigger_phrase": config.data.trigger,
        "wantrain.config_digest": schema.digest(config),
        "wantrain.base_digest": recipe.base.digest("transformer", recipe.cache.memo),
        "wantrain.manifest_digest": manifest_digest(recipe), "wantrain.variant": config.model.variant,
    }
