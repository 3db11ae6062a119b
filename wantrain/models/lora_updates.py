"""What a LoRA file does to the weights, for every kind that we read; and the way to and from a trained adapter.

LoHa, LoKr and their alpha as LyCORIS and ComfyUI compute them (facts/wan-formats.md 2.1, 3); DoRA as PEFT does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from wantrain.lora import MAGNITUDE, AdapterState, inner_rank
from wantrain.models.containers import Container, ContainerError
from wantrain.models.lora_formats import (
    GRAMMARS,
    PRODUCT,
    LoraFile,
    LoraPair,
    check_fit,
    products,
    read_lora,
    refuse_inexpressible,
    split_extra,
    write_lora,
)
from wantrain.models.names import module_to_diffusers, module_to_official, official_names
from wantrain.terms import UserError

Update = Callable[[torch.Tensor], torch.Tensor]
"""A weight in float32 -> the weight that the LoRA makes of it."""

STORAGE = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 1e-2), "float16": (torch.float16, 2e-3)}
"""The dtype in which A and B are stored, and the largest relative L2 error of a delta that this may cost."""

_DENSE = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_PARAMETERS = ("modulation", "emb_pos")


def product_scale(leaves: Mapping[str, torch.Tensor]) -> float:
    """alpha/rank; 1 without an alpha, and for a LoKr of two whole factors, whose alpha no reader applies."""
    rank = inner_rank(leaves)
    return float(leaves["alpha"]) / rank if rank and "alpha" in leaves else 1.0


def product_delta(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The update [out, in] of a LoHa or LoKr module, float32."""
    own = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    if "hada_w1_a" in own:
        delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    else:
        first, second = (own[w] if w in own else own[f"{w}_a"] @ own[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
        delta = torch.kron(first.contiguous(), second.contiguous())
    return product_scale(leaves) * delta


def updates(lora: LoraFile, strength: float = 1.0) -> dict[str, Update]:
    """Official tensor name -> what the LoRA at `strength` makes of that tensor.

    A DoRA module moves from the weight towards magnitude * direction by `strength`. Raises ContainerError for
    tensors whose meaning wantrain does not know, and, when an update is called, for one that does not fit.
    """
    magnitudes: dict[str, torch.Tensor] = {}
    deltas: list[tuple[str, Callable[[], torch.Tensor]]] = []
    for name, tensor in lora.extras.items():
        stem, suffix = split_extra(name)
        if _is_magnitude(lora, stem, suffix):
            magnitudes[stem] = tensor.float().reshape(-1, 1)
        elif suffix in _DENSE:
            target = stem if stem.endswith(_PARAMETERS) else f"{stem}.{_DENSE[suffix]}"
            deltas.append((target, tensor.float))
        elif not suffix.startswith(PRODUCT):
            raise ContainerError(lora.path, f"wantrain does not apply {name}", "an adapter of convolutions or biases, "
                                 "or a DoRA of another kind", "apply it with the tool that made it")
    deltas += [(f"{module}.weight", partial(product_delta, leaves)) for module, leaves in products(lora.extras).items()]
    deltas += [(f"{module}.weight", pair.delta) for module, pair in lora.pairs.items() if module not in magnitudes]
    found: dict[str, Update] = {f"{module}.weight": _turning(lora.pairs[module], magnitude, strength)
                                for module, magnitude in magnitudes.items()}
    for name, delta in deltas:
        found[name] = _adding(lora.path, name, delta, strength, found.get(name))
    return found


def _is_magnitude(lora: LoraFile, module: str, suffix: str) -> bool:
    """Whether this is a LoRA module's DoRA vector, one number an output, as PEFT has it and LyCORIS may."""
    return (suffix in (MAGNITUDE, "dora_scale") and module in lora.pairs
            and lora.extras[f"{module}.{suffix}"].numel() == lora.pairs[module].b.shape[0])


def _adding(path: Path, name: str, delta: Callable[[], torch.Tensor], strength: float, before: Update | None
            ) -> Update:
    def update(weight: torch.Tensor) -> torch.Tensor:
        added = delta()
        if _significant(added.shape) != _significant(weight.shape):
            raise ContainerError(path, f"its update of {name} is {list(added.shape)}, the base's tensor is "
                                 f"{list(weight.shape)}", "a LoRA for another Wan variant",
                                 "use the base that it was trained on")
        weight = before(weight) if before else weight
        return weight + strength * added.to(weight.device).reshape(weight.shape)

    return update


def _significant(shape: Sequence[int]) -> list[int]:
    """A shape without axes of length 1, which files write or leave out."""
    return [size for size in shape if size != 1]


def _turning(pair: LoraPair, magnitude_O1: torch.Tensor, strength: float) -> Update:
    def update(weight: torch.Tensor) -> torch.Tensor:
        turned = weight + pair.delta().to(weight.device)
        turned = magnitude_O1.to(weight.device) * turned / torch.linalg.norm(turned, dim=1, keepdim=True)
        return weight + strength * (turned - weight)

    return update


def plan_merge(container: Container, loras: Sequence[tuple[LoraFile, float]]) -> dict[str, list[Update]]:
    """A transformer's tensor names in its file -> what the LoRAs, at their strengths, do to them, in order.

    Raises ContainerError for a LoRA that changes a tensor which this transformer does not have.
    """
    own = {official: name for name, official in official_names(container.names()).items()}
    plan: dict[str, list[Update]] = {}
    for lora, strength in loras:
        for official, update in updates(lora, strength).items():
            if official not in own:
                raise ContainerError(lora.path, f"changes {official}, which is not in the base", "a LoRA for another "
                                     "Wan variant", "use the base that it was trained on")
            plan.setdefault(own[official], []).append(update)
    return plan


def merged_tensor(plan: Mapping[str, Sequence[Update]], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the file with its updates, in float32; one without any stays as it is."""
    for update in plan.get(name, ()):
        tensor = update(tensor.float())
    return tensor


def from_adapter(state: AdapterState) -> tuple[dict[str, LoraPair], dict[str, torch.Tensor]]:
    """A trained adapter as the pairs and extras of a LoRA file (official names)."""
    pairs: dict[str, LoraPair] = {}
    extras: dict[str, torch.Tensor] = {}
    for name, leaves in state.tensors.items():
        module, scale = module_to_official(name), state.scales[name]
        if "lora_A" in leaves:
            pairs[module] = LoraPair(leaves["lora_A"], leaves["lora_B"], scale * leaves["lora_A"].shape[0])
            if MAGNITUDE in leaves:
                extras[f"{module}.{MAGNITUDE}"] = leaves[MAGNITUDE]
            continue
        rank = inner_rank(leaves)
        # Readers ignore the alpha of a LoKr with two whole factors, so its scale goes into one of them.
        extras |= {f"{module}.{leaf}": tensor * scale if rank is None and leaf == "lokr_w1" else tensor
                   for leaf, tensor in leaves.items()}
        extras[f"{module}.alpha"] = torch.tensor(float(scale * rank) if rank else 1.0)
    return pairs, extras


def to_adapter(lora: LoraFile) -> AdapterState:
    """A LoRA file as an adapter (diffusers names), to train on or to sample with.

    Raises ContainerError, naming them, for tensors that no adapter of ours holds.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    scales: dict[str, float] = {}
    for module, pair in lora.pairs.items():
        rank = _own_rank(pair)
        tensors[module], scales[module] = {"lora_A": pair.a[:rank], "lora_B": pair.b[:, :rank]}, pair.scale
    for module, leaves in products(lora.extras).items():
        tensors[module] = {leaf: tensor for leaf, tensor in leaves.items() if leaf != "alpha"}
        scales[module] = product_scale(leaves)
    foreign = []
    for name, tensor in lora.extras.items():
        module, suffix = split_extra(name)
        if _is_magnitude(lora, module, suffix):
            tensors[module][MAGNITUDE] = tensor.reshape(-1)
        elif not suffix.startswith(PRODUCT):
            foreign.append(name)
    if foreign:
        raise ContainerError(lora.path, f"holds more than an adapter: {', '.join(foreign[:3])}"
                             f"{f' and {len(foreign) - 3} more' if len(foreign) > 3 else ''}", "a distilled or "
                             "extracted model", f"fold it into the base: model.merge='[{lora.path}]'")
    return AdapterState({module_to_diffusers(module): leaves for module, leaves in tensors.items()},
                        {module_to_diffusers(module): scale for module, scale in scales.items()})


def _own_rank(pair: LoraPair) -> int:
    """The rank without the zeros at the end that the writer pads with, at least 1."""
    used = (pair.a.flatten(1) != 0).any(1) | (pair.b.transpose(0, 1).flatten(1) != 0).any(1)
    return int(used.nonzero().max()) + 1 if used.any() else 1


def refuse_unexportable(state: AdapterState, format: str, storage: str) -> None:
    """Raise UserError for what a format cannot hold of an adapter, as the writer does, naming those that can.

    `storage`: a word of STORAGE. Only names, shapes and scales count, so an adapter on the meta device will do.
    """
    pairs, extras = from_adapter(state)
    refuse_inexpressible(GRAMMARS[format], pairs, extras, STORAGE[storage][0])


def read_adapter(path: Path, transformer: torch.nn.Module) -> AdapterState:
    """A LoRA file as an adapter for this diffusers transformer, which has none yet.

    Raises ContainerError for a file that is damaged, of another variant, or more than an adapter.
    """
    lora = read_lora(path)
    own = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    check_fit(lora, {official: own[name] for name, official in official_names(own).items()})
    return to_adapter(lora)


def low_rank(difference: torch.Tensor, rank: int) -> tuple[LoraPair, float]:
    """The best pair of a rank for a weight's change [out, in], and the share of the change's squared norm it keeps.

    Truncated SVD by randomised subspace iteration (Halko et al. 2011), the same numbers at every call.
    """
    rank = min(rank, *difference.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=min(rank + 16, *difference.shape), niter=8)
    root = s[:rank].sqrt()
    kept = float(s[:rank].double().square().sum() / difference.double().square().sum())
    return LoraPair((v[:, :rank] * root).T.contiguous(), u[:, :rank] * root, rank), min(kept, 1.0)


def write_proven(path: Path, lora: LoraFile, format: str, metadata: Mapping[str, str], storage: str) -> float:
    """Write a LoRA, read it back, and return the largest relative error of anything that it does.

    `storage`: a word of STORAGE. Raises UserError for what the format cannot hold, and for an error above what the
    storage may cost.
    """
    dtype, allowed = STORAGE[storage]
    write_lora(path, lora.pairs, format, metadata, dtype=dtype, extras=lora.extras)
    worst, where = worst_difference(lora, read_lora(path))
    if not worst <= allowed:
        raise UserError(f"{path}: read back, the delta of {where} differs by {worst:.1e}", "report this as a bug; what "
                        "it was made from is untouched")
    return worst


def worst_difference(one: LoraFile, other: LoraFile) -> tuple[float, str]:
    """The largest relative L2 difference of anything that two LoRAs do, and the module or tensor it is on.

    Infinite for what only one has. Pairs are compared by rank-sized products in float64, never by their deltas:
    ||B1 A1 - B2 A2||^2 = tr((B^T B)(A A^T)) with B = [B1, -B2], A = [A1; A2] (exact to about 1e-8 relative).
    """
    if only := sorted((one.pairs.keys() ^ other.pairs.keys()) | (one.extras.keys() ^ other.extras.keys())):
        return math.inf, only[0]
    differences = [(_pair_difference(pair, other.pairs[module]), module) for module, pair in one.pairs.items()]
    theirs = products(other.extras)
    differences += [(_relative(product_delta(leaves), product_delta(theirs[module])), module)
                    for module, leaves in products(one.extras).items()]
    differences += [(_relative(tensor, other.extras[name]), name) for name, tensor in one.extras.items()
                    if not split_extra(name)[1].startswith(PRODUCT)]
    return max(differences, default=(0.0, ""))


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.numel() != other.numel():
        return math.inf
    norm = float(one.double().norm())
    difference = float((one.double().reshape(-1) - other.double().reshape(-1)).norm())
    return difference / norm if norm else difference


def pair_norm(pair: LoraPair) -> float:
    """The L2 norm of a pair's delta, from rank-sized products."""
    return _norm(pair.b.double().flatten(1) * pair.scale, pair.a.double().flatten(1))


def _pair_difference(pair: LoraPair, other: LoraPair) -> float:
    norm = pair_norm(pair)
    difference = _norm(
        torch.cat([pair.b.double().flatten(1) * pair.scale, -other.b.double().flatten(1) * other.scale], 1),
        torch.cat([pair.a.double().flatten(1), other.a.double().flatten(1)]))
    return difference / norm if norm else difference


def _norm(b: torch.Tensor, a: torch.Tensor) -> float:
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
