"""LoRA files: one grammar table for reading and writing every spelling that Wan tools use.

Inside, a LoRA is a dictionary: official module path -> LoraPair. Who writes which format: docs/facts.md, "LoRA
formats". What each tool does with which file: docs/lora-files.md.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from wantrain.lora import MAGNITUDE
from wantrain.models.containers import Container, open_raw
from wantrain.models.lora_checks import (
    check_pair,
    check_products,
    check_values,
    config_alpha,
    one_number,
    product_size,
)
from wantrain.models.lora_names import PEFT_CONFIG, is_lora, weights_of
from wantrain.models.names import ANIMATE, TRANSFORMER, UnknownName, module_to_diffusers
from wantrain.models.variants import Expert
from wantrain.models.weight_files import ContainerError, parse_json
from wantrain.tensors import digest_tensors

DIGEST_KEY = "wantrain_digest"

Extras = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """One module's update alpha/rank * B @ A: `a` [rank, in, ...], `b` [out, rank, ...]."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """The update in the weight's shape [out, in, ...], float32."""
        product = self.b.float().flatten(1) @ self.a.float().flatten(1)
        return (self.scale * product).reshape(self.b.shape[0], *self.a.shape[1:])


Pairs = Mapping[str, LoraPair]


@dataclass(slots=True)
class LoraFile:
    """A LoRA file's content.

    `extras` are the tensors that are no A/B pair (`.diff`, `.diff_b`, LoHa, LoKr, DoRA magnitudes and the alphas
    that belong to them), by official stem and suffix; a bias of B is in them as the `.diff_b` that it makes. `names`
    are those of its tensors as they stand in the file, `ignored` names what the file holds and is no weight.
    """

    path: Path
    format: str
    pairs: dict[str, LoraPair]
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grammar:
    """How one format spells a LoRA.

    `flat`: underscores for dots in the module path; `naming`: whose module names; `down`, `up`: suffixes of A and B;
    `alpha`: where it stands (optional: in a tensor or else equal to the rank; tensor: one for every module; config: in
    the metadata or adapter_config.json); `conv`: whether its readers take Conv3d; `extras`: suffixes, beyond the
    pairs, that its readers apply.
    """

    id: str
    prefix: str
    flat: bool
    naming: Literal["official", "diffusers", "either"]
    down: str
    up: str
    alpha: Literal["optional", "tensor", "config"]
    conv: bool
    extras: tuple[str, ...] = ()

    @property
    def folds(self) -> bool:
        """Whether we write alpha/rank into B, since not every reader looks for an alpha."""
        return self.alpha == "optional" or self.id == "diffusers"

    @property
    def diffusers_names(self) -> bool:
        """Whether we write it with the module names of diffusers."""
        return self.naming == "diffusers" or self.id == "peft"


_KRON = ("hada_w", "hada_t", "lokr_w", "lokr_t", "alpha")
_AB = ("lora_A.weight", "lora_B.weight")
_AB_DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
_UPDOWN = ("lora_down.weight", "lora_up.weight")

GRAMMARS: dict[str, Grammar] = {g.id: g for g in (
    Grammar("universal", "diffusion_model.", False, "official", *_AB, "optional", False),
    Grammar("comfy_updown", "diffusion_model.", False, "official", *_UPDOWN, "optional", True, ("diff", *_KRON)),
    Grammar("fun", "lora_unet__", True, "official", *_UPDOWN, "tensor", True),
    Grammar("kohya", "lora_unet_", True, "official", *_UPDOWN, "tensor", True, _KRON),
    Grammar("diffusers", "transformer.", False, "diffusers", *_AB, "config", True, (MAGNITUDE,)),
    Grammar("peft", "base_model.model.", False, "either", *_AB, "config", True, (MAGNITUDE,)),
    Grammar("lycoris", "lycoris_", True, "diffusers", *_UPDOWN, "tensor", True, _KRON),
    Grammar("diffsynth_pipe", "pipe.dit.", False, "official", *_AB_DEFAULT, "optional", False),
    Grammar("diffsynth", "", False, "either", *_AB_DEFAULT, "optional", False),
)}
"""In the order in which prefixes are tried: a longer one goes before one that it starts with."""

_KEY = re.compile(
    r"(?P<stem>.+?)\.(?:"
    r"(?P<a>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)|"
    r"(?P<b>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)|"
    r"(?P<alpha>alpha)|"
    r"(?P<extra>diff|diff_b|diff_m|set_weight|dora_scale|lora_magnitude_vector(?:\.\w+)*|lora_mid\.weight|"
    r"lora_[AB](?:\.\w+)?\.bias|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2))"
)
_PARAMETER_STEM = re.compile(r"(vace_)?blocks\.\d+(\.modulation)?|head(\.modulation)?|img_emb\.emb_pos")
_EXPERT_PREFIXES: dict[Expert, dict[str, str]] = {
    "high": {"diffusion_model.transformer_1.": "diffusion_model.", "transformer.": "transformer."},
    "low": {"diffusion_model.transformer_2.": "diffusion_model.", "transformer_2.": "transformer."},
}


def read_lora(path: Path | str, expert: Expert | None = None) -> LoraFile:
    """Read a LoRA file, or a PEFT adapter folder, in any format of the table.

    `expert` chooses from a file that holds both. Tensors keep their stored dtype. Raises ContainerError, naming the
    tensor and the likely cause, for files that are damaged, not a LoRA, of unknown names, or whose alpha is lost.
    """
    path = Path(path).expanduser()
    raw = open_raw(weights_of(path))
    if not is_lora(raw.names()):
        raise ContainerError(raw.path, f"{next(iter(raw.names()), 'nothing')} is no tensor of a LoRA", _NO_LORA,
                             _INSPECT.format(shlex.quote(str(raw.path))))
    tensors = {name: raw.read(name) for name in raw.names()}
    _check_digest(raw, tensors)
    ignored = tuple(name for name, tensor in tensors.items() if _is_buffer(name, tensor))
    tensors = _one_expert(raw, {name: tensors[name] for name in tensors if name not in ignored}, expert)
    grammar = _grammar(raw, tensors)
    pieces, extras = _parse(raw, tensors, grammar)
    check_values(raw, tensors)
    config = _adapter_config(raw, grammar, expert) if grammar.alpha == "config" else {}
    pairs = {}
    for module, roles in pieces.items():
        if roles.keys() <= {"alpha"}:
            extras[f"{module}.alpha"] = roles["alpha"]
            continue
        check_pair(raw, module, roles)
        pairs[module] = LoraPair(roles["a"], roles["b"], _alpha(raw, module, roles, grammar, config))
    _check_transposed(raw, pairs)
    check_products(raw, products(extras))
    return LoraFile(path, grammar.id, pairs, _plain_extras(raw, pairs, extras), raw.metadata, tuple(tensors), ignored)


def _is_buffer(name: str, tensor: torch.Tensor) -> bool:
    """Whether this is a number that a tool keeps among the tensors (`lokr_factor`), and no weight."""
    return tensor.numel() == 1 and not tensor.is_floating_point() and _KEY.fullmatch(name) is None


def _check_digest(raw: Container, tensors: Extras) -> None:
    stated = raw.metadata.get(DIGEST_KEY)
    if stated is not None and stated != digest_tensors(tensors):
        raise ContainerError(raw.path, "its tensors are not those that wantrain wrote (the digest in its metadata "
                             "differs)", "damaged, or edited by a tool that kept the metadata",
                             f"export again, or take {DIGEST_KEY} out of the metadata if the change is wanted")


def _one_expert(raw: Container, tensors: dict[str, torch.Tensor], expert: Expert | None) -> dict[str, torch.Tensor]:
    """From a file with both experts' tensors, those of one under the prefix that a single expert has."""
    halves = {one: {name for name in tensors if name.startswith(tuple(prefixes))}
              for one, prefixes in _EXPERT_PREFIXES.items()}
    if not halves["low"] and not any(name.startswith("diffusion_model.transformer_1.") for name in halves["high"]):
        return tensors
    if other := sorted(tensors.keys() - halves["high"] - halves["low"]):
        raise ContainerError(raw.path, f"{other[0]} belongs to neither expert", "a LoRA that also trains a text "
                             "encoder", "export it without the text encoder's part")
    if expert is None and all(halves.values()):
        raise ContainerError(raw.path, "holds a LoRA for each of the two experts", "a combined A14B file",
                             "say which: expert=high or expert=low; a file of one: "
                             f"wantrain convert {shlex.quote(str(raw.path))} high_noise.safetensors expert=high")
    chosen = expert or ("high" if halves["high"] else "low")
    if not halves[chosen]:
        raise ContainerError(raw.path, f"holds no LoRA for the {chosen} noise expert, but one for the other",
                             "the experts were exchanged", "give it to the other expert")
    return {new + name.removeprefix(old): tensor for name, tensor in tensors.items()
            for old, new in _EXPERT_PREFIXES[chosen].items() if name.startswith(old)}


