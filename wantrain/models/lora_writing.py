"""LoRA files, written in any of the formats of wantrain.models.lora_formats; what a format cannot hold is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wantrain.files import write_json
from wantrain.lora import MAGNITUDE, inner_rank
from wantrain.models.lora_formats import (
    DIGEST_KEY,
    GRAMMARS,
    Extras,
    Grammar,
    LoraPair,
    Pairs,
    _spell,
    products,
    split_extra,
)
from wantrain.models.lora_names import PEFT_CONFIG, PEFT_WEIGHTS
from wantrain.models.names import ANIMATE, OWN_ONLY, module_to_diffusers
from wantrain.tensors import digest_tensors, write_tensors
from wantrain.terms import UserError

_ROUNDED = ("hada_", "lokr_", "diff")
"""Extras that are stored in the dtype asked for; rounded magnitudes would round the weight and not its change."""
_NETWORK = ("ss_network_dim", "ss_network_alpha")


def write_lora(path: Path, pairs: Pairs, format: str, metadata: Mapping[str, str], *,
               dtype: torch.dtype = torch.float32, extras: Extras | None = None) -> None:
    """Write pairs (official module paths) in a format of GRAMMARS; `peft` makes a folder, the others a file.

    All pairs get one rank, alpha is folded into B or kept, as the format wants; the metadata says the rank and alpha
    that the tensors have, and their digest. Raises UserError naming what the format cannot express (extras, Conv3d,
    modules without a name there, folding that would not be exact in `dtype`) and values that overflow `dtype`.
    """
    grammar = GRAMMARS[format]
    extras = extras or {}
    refuse_inexpressible(grammar, pairs, extras, dtype)
    pairs = _as_written(grammar, pairs)
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in pairs.items():
        stem = _spell(grammar, module)
        tensors[f"{stem}.{grammar.down}"] = pair.a.float().to(dtype)
        tensors[f"{stem}.{grammar.up}"] = pair.b.float().to(dtype)
        if grammar.alpha == "tensor":
            tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
    for name, tensor in extras.items():
        module, suffix = split_extra(name)
        is_factor = suffix.startswith(_ROUNDED)
        tensors[f"{_spell(grammar, module)}.{suffix}"] = tensor.float().to(dtype) if is_factor else tensor
    _refuse_overflow(tensors, dtype)
    told = {key: value for key, value in metadata.items() if key not in _NETWORK}
    header = {"format": "pt", **told, **_network(pairs, extras), DIGEST_KEY: digest_tensors(tensors)}
    if grammar.id == "peft":
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / PEFT_CONFIG, _peft_config(pairs, extras))
        write_tensors(path / PEFT_WEIGHTS, tensors, header)
        return
    if grammar.id == "diffusers":
        config = {f"transformer.{key}": value for key, value in _peft_config(pairs, extras).items()}
        header["lora_adapter_metadata"] = json.dumps(config, indent=2, sort_keys=True)
    write_tensors(path, tensors, header)


def _as_written(grammar: Grammar, pairs: Pairs) -> Pairs:
    """The same updates, all with the largest rank (rows and columns of zeros), and alpha folded where we fold it."""
    rank = max((pair.rank for pair in pairs.values()), default=0)
    pairs = {module: _padded(pair, rank) for module, pair in pairs.items()}
    if not grammar.folds:
        return pairs
    return {module: LoraPair(pair.a, pair.b.float() * pair.scale, pair.rank) for module, pair in pairs.items()}


def _padded(pair: LoraPair, rank: int) -> LoraPair:
    missing = rank - pair.rank
    if not missing:
        return pair
    a, b = pair.a, pair.b
    return LoraPair(torch.cat([a, a.new_zeros(missing, *a.shape[1:])]),
                    torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], 1), pair.scale * rank)


def _refuse_overflow(tensors: Extras, dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{name} is not finite in {str(dtype).removeprefix('torch.')}",
                            "store bfloat16 or float32; if it was not finite before, the training diverged")


def _network(pairs: Pairs, extras: Extras) -> dict[str, str]:
    """The field's two words for rank and alpha, from the tensors; `Dynamic` where modules differ, as sd-scripts has it.
    """
    scaled = {module: leaves for module, leaves in products(extras).items() if inner_rank(leaves) and "alpha" in leaves}
    ranks = [*(pair.rank for pair in pairs.values()), *(inner_rank(leaves) for leaves in scaled.values())]
    alphas = [*(pair.alpha for pair in pairs.values()), *(float(leaves["alpha"]) for leaves in scaled.values())]
    told = (set(map(str, ranks)), {f"{alpha:.9g}" for alpha in alphas})
    return {key: words.pop() if len(words) == 1 else "Dynamic"
            for key, words in zip(_NETWORK, told, strict=True) if words}


def inexpressible(grammar: Grammar, pairs: Pairs, extras: Extras, dtype: torch.dtype) -> dict[str, list[str]]:
    """What the format cannot hold -> the names that are of it. Reads no values, so meta tensors will do."""
    modules = dict.fromkeys([*pairs, *(split_extra(name)[0] for name in extras)])
    faults = {
        "tensors that its readers ignore": [n for n in extras
                                            if not split_extra(n)[1].startswith(grammar.extras or "\n")],
        "convolutions, which its readers refuse": [m for m, p in pairs.items() if p.a.ndim > 2 and not grammar.conv],
        "modules that diffusers does not have": [m for m in modules if grammar.diffusers_names
                                                   and m.startswith(OWN_ONLY)],
        "modules of Wan-Animate, which have no official name here": [
            m for m in modules if not grammar.diffusers_names and ANIMATE.is_module(m)],
        f"an alpha/rank that cannot be folded exactly in {dtype} (it is no power of two)": [
            m for m, p in pairs.items() if grammar.folds and dtype != torch.float32
            and abs(math.frexp(p.scale)[0]) != 0.5],
    }
    return {what: names for what, names in faults.items() if names}


def refuse_inexpressible(grammar: Grammar, pairs: Pairs, extras: Extras, dtype: torch.dtype) -> None:
    """Raise UserError for the first thing that the format cannot hold, naming the formats that can."""
    for what, names in inexpressible(grammar, pairs, extras, dtype).items():
        able = [g.id for g in GRAMMARS.values() if not inexpressible(g, pairs, extras, dtype)]
        advice = f"choose a format that can: {', '.join(able)}" if able else "no format can: fold it into a checkpoint"
        if not set(able) & {"universal", "comfy_updown", "kohya"}:
            advice += ("; for ComfyUI fold it into a checkpoint (wantrain merge BASE LORA OUT), and if it must be a "
                       "LoRA, take one out of that (wantrain extract OUT BASE LORA)")
        raise UserError(f"the format {grammar.id} cannot hold {what}: {', '.join(names[:3])}"
                        f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}",
                        advice + ("; or store float32" if "folded" in what else ""))


def _peft_config(pairs: Pairs, extras: Extras) -> dict[str, Any]:
    """PEFT's LoraConfig fields: the one rank, the commonest alpha, patterns with full names for the rest."""
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": next(iter(pairs.values())).rank,
        "lora_alpha": alpha,
        "target_modules": sorted(module_to_diffusers(module) for module in pairs),
        "rank_pattern": {},
        "alpha_pattern": {module_to_diffusers(m): p.alpha for m, p in pairs.items() if p.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(name.endswith(MAGNITUDE) for name in extras),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
