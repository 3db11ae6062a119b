"""Weights into a module: built empty, filled strictly from a container, and why a file does not fit; the room left."""

from __future__ import annotations

import contextlib
import gc
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from diffusers.utils import logging as diffusers_logging
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import logging as transformers_logging

from wantrain.models.containers import Container
from wantrain.models.names import Rename, UnknownName
from wantrain.models.quantised import FILED, QuantisedLinear
from wantrain.models.weight_files import ContainerError

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and their buffers as real as ever.

    Building under torch.device("meta") would lose the buffers that no file holds (rotary tables, position ids).
    """
    def to_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None
                ) -> torch.nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied parameter must stay the same object
            return parameter
        return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    # torch types the hook as returning None, and documents that what it returns replaces the parameter.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


ROOM = 0.95
"""Share of a device's memory that tensors can fill: blocks of other sizes leave gaps."""


def free_bytes(device: torch.device, gib: float | None = None) -> float:
    """What the device can still take: of `gib` GiB where that is given, else of all it has. A CPU has no end; there
    `gib` is for the work alone.
    """
    if device.type != "cuda":
        return math.inf if gib is None else gib * 2**30
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    left = ROOM * (free + torch.cuda.memory_reserved(device) - held)  # what the allocator holds unused can be had
    return left if gib is None else min(left, ROOM * gib * 2**30 - held)