def _grammar(raw: Container, names: Iterable[str]) -> Grammar:
    """The one format that all names have the prefix of, and whose word for A is the file's."""
    found = {name: next(g.prefix for g in GRAMMARS.values() if name.startswith(g.prefix)) for name in names}
    prefixes = Counter(found.values())
    if not prefixes:
        raise ContainerError(raw.path, "holds no LoRA and no tensors", "an interrupted export", "export it again")
    if len(prefixes) > 1:
        odd = next(name for name, prefix in found.items() if prefix == prefixes.most_common()[-1][0])
        raise ContainerError(raw.path, f"mixes prefixes: {', '.join(repr(p) for p in prefixes)} (e.g. {odd})",
                             "two formats in one file, or a LoRA that also trains a text encoder",
                             "export it in one format, of the transformer alone")
    words = {key["a"] for name in names if (key := _KEY.fullmatch(name)) and key["a"]}
    rows = [g for g in GRAMMARS.values() if g.prefix == next(iter(prefixes))]
    return next((g for g in rows if g.down in words), rows[0])


_NO_LORA = "a base checkpoint, or a kind of adapter that wantrain does not know"
_INSPECT = "a base goes to model.path or model.parts; what a file holds: wantrain inspect {}"
_RENAME = "names must begin with one of " + ", ".join(sorted({g.prefix for g in GRAMMARS.values() if g.prefix})) + (
    " and go on as Wan's own (or, after transformer. and lycoris_, diffusers') module names: rename them so, or export "
    "again in a format of the list (docs/lora-files.md)")


