"""Adapters through PEFT: inject, the trainable set, their state. A LoRA: W' = W + alpha/rank * B A (Hu et al. 2021)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wantrain.targets import matched, matching
from wantrain.terms import UserError

ADAPTER = "default"
MAGNITUDE = "lora_magnitude_vector"
"""PEFT's word for DoRA's magnitudes [out]."""


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """One of PEFT's adapters: the name of its config's class, the word for alpha there, the tensors that a module may
    get, and what else its config says.
    """

    config: str
    alpha: str
    leaves: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


_PAIR = ("lora_A", "lora_B")
KINDS: dict[str, AdapterKind] = {
    "lora": AdapterKind("LoraConfig", "lora_alpha", _PAIR),
    "rslora": AdapterKind("LoraConfig", "lora_alpha", _PAIR, {"use_rslora": True}),
    "dora": AdapterKind("LoraConfig", "lora_alpha", (*_PAIR, MAGNITUDE), {"use_dora": True}),
    "loha": AdapterKind("LoHaConfig", "alpha", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "lokr": AdapterKind("LoKrConfig", "alpha",
                        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
}
"""rslora scales by alpha/sqrt(rank) (Kalajdzievski 2023); dora learns each row's length apart (Liu et al. 2024); loha
and lokr are the Hadamard and Kronecker products of LyCORIS (Yeh et al. 2023)."""

_PARAMETER = re.compile(rf"(?P<module>.+)\.(?P<leaf>\w+)\.{ADAPTER}(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class Spec:
    """How an adapter is made: inner width, scale and kind.

    `rank_pattern` and `alpha_pattern` give other values to the modules that a target (preset or regular expression)
    matches; where several match, the last counts.
    """

    rank: int
    alpha: float
    kind: str = "lora"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class AdapterState:
    """An adapter outside a model: per module (diffusers name) its tensors by leaf, and the factor on their product.

    Leaves are those of KINDS: lora_A [rank, in] and lora_B [out, rank], lora_magnitude_vector [out], hada_*, lokr_*.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    scales: dict[str, float]


