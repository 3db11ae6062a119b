"""Whether what a LoRA file holds is whole: finite tensors, pairs and factors that multiply, sizes that a Wan has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wantrain.models.containers import Container
from wantrain.models.weight_files import ContainerError

Tensors = Mapping[str, torch.Tensor]

_MOST_NUMBERS = 1 << 28
"""In the largest weight that a LoRA may change; Wan's largest have 160 million."""
_PRODUCTS = {"hada_w": ("hada_w1", "hada_w2"), "lokr_w": ("lokr_w1", "lokr_w2")}


def check_pair(raw: Container, module: str, roles: Tensors) -> None:
    """Refuse a pair of which one is missing, or that do not multiply. Raises ContainerError, as all of these do."""
    for role, other in (("a", "b"), ("b", "a")):
        if role not in roles:
            raise ContainerError(raw.path, f"{module} has {other.upper()} but no {role.upper()}", "an interrupted "
                                 "export, or tensors filtered by name")
    a, b = roles["a"], roles["b"]
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1:
        transposed = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] <= min(a.shape[0], b.shape[1])
        raise ContainerError(raw.path, f"{module}: A {list(a.shape)} and B {list(b.shape)} do not multiply",
                             "A and B are transposed or exchanged" if transposed else "tensors of two LoRAs were mixed")
    out, into = len(b), math.prod(a.shape[1:])
    _check_size(raw, module, out, into)


def _check_size(raw: Container, module: str, out: int, into: int) -> None:
    if out * into > _MOST_NUMBERS:
        raise ContainerError(raw.path, f"{module} would change a weight of {out} x {into} numbers, which no Wan "
                             "transformer has", "a damaged file, or a LoRA of another model")


def check_values(raw: Container, tensors: Tensors) -> None:
    """Refuse tensors of whole numbers, of nothing, and with values that are not finite."""
    for name, tensor in tensors.items():
        is_alpha = name.endswith(".alpha")
        if not tensor.is_floating_point() and not is_alpha:
            raise ContainerError(raw.path, f"{name} is stored as {tensor.dtype}", "a LoRA quantised for inference only",
                                 "use the float16, bfloat16 or float32 file of the same LoRA")
        if not tensor.numel():
            raise ContainerError(raw.path, f"{name} is empty: {list(tensor.shape)}", "an interrupted export")
        if not is_alpha and not torch.isfinite(tensor.float()).all():
            raise ContainerError(raw.path, f"{name} is not finite", "the training diverged",
                                 "export an earlier checkpoint")


def product_size(leaves: Tensors) -> tuple[int, int]:
    """[out, in] of the weight that a LoHa or LoKr module changes, without multiplying it out."""
    if "hada_w1_a" in leaves:
        return len(leaves["hada_w1_a"]), leaves["hada_w1_b"].shape[1]
    halves = [(leaves[w], leaves[w]) if w in leaves else (leaves[f"{w}_a"], leaves[f"{w}_b"])
              for w in ("lokr_w1", "lokr_w2")]
    return math.prod(len(a) for a, _ in halves), math.prod(b.shape[1] for _, b in halves)


def check_products(raw: Container, products: Mapping[str, Tensors]) -> None:
    """Refuse LoHa and LoKr modules whose factors are not all there or do not multiply, and an alpha of nothing."""
    for module, leaves in products.items():
        kind = next((kind for kind in _PRODUCTS if any(leaf.startswith(kind) for leaf in leaves)), None)
        if kind is None:
            raise ContainerError(raw.path, f"{module} has an alpha, and nothing that it scales", "an interrupted "
                                 "export, or tensors filtered by name")
        for factor in _PRODUCTS[kind]:
            _check_factor(raw, module, factor, leaves, may_be_whole=kind != "hada_w")
        if kind == "hada_w" and (len(leaves["hada_w1_a"]) != len(leaves["hada_w2_a"])
                                 or leaves["hada_w1_b"].shape[1] != leaves["hada_w2_b"].shape[1]):
            raise ContainerError(raw.path, f"{module}: the sizes of hada_w1 and hada_w2 differ", "tensors of two LoRAs "
                                 "were mixed")
        _check_size(raw, module, *product_size(leaves))
        if "alpha" in leaves and (leaves["alpha"].numel() != 1 or not float(leaves["alpha"])
                                  or not math.isfinite(float(leaves["alpha"]))):
            raise ContainerError(raw.path, f"{module} has the alpha {leaves['alpha'].tolist()}", "a damaged file")


def _check_factor(raw: Container, module: str, factor: str, leaves: Tensors, *, may_be_whole: bool) -> None:
    """Refuse a factor of which neither the whole nor both halves are there, or whose halves do not multiply."""
    parts = [leaves[leaf] for leaf in (factor, f"{factor}_a", f"{factor}_b") if leaf in leaves]
    a, b = leaves.get(f"{factor}_a"), leaves.get(f"{factor}_b")
    if (a is None or b is None) and (factor not in leaves or not may_be_whole):
        raise ContainerError(raw.path, f"{module} lacks {factor} or a half of it", "an interrupted export, or "
                             "tensors filtered by name")
    if factor in leaves and len(parts) > 1:
        raise ContainerError(raw.path, f"{module} has {factor} whole and in halves", "two files merged into one",
                             "use one of the two")
    if odd := [list(part.shape) for part in parts if part.ndim != 2]:
        raise ContainerError(raw.path, f"{module}: {factor} is {odd[0]}, and wantrain reads those of Linears", "an "
                             "adapter of convolutions", "apply it with the tool that made it")
    if a is not None and b is not None and a.shape[1] != b.shape[0]:
        raise ContainerError(raw.path, f"{module}: {factor}_a {list(a.shape)} and {factor}_b {list(b.shape)} "
                             "do not multiply", "transposed tensors, or those of two LoRAs mixed")


def one_number(tensor: torch.Tensor) -> float:
    """The number in a tensor of one element. Raises ValueError for other tensors."""
    if tensor.numel() != 1:
        raise ValueError(f"it has {tensor.numel()} numbers")
    return float(tensor)


def config_alpha(config: Mapping[str, Any], names: Sequence[str], rank: int) -> float:
    """Alpha of a module (its `names`) by PEFT's rules: the first pattern that matches its end, else lora_alpha, else
    the rank. Raises ValueError, TypeError, AttributeError or re.error for what PEFT would not have written.
    """
    if not config:
        return float(rank)
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise ValueError(f"wantrain does not match {pattern!r}, which may take for ever")
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            alpha = value
            break
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