def _parse(raw: Container, tensors: Extras, grammar: Grammar
           ) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Per official module its a, b and alpha; and the extras by official stem and suffix."""
    pieces: dict[str, dict[str, torch.Tensor]] = {}
    extras: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        key = _KEY.fullmatch(name.removeprefix(grammar.prefix))
        if key is None:
            raise ContainerError(raw.path, f"{name} is no tensor of a LoRA", _NO_LORA,
                                 _INSPECT.format(shlex.quote(str(raw.path))))
        stem = _official(raw, name, key["stem"], grammar)
        if key["extra"]:
            extra = f"{stem}.{MAGNITUDE if key['extra'].startswith(MAGNITUDE) else key['extra']}"
            if extra in extras:
                raise ContainerError(raw.path, f"{name}: there are two of {extra}", "two files merged into one",
                                     "use one of the two")
            extras[extra] = tensor
            continue
        role = "a" if key["a"] else "b" if key["b"] else "alpha"
        roles = pieces.setdefault(stem, {})
        if role in roles:
            raise ContainerError(raw.path, f"{name}: {stem} has two tensors for {role}", "two files merged into one",
                                 "use one of the two")
        roles[role] = tensor
    return pieces, extras


def _official(raw: Container, name: str, stem: str, grammar: Grammar) -> str:
    """The official module (or, for .diff on a bare parameter, tensor) that a stem means."""
    official = _known(stem, grammar.flat, other=False) if grammar.naming != "diffusers" else None
    official = official or (_known(stem, grammar.flat, other=True) if grammar.naming != "official" else None)
    if official is None:
        whose = {"official": "official", "diffusers": "diffusers", "either": "known"}[grammar.naming]
        raise ContainerError(raw.path, f"{name}: {stem!r} is no {whose} module of a Wan transformer", "a wrong "
                             "prefix, a LoRA of another model, or one that also trains a text encoder", _RENAME)
    return official


def _known(stem: str, flat: bool, other: bool) -> str | None:
    """The official path of a module in either naming, or None; bare parameters (`.diff`, `.diff_m`) count too."""
    for table in (TRANSFORMER, ANIMATE) if other else (TRANSFORMER,):
        with contextlib.suppress(UnknownName):
            if flat:
                return table.from_flat(stem, other)
            if other:
                return table.to_official(stem)
    if flat or other:
        return None
    return stem if TRANSFORMER.is_module(stem) or _PARAMETER_STEM.fullmatch(stem) else None


def _adapter_config(raw: Container, grammar: Grammar, expert: Expert | None) -> dict[str, Any]:
    """PEFT's configuration: of a diffusers file from its metadata, of a PEFT adapter from the file beside it."""
    if grammar.id == "peft":
        beside = raw.path.parent / PEFT_CONFIG
        if not beside.is_file():
            raise ContainerError(raw.path, f"has no {PEFT_CONFIG} beside it, which says alpha", "only the weights were "
                                 "copied", f"copy {PEFT_CONFIG} into the same folder")
        return parse_json(beside, PEFT_CONFIG, beside.read_bytes())
    packed = parse_json(raw.path, "lora_adapter_metadata", raw.metadata.get("lora_adapter_metadata", "{}").encode())
    whose = "transformer_2." if expert == "low" and any(k.startswith("transformer_2.") for k in packed) \
        else "transformer."
    return {key.removeprefix(whose): value for key, value in packed.items() if key.startswith(whose)}


