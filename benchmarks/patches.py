"""What benchmarks.recipes changes of wantrain's own code: three ways of training that wantrain has no setting for, and
what its trainings leave out. Each is a context manager; no other code is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from wantrain import flow, objective
from wantrain.data import batches
from wantrain.density import Density
from wantrain.recipe import heldout, judgement, run
from wantrain.recipe.training import Training
from wantrain.terms import Batch

KEPT = 0.5
"""Of a sample's tokens, the share that goes through the blocks."""
PATCH = 2
"""Latent places that a token covers, each way."""

Losses = Callable[[Training, Batch], torch.Tensor]


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Trainings measure held-out clips alone, and neither those they are trained on nor what no table here says."""
    measured = heldout.measured

    def alone(training: Training, sets: Any, rows: heldout.Rows, with_adapter: bool = True) -> heldout.Losses:
        return measured(training, sets, {name: own for name, own in rows.items() if name == heldout.HELDOUT},
                        with_adapter)

    with (mock.patch.object(heldout, "measured", alone), mock.patch.object(judgement, "write", return_value=None),
          mock.patch.object(run, "write_densities")):
        yield


@contextlib.contextmanager
def independent() -> Iterator[None]:
    """Each sample's sigma is drawn by itself, and not one from each of the batch's equal shares of the density."""
    def draw(seed: int, step: int, index_B: Sequence[int], global_batch_size: int, density: Density) -> torch.Tensor:
        drawn = torch.rand(global_batch_size, generator=flow.generator_for(seed, step, "sigma"), dtype=torch.float64)
        return flow.sigma_at(drawn, density)[list(index_B)]

    with mock.patch.object(batches, "draw_sigma", draw):
        yield


@contextlib.contextmanager
def thinned() -> Iterator[None]:
    """Trainings compute, and learn from, a random half of each step's tokens, at their own places of the whole."""
    losses = Training.losses

    def of_some(self: Training, batch: Batch) -> torch.Tensor:
        shape = batch.latents_BCTHW.shape[2:]
        kept = kept_tokens(batch)
        weight = torch.zeros(shape.numel() // PATCH**2)
        weight[kept] = 1
        weight = weight.view(shape[0], shape[1] // PATCH, shape[2] // PATCH)
        weight = weight.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        with weighted(weight.expand(len(batch.planned_B), 1, -1, -1, -1)), \
                only(self.accelerator.unwrap_model(self.model), kept):
            return losses(self, batch)

    with mock.patch.object(Training, "losses", of_some):
        yield


def kept_tokens(batch: Batch) -> torch.Tensor:
    """The places of the tokens that are computed in this step, in order; a function of the batch's draws."""
    num_tokens = batch.latents_BCTHW.shape[2:].numel() // PATCH**2
    generator = flow.generator_for("thinning", *map(str, batch.sigma_B.tolist()))
    return torch.randperm(num_tokens, generator=generator)[: round(KEPT * num_tokens)].sort().values


@contextlib.contextmanager
def only(transformer: Any, kept: torch.Tensor) -> Iterator[None]:
    """In the block, the transformer's blocks see these tokens; the others go past them unchanged."""
    whole: dict[str, Any] = {}

    def before(block: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, text, temb, rotary = args
        if block is transformer.blocks[0]:
            whole.update(x=x, rotary=tuple(part[:, kept] for part in rotary))
            x = x[:, kept]
        return x, text, temb, whole["rotary"]

    def after(block: torch.nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = whole["x"]
        return x.index_copy(1, kept, result.to(x.dtype))

    hooks = [block.register_forward_pre_hook(before) for block in transformer.blocks]
    hooks.append(transformer.blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def moving() -> Iterator[None]:
    """The loss of a latent place counts 1, and 1 more times how much it changes over time, over the clip's mean."""
    losses = Training.losses

    def by_motion(self: Training, batch: Batch) -> torch.Tensor:
        with weighted(motion_weight(batch.latents_BCTHW)):
            return losses(self, batch)

    with mock.patch.object(Training, "losses", by_motion):
        yield


def motion_weight(latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, H, W]: 1 + change / the mean change of the clip. A latent frame's change is the larger of those to its
    neighbours.
    """
    change = latents_BCTHW.diff(dim=2).abs().mean(1, keepdim=True)
    nothing = torch.zeros_like(change[:, :, :1])
    change = torch.maximum(torch.cat([nothing, change], 2), torch.cat([change, nothing], 2))
    return 1 + change / change.mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)


@contextlib.contextmanager
def weighted(weight_B1THW: torch.Tensor) -> Iterator[None]:
    """In the block, these are the weights of latent places in every loss."""
    with mock.patch.object(objective, "place_weight", return_value=weight_B1THW):
        yield


PATCHES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext, "independent": independent, "thinned": thinned, "moving": moving}
