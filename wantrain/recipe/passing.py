"""The transformers that a sample in training goes through: the one that trains, and others for as long as they work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import overload

import torch

from wantrain import engine, lora
from wantrain.engine import checkpoint, saved
from wantrain.engine.states import parameters_of, whole
from wantrain.lora import AdapterState
from wantrain.models import fit
from wantrain.models.base import Base
from wantrain.models.block import BlockMemory
from wantrain.models.loading import free_bytes, let_go
from wantrain.models.variants import Expert
from wantrain.recipe import folders
from wantrain.recipe.recipe import form_of
from wantrain.recipe.sampler import working_bytes
from wantrain.recipe.training import Training


class InTurn(Sequence[torch.nn.Module]):
    """Transformers of which one is there at a time: to ask for another lets it go."""

    def __init__(self, opened: Sequence[Callable[[], AbstractContextManager[torch.nn.Module]]]) -> None:
        self._opened, self._place, self._stack = opened, -1, ExitStack()
        self._there: torch.nn.Module | None = None

    def __len__(self) -> int:
        return len(self._opened)

    @overload
    def __getitem__(self, place: int) -> torch.nn.Module: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[torch.nn.Module]: ...

    def __getitem__(self, place: int | slice) -> torch.nn.Module | Sequence[torch.nn.Module]:
        assert isinstance(place, int), "one at a time"
        if self._there is None or place != self._place:
            self.close()
            self._place, self._there = place, self._stack.enter_context(self._opened[place]())
        return self._there

    def close(self) -> None:
        """Let go of the one that is there."""
        self._there = None
        self._stack.close()


def adapter_of(training: Training) -> AdapterState:
    """The adapter as it is now, whole; every process must call it."""
    unwrapped = training.accelerator.unwrap_model(training.model)
    with whole(training.accelerator, parameters_of(training.accelerator, training.model)) as values:
        return lora.adapter_state(values, lora.scales(unwrapped))


def finished_adapter(training: Training, expert: Expert | None) -> AdapterState | None:
    """What the newest checkpoint of the other expert holds, read by the first process; None where there is none."""
    found = None
    if training.accelerator.is_main_process:
        for path in reversed(folders.checkpoints_of(training.config, expert).on_disk()):
            with contextlib.suppress(saved.Damaged):
                _, tensors = checkpoint.load(path, None)
                found = lora.adapter_state(checkpoint.values(tensors), saved.record_of(path).scales)
                break
    return training.rendezvous.first(found)


@contextlib.contextmanager
def loaded(training: Training, base: Base, adapter: AdapterState | None) -> Iterator[torch.nn.Module]:
    """In the block, a transformer of its own with this adapter, as memory is saved in the training."""
    recipe, device, swap = training.recipe, training.device, training.memory.swap
    with aside(training):
        place = engine.loading_device(training.accelerator, through_host=swap > 0)
        transformer = base.transformer(recipe.dtype, place, form=form_of(training.memory.base))
        fit.fit(transformer, device, adapter or (), memory=BlockMemory(swap=swap))
        try:
            yield transformer
        finally:
            del transformer
            let_go()


@contextlib.contextmanager
def aside(training: Training) -> Iterator[None]:
    """In the block, the frozen weights of the training wait in host memory where the device has no room for as many
    again. Their bits are the same afterwards, and so is the memory that they take.
    """
    unwrapped = training.accelerator.unwrap_model(training.model)
    swapped = set(getattr(unwrapped, "_ddp_params_and_buffers_to_ignore", ()))  # those in the host's memory already
    tensors = [tensor for name, tensor in (*unwrapped.named_parameters(), *unwrapped.named_buffers())
               if not tensor.requires_grad and name not in swapped and tensor.device == training.device]
    needed = sum(tensor.nbytes for tensor in tensors) + working_bytes(training.recipe)
    if needed <= free_bytes(training.device, training.config.memory.gib):
        tensors = []
    for tensor in tensors:
        tensor.data = tensor.data.to("cpu")
    let_go()
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.to(training.device)
