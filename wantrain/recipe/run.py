"""What a run says of itself: to a resume, to the files that it exports, and in its folder."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wantrain import __version__, flow, metrics
from wantrain import config as schema
from wantrain.engine import saved
from wantrain.engine.saved import Record
from wantrain.files import write_json, write_text
from wantrain.models import quantised
from wantrain.pages.plots import density_svg
from wantrain.recipe.clips import Clips, manifest_digest
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import sampler_settings
from wantrain.terms import NUM_TIMESTEPS

NUM_PLOTTED = 20_000
"""Sigmas that the plot of the run folder draws."""


def run_fingerprint(recipe: Recipe, clips: Clips, form: str) -> dict[str, Any]:
    """All that fixes the training's numbers: keys of the config, the base's weights, the form in which they are stored
    and, where products are computed in that, that they are; the clips with their captions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**schema.resume_keys(recipe.config), "(base weights)": recipe.base_digest, saved.BASE_FORM: form,
            "(clips and captions)": manifest_digest(clips),
            **({saved.BASE_PRODUCTS: form} if quantised.has_products(form, device) else {})}


def file_metadata(recipe: Recipe, clips: Clips) -> dict[str, str]:
    """What a LoRA file of this training says of itself: the field's keys (ss_*, modelspec.*) and its origin."""
    config, variant = recipe.config, recipe.variant
    _, shift = config.sigma.drawn(variant)
    own = {
        "version": __version__, "trigger": config.data.trigger, "variant": variant.name,
        "config_digest": schema.digest(config), "manifest_digest": manifest_digest(clips),
        "base_digest": recipe.base_digest,
        "merged": " ".join(f"{Path(path).name}={strength:g}" for path, strength in recipe.base.merged),
        "expert": recipe.base.expert or "", "sigmas": " ".join(f"{sigma:g}" for sigma in recipe.sigmas),
        "ema": f"{config.optim.ema:g}" if config.optim.keeps_average else "",
        "targets": " ".join(config.lora.targets), "num_heldout": str(len(clips.heldout)),
    }
    return {
        "software": f"wantrain {__version__}", "ss_output_name": config.run.name, "ss_base_model_version": "wan",
        "ss_network_module": f"wantrain.lora ({config.lora.kind.name})", "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.alpha), "ss_learning_rate": str(config.optim.lr),
        "ss_seed": str(config.train.seed), "ss_num_train_items": str(len(clips.planned)),
        "ss_discrete_flow_shift": str(shift), "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1", "modelspec.title": config.run.name,
        "modelspec.timestep_range": ",".join(f"{NUM_TIMESTEPS * sigma:g}" for sigma in recipe.sigmas),
        "modelspec.resolution": "x".join(map(str, reversed(config.data.resolutions[0]))),
        "modelspec.trigger_phrase": config.data.trigger,
        **{f"wantrain.{key}": value for key, value in own.items()},
    }


def record_of(recipe: Recipe, clips: Clips, scales: Mapping[str, float], form: str) -> Record:
    """What each checkpoint says besides its tensors; `scales` are the factors on the adapter's products, `form` is that
    of the base.
    """
    return Record(run_fingerprint(recipe, clips, form), recipe.config.lora.kind.name, scales,
                  file_metadata(recipe, clips))


def write_header(recipe: Recipe, clips: Clips, more: Mapping[str, Any]) -> None:
    """`config.yaml`, `run.json` (versions, digests and `more`) and the plots of what sigmas are drawn."""
    config = recipe.config
    write_text(recipe.run_dir / "config.yaml", schema.to_yaml(config))
    write_json(recipe.run_dir / "run.json", {
        "wantrain": __version__, "commit": metrics.commit(), "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")},
        "config_digest": schema.digest(config), "base_digest": recipe.base_digest, "expert": recipe.base.expert,
        "sigmas": recipe.sigmas, "manifest_digest": manifest_digest(clips), "num_clips": len(clips.planned), **more,
    })
    write_densities(recipe, clips)


def write_densities(recipe: Recipe, clips: Clips) -> None:
    """`sigma_density.svg`: what sigmas are drawn beside those of inference, a plot for each density that buckets have.
    """
    config, variant = recipe.config, recipe.variant
    densities = {recipe.density(bucket): bucket for bucket in dict.fromkeys(p.bucket for p in clips.planned)}
    steps = range(math.ceil(NUM_PLOTTED / config.data.batch_size))
    inference = sampler_settings(recipe)
    for density, bucket in densities.items():
        size = config.data.batch_size
        drawn = torch.cat([flow.draw_sigma(config.train.seed, step, range(size), size, density) for step in steps])
        name = "sigma_density.svg" if len(densities) == 1 else f"sigma_density {bucket}.svg"
        expert = f", {recipe.base.expert} noise expert" if recipe.base.expert else ""
        write_text(recipe.run_dir / name, density_svg(
            f"{config.run.name}{expert}: sigmas of training", drawn.tolist(), density, inference_shift=inference.shift,
            inference_sigmas=inference.sigmas[:-1].tolist(), boundary=variant.boundary))
