"""`wantrain merge BASE LORA[=STRENGTH] ... OUT`: a transformer with LoRAs folded into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from wantrain import metrics
from wantrain.files import write_tensors
from wantrain.models import lora_formats
from wantrain.models.containers import open_container
from wantrain.models.names import transformer_to_diffusers, transformer_to_official
from wantrain.terms import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIONS = {"layout": ("official", "diffusers"), "dtype": tuple(DTYPES)}
USAGE = "wantrain merge BASE LORA[=STRENGTH] ... OUT"


def run(arguments: Sequence[str]) -> None:
    """Add strength * delta to every adapted weight in float32, cast, and write one safetensors file.

    The merged model is held in memory once, in the dtype asked for.
    """
    options = {"layout": "official", "dtype": "bfloat16"}
    files = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in OPTIONS:
            files.append(argument)
        elif value not in OPTIONS[key]:
            raise UserError(f"{argument} is not allowed: {', '.join(OPTIONS[key])}", USAGE)
        else:
            options[key] = value
    if len(files) < 3:
        raise UserError(f"merge takes a base, at least one LoRA and an output, got {len(files)} paths", USAGE)
    source, *loras, target = files
    container = open_container(source)
    names = container.names()
    is_official = "head.modulation" in names
    official = {n: n if is_official else transformer_to_official(n) for n in names}
    shapes = {official[name]: shape for name, shape in container.shapes().items()}
    deltas = [_read(argument, shapes) for argument in loras]
    merged, touched = {}, 0
    with metrics.progress(len(official), 0, "tensor", "merge") as bar:
        for name, own in official.items():
            tensor = container.read(name, torch.float32)
            added = [strength * lora.pairs[module].delta() for lora, strength in deltas
                     if (module := own.removesuffix(".weight")) in lora.pairs and own.endswith(".weight")]
            tensor = torch.stack([tensor, *added]).sum(0) if added else tensor
            touched += bool(added)
            merged[own if options["layout"] == "official" else transformer_to_diffusers(own)] = tensor.to(
                DTYPES[options["dtype"]])
            bar.update()
    write_tensors(Path(target), merged, {"format": "pt"})
    print(f"{target}: {touched} of {len(merged)} tensors changed, {options['layout']} names, {options['dtype']}")


def _read(argument: str, shapes: dict[str, tuple[int, ...]]) -> tuple[lora_formats.LoraFile, float]:
    """A LoRA that fits the base, and its strength."""
    path, _, strength = argument.partition("=")
    try:
        value = float(strength or 1)
    except ValueError as error:
        raise UserError(f"{argument}: the strength {strength!r} is not a number", USAGE) from error
    lora = lora_formats.read_lora(Path(path))
    if lora.extras:
        raise UserError(f"{path} holds what merge does not apply: {', '.join(list(lora.extras)[:3])}",
                        "merge it with the tool that made it")
    lora_formats.check_fit(lora, shapes)
    return lora, value