def _alpha(raw: Container, module: str, roles: Extras, grammar: Grammar, config: Mapping[str, Any]) -> float:
    """A pair's alpha: its own tensor, what the config says, or the rank. Raises ContainerError."""
    if "alpha" not in roles and grammar.alpha == "tensor":
        raise ContainerError(raw.path, f"{module} has no alpha, which every {grammar.id} file has",
                             "a converter dropped it; without it the LoRA's strength is unknown",
                             "convert the original file again")
    try:
        alpha = one_number(roles["alpha"]) if "alpha" in roles \
            else config_alpha(config, (module, module_to_diffusers(module)), len(roles["a"]))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ContainerError(raw.path, f"the alpha of {module} cannot be read: {error}", "damaged metadata") from error
    if not math.isfinite(alpha) or alpha == 0:
        raise ContainerError(raw.path, f"{module} has alpha {alpha}, so no effect", "a damaged file")
    return alpha


def _plain_extras(raw: Container, pairs: Pairs, extras: Extras) -> dict[str, torch.Tensor]:
    """The extras with one spelling for what several tools spell in their own way.

    A bias of B becomes the `.diff_b` that it makes, LyCORIS' `dora_scale` [out, 1] PEFT's magnitudes [out]. Raises
    ContainerError for a dora_scale that says something else.
    """
    found = {}
    for name, tensor in extras.items():
        module, suffix = split_extra(name)
        pair = pairs.get(module)
        if suffix.startswith("lora_B") and pair is not None:
            if tensor.numel() != len(pair.b):
                raise ContainerError(raw.path, f"{name} is {list(tensor.shape)}, B is {list(pair.b.shape)}", "tensors "
                                     "of two LoRAs were mixed")
            if f"{module}.diff_b" in extras:
                raise ContainerError(raw.path, f"{name} and a diff_b change the same bias", "two files merged into one",
                                     "use one of the two")
            found[f"{module}.diff_b"] = pair.scale * tensor.float().reshape(-1)
        elif suffix == "dora_scale":
            if pair is None or pair.a.ndim > 2 or tuple(tensor.shape) not in {(len(pair.b), 1)}:
                raise ContainerError(raw.path, f"{name} is {list(tensor.shape)}; wantrain reads DoRA with a magnitude "
                                     "for each row, [out, 1], on the LoRA of a Linear", "DoRA over columns (LyCORIS "
                                     "without wd_on_out), of a convolution, or on LoHa or LoKr",
                                     "fold it into a checkpoint with the tool that made it, then wantrain extract")
            found[f"{module}.{MAGNITUDE}"] = tensor.reshape(-1)
        else:
            found[name] = tensor
    return found