def let_go() -> None:
    """Free what nobody refers to any more: models are knots of references, which only the collector takes apart."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_into(module: torch.nn.Module, container: Container, rename: Rename, *, dtype: torch.dtype,
              device: torch.device | str = "cpu", keep_float32: Collection[str] = (),
              edit: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
              placed: Callable[[torch.nn.Parameter], None] | None = None) -> None:
    """Fill a module whose parameters are on the meta device, tensor by tensor.

    `rename` gives the module's names for a file's name (wantrain.models.names). `edit` may change a tensor, given by
    the file's name as it is stored, before it is cast. `placed` gets each parameter as soon as the module has it, e.g.
    to keep only a part of it: no more than one tensor is whole then. Tensors with a name part in `keep_float32`
    (diffusers' `_keep_in_fp32_modules`) become float32, the others `dtype`; a QuantisedLinear stores its weight in its
    own form, or takes what the file holds where that is in this form already and `edit` is not given. Axes of length 1
    do not count in a shape. Raises ContainerError, before reading anything, when a tensor is missing, unexpected, given
    twice or of another shape; and when anything would stay on meta.
    """
    targets = module.state_dict(keep_vars=True)
    groups = _tied(targets)
    plan = _plan(container, rename, {name: tuple(t.shape) for name, t in targets.items()}, groups)
    for source, names in plan.items():
        layer = None if edit or len(names) > 1 else _quantised(module, names[0])
        if layer and (found := container.stored(source, FILED.get(layer.form, ()), device)):
            stored = layer.keep(*found)
            if placed:
                placed(stored)
            continue
        whole = container.read(source, device=device)
        whole = edit(source, whole) if edit else whole
        for name, piece in zip(names, whole.chunk(len(names)), strict=True):
            kept = any(part in keep_float32 for part in name.split(".")) or _quantised(module, name) is not None
            tensor = piece.reshape(targets[name].shape).to(torch.float32 if kept else dtype, copy=len(names) > 1)
            parameter = _assign(module, groups[name], tensor)
            if placed and parameter is not None:
                placed(parameter)
        del whole, piece, tensor
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise ContainerError(container.path, f"no file holds {left[:3]} of {type(module).__name__}",
                             "the module was not built under empty_weights()", "build it under empty_weights()")


def _tied(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """For each name, all names of the same tensor (umT5 ties encoder.embed_tokens to shared)."""
    same: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        same.setdefault(id(tensor), []).append(name)
    return {name: same[id(tensor)] for name, tensor in tensors.items()}


def _assign(module: torch.nn.Module, names: Iterable[str], tensor: torch.Tensor) -> torch.nn.Parameter | None:
    """Give the tensor to the module; returns its parameter, None for a buffer."""
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assigned = None
    for name in names:
        owner, _, leaf = name.rpartition(".")
        owning = module.get_submodule(owner)
        if layer := _quantised(module, name):
            assigned = layer.store(tensor)
        elif leaf in dict(owning.named_parameters(recurse=False)):
            owning.register_parameter(leaf, parameter)
            assigned = parameter
        else:
            owning.register_buffer(leaf, tensor)
    return assigned


def _quantised(module: torch.nn.Module, name: str) -> QuantisedLinear | None:
    """The layer that stores the weight of this name in a form of its own, if one does."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    return layer if leaf == "weight" and isinstance(layer, QuantisedLinear) else None


def _plan(container: Container, rename: Rename, targets: Mapping[str, tuple[int, ...]],
          groups: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Which names of the module each of the file's tensors fills; every fault found is reported at once."""
    shapes = container.shapes()
    plan: dict[str, tuple[str, ...]] = {}
    filled: dict[str, str] = {}
    unexpected: list[str] = []
    faults: list[str] = []
    for source, shape in shapes.items():
        try:
            names = rename(source)
        except UnknownName:
            names = (source,)
        if any(name not in targets for name in names):
            unexpected.append(source)
            continue
        for name in names:
            share = (shape[0] // len(names), *shape[1:]) if len(names) > 1 else shape
            if _significant(share) != _significant(targets[name]):
                faults.append(f"{source} has shape {list(shape)}, the model's {name} {list(targets[name])}")
            if name in filled:
                faults.append(f"{source} and {filled[name]} are both {name}")
            filled |= dict.fromkeys(groups[name], source)
        if names:
            plan[source] = names
    missing = [name for name in targets if name not in filled]
    if missing or unexpected or faults:
        raise ContainerError(container.path, _misfit(missing, unexpected, faults),
                             _cause(missing, unexpected, faults, len(targets)),
                             "check model.variant and the path, or get the file again")
    return plan


def _significant(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _misfit(missing: Sequence[str], unexpected: Sequence[str], faults: Sequence[str]) -> str:
    lines = [f"{len(names)} tensors {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
             for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    return "does not fit the model; " + "; ".join([*lines, *faults[:3]])


def _cause(missing: Sequence[str], unexpected: Sequence[str], faults: Sequence[str], total: int) -> str:
    """The likeliest reason why a file does not fit, from what is missing and what is too much."""
    def any_with(names: Sequence[str], *marks: str) -> bool:
        return any(mark in name for name in names for mark in marks)

    missing_blocks = {m[1] for name in missing if (m := re.match(r"(?:encoder\.)?(\w*blocks?\.\d+)\.", name))}
    reasons = (
        (any_with(unexpected, "lora_", "lokr_", "hada_"), "this is a LoRA file, not a base checkpoint"),
        (len(missing) == total, "another part of the model, or a layout that wantrain does not know"),
        (any_with(missing, "image_embedder", "add_k_proj"), "the file is a T2V or A14B model, the variant expects "
         "image tokens"),
        (any_with(unexpected, "img_emb", "k_img", "image_embedder", "add_k_proj"), "the file is a 2.1 I2V model, the "
         "variant has no image tokens"),
        (any_with(unexpected, "vace_"), "the file is a VACE model, the variant is not"),
        (any_with(missing, "vace_"), "the variant is VACE, the file is not"),
        (bool(missing_blocks) and not unexpected, f"a shard is missing or the file was cut: it lacks "
         f"{', '.join(sorted(missing_blocks)[:3])}"),
        (any_with(unexpected, "blocks."), "the file is of a larger or newer variant"),
        (bool(faults) and not missing and not unexpected, "a variant of other sizes, or transposed tensors"),
    )
    return next((reason for holds, reason in reasons if holds), "a damaged file or another variant")
