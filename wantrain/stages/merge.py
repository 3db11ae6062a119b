"""`wantrain merge BASE LORA[=STRENGTH] ... OUT`: a transformer with LoRAs folded into its weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch

from wantrain.files import write_json
from wantrain.jobs import progress
from wantrain.models.base import open_transformer
from wantrain.models.containers import Container
from wantrain.models.detection import detect, expert_named, stated_vace_layers
from wantrain.models.lora_names import lora_argument, weights_of
from wantrain.models.lora_updates import STORAGE, Update, merged_tensor, plan_merge, read_given
from wantrain.models.names import ANIMATE_ONLY, OWN_ONLY, official_names, transformer_to_diffusers
from wantrain.models.outputs import check_file, check_folder
from wantrain.models.variants import Expert, diffusers_config, is_diffusers_config
from wantrain.tensors import stream_tensors
from wantrain.terms import UserError

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def run(given: argparse.Namespace) -> None:
    """Fold every LoRA in, in float32, cast, write and read back; one tensor in memory at a time.

    layout=official writes one file with the names of the public and ComfyUI files, layout=diffusers a folder for
    from_pretrained.
    """
    container, out = open_transformer(given.BASE), Path(given.OUT).expanduser()
    loras = [lora_argument(word) for word in given.LORA]
    usage = "wantrain merge BASE LORA[=STRENGTH] ... OUT.safetensors"
    inputs, in_folder = [container.path, *(weights_of(path) for path, _ in loras)], given.layout == "diffusers"
    target = check_folder(out, DIFFUSERS_FILE, "transformer", inputs, usage) if in_folder \
        else check_file(out, "transformer", inputs, usage)
    own = official_names(container.names())
    refuse_other_layout_of_animate(container, given.layout)
    if in_folder:
        config = diffusers_folder_config(container)  # refuses what diffusers has no class for
        own = {name: name if name.startswith(ANIMATE_ONLY) else transformer_to_diffusers(official)
               for name, official in own.items()}
    named = expert_named(container.path)
    expert = cast("Expert | None", given.expert or None) or named
    if named and expert != named:
        raise UserError(f"expert={expert}, but {container.path} is named as the {named} noise expert",
                        f"expert={named}, or the other expert's file")
    plan = plan_merge(container, [(read_given(path, expert), strength) for path, strength in loras])
    shapes, dtype = container.shapes(), STORAGE[given.dtype][0]
    stream_tensors(target, {own[name]: shape for name, shape in shapes.items()}, dtype,
                   merged(container, plan, dtype), {"wantrain.merged": " ".join(given.LORA)})
    if in_folder:
        write_json(out / "config.json", config)
    print(f"{target}: {len(plan)} of {len(shapes)} tensors changed, {given.layout} names, {given.dtype}; "
          "read back equal")


def refuse_other_layout_of_animate(container: Container, layout: str) -> None:
    """Raise UserError where Wan-Animate's own tensors would have to be cut otherwise."""
    own = "official" if "head.modulation" in container.names() else "diffusers"
    if own != layout and any(name.startswith(ANIMATE_ONLY) for name in container.names()):
        raise UserError(f"{container.path} is Wan-Animate under {own} names, whose own tensors are cut otherwise under "
                        f"{layout} ones", f"layout={own}")


def merged(container: Container, plan: dict[str, list[Update]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Every tensor of the file with its updates, in `dtype`. Raises UserError where one is not finite then."""
    names = container.names()
    with progress(len(names), 0, "tensor", "merge") as bar:
        for name in names:
            exact = merged_tensor(plan, name, container.read(name))
            tensor = exact.to(dtype)
            if not torch.isfinite(exact).all():
                raise UserError(f"{name} is not finite " + ("after merging" if name in plan else "in the base"),
                                "use smaller strengths, or inspect the LoRAs; nothing was written")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite in {dtype}: its largest value is {float(exact.abs().max()):.3g}",
                                "write dtype=bfloat16 or dtype=float32, or use smaller strengths; nothing was written")
            yield tensor
            bar.update()


def diffusers_folder_config(container: Container) -> dict[str, object]:
    """The config.json of the folder: the base's own, or that of the variant which the tensors fit."""
    if is_diffusers_config(container.config or {}):
        return container.config or {}
    stated = stated_vace_layers(container.config or {})
    detection = detect(container.shapes(), str(container.path), container.config)
    variant = detection.resolve(next(iter(detection.candidates), None))  # they differ in schedules only
    if variant.architecture.driven or any(name.startswith(OWN_ONLY) for name in container.names()):
        raise UserError(f"{container.path} is a {variant.name}, whose class here is not diffusers': it would not "
                        "read such a folder", "layout=official")
    return {"_class_name": variant.transformer_class, **diffusers_config(variant),
            **({"vace_layers": list(stated)} if stated else {})}
