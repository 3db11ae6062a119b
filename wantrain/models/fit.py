"""What changes a loaded transformer: one function, in one order.

1. Short text on the CPU: it replaces diffusers' attention processors, which the adapter and the sharing of tokens then
   find in place. 2. The adapter, over the frozen weights. 3. The kernel of attention. 4. What each block that holds the
adapter keeps for backward. 5. Sequence parallelism, whose hooks must be the outermost, and which needs the started
process group; it leaves the kernel to diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from wantrain import lora
from wantrain.lora import AdapterState, Spec
from wantrain.models import attention, block, compiled, sequence
from wantrain.models.block import BlockMemory
from wantrain.models.lora_formats import LoraFile
from wantrain.models.lora_names import instead_of_adapter
from wantrain.models.lora_updates import adapter_for, read_adapter
from wantrain.models.short_text import shorten_text
from wantrain.models.variants import Expert
from wantrain.terms import UserError


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter to train: without effect, or with that of the LoRA `start`."""

    targets: Sequence[str]
    spec: Spec
    seed: int
    start: LoraFile | None = None


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA file of any format at its own strength, which lora.set_strength multiplies; `expert` where its transformer
    is one's.
    """

    path: Path
    expert: Expert | None = None
    strength: float = 1.0


def fit(transformer: WanTransformer3DModel, device: torch.device,
        adapter: NewAdapter | AdapterState | Sequence[AdapterFile] = (), *, memory: BlockMemory | None = None,
        is_divided: bool = False, sequence_parallel: int = 1) -> list[str]:
    """Make a loaded transformer ready to be trained or sampled on `device`; the names of its adapted modules.

    A new adapter is trained. Its blocks, and those of others, save memory as `memory` says. `is_divided` says that the
    engine divides the weights of a block among processes. To be called once. Raises UserError where the adapter does
    not fit the transformer, or its file is damaged, of another variant or expert, or more than an adapter; and where
    blocks cannot keep so.
    """
    if device.type == "cpu" and not transformer.config.image_dim:
        shorten_text(transformer)
    if isinstance(adapter, NewAdapter):
        start = adapter_for(adapter.start, transformer) if adapter.start else None
        modules = lora.inject(transformer, adapter.targets, adapter.spec, adapter.seed)
        if start:
            lora.start_from(transformer, start)
        if sequence_parallel == 1:
            attention.choose(transformer, device)
        if not is_divided and block.can_train(transformer):
            block.train_blocks(transformer, memory or BlockMemory(), device, compiled.operations_for(device)[0])
        else:
            _checkpoint(transformer, memory or BlockMemory())
    else:
        modules = _attach(transformer, adapter)
        if block.can_train(transformer):  # whose forward pass saves what a LoRA costs; without one, for equal numbers
            block.train_blocks(transformer, memory or BlockMemory(), device)
    if sequence_parallel > 1:
        sequence.share_tokens(transformer, sequence_parallel)
    return modules


def exchange(transformer: WanTransformer3DModel, adapter: Sequence[AdapterFile]) -> None:
    """Give a transformer that is fitted for sampling these LoRA files in place of those that it has."""
    lora.detach(transformer)
    _attach(transformer, adapter)


def _checkpoint(transformer: WanTransformer3DModel, memory: BlockMemory) -> None:
    """diffusers' own blocks, where ours cannot be: an engine that divides weights gathers those of a module when that
    is called, and our backward pass does not call the parts of a block.
    """
    others = "Animate-2, adapters other than lora and rslora, and weights that ZeRO-3 or FSDP2 divides, are trained " \
        "through diffusers' blocks. Allowed there:"
    if memory.offload:
        raise UserError(f"memory.offload = true: {others} false", "set memory.offload=false")
    keeps = {memory.keep} if isinstance(memory.keep, str) else set(memory.keep)
    if keeps == {"inputs"}:
        transformer.enable_gradient_checkpointing()
    elif keeps != {"all"}:
        raise UserError(f"memory.keep = {', '.join(sorted(keeps))}: {others} all, inputs",
                        "set memory.keep=inputs, or memory.keep=all")


def _attach(transformer: torch.nn.Module, files: AdapterState | Sequence[AdapterFile]) -> list[str]:
    if isinstance(files, AdapterState):
        lora.attach(transformer, files)
        return list(files.tensors)
    if not files:
        return []
    states = [(read_adapter(file.path, transformer, file.expert), file.strength) for file in files]
    about, path = " and ".join(str(file.path) for file in files), files[0].path
    try:
        state = lora.joined(states)
        lora.attach(transformer, state)
    except UserError as error:
        raise UserError(f"{about}: {error.message}", instead_of_adapter(path)) from error
    return list(state.tensors)
