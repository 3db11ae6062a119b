"""What a LoRA file does to the weights, for every kind that we read; and the way to and from a trained adapter.

LoHa, LoKr and their alpha as LyCORIS and ComfyUI compute them (docs/facts.md, "LoHa, LoKr, DoRA"); DoRA as PEFT does.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from wantrain.files import set_in_place
from wantrain.lora import MAGNITUDE, AdapterState, inner_rank
from wantrain.models.containers import Container
from wantrain.models.lora_checks import product_size
from wantrain.models.lora_formats import (
    GRAMMARS,
    PRODUCT,
    LoraFile,
    LoraPair,
    check_fit,
    products,
    read_lora,
    split_extra,
)
from wantrain.models.lora_names import instead_of_adapter, refuse_other_expert
from wantrain.models.lora_writing import refuse_inexpressible, write_lora
from wantrain.models.names import module_to_diffusers, module_to_official, official_names
from wantrain.models.variants import Expert
from wantrain.models.weight_files import ContainerError
from wantrain.terms import UserError

Update = Callable[[torch.Tensor], torch.Tensor]
"""A weight in float32 -> the weight that the LoRA makes of it."""

STORAGE = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 1e-2), "float16": (torch.float16, 2e-3)}
"""The dtype in which A and B are stored, and the largest relative L2 error of a delta that this may cost."""

_DENSE = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_PARAMETERS = ("modulation", "emb_pos")


def product_scale(leaves: Mapping[str, torch.Tensor]) -> float:
    """The factor on a product: alpha/rank. It is 1 without an alpha, and for a LoKr of two whole factors, since no
    reader applies the alpha of one.
    """
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
    deltas: list[tuple[str, Sequence[int], Callable[[], torch.Tensor]]] = []
    for name, tensor in lora.extras.items():
        stem, suffix = split_extra(name)
        if _is_magnitude(lora, stem, suffix):
            magnitudes[stem] = tensor.float().reshape(-1, 1)
        elif suffix in _DENSE:
            target = stem if stem.endswith(_PARAMETERS) else f"{stem}.{_DENSE[suffix]}"
            deltas.append((target, tensor.shape, tensor.float))
        elif not suffix.startswith(PRODUCT):
            raise ContainerError(lora.path, f"wantrain does not apply {name}", "an adapter of convolutions, or a "
                                 "DoRA of another kind", "apply it with the tool that made it")
    deltas += [(f"{module}.weight", product_size(leaves), partial(product_delta, leaves))
               for module, leaves in products(lora.extras).items()]
    deltas += [(f"{module}.weight", (len(pair.b), *pair.a.shape[1:]), pair.delta)
               for module, pair in lora.pairs.items() if module not in magnitudes]
    found: dict[str, Update] = {f"{module}.weight": _turning(lora.path, module, lora.pairs[module], magnitude, strength)
                                for module, magnitude in magnitudes.items()}
    for name, shape, delta in deltas:
        checked = partial(_check_same, lora.path, name, shape)
        found[name] = _adding(checked, delta, strength, found.get(name))
    return found


def _is_magnitude(lora: LoraFile, module: str, suffix: str) -> bool:
    """Whether this is a LoRA module's DoRA vector, one number an output: PEFT's [out], LyCORIS' [out, 1]."""
    if module not in lora.pairs or suffix not in (MAGNITUDE, "dora_scale"):
        return False
    tensor, out = lora.extras[f"{module}.{suffix}"], len(lora.pairs[module].b)
    return tensor.numel() == out if suffix == MAGNITUDE else tuple(tensor.shape) == (out, 1)


def _adding(check: Callable[[torch.Tensor], None], delta: Callable[[], torch.Tensor], strength: float,
            before: Update | None) -> Update:
    def update(weight: torch.Tensor) -> torch.Tensor:
        check(weight)  # before anything is multiplied out
        weight = before(weight) if before else weight
        return weight + strength * delta().to(weight.device).reshape(weight.shape)

    return update


def _check_same(path: Path, name: str, shape: Sequence[int], weight: torch.Tensor) -> None:
    """Refuse an update of another shape than the weight. Axes of length 1 do not count: files leave them out."""
    if [size for size in shape if size != 1] != [size for size in weight.shape if size != 1]:
        raise ContainerError(path, f"its update of {name} is {list(shape)}, the base's tensor is {list(weight.shape)}",
                             "a LoRA for another Wan variant", "use the base that it was trained on")


