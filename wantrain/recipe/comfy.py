"""The ComfyUI workflow beside an export, from the config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wantrain.config import Config, SamplerProfile, variant_of
from wantrain.files import write_json
from wantrain.models.base import expert_path
from wantrain.models.comfy_files import FILES, NOT_TAKEN
from wantrain.models.lora_formats import read_lora
from wantrain.models.lora_loaders import not_loading
from wantrain.models.variants import Expert
from wantrain.options import split_strength


def write_workflow(config: Config, path: Path, exports: Mapping[Expert | None, Path]) -> str:
    """Write the workflow that samples these exports as the config's sampler does in ComfyUI; what to tell of it.

    Where ComfyUI cannot, there is none, nor one of an earlier export.
    """
    variant = variant_of(config)
    path.unlink(missing_ok=True)
    if variant.name not in FILES:
        return f"no ComfyUI workflow: ComfyUI has no {variant.name}"
    if (lacking := NOT_TAKEN.get(variant.task)) in (config.sampler.inputs or [{}])[0]:
        return f"no ComfyUI workflow: its node for {variant.name} takes no {lacking}"
    for export in exports.values():
        if why := dict(not_loading(read_lora(export), variant.task)).get("ComfyUI"):
            return f"no ComfyUI workflow: it {why} ({export.name})"
    from wantrain.models.comfy_workflow import Wanted, workflow  # diffusers' solvers, which take seconds to import
    from wantrain.recipe.sampler import settings_of

    own = config.sampler
    tool = own if own.profile is SamplerProfile.comfy else replace(own, profile=SamplerProfile.comfy, solver=None)
    strength = next((s for s in reversed(own.strengths) if s), 1.0)
    loras = {expert: merged(config, expert) + ([(exports[expert].name, strength)] if expert in exports else [])
             for expert in variant.experts or (None,)}
    write_json(path, workflow(variant, Wanted(
        settings_of(replace(config, sampler=tool), variant), loras, prompt_of(config), own.seeds[0],
        own.inputs[0] if own.inputs else {}, path.name.partition(".")[0])))
    return f"wrote {path}: drop it into ComfyUI; its LoRA files belong into models/loras"


def merged(config: Config, expert: Expert | None) -> list[tuple[str, float]]:
    """The LoRAs that are folded into the base, a few-step one last, which ComfyUI loads one after the other."""
    words = [*config.model.merge, *filter(None, [config.sampler.fast_lora])]
    given = [split_strength(expert_path(word, expert)) for word in words]
    return [(Path(file).name, 1.0 if strength is None else strength) for file, strength in given]


def prompt_of(config: Config) -> str:
    """The first prompt that holds the trigger; else the first one with the trigger before it."""
    trigger, prompts = config.data.trigger, config.sampler.prompts
    holding = [prompt for prompt in prompts if trigger in prompt]
    return holding[0] if holding else ", ".join(filter(None, [trigger, *prompts[:1]]))
