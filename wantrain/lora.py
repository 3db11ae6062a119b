"""LoRA adapters through PEFT: inject, the trainable set, state, merge. Hu et al. 2021: W' = W + alpha/rank * B A."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from wantrain.terms import UserError

ADAPTER = "default"

TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "attn": (r"(vace_)?blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)",),
    "attn_ffn": (
        r"(vace_)?blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)",
        r"(vace_)?blocks\.\d+\.ffn\.(net\.0\.proj|net\.2)",
    ),
    "all_linear": (r".*",),
}
"""Names of target sets, each a list of regular expressions over diffusers module names (full match)."""


@dataclass(slots=True)
class AdapterState:
    """The trained weights of one adapter: per module (diffusers name) A [rank, in] and B [out, rank], float32."""

    rank: int
    alpha: float
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(module name, alpha/rank * B @ A [out, in]) of every module."""
        for name, (a, b) in self.pairs.items():
            yield name, (self.alpha / self.rank) * (b.float() @ a.float())


def match_targets(transformer: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the Linear modules that the presets or regular expressions match, in the model's order.

    Raises UserError when any pattern matches nothing: a typo must not train something else.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    matched: set[str] = set()
    for target in targets:
        patterns = TARGET_PRESETS.get(target, (target,))
        try:
            found = {name for name in linears if any(re.fullmatch(p, name) for p in patterns)}
        except re.error as error:
            raise UserError(f"lora.targets: {target!r} is not a regular expression: {error}", "mend the pattern"
                            ) from error
        if not found:
            raise UserError(
                f"lora.targets: {target!r} matches no Linear of this transformer. Allowed: a preset "
                f"({', '.join(TARGET_PRESETS)}) or a regular expression over names such as {', '.join(linears[:3])}",
                "set lora.targets to a preset, e.g. lora.targets=[attn_ffn]",
            )
        matched |= found
    return [name for name in linears if name in matched]


def inject(transformer: torch.nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int) -> list[str]:
    """Freeze `transformer`, add a LoRA (float32, A random from `seed`, B zero) to the targets; returns their names.

    Works on the meta device too. Raises UserError when a target matches nothing.
    """
    names = match_targets(transformer, targets)
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
    for parameter in trainable(transformer).values():
        parameter.data = parameter.data.float()
    check_trainable(transformer, names)
    return names


def trainable(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters with a gradient, by name."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def check_trainable(transformer: torch.nn.Module, names: Sequence[str]) -> None:
    """Refuse unless exactly lora_A and lora_B of `names` are trainable."""
    wanted = {f"{name}.lora_{x}.{ADAPTER}.weight" for name in names for x in "AB"}
    found = set(trainable(transformer))
    assert found == wanted, f"trainable set is wrong: missing {sorted(wanted - found)}, extra {sorted(found - wanted)}"


def adapter_state(parameters: Mapping[str, torch.Tensor], rank: int, alpha: float) -> AdapterState:
    """The state from named trainable tensors (whole, as `trainable` or the engine's gather gives them)."""
    suffix_a, suffix_b = (f".lora_{x}.{ADAPTER}.weight" for x in "AB")
    pairs = {}
    for name, a in parameters.items():
        if name.endswith(suffix_a):
            module = name.removesuffix(suffix_a)
            pairs[module] = (a.detach().cpu().float().clone(),
                             parameters[module + suffix_b].detach().cpu().float().clone())
    assert 2 * len(pairs) == len(parameters), "a trainable tensor is neither lora_A nor lora_B"
    return AdapterState(rank, alpha, pairs)


def named_tensors(state: AdapterState) -> dict[str, torch.Tensor]:
    """The inverse of `adapter_state`: tensors under the names that the adapted transformer gives its parameters."""
    return {f"{module}.lora_{x}.{ADAPTER}.weight": tensor
            for module, pair in state.pairs.items() for x, tensor in zip("AB", pair, strict=True)}


def load_adapter(transformer: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy named tensors into the injected adapter; the names must be exactly the trainable ones."""
    own = trainable(transformer)
    if set(own) != set(parameters):
        missing, extra = sorted(set(own) - set(parameters)), sorted(set(parameters) - set(own))
        raise UserError(f"the adapter does not fit this model: missing {missing[:3]}, unexpected {extra[:3]}",
                        "use the model, lora.rank and lora.targets that the adapter was trained with")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != parameters[name].shape:
                raise UserError(f"{name}: {tuple(parameters[name].shape)} does not fit {tuple(parameter.shape)}",
                                "use the lora.rank that the adapter was trained with")
            parameter.copy_(parameters[name])


def start_from(transformer: torch.nn.Module, rank: int, alpha: float,
               pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    """Give the injected adapter the deltas of another LoRA: per module (diffusers name) A, B and alpha/rank.

    A smaller rank fills the first rows and leaves the rest at their start, so the delta is the same and can grow.
    Raises UserError for modules that are no targets and for ranks above ours.
    """
    own = trainable(transformer)
    with torch.no_grad():
        for name, (a, b, scale) in pairs.items():
            key = f"{name}.lora_{{}}.{ADAPTER}.weight"
            if key.format("A") not in own:
                raise UserError(f"lora.start_from adapts {name}, which lora.targets does not match",
                                "widen lora.targets, e.g. lora.targets=[all_linear]")
            if a.shape[0] > rank:
                raise UserError(f"lora.start_from has rank {a.shape[0]} on {name}, above lora.rank = {rank}",
                                f"set lora.rank={a.shape[0]} and lora.alpha={a.shape[0]}")
            own[key.format("A")][: a.shape[0]] = a.float()
            own[key.format("B")][:, : a.shape[0]] = b.float() * (scale * rank / alpha)


def _layers(transformer: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def switched_off(transformer: torch.nn.Module) -> Iterator[None]:
    """Within the block the transformer computes as the frozen base does."""
    for layer in _layers(transformer):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in _layers(transformer):
            layer.enable_adapters(True)


def merge(transformer: torch.nn.Module) -> None:
    """Fold the adapter into the base weights, in place."""
    for layer in _layers(transformer):
        layer.merge()