def _turning(path: Path, module: str, pair: LoraPair, magnitude_O1: torch.Tensor, strength: float) -> Update:
    def update(weight: torch.Tensor) -> torch.Tensor:
        _check_same(path, f"{module}.weight", (len(pair.b), *pair.a.shape[1:]), weight)
        turned = weight + pair.delta().to(weight.device)
        turned = magnitude_O1.to(weight.device) * turned / torch.linalg.norm(turned, dim=1, keepdim=True)
        return weight + strength * (turned - weight)

    return update


def plan_merge(container: Container, loras: Sequence[tuple[LoraFile, float]]) -> dict[str, list[Update]]:
    """A transformer's tensor names in its file -> what the LoRAs, at their strengths, do to them, in order.

    Parts for image tokens are left out where it has none. Raises ContainerError for a LoRA that changes another tensor
    which this transformer does not have.
    """
    own = {official: name for name, official in official_names(container.names()).items()}
    plan: dict[str, list[Update]] = {}
    for lora, strength in loras:
        for official, update in updates(without_image_parts(lora, own), strength).items():
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


_IMAGE_PARTS = re.compile(r"img_emb\..+|blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)(\..+)?")


def without_image_parts(lora: LoraFile, names: Collection[str]) -> LoraFile:
    """Leave out what a LoRA does to CLIP's image tokens where the base, of these official tensor names, has none. So
    LoRAs of Wan2.1 image-to-video work on Wan2.2. What is left out is printed. A LoRA that does nothing else is
    returned unchanged, and check_fit refuses it.
    """
    if any(map(_IMAGE_PARTS.fullmatch, names)):
        return lora
    pairs = {module: pair for module, pair in lora.pairs.items() if not _IMAGE_PARTS.fullmatch(module)}
    extras = {name: tensor for name, tensor in lora.extras.items() if not _IMAGE_PARTS.fullmatch(name)}
    num_left_out = len(lora.pairs) - len(pairs) + len(lora.extras) - len(extras)
    if not num_left_out or not (pairs or extras):
        return lora
    print(f"{lora.path}: left out its {num_left_out} parts for CLIP image tokens (img_emb, k_img, v_img, norm_k_img), "
          "which this base does not have; the rest is applied")
    return replace(lora, pairs=pairs, extras=extras)


def is_zero(lora: LoraFile) -> bool:
    """Whether a LoRA changes nothing: in every module a factor is all zeros. A DoRA's magnitudes do change weights."""
    if any(split_extra(name)[1] in (MAGNITUDE, "dora_scale") for name in lora.extras):
        return False
    factors = [[pair.a, pair.b] for pair in lora.pairs.values()]
    for leaves in products(lora.extras).values():
        factors.append([tensor for leaf, tensor in leaves.items() if leaf != "alpha"])
    factors += [[tensor] for name, tensor in lora.extras.items() if not split_extra(name)[1].startswith(PRODUCT)]
    return all(any(not tensor.any() for tensor in own) for own in factors)


def read_given(path: Path, expert: Expert | None = None) -> LoraFile:
    """A LoRA that a user gives to a transformer, or to one expert: of a file with both, its half.

    Raises UserError as `read_lora` does, for one that says it is the other expert's, and for one that does nothing.
    """
    lora = read_lora(path, expert)
    refuse_other_expert(path, lora.metadata, expert)
    if is_zero(lora):
        raise ContainerError(path, "is a LoRA of zeros: it changes nothing", "an export before the first step, or a "
                             "learning rate of 0", f"train further, or leave it out; look at it: wantrain inspect "
                             f"{shlex.quote(str(path))}")
    return lora


