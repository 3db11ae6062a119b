"""`wantrain inspect FILE`: what a weight file or a LoRA holds, and where it will load."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from wantrain.lora import MAGNITUDE, inner_rank
from wantrain.models import hub, lora_formats
from wantrain.models.containers import Container, find_parts, open_container, open_raw
from wantrain.models.detection import detect, fitting_lora, part_held
from wantrain.models.lora_checks import product_size
from wantrain.models.lora_formats import LoraFile, products, split_extra
from wantrain.models.lora_loaders import told
from wantrain.models.lora_names import PEFT_WEIGHTS, is_lora, is_run, said_expert, weights_of
from wantrain.models.lora_updates import is_zero, pair_norm, product_norm
from wantrain.models.variants import Expert
from wantrain.models.weight_files import ContainerError


def run(given: argparse.Namespace) -> None:
    """Print what the one file, or folder of shards, is, or each part of a whole checkpoint's folder."""
    path = hub.local(given.FILE)
    if parts := _checkpoint(path):
        for part in parts:
            _weights(part, open_container(part))
        return
    if is_lora(open_raw(_weights_path(path)).names()):
        _lora(lora_formats.read_lora(path, cast("Expert | None", given.expert or None)), given.norms == "all")
    else:
        _weights(path, open_container(path))


def _weights_path(path: Path) -> Path:
    """The path itself, or the file in a PEFT adapter's folder; refuses a run's folder or checkpoint."""
    return weights_of(path) if is_run(path) or (path / PEFT_WEIGHTS).is_file() else path


def _checkpoint(path: Path) -> list[Path]:
    """The parts with weights of a whole checkpoint's folder; empty for anything else."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return []
    try:
        return [part for name, part in find_parts(path).items() if name != "tokenizer"]
    except ContainerError:
        return []


def _lora(lora: LoraFile, every_norm: bool) -> None:
    made = products(lora.extras)
    sizes = {module: (pair.b.shape[0], pair.a.shape[1]) for module, pair in lora.pairs.items() if pair.a.ndim == 2}
    sizes |= {module: product_size(leaves) for module, leaves in made.items()}
    suffixes = {split_extra(name)[1] for name in lora.extras}
    ranks = Counter([*(pair.rank for pair in lora.pairs.values()),
                     *(inner_rank(leaves) or "whole factors" for leaves in made.values())])
    scales = Counter(f"{pair.alpha:g} on rank {pair.rank}" for pair in lora.pairs.values())
    print(f"file      {lora.path}: {_kind(lora, suffixes)}, format {lora.format}")
    print(f"modules   {len(lora.pairs) + len(made)}"
          + (f", and {len(lora.extras)} other tensors: {', '.join(sorted(suffixes))}" if lora.extras else ""))
    if lora.ignored:
        print(f"ignored   {', '.join(lora.ignored)}: no weights")
    if is_zero(lora):
        print("effect    none: a LoRA of zeros")
    if expert := said_expert(lora.path, lora.metadata)[0]:
        print(f"expert    {expert} noise, by its {said_expert(lora.path, lora.metadata)[1]}")
    print(f"fits      {' or '.join(fitting_lora(sizes)) or 'no variant'} (by its modules' names and sizes)")
    print(f"rank      {', '.join(f'{rank} on {n}' for rank, n in ranks.most_common())}")
    if scales:
        print(f"alpha     {', '.join(f'{scale} ({n} modules)' for scale, n in scales.most_common(4))}")
    print(told(lora))
    norms = {module: pair_norm(pair) for module, pair in lora.pairs.items()}
    _norms(norms | {module: product_norm(leaves) for module, leaves in made.items()}, every_norm)
    for key, value in sorted(lora.metadata.items()):
        print(f"metadata  {key} = {value if len(value) <= 100 else value[:97] + '...'}")


def _kind(lora: LoraFile, suffixes: set[str]) -> str:
    is_dora = bool(suffixes & {MAGNITUDE, "dora_scale"})
    kinds = {"LoRA": bool(lora.pairs) and not is_dora, "DoRA": is_dora, "LoHa": "hada_w1_a" in suffixes,
             "LoKr": any(suffix.startswith("lokr_") for suffix in suffixes),
             "whole differences": bool(suffixes & {"diff", "diff_b", "diff_m"})}
    return " and ".join(kind for kind, there in kinds.items() if there)


def _norms(norms: Mapping[str, float], every: bool) -> None:
    """L2 norms of the deltas: by kind of module the least, mean and largest over the blocks, or every one."""
    if every:
        print("norms     of the deltas (L2):")
        for module, norm in norms.items():
            print(f"          {norm:10.4g}  {module}")
        return
    kinds: dict[str, list[tuple[float, str]]] = {}
    for module, norm in norms.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", module, count=1), []).append((norm, module))
    print("norms     of the deltas (L2): least, mean, largest; norms=all lists every module")
    for kind, found in kinds.items():
        mean = sum(norm for norm, _ in found) / len(found)
        print(f"          {min(found)[0]:10.4g} {mean:10.4g} {max(found)[0]:10.4g}  {kind}"
              + (f" (largest: {max(found)[1]})" if len(found) > 1 else ""))


def _weights(path: Path, container: Container) -> None:
    shapes = container.shapes()
    print(f"file      {path}: {container.kind}" + (f", names under {container.prefix}*" if container.prefix else ""))
    print(f"tensors   {len(shapes)}, {sum(map(math.prod, shapes.values())):,} parameters")
    print(f"stored as {', '.join(f'{k} x {n}' for k, n in Counter(map(container.dtype_of, shapes)).most_common())}")
    print(f"holds     {part_held(shapes) or detect(shapes, str(path), container.config).message}"
          + (", and its tokenizer" if container.spiece_model() else ""))
