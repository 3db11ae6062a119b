"""Any published container of Wan weights, read one tensor at a time; and filling a module from it, strictly.

A container is a safetensors file, a pickle (.pth, read with weights_only=True), a GGUF file, or a folder of shards
(diffusers and official folders alike). Names come out bare, quantised weights as what they stand for:
weight * scale in float32, then cast. Layouts and who writes them: docs/facts.md, "Containers".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from wantrain.models.names import Rename, UnknownName
from wantrain.models.weight_files import OPENERS, ContainerError, Entry, Kind, kind_of, parse_json

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_HIDDEN_SUFFIXES = (*_SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
_HIDDEN_NAMES = ("scaled_fp8", "spiece_model")
_UNREADABLE_SUFFIXES = {".weight_scale_2": "nvfp4", ".pre_quant_scale": "awq_w4a16"}
_QUANT_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise",
                  "int8_tensorwise")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(slots=True)
class Container:
    """The tensors of one model, by bare name.

    `metadata` are the file's own text fields, `config` the folder's config.json where there is one. Helper tensors
    of quantisation and an embedded tokenizer do not count as tensors.
    """

    path: Path
    kind: Kind
    metadata: dict[str, str]
    config: dict[str, Any] | None
    prefix: str
    _entries: dict[str, Entry] = field(repr=False)
    _scales: dict[str, str] = field(repr=False)

    def names(self) -> list[str]:
        """Bare names, in the order of the file."""
        return [name for name in self._entries if not name.endswith(_HIDDEN_SUFFIXES) and name not in _HIDDEN_NAMES]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every tensor, without reading any."""
        return {name: self._entries[name].shape for name in self.names()}

    def dtype_of(self, name: str) -> str:
        """How a tensor is stored: a torch dtype or GGUF type, `+ scale` where a scale belongs to it."""
        return self._entries[name].storage + (" + scale" if name in self._scales else "")

    def read(self, name: str, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, dequantised, in memory of its own.

        `dtype` None keeps the stored dtype, and gives float32 for a quantised tensor. Raises ContainerError for an
        unreadable tensor, a scale that is missing, not finite or of a shape that does not fit.
        """
        tensor = self._entries[name].load()
        if name in self._scales:
            scale = self._entries[self._scales[name]].load()
            if not scale.is_floating_point():
                raise ContainerError(self.path, f"the scale of {name} is stored as {scale.dtype}", "a block format "
                                     "such as mxfp8, without the note that says so", "use the fp16, bf16 or "
                                     "tensor-scaled fp8 file of the same model")
            tensor = self._scaled(name, tensor.to(device, torch.float32), scale.to(device, torch.float32))
        elif tensor.dtype == torch.int8 or (tensor.dtype in _FP8 and tensor.ndim > 1 and self._has_lost_scale(tensor)):
            raise ContainerError(self.path, f"{name} is {tensor.dtype} without a scale, while weights of this kind "
                                 "have one", "the scale was dropped when the file was repackaged")
        return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)

    def _has_lost_scale(self, fp8: torch.Tensor) -> bool:
        """Whether an fp8 weight without a scale had one: others have, the file says so, or it fills its whole range,
        which no trained weight does unscaled.
        """
        return (bool(self._scales) or "scaled_fp8" in self._entries
                or float(fp8.float().abs().nan_to_num().max()) > torch.finfo(fp8.dtype).max / 4)

    def spiece_model(self) -> bytes | None:
        """The SentencePiece tokenizer that ComfyUI's text encoder files carry, if this one does."""
        if "spiece_model" not in self._entries:
            return None
        return _bytes(self.path, "spiece_model", self._entries["spiece_model"])

    def _scaled(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(scale).all():
            raise ContainerError(self.path, f"the scale of {name} is not finite", "the quantisation overflowed or the "
                                 "file is damaged")
        try:
            expanded = expand_scale(scale, weight.shape)
        except ValueError as error:
            raise ContainerError(self.path, f"{name}: {error}", "a quantisation layout that wantrain does not know",
                                 "use an fp16, bf16 or tensor-scaled fp8 file") from error
        if (scale < 0).any() or ((scale == 0).any() and ((expanded == 0) & (weight != 0)).any()):
            raise ContainerError(self.path, f"the scale of {name} is {float(scale.min()):g}", "the scales were lost "
                                 "when the file was repackaged, or underflowed in float16")
        return weight * expanded


def expand_scale(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A scale as something that multiplies a weight [out, in, ...].

    Accepts one number; [out] or [out, 1], one a row; [out, blocks, 1] or [out, blocks], one a run of in/blocks
    columns; [p, q], one a block of out/p rows and in/q columns. Raises ValueError for any other shape.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    out, *rest = shape
    if scale.ndim == 3 and scale.shape[2] == 1:
        scale = scale[..., 0]
    if scale.numel() == out and scale.shape[0] == out:
        return scale.reshape(out, *(1 for _ in rest))
    if scale.ndim == 2 and len(rest) == 1 and out % scale.shape[0] == 0 and rest[0] % scale.shape[1] == 0:
        p, q = scale.shape
        return scale.repeat_interleave(out // p, 0).repeat_interleave(rest[0] // q, 1)
    raise ValueError(f"a scale of shape {list(scale.shape)} does not fit a weight of shape {list(shape)}")


def open_container(path: Path | str) -> Container:
    """Open a weight file, or a folder that holds one model's weight files. Reads headers and quantisation notes only.

    Raises ContainerError for anything that is not a readable weight container.
    """
    raw = open_raw(path)
    _refuse_unreadable(raw)
    raw.prefix, raw._entries = _bare(raw.path, raw._entries)
    raw._scales = {name.removesuffix(suffix) + ".weight": name
                   for suffix in _SCALE_SUFFIXES for name in raw._entries if name.endswith(suffix)}
    return raw


def open_raw(path: Path | str) -> Container:
    """The same, with names and tensors as they stand in the file: no prefix taken off, nothing dequantised."""
    path = Path(path).expanduser()
    files = _weight_files(path) if path.is_dir() else [path]
    kind = kind_of(files[0])
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if kind_of(file) != kind:
            raise ContainerError(file, f"is {kind_of(file)}, its neighbours are {kind}", "two downloads in one folder")
        found, more = OPENERS[kind](file)
        if twice := sorted(entries.keys() & found.keys()):
            raise ContainerError(file, f"repeats {twice[0]} and {len(twice) - 1} more of another shard",
                                 "two versions of the model in one folder")
        entries |= found
        metadata |= more
    config = path / "config.json"
    return Container(path, kind, metadata, _read_json(config) if config.is_file() else None, "", entries, {})


def _bare(path: Path, entries: dict[str, Entry]) -> tuple[str, dict[str, Entry]]:
    """Strip a prefix that the model's tensors share; refuse a checkpoint that holds several models."""
    named = [name for name in entries if name not in _HIDDEN_NAMES]
    for prefix in PREFIXES:
        other = [name for name in named if not name.startswith(prefix)]
        if not other:
            return prefix, {name.removeprefix(prefix): entry for name, entry in entries.items()}
        if len(other) < len(named):
            raise ContainerError(path, f"has tensors under {prefix}* and others, e.g. {other[0]}", "an all-in-one "
                                 "checkpoint", "use the separate transformer, VAE and text encoder files")
    return "", entries


def _bytes(path: Path, name: str, entry: Entry) -> bytes:
    """The text that a tensor of bytes holds."""
    if entry.storage not in ("uint8", "int8", "I8"):
        raise ContainerError(path, f"{name} is stored as {entry.storage} and not as bytes", "a file cast as a whole")
    return bytes(entry.load().contiguous().view(torch.uint8).numpy())


def _refuse_unreadable(raw: Container) -> None:
    """Refuse quantisation formats whose weights are not weight * scale."""
    path, entries, metadata = raw.path, raw._entries, raw.metadata
    formats = {name: kind for name in entries for suffix, kind in _UNREADABLE_SUFFIXES.items() if name.endswith(suffix)}
    for name, entry in entries.items():
        if name.endswith(".comfy_quant"):
            formats[name] = str(parse_json(path, name, _bytes(path, name, entry)).get("format"))
    if "_quantization_metadata" in metadata:
        stated = parse_json(path, "_quantization_metadata", metadata["_quantization_metadata"].encode())
        layers = stated.get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise ContainerError(path, "_quantization_metadata has no layers with a format each", "damaged metadata")
        formats |= {name: str(layer.get("format")) for name, layer in layers.items()}
    for name, kind in formats.items():
        if kind not in _QUANT_FORMATS:
            raise ContainerError(path, f"{name} says the quantisation format {kind}, wantrain reads "
                                 f"{', '.join(_QUANT_FORMATS)}", "a file made for inference only",
                                 "use the fp16, bf16 or fp8 file of the same model")


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(path, path.name, path.read_bytes())


def _weight_files(folder: Path) -> list[Path]:
    """The files of the one model in a folder: named by its index, a single file, or a whole set of shards."""
    indices = [path for path in sorted(folder.glob("*.index.json")) if path.is_file()]
    if len(indices) > 1:
        raise ContainerError(folder, f"has {len(indices)} indices: {', '.join(p.name for p in indices)}",
                             "two precisions in one folder", "keep one of them, or point at a file")
    if indices:
        weight_map = _read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ContainerError(indices[0], "has no weight_map", "not an index of shards")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    else:
        files = next((found for suffixes in (("safetensors",), ("pth", "pt", "bin"), ("gguf",))
                      if (found := sorted(p for s in suffixes for p in folder.glob(f"*.{s}")))), [])
        _check_shards(folder, files)
    if not files:
        raise ContainerError(folder, "holds no weights (.safetensors, .pth, .gguf)", "an interrupted download, or the "
                             "folder above or below the right one", f"look at it: ls -R {folder}")
    if absent := [p.name for p in files if not p.is_file()]:
        raise ContainerError(folder, f"lacks {len(absent)} of {len(files)} shards: {', '.join(absent[:3])}",
                             "an interrupted download")
    return files


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Without an index, several files are one model only if they are all of NAME-i-of-n."""
    if len(files) < 2:
        return
    found = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", p.name) for p in files]
    stems = {m and (m[1], int(m[3])) for m in found}
    if None in stems or len(stems) > 1:
        raise ContainerError(folder, f"holds several models: {', '.join(p.name for p in files[:4])}",
                             "files of different parts in one folder", "point at one of the files")
    total = next(int(m[3]) for m in found if m)
    if absent := sorted(set(range(1, total + 1)) - {int(m[2]) for m in found if m}):
        raise ContainerError(folder, f"lacks shards {absent[:5]} of {total}", "an interrupted download")


_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("high", ("high_noise_model", "transformer")),
    ("low", ("low_noise_model", "transformer_2")),
    ("vae", ("vae", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "Wan2.1_VAE.safetensors", "Wan2.2_VAE.safetensors")),
    ("text_encoder", ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors")),
    ("image_encoder", ("image_encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
                       "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors")),
    ("tokenizer", ("tokenizer", "google/umt5-xxl")),
)


def find_parts(folder: Path) -> dict[str, Path]:
    """The parts of a whole checkpoint folder, diffusers or official, each openable with `open_container`.

    Keys: `transformer`, or `high` and `low`; `vae`, `text_encoder`, `image_encoder`, `tokenizer`, where they exist.
    Raises ContainerError when the folder has no transformer.
    """
    parts = {part: folder / name for part, names in _PARTS for name in reversed(names) if (folder / name).exists()}
    if "low" not in parts and "high" in parts:
        parts["transformer"] = parts.pop("high")
    if not {"high", "low", "transformer"} & parts.keys():
        if not list(folder.glob("diffusion_pytorch_model*")):
            raise ContainerError(folder, "holds no Wan transformer (transformer/, high_noise_model/ or "
                                 "diffusion_pytorch_model*)", "the folder above or below the right one",
                                 f"look at it: ls -R {folder}")
        parts["transformer"] = folder
    return parts


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


def load_into(module: torch.nn.Module, container: Container, rename: Rename, *, dtype: torch.dtype,
              device: torch.device | str = "cpu", keep_float32: Collection[str] = (),
              edit: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
              placed: Callable[[torch.nn.Parameter], None] | None = None) -> None:
    """Fill a module whose parameters are on the meta device, tensor by tensor.

    `rename` gives the module's names for a file's name (wantrain.models.names). `edit` may change a tensor, given by
    the file's name as it is stored, before it is cast. `placed` gets each parameter as soon as the module has it, e.g.
    to keep only a part of it: no more than one tensor is whole then. Tensors with a name part in `keep_float32`
    (diffusers' `_keep_in_fp32_modules`) become float32, the others `dtype`. Leading axes of length 1 do not count in a
    shape. Raises ContainerError, before reading anything, when a tensor is missing, unexpected, given twice or of
    another shape; and when anything would stay on meta.
    """
    targets = module.state_dict(keep_vars=True)
    groups = _tied(targets)
    plan = _plan(container, rename, {name: tuple(t.shape) for name, t in targets.items()}, groups)
    for source, names in plan.items():
        whole = container.read(source, device=device)
        whole = edit(source, whole) if edit else whole
        for name, piece in zip(names, whole.chunk(len(names)), strict=True):
            kept = any(part in keep_float32 for part in name.split("."))
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
        if leaf in dict(owning.named_parameters(recurse=False)):
            owning.register_parameter(leaf, parameter)
            assigned = parameter
        else:
            owning.register_buffer(leaf, tensor)
    return assigned


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
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


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