def to_adapter(lora: LoraFile) -> AdapterState:
    """A LoRA file as an adapter (diffusers names), to train on or to sample with.

    Raises ContainerError, naming them, for tensors that no adapter of ours holds, and for several kinds in one file.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    scales: dict[str, float] = {}
    for module, pair in lora.pairs.items():
        rank = _own_rank(pair)
        tensors[module], scales[module] = {"lora_A": pair.a[:rank], "lora_B": pair.b[:, :rank]}, pair.scale
    for module, leaves in products(lora.extras).items():
        tensors.setdefault(module, {}).update({leaf: tensor for leaf, tensor in leaves.items() if leaf != "alpha"})
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
                             "extracted model", instead_of_adapter(lora.path))
    kinds = {kind: module for module, leaves in tensors.items() for kind in [_kind_of(leaves)]}
    if len(kinds) > 1 or any(" with " in kind for kind in kinds):
        raise ContainerError(lora.path, "holds several kinds of adapter: "
                             + ", ".join(f"{kind} ({module})" for kind, module in kinds.items()),
                             "tools that choose one by the module", instead_of_adapter(lora.path))
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


def _kind_of(leaves: Collection[str]) -> str:
    """LoRA, DoRA, LoHa or LoKr, or all that a module's tensors are of."""
    found = {"hada": "LoHa", "lokr": "LoKr", "lora": "DoRA" if MAGNITUDE in leaves else "LoRA"}
    return " with ".join(sorted({found[leaf[:4]] for leaf in leaves}))


def read_adapter(path: Path, transformer: torch.nn.Module, expert: Expert | None = None) -> AdapterState:
    """A LoRA file as an adapter for this diffusers transformer, which has none yet; see `read_given`."""
    return adapter_for(read_given(path, expert), transformer)


def adapter_for(lora: LoraFile, transformer: torch.nn.Module) -> AdapterState:
    """A LoRA as an adapter for this diffusers transformer, which has none yet.

    Raises ContainerError for one of another variant, or that is more than an adapter.
    """
    own = {name: tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves parameters empty
           for name, parameter in transformer.named_parameters()}
    shapes = {official: own[name] for name, official in official_names(own).items()}
    lora = without_image_parts(lora, shapes)
    check_fit(lora, shapes)
    return to_adapter(lora)


def low_rank(difference: torch.Tensor, rank: int) -> tuple[LoraPair, float]:
    """The best pair of a rank for a weight's change [out, in], and the share of the change's squared norm it keeps.

    Truncated SVD by randomised subspace iteration (Halko et al. 2011), the same numbers at every call.
    """
    rank = min(rank, *difference.shape)
    scale = 2.0 ** math.frexp(float(difference.abs().max()))[1]  # squares of the largest float32 would overflow
    difference = difference / scale
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=min(rank + 16, *difference.shape), niter=8)
    root = s[:rank].sqrt() * math.sqrt(scale)
    kept = float(s[:rank].double().square().sum() / difference.double().square().sum())
    return LoraPair((v[:, :rank] * root).T.contiguous(), u[:, :rank] * root, rank), min(kept, 1.0)


_BUG = "report this as a bug; what it was made from is untouched"


def write_proven(lora: LoraFile, format: str, metadata: Mapping[str, str], storage: str,
                 trained: AdapterState | None = None) -> float:
    """Write a LoRA, read it back, and only if it is right set it in its place, `lora.path`. Returns the largest
    relative error of what it does to any module; with `trained`, against those tensors and factors themselves.

    `storage`: a word of STORAGE. Raises UserError for what the format cannot hold, and for an error above what the
    storage may cost.
    """
    dtype, allowed = STORAGE[storage]
    with set_in_place(lora.path) as path:
        write_lora(path, lora.pairs, format, metadata, dtype=dtype, extras=lora.extras)
        written = read_lora(path)
        worst, where = worst_difference(lora, written)
        if not worst <= allowed:
            raise UserError(f"{lora.path}: read back, the delta of {where} differs by {worst:.1e}", _BUG)
        return refuse_difference(lora.path, written, trained, storage) if trained else worst


def refuse_difference(path: Path, lora: LoraFile, trained: AdapterState, storage: str) -> float:
    """Compare what a LoRA does to each module, as the sampler reads it, with the trained tensors and factors.

    Returns the largest relative L2 error.

    Raises UserError above what the storage (a word of STORAGE) may cost; `path` is the file's, for that message.
    """
    written = to_adapter(lora)
    if only := sorted(written.tensors.keys() ^ trained.tensors.keys()):
        raise UserError(f"{path}: {only[0]} is only in one of file and checkpoint", _BUG)
    errors = {module: _effect_error(leaves, trained.scales[module], written.tensors[module], written.scales[module])
              for module, leaves in trained.tensors.items()}
    where = max(errors, key=lambda module: errors[module])
    if not errors[where] <= STORAGE[storage][1]:
        raise UserError(f"{path}: read back, the delta of {where} differs from the checkpoint's by {errors[where]:.1e}",
                        _BUG)
    return errors[where]


