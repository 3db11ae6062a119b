"""Any published container of Wan weights, read one tensor at a time.

A container is a safetensors file, a pickle (.pth, read with weights_only=True), a GGUF file, or a folder of shards
(diffusers and official folders alike). Names come out bare, quantised weights as what they stand for:
weight * scale in float32, then cast. Layouts and who writes them: docs/facts.md, "Containers".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wantrain.models.weight_files import OPENERS, ContainerError, ContainerKind, Entry, kind_of, parse_json

if TYPE_CHECKING:  # only tensors themselves need it, not what is told of them
    import torch

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_HIDDEN_SUFFIXES = (*_SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
_HIDDEN_NAMES = ("scaled_fp8", "spiece_model")
_UNREADABLE_SUFFIXES = {".weight_scale_2": "nvfp4", ".pre_quant_scale": "awq_w4a16"}
_QUANT_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise",
                  "int8_tensorwise")


_FORMS = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "int8": "int8", "Q8_0": "int8"}


@dataclass(slots=True)
class Container:
    """The tensors of one model, by bare name.

    `metadata` are the file's own text fields, `config` the folder's config.json where there is one. Helper tensors
    of quantisation and an embedded tokenizer do not count as tensors.
    """

    path: Path
    kind: ContainerKind
    metadata: dict[str, str]
    config: dict[str, Any] | None
    prefix: str
    _entries: dict[str, Entry] = field(repr=False)
    _scales: dict[str, str] = field(repr=False)
    is_mapped: bool = False

    def names(self) -> list[str]:
        """Bare names, in the order of the file."""
        return [name for name in self._entries if not name.endswith(_HIDDEN_SUFFIXES) and name not in _HIDDEN_NAMES]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every tensor, without reading any."""
        return {name: self._entries[name].shape for name in self.names()}

    def dtype_of(self, name: str) -> str:
        """How a tensor is stored: a torch dtype or GGUF type, `+ scale` where a scale belongs to it."""
        return self._entries[name].storage + (" + scale" if name in self._scales else "")

    def form_of(self, name: str) -> str | None:
        """The word of memory.base for how a tensor is stored, where that is a form of a byte."""
        return _FORMS.get(self._entries[name].storage)

    def read(self, name: str, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, dequantised, in memory of its own; where the container `is_mapped`, that of the file as it is
        mapped, for the CPU and the stored dtype.

        `dtype` None keeps the stored dtype, and gives float32 for a quantised tensor. Raises ContainerError for an
        unreadable tensor, a scale that is missing, not finite or of a shape that does not fit.
        """
        import torch

        tensor, scale = self._parts(name)
        if scale is not None:
            tensor, scale = tensor.to(device, torch.float32), scale.to(device, torch.float32)
            tensor = tensor * self._expanded(name, tensor, scale)
        return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=not self.is_mapped)

    def stored(self, name: str, dtypes: Collection[torch.dtype], device: torch.device | str = "cpu"
               ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A matrix [out, in] as the file holds it, where that is in numbers of one of these dtypes: they, and what a
        step is of each run of a row, [out, runs]. None for any other tensor. Raises as `read` does.
        """
        import torch

        entry = self._entries[name]
        if entry.runs is not None and torch.int8 in dtypes:
            numbers, scale = entry.runs()
        elif entry.storage in {str(dtype).removeprefix("torch.") for dtype in dtypes} and len(entry.shape) == 2:
            numbers, found = self._parts(name)
            scale = torch.ones(()) if found is None else found.float()
            if found is not None:
                self._expanded(name, numbers, scale)
            scale = by_runs(scale, numbers.shape)
        else:
            return None
        return numbers.to(device, copy=True), scale.to(device, copy=True)

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A tensor as it is stored, and its scale if it has one."""
        import torch

        tensor = self._entries[name].load()
        if name in self._scales:
            scale = self._entries[self._scales[name]].load()
            if not scale.is_floating_point():
                raise ContainerError(self.path, f"the scale of {name} is stored as {scale.dtype}", "a block format "
                                     "such as mxfp8, without the note that says so", "use the fp16, bf16 or "
                                     "tensor-scaled fp8 file of the same model")
            return tensor, scale
        if tensor.dtype == torch.int8 or (tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
                                          and tensor.ndim > 1 and self._has_lost_scale(tensor)):
            raise ContainerError(self.path, f"{name} is {tensor.dtype} without a scale, while weights of this kind "
                                 "have one", "the scale was dropped when the file was repackaged")
        return tensor, None

    def _has_lost_scale(self, fp8: torch.Tensor) -> bool:
        """Whether an fp8 weight without a scale had one: others have, the file says so, or it fills its whole range,
        which no trained weight does unscaled.
        """
        import torch

        return (bool(self._scales) or "scaled_fp8" in self._entries
                or float(fp8.float().abs().nan_to_num().max()) > torch.finfo(fp8.dtype).max / 4)

    def spiece_model(self) -> bytes | None:
        """The SentencePiece tokenizer that ComfyUI's text encoder files carry, if this one does."""
        if "spiece_model" not in self._entries:
            return None
        return _bytes(self.path, "spiece_model", self._entries["spiece_model"])

    def _expanded(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The scale as something that multiplies the weight. Raises ContainerError for one that cannot be right."""
        if not scale.isfinite().all():
            raise ContainerError(self.path, f"the scale of {name} is not finite", "the quantisation overflowed or the "
                                 "file is damaged")
        try:
            expanded = expand_scale(scale, weight.shape)
        except ValueError as error:
            raise ContainerError(self.path, f"{name}: {error}", "a quantisation layout that wantrain does not know",
                                 "use an fp16, bf16 or tensor-scaled fp8 file") from error
        if (scale < 0).any() or ((scale == 0).any() and ((expanded == 0) & (weight.float() != 0)).any()):
            raise ContainerError(self.path, f"the scale of {name} is {float(scale.min()):g}", "the scales were lost "
                                 "when the file was repackaged, or underflowed in float16")
        return expanded


def expand_scale(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A scale as something that multiplies a weight [out, in, ...].

    Accepts one number; [out] or [out, 1], one a row; [out, blocks, 1] or [out, blocks], one a run of in/blocks
    columns; [p, q], one a block of out/p rows and in/q columns. Raises ValueError for any other shape.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    out, *rest = shape
    runs = by_runs(scale, shape)
    return runs.reshape(out, *(1 for _ in rest)) if runs.shape[1] == 1 else runs.repeat_interleave(
        rest[0] // runs.shape[1], 1)


def by_runs(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The same scale as one of each run of each row, [out, runs]. Raises ValueError as `expand_scale` does."""
    out, *rest = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(out, 1)
    if scale.ndim == 3 and scale.shape[2] == 1:
        scale = scale[..., 0]
    if scale.numel() == out and scale.shape[0] == out:
        return scale.reshape(out, 1)
    if scale.ndim == 2 and len(rest) == 1 and out % scale.shape[0] == 0 and rest[0] % scale.shape[1] == 0:
        return scale.repeat_interleave(out // len(scale), 0)
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
    """Open a weight file or folder as it is: prefixes stay on the names, and nothing is dequantised."""
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
    return entry.load().numpy().tobytes()


def _refuse_unreadable(raw: Container) -> None:
    """Refuse quantisation formats whose weights are not weight * scale."""
    path, entries, metadata = raw.path, raw._entries, raw.metadata
    formats = {}
    for name, entry in entries.items():
        if name.endswith(".comfy_quant"):
            formats[name] = str(parse_json(path, name, _bytes(path, name, entry)).get("format"))
    if "_quantization_metadata" in metadata:
        stated = parse_json(path, "_quantization_metadata", metadata["_quantization_metadata"].encode())
        layers = stated.get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise ContainerError(path, "_quantization_metadata has no layers with a format each", "damaged metadata")
        formats |= {name: str(layer.get("format")) for name, layer in layers.items()}
    # What the file says goes first. nvfp4 may have the other suffix as well, so it is looked for before awq_w4a16.
    for suffix, kind in _UNREADABLE_SUFFIXES.items():
        formats |= {name: kind for name in entries if name.endswith(suffix)}
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
                             "folder above or below the right one", f"ls -R {shlex.quote(str(folder))}")
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
    ("audio_encoder", ("audio_encoder", "wav2vec2-large-xlsr-53-english")),
    ("tokenizer", ("tokenizer", "google/umt5-xxl")),
)


def find_parts(folder: Path) -> dict[str, Path]:
    """The parts of a whole checkpoint folder, diffusers or official, each openable with `open_container`.

    Keys: `transformer`, or `high` and `low`; `vae`, `text_encoder`, `image_encoder`, `audio_encoder` and `tokenizer`
    where they exist. Raises ContainerError when the folder has no transformer.
    """
    parts = {part: folder / name for part, names in _PARTS for name in reversed(names) if (folder / name).exists()}
    if "low" not in parts and "high" in parts:
        parts["transformer"] = parts.pop("high")
    if not {"high", "low", "transformer"} & parts.keys():
        if not list(folder.glob("diffusion_pytorch_model*")):
            raise ContainerError(folder, "holds no Wan transformer (transformer/, high_noise_model/ or "
                                 "diffusion_pytorch_model*)", "the folder above or below the right one",
                                 f"ls -R {shlex.quote(str(folder))}")
        parts["transformer"] = folder
    return parts


