"""`wantrain extract TUNED BASE OUT rank=32`: what a tuned transformer learned, as a LoRA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from wantrain import __version__
from wantrain.jobs import progress
from wantrain.models.base import open_transformer
from wantrain.models.containers import Container
from wantrain.models.lora_formats import LoraFile, LoraPair
from wantrain.models.lora_updates import low_rank, write_proven
from wantrain.models.names import official_names
from wantrain.models.outputs import check_lora_output
from wantrain.models.weight_files import ContainerError
from wantrain.terms import UserError


def run(given: argparse.Namespace) -> None:
    """Write the best LoRA of the given rank for TUNED - BASE, with the share of the change that it keeps, per layer.

    `rest` says what becomes of changed tensors that are no Linear weight: refuse names them, diff writes them whole
    (format=comfy_updown), drop leaves them out.
    """
    tuned, base, target = open_transformer(given.TUNED), open_transformer(given.BASE), Path(given.OUT).expanduser()
    check_lora_output(target, given.format, [tuned.path, base.path], "wantrain extract TUNED BASE OUT.safetensors")
    pairs, energy, rest = differences(tuned, base, given.rank)
    if not pairs and not rest:
        raise UserError(f"{given.TUNED} and {given.BASE} hold the same weights", "check the two paths")
    if rest and given.rest == "refuse":
        raise UserError(f"{len(rest)} changed tensors are no Linear weight: {', '.join(list(rest)[:3])}",
                        "rest=diff format=comfy_updown keeps them (ComfyUI, LightX2V), rest=drop leaves them out")
    extras = rest if given.rest == "diff" else {}
    metadata = {"software": f"wantrain {__version__}", "ss_network_dim": str(given.rank),
                "ss_network_alpha": str(given.rank), "wantrain.extracted_from": f"{given.TUNED} - {given.BASE}",
                "wantrain.energy": json.dumps({module: round(kept, 6) for module, kept in energy.items()})}
    worst = write_proven(LoraFile(target, given.format, pairs, extras), given.format, metadata, given.dtype)
    for module, kept in energy.items():
        print(f"  {kept:8.2%}  {module}")
    print(f"{target}: rank {given.rank} on {len(pairs)} modules, above the share of each change's energy that it "
          f"keeps (least {min(energy.values(), default=1):.2%})"
          + (f"; {len(rest)} other changed tensors {'kept' if extras else 'left out'}" if rest else "")
          + f"; read back, largest relative error of a delta {worst:.1e}")


def differences(tuned: Container, base: Container, rank: int
                ) -> tuple[dict[str, LoraPair], dict[str, float], dict[str, torch.Tensor]]:
    """(official module -> pair, module -> share of the squared norm kept, whole differences of all other tensors)."""
    theirs, own = ({official: name for name, official in official_names(c.names()).items()} for c in (tuned, base))
    if only := sorted(theirs.keys() ^ own.keys()):
        raise ContainerError(tuned.path, f"and the base do not have the same tensors: {', '.join(only[:3])}",
                             "two different Wan variants", "use the base that it was tuned from")
    pairs: dict[str, LoraPair] = {}
    energy: dict[str, float] = {}
    rest: dict[str, torch.Tensor] = {}
    with progress(len(own), 0, "tensor", "extract") as bar:
        for official, name in own.items():
            after, before = tuned.read(theirs[official]), base.read(name)
            bar.update()
            # What is equal in either file's dtype was rounded, not tuned.
            if torch.equal(before.to(after.dtype), after) or torch.equal(after.to(before.dtype), before):
                continue
            if after.shape != before.shape:
                raise ContainerError(tuned.path, f"{official} is {list(after.shape)}, that of the base "
                                     f"{list(before.shape)}", "two different Wan variants", "use the base that it was "
                                     "tuned from")
            difference = after.float() - before.float()
            if not torch.isfinite(difference).all():
                raise ContainerError(tuned.path, f"{official} or that of the base is not finite", "a damaged file")
            module, _, leaf = official.rpartition(".")
            if leaf == "weight" and difference.ndim == 2:
                pairs[module], energy[module] = low_rank(difference, rank)
            else:
                suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}.get(leaf)
                rest[f"{module}.{suffix}" if suffix else f"{official}.diff"] = difference
    return pairs, energy, rest