def _effect_error(trained: Mapping[str, torch.Tensor], scale: float, written: Mapping[str, torch.Tensor],
                  written_scale: float) -> float:
    """The relative L2 error of one module's product, and of its DoRA magnitudes."""
    if "lora_A" not in trained:
        wanted, found = (factor * _product(leaves) for leaves, factor in ((trained, scale), (written, written_scale)))
        return _relative(wanted, found)
    own, theirs = (LoraPair(leaves["lora_A"], factor * leaves["lora_B"].double(), len(leaves["lora_A"]))
                   for leaves, factor in ((trained, scale), (written, written_scale)))
    magnitude = [leaves[MAGNITUDE] for leaves in (trained, written) if MAGNITUDE in leaves]
    if len(magnitude) == 1:
        return math.inf
    return max(_pair_difference(own, theirs), _relative(*magnitude) if magnitude else 0.0)


def _product(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The product of a LoHa or LoKr without its factor, float64 (LyCORIS, Yeh et al. 2023)."""
    own = {leaf: tensor.double() for leaf, tensor in leaves.items()}
    if "hada_w1_a" in own:
        return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    left = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    right = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    return torch.einsum("ab,cd->acbd", left, right).reshape(left.shape[0] * right.shape[0], -1)


def worst_difference(one: LoraFile, other: LoraFile) -> tuple[float, str]:
    """The largest relative L2 difference of anything that two LoRAs do, and the module or tensor it is on.

    Infinite for what only one has. Pairs are compared by rank-sized products in float64, never by their deltas:
    ||B1 A1 - B2 A2||^2 = tr((B^T B)(A A^T)) with B = [B1, -B2], A = [A1; A2] (exact to about 1e-8 relative).
    """
    if only := sorted((one.pairs.keys() ^ other.pairs.keys()) | (one.extras.keys() ^ other.extras.keys())):
        return math.inf, only[0]
    differences = [(_pair_difference(pair, other.pairs[module]), module) for module, pair in one.pairs.items()]
    theirs = products(other.extras)
    differences += [(0.0 if _same(leaves, theirs[module]) else
                     _relative(product_delta(leaves), product_delta(theirs[module])), module)
                    for module, leaves in products(one.extras).items()]
    differences += [(_relative(tensor, other.extras[name]), name) for name, tensor in one.extras.items()
                    if not split_extra(name)[1].startswith(PRODUCT)]
    return max(differences, default=(0.0, ""))


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[leaf]) for leaf, tensor in one.items())


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.numel() != other.numel():
        return math.inf
    norm = float(one.double().norm())
    difference = float((one.double().reshape(-1) - other.double().reshape(-1)).norm())
    return difference / norm if norm else difference


def pair_norm(pair: LoraPair) -> float:
    """The L2 norm of a pair's delta, from rank-sized products."""
    return _norm(pair.b.double().flatten(1) * pair.scale, pair.a.double().flatten(1))


def product_norm(leaves: Mapping[str, torch.Tensor]) -> float:
    """The L2 norm of a LoHa's or LoKr's delta, without the memory that the delta takes."""
    own = {leaf: tensor.double() for leaf, tensor in leaves.items() if leaf != "alpha"}
    if "hada_w1_a" in own:
        rows = ((a1 @ own["hada_w1_b"]) * (a2 @ own["hada_w2_b"])
                for a1, a2 in zip(*(torch.split(own[w], 64) for w in ("hada_w1_a", "hada_w2_a")), strict=True))
        norm = math.sqrt(sum(float(row.square().sum()) for row in rows))
    else:
        norm = math.prod(float(own[w].norm()) if w in own else _norm(own[f"{w}_a"], own[f"{w}_b"])
                         for w in ("lokr_w1", "lokr_w2"))
    return abs(product_scale(leaves)) * norm


def _pair_difference(pair: LoraPair, other: LoraPair) -> float:
    norm = pair_norm(pair)
    difference = _norm(
        torch.cat([pair.b.double().flatten(1) * pair.scale, -other.b.double().flatten(1) * other.scale], 1),
        torch.cat([pair.a.double().flatten(1), other.a.double().flatten(1)]))
    return difference / norm if norm else difference


def _norm(b: torch.Tensor, a: torch.Tensor) -> float:
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