def match_targets(transformer: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the Linear modules that the presets or regular expressions match, in the model's order.

    Raises UserError when any pattern matches nothing: a typo must not train something else.
    """
    return matched([name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)],
                   targets)


def inject(transformer: torch.nn.Module, targets: Sequence[str], spec: Spec, seed: int) -> list[str]:
    """Freeze `transformer` and add an adapter (float32, drawn from `seed`, without effect) to the targets.

    Returns their names. Works on the meta device too. Raises UserError when a target or pattern matches nothing.
    """
    import peft  # which takes seconds, and what reads and writes LoRA files needs none of it
    from peft.utils.integrations import gather_params_ctx

    names = match_targets(transformer, targets)
    transformer.requires_grad_(False)
    kind = KINDS[spec.kind]
    on_meta = next(transformer.parameters()).is_meta  # where PEFT would draw the adapter on the CPU, for nothing
    config = getattr(peft, kind.config)(
        **kind.options, r=spec.rank, target_modules="|".join(map(re.escape, names)),  # PEFT takes names as endings
        rank_pattern=_by_name(names, spec.rank_pattern, "lora.rank_pattern"),
        alpha_pattern=_by_name(names, spec.alpha_pattern, "lora.alpha_pattern"), **{kind.alpha: spec.alpha})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, transformer, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta)
    for name, parameter in trainable_parameters(transformer).items():
        parameter.data = parameter.data.float()
        if MAGNITUDE in name:  # PEFT took the rows' lengths in the base's dtype
            weight = transformer.get_parameter(name.partition(f".{MAGNITUDE}")[0] + ".base_layer.weight")
            with gather_params_ctx(weight, modifier_rank=None):
                parameter.data = torch.linalg.norm(weight.float(), dim=1)
    _check_trainable(transformer, names, kind)
    return names


def _by_name(names: Sequence[str], patterns: Mapping[str, Any], key: str) -> dict[str, Any]:
    """PEFT's patterns, one for each module that ours match."""
    return {re.escape(name): value for target, value in patterns.items() for name in matching(names, target, key)}


def trainable_parameters(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters with a gradient, by name."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def lr_factors(transformer: torch.nn.Module, b_factor: float, patterns: Mapping[str, float]) -> dict[str, float]:
    """The factor on the learning rate of each trainable tensor, by name.

    That of the last preset or regular expression over the adapted modules' names that matches, times `b_factor` for
    the B of a LoRA: LoRA+ (Hayou et al. 2024). Raises UserError when a pattern matches no adapted module.
    """
    leaves = _by_module(trainable_parameters(transformer))
    chosen = dict.fromkeys(leaves, 1.0)
    for target, factor in patterns.items():
        chosen |= dict.fromkeys(matching(list(leaves), target, "optim.lr_factors"), factor)
    return {name: chosen[found["module"]] * (b_factor if found["leaf"] == "lora_B" else 1.0)
            for name, found in ((name, _parsed(name)) for name in trainable_parameters(transformer))}


def _parsed(name: str) -> re.Match[str]:
    """The module and the leaf in a trainable tensor's name."""
    found = _PARAMETER.fullmatch(name)
    assert found is not None, f"{name} is no tensor of an adapter"
    return found


def _by_module(parameters: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Named trainable tensors as module -> leaf -> tensor."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in parameters.items():
        found = _parsed(name)
        tensors.setdefault(found["module"], {})[found["leaf"]] = tensor
    return tensors


def _check_trainable(transformer: torch.nn.Module, names: Iterable[str], kind: AdapterKind) -> None:
    """Refuse unless exactly the adapter's tensors of `names` are trainable."""
    found = _by_module(trainable_parameters(transformer))
    strays = [(name, leaf) for name, leaves in found.items() for leaf in leaves if leaf not in kind.leaves]
    assert found.keys() == set(names), f"the adapted modules are wrong: {sorted(found.keys() ^ set(names))}"
    assert not strays, f"the trainable set is wrong: {strays}"


def scales(transformer: torch.nn.Module) -> dict[str, float]:
    """The factor on each adapted module's product: alpha/rank, or alpha/sqrt(rank) for rslora."""
    return {name: float(layer.scaling[ADAPTER]) for name, layer in _adapted_layers(transformer)}


def _adapted_layers(transformer: torch.nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers by module name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)]


def pair_of(layer: torch.nn.Module) -> tuple[Any, torch.Tensor | None, torch.Tensor | None, float] | None:
    """The frozen Linear of an adapted layer, A, B and the factor on their product; None where it is no plain LoRA.

    A and B are None where the adapter is switched off.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or layer.lora_variant or not layer.lora_A:
        return None
    if layer.disable_adapters or ADAPTER not in layer.active_adapters:
        return layer.base_layer, None, None, 1.0
    return layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


def adapter_state(parameters: Mapping[str, torch.Tensor], factors: Mapping[str, float]) -> AdapterState:
    """The state from named trainable tensors and `scales`. The tensors are whole, as
    `trainable_parameters` or the engine's gather gives them.

    Tensors on the meta device stay there.
    """
    if strays := [name for name in parameters if not _PARAMETER.fullmatch(name)]:
        raise UserError(f"{strays[0]} is no tensor of an adapter", "go on from a checkpoint that nobody edited")
    tensors = _by_module({name: tensor.detach().float() if tensor.is_meta else tensor.detach().cpu().float().clone()
                          for name, tensor in parameters.items()})
    if others := sorted(tensors.keys() ^ factors.keys()):
        raise UserError(f"{others[0]} has a scale and no tensors, or tensors and no scale",
                        "go on from a checkpoint that nobody edited")
    if parts := [module for module, leaves in tensors.items() if not _is_whole(leaves)]:
        raise UserError(f"{parts[0]} lacks a part of its adapter", "go on from a checkpoint that nobody edited")
    return AdapterState(tensors, dict(factors))


def _is_whole(leaves: Mapping[str, torch.Tensor]) -> bool:
    """Whether all factors of a module's product are there."""
    def has(*names: str) -> bool:
        return all(name in leaves and leaves[name].ndim == 2 for name in names)

    if has(*_PAIR) or has(*KINDS["loha"].leaves):
        return True
    return all(has(f"lokr_w{n}") or has(f"lokr_w{n}_a", f"lokr_w{n}_b") for n in (1, 2))


def start_from(transformer: torch.nn.Module, given: AdapterState) -> None:
    """Give the injected adapter the effect of another; modules that `given` lacks stay without effect.

    A smaller LoRA rank fills the first rows and leaves the rest at their start, so the delta is the same and can grow.
    Raises UserError for modules that are no targets, another kind, ranks above ours and products of other sizes.
    """
    own, factors = _by_module(trainable_parameters(transformer)), scales(transformer)
    for module, theirs in given.tensors.items():
        if module not in own:
            raise UserError(f"the LoRA adapts {module}, which lora.targets does not match",
                            "widen lora.targets, e.g. lora.targets=[all_linear]")
        if own[module].keys() != theirs.keys():
            are_lokr = all(leaf.startswith("lokr") for leaf in (*theirs, *own[module]))
            raise UserError(f"on {module} the LoRA holds {', '.join(theirs)}, our adapter {', '.join(own[module])}",
                            _rank_of(theirs) if are_lokr else "set lora.kind to the file's (wantrain inspect FILE), or "
                            "fold it in with model.merge")
        _fill(module, own[module], theirs, given.scales[module] / factors[module])


_WHOLE = "it is factored otherwise than PEFT does, and no lora.rank fits: fold the file in with model.merge"


def _rank_of(theirs: Mapping[str, torch.Tensor]) -> str:
    """What to set for a product of another rank."""
    rank = inner_rank(theirs)
    return _WHOLE if rank is None else f"set lora.rank={rank}, or fold the file in with model.merge"


def _fill(module: str, own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], factor: float) -> None:
    """Copy one module's tensors; one of them takes `factor`, the quotient of the scales."""
    scaled = next(leaf for leaf in ("lora_B", "hada_w2_b", "lokr_w1", "lokr_w1_b") if leaf in own)
    with torch.no_grad():
        for leaf, tensor in theirs.items():
            value = tensor.float().reshape(-1) if leaf == MAGNITUDE else tensor.float()
            target = own[leaf]
            if leaf in _PAIR and target.shape != value.shape:
                rank, allowed = (t.shape[leaf == "lora_B"] for t in (value, target))
                if rank > allowed:
                    raise UserError(f"the LoRA has rank {rank} on {module}, above lora.rank = {allowed}",
                                    f"set lora.rank={rank} and lora.alpha={rank}")
                target = target[:rank] if leaf == "lora_A" else target[:, :rank]
            if target.shape != value.shape:
                outer = int(leaf.endswith("b"))  # the axis that no rank changes
                is_cut_otherwise = leaf.startswith("lokr") and value.shape[outer] != target.shape[outer]
                raise UserError(f"{module}.{leaf}: {list(value.shape)} does not fit our {list(target.shape)}",
                                _WHOLE if is_cut_otherwise else _rank_of(theirs))
            target.copy_(value * factor if leaf == scaled else value)


def attach(transformer: torch.nn.Module, given: AdapterState) -> None:
    """Inject an adapter of `given`'s kind, modules and ranks, and give it its effect, e.g. to sample with a file.

    Raises UserError as `inject` and `start_from` do; a LoKr that was factored otherwise than PEFT does is refused.
    """
    leaves = set().union(*given.tensors.values())
    kind = "dora" if MAGNITUDE in leaves else next(
        name for name, kind in KINDS.items() if leaves <= set(kind.leaves))
    # For a LoKr of two whole factors: the least rank at which PEFT leaves the second whole.
    ranks = {re.escape(module): inner_rank(tensors) or -(-max(tensors["lokr_w2"].shape) // 2)
             for module, tensors in given.tensors.items()}
    rank = next(iter(ranks.values()))
    others = {module: own for module, own in ranks.items() if own != rank}
    inject(transformer, list(ranks), Spec(rank, rank, kind, others), seed=0)
    start_from(transformer, given)


def detach(transformer: torch.nn.Module) -> None:
    """Take the adapter out again, if there is one: another can be attached."""
    layers = _adapted_layers(transformer)
    for name, layer in layers:
        transformer.set_submodule(name, layer.get_base_layer())
    if layers:
        del transformer.peft_config  # PEFT's note on the model, which it would warn of


def joined(states: Sequence[tuple[AdapterState, float]]) -> AdapterState:
    """One adapter whose delta is the sum of these adapters' deltas times their strengths.

    Raises UserError for kinds other than LoRA where this is no adapter of the kind: of several, and of a DoRA that is
    not at 1.
    """
    if len(states) == 1 and states[0][1] == 1:
        return states[0][0]
    leaves = set().union(*(own for state, _ in states for own in state.tensors.values()))
    if len(states) == 1 and MAGNITUDE not in leaves:
        (state, strength), = states
        return AdapterState(state.tensors, {module: scale * strength for module, scale in state.scales.items()})
    if foreign := sorted(leaves - set(_PAIR)):
        raise UserError(f"it holds {foreign[0]}, and only LoRAs of pairs add up, or can be at another strength",
                        "fold it in with model.merge")
    tensors = {}
    for module in dict.fromkeys(module for state, _ in states for module in state.tensors):
        parts = [(state.tensors[module], state.scales[module] * strength) for state, strength in states
                 if module in state.tensors]
        tensors[module] = {"lora_A": torch.cat([own["lora_A"].float() for own, _ in parts]),
                           "lora_B": torch.cat([own["lora_B"].float() * factor for own, factor in parts], dim=1)}
    return AdapterState(tensors, dict.fromkeys(tensors, 1.0))


def inner_rank(leaves: Mapping[str, torch.Tensor]) -> int | None:
    """One module's inner width; None where both factors of a LoKr are whole."""
    narrow = next((leaves[leaf] for leaf in ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if leaf in leaves), None)
    return None if narrow is None else narrow.shape[0]


def set_strength(transformer: torch.nn.Module, strength: float) -> None:
    """Multiply the adapter's delta; at 0 the transformer computes bitwise as the frozen base."""
    for _, layer in _adapted_layers(transformer):
        layer.enable_adapters(strength != 0)
        layer.set_scale(ADAPTER, strength)


@contextlib.contextmanager
def switched_off(transformer: torch.nn.Module) -> Iterator[None]:
    """Within the block the transformer computes as the frozen base, and after it as before.

    PEFT's `enable_adapters` would also take requires_grad from the parameters, on which DDP and ZeRO have hooks.
    """
    before = [(layer, layer._disable_adapters) for _, layer in _adapted_layers(transformer)]
    for layer, _ in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in before:
            layer._disable_adapters = was_off