def _check_transposed(raw: Container, pairs: Pairs) -> None:
    """Refuse a file in which every rank is above both sides of its module, unless we wrote it (its digest is right).

    A rank above one side, or above both in some modules, is wasteful and not wrong.
    """
    above = [module for module, pair in pairs.items()
             if pair.rank > max(pair.b.shape[0], math.prod(pair.a.shape[1:]))]
    if pairs and len(above) == len(pairs) and DIGEST_KEY not in raw.metadata:
        one = pairs[above[0]]
        raise ContainerError(raw.path, f"{above[0]}: A {list(one.a.shape)} and B {list(one.b.shape)} have a rank above "
                             "the module's size, as all modules here", "A and B are transposed")


PRODUCT = ("hada_w", "lokr_w", "alpha")
"""What the suffixes of a LoHa's and a LoKr's tensors begin with."""


def products(extras: Extras) -> dict[str, dict[str, torch.Tensor]]:
    """The LoHa and LoKr modules among the extras: official module -> leaf -> tensor, alpha among them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in extras.items():
        module, leaf = split_extra(name)
        if leaf.startswith(PRODUCT):
            found.setdefault(module, {})[leaf] = tensor
    return found


def check_fit(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a LoRA whose modules the base does not have in that size.

    `shapes`: of the base's tensors, by official name. Raises ContainerError naming the first module that differs.
    """
    for module, pair in lora.pairs.items():
        wanted = shapes.get(f"{module}.weight")
        made: tuple[int, ...] = (pair.b.shape[0], *pair.a.shape[1:])
        if wanted is None:
            raise ContainerError(lora.path, f"{module} is not in the base", "a LoRA for another Wan variant",
                                 "use the base that it was trained on")
        if made != tuple(wanted):
            raise ContainerError(lora.path, f"{module} makes an update {list(made)}, the base's weight is "
                                 f"{list(wanted)}", "a LoRA for another Wan variant, or A and B transposed",
                                 "use the base that it was trained on")
    for module, leaves in products(lora.extras).items():
        made, wanted = product_size(leaves), shapes.get(f"{module}.weight")
        if made != wanted:
            raise ContainerError(lora.path, f"{module} makes an update {list(made)}, the base's weight is "
                                 f"{list(wanted or ())}", "a LoRA for another Wan variant", "use the base that it was "
                                 "trained on")


def split_extra(name: str) -> tuple[str, str]:
    """The name of an extra tensor as (official stem, suffix)."""
    key = _KEY.fullmatch(name)
    assert key is not None, f"{name} is no extra tensor"
    return key["stem"], name.removeprefix(key["stem"] + ".")


def _spell(grammar: Grammar, module: str) -> str:
    stem = module_to_diffusers(module) if grammar.diffusers_names else module
    return grammar.prefix + (stem.replace(".", "_") if grammar.flat else stem)


