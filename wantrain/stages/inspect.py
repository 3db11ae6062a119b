"""`wantrain inspect FILE`: what a weight file or a LoRA holds, and where it will load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from wantrain.models import lora_formats
from wantrain.models.containers import Container, open_container, open_raw
from wantrain.models.lora_formats import LOADS_IN, PEFT_WEIGHTS, LoraFile
from wantrain.models.variants import detect
from wantrain.terms import UserError

LORA_MARKS = (".lora_", ".hada_", ".lokr_", ".diff", ".lora.")
PART_MARKS = {
    "VAE": ("encoder.conv1.weight", "encoder.conv_in.weight"),
    "umT5 text encoder": ("token_embedding.weight", "shared.weight"),
    "CLIP image encoder": ("visual.cls_embedding", "embeddings.class_embedding"),
}


def run(arguments: Sequence[str]) -> None:
    """Print what the one file, or folder of shards, is."""
    if len(arguments) != 1:
        raise UserError(f"inspect takes one file or folder, got {len(arguments)}", "wantrain inspect FILE")
    path = Path(arguments[0]).expanduser()
    raw = open_raw(path / PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else path)
    if any(mark in name for name in raw.names() for mark in LORA_MARKS):
        _lora(path, lora_formats.read_lora(path))
    else:
        _weights(path, open_container(path))


def _lora(path: Path, lora: LoraFile) -> None:
    ranks = Counter(pair.rank for pair in lora.pairs.values())
    scales = Counter(round(pair.scale, 6) for pair in lora.pairs.values())
    print(f"file      {path}: LoRA, format {lora.format}")
    print(f"modules   {len(lora.pairs)}" + (f", and {len(lora.extras)} other tensors, e.g. {next(iter(lora.extras))}"
                                           if lora.extras else ""))
    print(f"rank      {', '.join(f'{rank} on {n}' for rank, n in ranks.most_common())}")
    print(f"scale     {', '.join(f'{scale:g} on {n}' for scale, n in scales.most_common(4))} (alpha / rank)")
    print(f"loads in  {LOADS_IN[lora.format]}")
    norms = sorted(((float(pair.delta().norm()), module) for module, pair in lora.pairs.items()), reverse=True)
    print("norms     largest and smallest of the deltas (L2):")
    for norm, module in norms[:3] + norms[3:][-2:]:
        print(f"          {norm:9.4g}  {module}")
    for key, value in sorted(lora.metadata.items()):
        print(f"metadata  {key} = {value[:100]}")


def _weights(path: Path, container: Container) -> None:
    shapes = container.shapes()
    print(f"file      {path}: {container.kind}" + (f", names under {container.prefix}*" if container.prefix else ""))
    print(f"tensors   {len(shapes)}, {sum(map(math.prod, shapes.values())):,} parameters")
    print(f"stored as {', '.join(f'{k} x {n}' for k, n in Counter(map(container.dtype_of, shapes)).most_common())}")
    part = next((name for name, marks in PART_MARKS.items() if any(mark in shapes for mark in marks)), None)
    print(f"holds     {part or detect(shapes, str(path)).message}")
