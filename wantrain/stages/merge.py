"""`wantrain merge BASE LORA[=STRENGTH] ... OUT`: a transformer with LoRAs folded into its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from wantrain.files import write_json
from wantrain.jobs import progress
from wantrain.models.base import lora_argument, open_transformer
from wantrain.models.containers import Container
from wantrain.models.lora_formats import read_lora
from wantrain.models.lora_updates import STORAGE, Update, merged_tensor, plan_merge
from wantrain.models.names import official_names, transformer_to_diffusers
from wantrain.models.variants import Expert, detect, diffusers_config, is_diffusers_config
from wantrain.options import parse
from wantrain.tensors import stream_tensors
from wantrain.terms import UserError

USAGE = "wantrain merge BASE LORA[=STRENGTH] ... OUT.safetensors"
OPTIONS = {"layout": ("official", "diffusers"), "dtype": ("bfloat16", "float16", "float32"),
           "expert": ("", "high", "low")}
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def run(arguments: Sequence[str]) -> None:
    """Fold every LoRA in, in float32, cast, write and read back; one tensor in memory at a time.

    layout=official writes one file with the names of the public and ComfyUI files, layout=diffusers a folder for
    from_pretrained.
    """
    files, options = parse(arguments, USAGE, OPTIONS)
    if len(files) < 3:
        raise UserError(f"merge takes a base, at least one LoRA and an output, got {len(files)} paths", USAGE)
    source, *given, out = files
    container = open_transformer(source)
    expert = cast("Expert | None", options["expert"] or None)
    plan = plan_merge(container, [(read_lora(path, expert), strength) for path, strength in map(lora_argument, given)])
    target = Path(out).expanduser()
    own = official_names(container.names())
    if options["layout"] == "diffusers":
        config = diffusers_folder_config(container)  # refuses what diffusers has no class for
        own = {name: transformer_to_diffusers(official) for name, official in own.items()}
        write_json(target / "config.json", config)
        target = target / DIFFUSERS_FILE
    elif target.suffix != ".safetensors":
        raise UserError(f"{out} does not end in .safetensors", USAGE)
    shapes = container.shapes()
    stream_tensors(target, {own[name]: shape for name, shape in shapes.items()}, STORAGE[options["dtype"]][0],
                   merged(container, plan), {"wantrain.merged": " ".join(given)})
    print(f"{target}: {len(plan)} of {len(shapes)} tensors changed, {options['layout']} names, {options['dtype']}; "
          "read back equal")


def merged(container: Container, plan: dict[str, list[Update]]) -> Iterator[torch.Tensor]:
    """Every tensor of the file with its updates. Raises UserError where a result is not finite."""
    names = container.names()
    with progress(len(names), 0, "tensor", "merge") as bar:
        for name in names:
            tensor = merged_tensor(plan, name, container.read(name))
            if name in plan and not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite after merging", "use smaller strengths, or inspect the LoRAs")
            yield tensor
            bar.update()


def diffusers_folder_config(container: Container) -> dict[str, object]:
    """The config.json of the folder: the base's own, or that of the variant which the tensors fit."""
    if is_diffusers_config(container.config or {}):
        return container.config or {}
    detection = detect(container.shapes(), str(container.path))
    variant = detection.resolve(detection.fitting[0] if detection.fitting else None)  # they differ in schedules only
    return {"_class_name": variant.transformer_class, **diffusers_config(variant)}
