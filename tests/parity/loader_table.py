"""The matrix of LoRA formats x kinds x targets x variants x loaders, measured; `python -m tests.parity.loader_table`
writes docs/lora-files.md.

Each file is written by wantrain from an adapter that PEFT made, and loaded by each tool's rules (tests/parity/loaders);
right is what PEFT's own merge makes of the weights.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import peft
import torch
from diffusers import WanAnimateTransformer3DModel

from tests import tiny_models as tiny
from tests.parity.loaders import CALLED, MODELS_LACKED, RULES, SOURCES, Base, Refused, Tensors, changed, load, verdict
from wantrain import lora
from wantrain.models.lora_formats import GRAMMARS, LoraFile, read_lora
from wantrain.models.lora_updates import from_adapter
from wantrain.models.lora_writing import write_lora
from wantrain.models.names import ANIMATE_ONLY, transformer_to_official
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.terms import UserError

DOC = Path(__file__).parents[2] / "docs" / "lora-files.md"
LOADERS = ("ComfyUI", "WanVideoWrapper", "diffusers", "PEFT", "DiffSynth-Studio", "LightX2V", "VideoX-Fun",
           "ai-toolkit", "diffusion-pipe", "musubi-tuner", "LyCORIS")
assert set(LOADERS) == RULES.keys() | CALLED.keys() == SOURCES.keys()

BASES = {
    "t2v": "T2V, TI2V-5B, and I2V-A14B (no CLIP)",
    "i2v": "I2V 2.1, FLF2V and Fun, with CLIP",
    "vace": "VACE",
    "animate": "Animate",
}
"""Variants with the same Linears behave alike, but for the models that a tool lacks."""
TARGETS: dict[str, tuple[list[str], dict[str, int]]] = {
    "attn": (["attn"], {}), "attn_ffn": (["attn_ffn"], {}), "all_linear": (["all_linear"], {}),
    "rank_pattern": (["attn_ffn"], {"attn": 2}),
}
KINDS = ("lora", "rslora", "dora", "loha", "lokr")


class Row(NamedTuple):
    base: str
    kind: str
    targets: str
    format: str


@functools.cache
def base_of(name: str) -> Base:
    """The tiny twin of a family of variants."""
    if name == "animate":
        torch.manual_seed(0)
        module = WanAnimateTransformer3DModel(**diffusers_config(VARIANTS["tiny_wan_animate"]))
    else:
        module = tiny.transformer(name)
    linears = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    own = {n for n in linears if n.startswith(ANIMATE_ONLY)}
    official = {n if n in own else transformer_to_official(n): n for n in linears}
    others = frozenset() if name == "animate" else frozenset(
        transformer_to_official(n) for n in module.state_dict() if n.rpartition(".")[0] not in linears)
    return Base(module.requires_grad_(False), official, others)


def adapted(base: Base, kind: str, targets: str) -> tuple[LoraFile, Tensors]:
    """A PEFT adapter far from its start, as our writer is given it, and what PEFT's merge makes of the weights."""
    module = copy.deepcopy(base.module)
    names, ranks = TARGETS[targets]
    lora.inject(module, names, lora.Spec(4, 3, kind, ranks), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable_parameters(module).values():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    state = lora.adapter_state(lora.trainable_parameters(module), lora.scales(module))
    return LoraFile(Path("trained"), "universal", *from_adapter(state)), changed(module, base)


def measured(base: Base, path: Path, wanted: Tensors) -> dict[str, str]:
    """What each tool does with one file."""
    cells = {}
    for loader in LOADERS:
        try:
            cells[loader] = verdict(load(loader, path, base), wanted)
        except Refused:
            cells[loader] = "raises"
    return cells


def rows(bases: tuple[str, ...] = tuple(BASES), kinds: tuple[str, ...] = KINDS,
         targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[tuple[Row, LoraFile | None, dict[str, str]]]:
    """Every row with its file as it reads back (None where the format cannot hold it) and each tool's verdict."""
    with tempfile.TemporaryDirectory() as folder:
        for name in bases:
            base = base_of(name)
            for kind in kinds:
                for target in targets:
                    given, wanted = adapted(base, kind, target)
                    for format in GRAMMARS:
                        suffix = "" if format == "peft" else ".safetensors"
                        path = Path(folder) / ("-".join((name, kind, target, format)) + suffix)
                        try:
                            write_lora(path, given.pairs, format, {}, extras=given.extras)
                        except UserError:
                            yield Row(name, kind, target, format), None, {}
                            continue
                        yield Row(name, kind, target, format), read_lora(path), measured(base, path, wanted)


def merged(found: list[tuple[Row, dict[str, str]]], base: str) -> list[tuple[str, str, str, dict[str, str]]]:
    """(format, kinds, targets, verdicts) of one family: rows that differ in targets or kind alone become one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    cells = {}
    for row, verdicts in found:
        if row.base == base and verdicts:
            key = (row.format, row.kind, "|".join(verdicts.values()))
            cells[key[2]] = verdicts
            groups.setdefault(key, []).append(row.targets)
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for (format, kind, key), targets in groups.items():
        kinds.setdefault((format, ", ".join(targets), key), []).append(kind)
    return [(format, ", ".join(own), targets, cells[key]) for (format, targets, key), own in kinds.items()]


INTRO = """# LoRA files: which tool loads what

Written by `python -m tests.parity.loader_table`; do not edit. Every file was written by `wantrain export`'s writer from
an adapter made by PEFT, and loaded by each tool's own rules, restated in `tests/parity/loaders.py` (diffusers and PEFT
are called); right is what PEFT's merge makes of the weights. `wantrain inspect FILE`, `convert` and `export` say the
same of one file: their table (`wantrain/models/lora_loaders.py`) is held against this matrix by the tests.

- **right**: every module gets the trained change (to 1e-4). **N of M**: the rest silently gets none.
  **nothing**: loads without an effect. **raises**: an error. **wrong**: another change than the trained one.
- Where ranks differ (`lora.rank_pattern`), every module is padded with rows and columns of zeros to the largest: the
  same change, and right also in tools that have one rank for all modules. alpha grows in proportion, or is folded.
- universal, comfy_updown, diffsynth, diffsynth_pipe and diffusers have alpha/rank folded into B and hold no alpha;
  kohya, fun and lycoris hold one for every module; peft says it in `adapter_config.json`. `ss_network_dim` and
  `ss_network_alpha` are those of the tensors (`Dynamic` where modules differ).
- `export.dtype` and `convert dtype=` hold for A, B, the factors of LoHa and LoKr, and whole differences; alphas and the
  magnitudes of DoRA stay as they are.
- A rank above a module's size is wasteful and loads like any other.
- A row is missing where the format cannot hold the file: `wantrain train` says so before it begins.
- WanVideoWrapper is shown with LoRAs merged; without merging it also passes over `head`.

Two experts of Wan2.2 A14B are two files.
"""


UNREAD = (
    "These are the stored versions, not always the newest. Not read but taken from earlier runs",
    "of the tools: LyCORIS, the table of names of ComfyUI, and that ai-toolkit and the LoRA of diffusion-pipe have one",
    "rank and ai-toolkit has it in `blocks` alone. The models that ai-toolkit lacks are not read from its source.",
)


def document() -> str:
    """The text of docs/lora-files.md."""
    found = [(row, verdicts) for row, _, verdicts in rows()]
    lines = [INTRO, "## Read", "", "| tool | source | version or commits | files |", "| --- | --- | --- | --- |"]
    called = {"diffusers": diffusers.__version__, "peft": peft.__version__}
    for tool, source in SOURCES.items():
        version = f"{called[source.where]}, called" if source.where in called else source.version
        lines.append(f"| {tool} | {source.where} | {version} | {source.files} |")
    lines += ["", "Read on 2026-11-29.", "", *UNREAD, "", "## Models that a tool lacks", "", "| tool | no model for |",
              "| --- | --- |", *(f"| {tool} | {', '.join(tasks)} |" for tool, tasks in MODELS_LACKED.items()),
              "", "The tables below show what these tools would do with the names."]
    for base, what in BASES.items():
        lines += ["", f"## {what}", "", f"| format | kind | targets | {' | '.join(LOADERS)} |",
                  "| --- " * (3 + len(LOADERS)) + "|"]
        lines += [f"| {format} | {kinds} | {targets} | {' | '.join(verdicts[tool] for tool in LOADERS)} |"
                  for format, kinds, targets, verdicts in merged(found, base)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOC.write_text(document())
    print(f"wrote {DOC}")
