"""`wantrain export`: the newest checkpoint as a LoRA file, proven by reading it back."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from wantrain import __version__, lora
from wantrain import config as schema
from wantrain.config import Config
from wantrain.engine import checkpoint
from wantrain.engine.checkpoint import Place
from wantrain.models.lora_formats import LoraFile, products
from wantrain.models.lora_updates import from_adapter, write_proven
from wantrain.stages import Opened, manifest_digest, opened, spec_of
from wantrain.terms import NUM_TIMESTEPS, UserError


def run(config: Config, arguments: Sequence[str]) -> None:
    """Write `export/NAME.safetensors`, or the pair of both experts, each read back and compared with what was trained.
    """
    for recipe in opened(config, arguments).trainings():
        export_one(recipe, arguments)


def export_one(recipe: Opened, arguments: Sequence[str]) -> None:
    """One adapter in the format asked for, and its average if one was kept."""
    config = recipe.config
    found = checkpoint.newest_whole(Place(recipe.run_dir / "checkpoints"), None)
    if found is None:
        raise UserError(f"no checkpoint in {recipe.run_dir / 'checkpoints'}",
                        shlex.join(["wantrain", "train", *arguments]))
    _, progress, tensors, passed = found
    step = progress.step
    print("".join(f"{message}; step {step} is exported\n" for message in passed), end="")
    scales, form = adapter_scales(recipe), config.export.format.name
    for key, path in ((checkpoint.VALUE, recipe.export_path), (checkpoint.EMA, recipe.ema_export_path)):
        if not (values := checkpoint.values(tensors, key)):
            continue
        pairs, extras = from_adapter(lora.adapter_state(values, scales))
        about = metadata(recipe, step) | ({"wantrain.ema_decay": str(config.optim.ema_decay)} if key == checkpoint.EMA
                                          else {})
        worst = write_proven(path, LoraFile(path, form, pairs, extras), form, about, config.export.dtype.name)
        print(f"exported {path} ({form}): {config.lora.kind.name} on {len(pairs) or len(products(extras))} modules, "
              f"step {step}; read back, largest relative error of a delta {worst:.1e}")


def adapter_scales(recipe: Opened) -> dict[str, float]:
    """The factor on each module's product, from the adapter's own layers, without reading weights."""
    transformer = recipe.base.meta_transformer()
    lora.inject(transformer, recipe.config.lora.targets, spec_of(recipe.config), recipe.config.train.seed)
    return lora.scales(transformer)


def metadata(recipe: Opened, step: int) -> dict[str, str]:
    """What the file says of itself: the field's keys (ss_*, modelspec.*) and where it comes from."""
    config = recipe.config
    own = {
        "version": __version__, "steps": str(step), "trigger": config.data.trigger, "variant": config.model.variant,
        "config_digest": schema.digest(config), "manifest_digest": manifest_digest(recipe),
        "base_digest": recipe.base.digest("transformer", recipe.cache.memo),
        "merged": " ".join(f"{path}={strength:g}" for path, strength in recipe.base.merged),
        "expert": recipe.base.expert or "", "sigmas": " ".join(f"{sigma:g}" for sigma in recipe.sigmas),
    }
    finished = datetime.now(UTC)
    shift = recipe.variant.shift if config.sigma.shift is None else config.sigma.shift
    return {
        "software": f"wantrain {__version__}", "ss_output_name": config.run.name, "ss_base_model_version": "wan",
        "ss_network_module": f"wantrain.lora ({config.lora.kind.name})", "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.alpha), "ss_steps": str(step), "ss_max_train_steps": str(step),
        "ss_learning_rate": str(config.optim.lr), "ss_seed": str(config.train.seed),
        "ss_num_train_items": str(len(recipe.planned)), "ss_discrete_flow_shift": str(shift),
        "ss_training_finished_at": str(finished.timestamp()),
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1", "modelspec.title": config.run.name,
        "modelspec.date": finished.isoformat(timespec="seconds"),
        "modelspec.timestep_range": ",".join(f"{NUM_TIMESTEPS * sigma:g}" for sigma in recipe.sigmas),
        "modelspec.resolution": "x".join(map(str, reversed(config.data.resolutions[0]))),
        "modelspec.trigger_phrase": config.data.trigger,
        **{f"wantrain.{key}": value for key, value in own.items()},
    }
