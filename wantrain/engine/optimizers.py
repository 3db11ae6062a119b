"""The optimizers: what each needs, where it works, and what of it a checkpoint must hold.

All keep the parameters' float32 values where the model has them. Param groups carry a `factor` on the learning rate.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from wantrain.engine import is_fsdp, offloads_optimizer, zero_stage
from wantrain.engine.ema import Ema
from wantrain.engine.states import fill, parameters_of, states, whole
from wantrain.terms import UserError


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """One optimizer: its package, the ZeRO stages that it works under and what else it does not survive there."""

    package: str | None
    """What `pip install` takes and `import` too; None for torch's own."""
    scalars: tuple[str, ...] = ()
    """Numbers of a param group that the next step depends on."""
    counter: Callable[[int], Any] | None = float
    """How a parameter's state holds the number of its updates, None where it holds none."""
    zero_stages: tuple[int, ...] = ()
    """The DeepSpeed ZeRO stages under which it computes and resumes as it does without."""
    refused: str = ""
    """Why not under the other stages."""
    averages: bool = False
    """Whether it trains at one point and gives another as its result: the average of what it has found (`averaged`)."""


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(None, counter=lambda updates: torch.tensor(float(updates)), zero_stages=(1, 2, 3)),
    "adamw_8bit": OptimizerKind("bitsandbytes", counter=int, refused="its blocks of 256 would straddle tensors in "
                                "ZeRO's flat partitions, and no checkpoint by name could hold them"),
    "prodigy": OptimizerKind("prodigyopt", ("k", "d", "d_max", "d_numerator"), int,
                             refused="each process would find another learning rate, from its own part of the weights"),
    "schedule_free": OptimizerKind("schedulefree", ("k", "weight_sum", "lr_max"), None, (1, 2),
                                   "ZeRO-3 steps it once for each sub-group, and it would count each as a step",
                                   averages=True),
}
"""adamw: Loshchilov & Hutter 2019; adamw_8bit: Dettmers et al. 2022; prodigy: Mishchenko & Defazio 2024; schedule_free:
Defazio et al. 2024."""


def check(accelerator: Accelerator, name: str) -> None:
    """Refuse an optimizer whose package is absent, or that does not work under the engine that launched us."""
    refuse_under_zero(name, zero_stage(accelerator), offloads_optimizer(accelerator))
    if is_fsdp(accelerator) and name != "adamw":
        raise UserError(f"optim.name = {name} does not work under FSDP2, whose sharded tensors it does not know. "
                        "Allowed: adamw", "launch with launch/ddp.yaml, or set optim.name=adamw")
    package = OPTIMIZERS[name].package
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"optim.name = {name} needs the package {package}: {error}",
                            f'pip install "wantrain[{name}]"    (or: pip install {package})') from error


def refuse_under_zero(name: str, stage: int, offloads: bool) -> None:
    """Raise UserError where `name` does not work under this ZeRO stage (0: no DeepSpeed)."""
    kind = OPTIMIZERS[name]
    if stage and stage not in kind.zero_stages:
        raise UserError(f"optim.name = {name} does not work under DeepSpeed ZeRO-{stage}: {kind.refused}. Allowed: "
                        f"{', '.join(n for n, other in OPTIMIZERS.items() if stage in other.zero_stages)}",
                        "launch with launch/ddp.yaml, or set optim.name=adamw")
    if offloads and name != "adamw":
        raise UserError(f"optim.name = {name}: DeepSpeed's optimizer offload would put its own Adam in its place. "
                        "Allowed: adamw", "take offload_optimizer out of the launch file, or set optim.name=adamw")


def groups(parameters: Mapping[str, torch.nn.Parameter], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Param groups by factor on the learning rate, in the order in which the factors first occur."""
    by_factor: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_factor.setdefault(factors[name], []).append(parameter)
    return [{"params": own, "factor": factor} for factor, own in by_factor.items()]


def make(name: str, groups: Sequence[Mapping[str, Any]], *, lr: float, betas: Sequence[float], eps: float,
         weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer `name` over param groups of `groups`; `check` has been called."""
    own = [dict(group) for group in groups]
    common: dict[str, Any] = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(own, **common)
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(own, **common)
    if name == "prodigy":
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
            # Its authors' advice for diffusion models; without the safeguard a warm-up makes it overestimate.
            return Prodigy(own, **common, use_bias_correction=True, safeguard_warmup=True)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(own, **common)
    optimizer.train()  # for good: `at_average` moves the model, never the optimizer's own state
    return optimizer


def numbers(optimizer: Any, name: str) -> dict[str, float]:
    """The optimizer's own numbers for the metrics: Prodigy's estimate, by which it multiplies the learning rate."""
    return {"prodigy_d": float(optimizer.param_groups[0]["d"])} if name == "prodigy" else {}


def average(value: torch.Tensor, z: torch.Tensor, beta: float) -> torch.Tensor:
    """Solve y = (1 - beta) z + beta x for x, schedule-free's average. `value` is y, the values that it trains at."""
    return value.lerp(z, 1 - 1 / beta)


def beta_of(optimizer: Any) -> float:
    """Schedule-free's beta, the first of optim.betas."""
    return float(optimizer.param_groups[0]["betas"][0])


def averaged(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Whole averaged values by name, none before the first step. Every process must call it."""
    beta = beta_of(optimizer)
    return {name: average(value, tensors["z"], beta) for name, value, tensors in states(accelerator, model, optimizer)
            if tensors}


@contextlib.contextmanager
def at_average(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, kind: OptimizerKind, ema: Ema | None
               ) -> Iterator[None]:
    """In the block, the model holds what a checkpoint gives as the adapter; after it, the values that it trains at.

    They differ where an average is kept, `ema` or that of schedule-free. Going there and back by the latter's formula
    would round each time, and validation would move the training; so the model gets its own bits back. Every process
    must call it.
    """
    if ema is None and not kind.averages:
        yield
        return
    parameters = parameters_of(accelerator, model)
    with whole(accelerator, parameters) as values:
        before = {name: value.clone() for name, value in values.items()}
    fill(accelerator, parameters, averaged(accelerator, model, optimizer) if ema is None else ema.tensors)
    try:
        yield
    finally:
        fill(accelerator, parameters, before)
