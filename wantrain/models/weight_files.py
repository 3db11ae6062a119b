"""Weight files of every kind, opened tensor by tensor; what is no such file, or not whole, is refused by name.

Nothing is taken on trust: no tensor is larger than the bytes behind it, and no header longer than its file.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from wantrain.terms import UserError

if TYPE_CHECKING:  # names, shapes and dtypes of a safetensors or GGUF file are read without torch
    import torch

ContainerKind = Literal["safetensors", "pth", "gguf"]

SUFFIXES: dict[str, ContainerKind] = {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth", ".ckpt": "pth",
                              ".bin": "pth", ".gguf": "gguf"}
_OUTER_KEYS = ("model_state", "state_dict", "model", "module")
_MAX_HEADER_BYTES = 100_000_000
_REMAP_BYTES = 1 << 27
"""A safetensors file is mapped afresh after this many bytes, so that its read pages do not count as our memory."""


AGAIN = "get it again from where it was made or downloaded, or name another file"


class ContainerError(UserError):
    """A weight file that cannot be read: `path`, what is wrong with it, and the likely cause."""

    def __init__(self, path: Path, fault: str, cause: str, next_step: str = AGAIN) -> None:
        super().__init__(f"{path}: {fault} (likely cause: {cause})", next_step)
        self.path, self.fault, self.cause = path, fault, cause


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor: its logical shape, its storage as a word (a torch dtype or GGUF type), and how to get it; where
    it is whole numbers of a byte with a scale for each run of a row, and no tensor beside it says so, how to get these.
    """

    shape: tuple[int, ...]
    storage: str
    load: Callable[[], torch.Tensor]
    runs: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None


def parse_json(path: Path, name: str, text: bytes) -> dict[str, Any]:
    """A JSON object out of a weight file; `name` is what held it. Raises ContainerError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContainerError(path, f"{name} is not JSON: {error}", "the file is damaged") from error
    if not isinstance(value, dict):
        raise ContainerError(path, f"{name} is not a JSON object", "the file is damaged")
    return value


def kind_of(path: Path) -> ContainerKind:
    """The kind by suffix, checked against the first bytes. Raises ContainerError."""
    try:
        if not path.exists():
            raise ContainerError(path, "does not exist", "a wrong path", "check the path")
        if not path.is_file():
            raise ContainerError(path, "is no regular file", "a pipe, a device or a folder", "name a file")
        if path.suffix not in SUFFIXES:
            raise ContainerError(path, f"has the suffix {path.suffix!r}; wantrain reads {', '.join(SUFFIXES)}",
                                 "not a weight file", f"ls {shlex.quote(str(path.parent))}")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ContainerError(path, f"cannot be read: {error.strerror or error}", "permissions, or a failing disk",
                             f"ls -l {shlex.quote(str(path))}") from error
    said = SUFFIXES[path.suffix]
    looks, cause, next_step = _sniff(head)
    if looks not in (said, "?"):
        shown = f", which begins {head[:80].decode('utf-8', 'replace')!r}" if next_step == _LOOK else ""
        raise ContainerError(path, f"is named {path.suffix} but is {looks}{shown}", cause, next_step)
    if said == "safetensors":
        _check_header_size(path, head)
    return said


_RENAMED = "a renamed file"
_PICKLE = "a pickle renamed to pass for another format"
_ANSWER = "the download answered with a login or error page"
_LOOK = "read what it says, download it anew with an account or a token where the site asks for one, and name that file"
_NAME = "rename it to the suffix of what it is, if you trust where it came from"
_MAGICS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"\Z"), "empty", "an interrupted download"),
    (re.compile(rb"GGUF"), "gguf", _RENAMED),
    (re.compile(rb"PK\x03\x04"), "pth", _PICKLE),
    (re.compile(rb"version https://git-lfs"), "a git-lfs pointer", "a clone without `git lfs pull`"),
    (re.compile(rb"(?s).{5}\x00{3}\{"), "safetensors", _RENAMED),
    (re.compile(rb"\x80"), "pth", _PICKLE),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*<"), "a web page", _ANSWER),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]\s*[\[{\"\]}]"), "JSON", _ANSWER),
    (re.compile(rb"[\t\n\r\x20-\x7e]+\Z"), "text", _ANSWER),
)
"""What a file starts with, what that is, and how it got another suffix; the first that matches counts."""


def _sniff(head: bytes) -> tuple[str, str, str]:
    """What a file that begins so looks like, the likely cause, and what to do."""
    found = next(((looks, cause) for magic, looks, cause in _MAGICS if magic.match(head)), ("?", ""))
    return *found, {_ANSWER: _LOOK, _RENAMED: _NAME, _PICKLE: _NAME}.get(found[1], AGAIN)


def _check_header_size(path: Path, head: bytes) -> None:
    size = path.stat().st_size
    claimed = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if len(head) < 8 or claimed > min(size - 8, _MAX_HEADER_BYTES):
        raise ContainerError(path, f"its header claims {claimed} bytes, the file has {size}", "not safetensors, or an "
                             "interrupted download")


class _Mapped:
    """A safetensors file that is mapped while it is read, and let go every _REMAP_BYTES."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: Any = None
        self.num_bytes = 0

    def load(self, name: str) -> torch.Tensor:
        try:
            if self.handle is None or self.num_bytes > _REMAP_BYTES:
                self.handle, self.num_bytes = safe_open(self.path, framework="pt"), 0
            tensor: torch.Tensor = self.handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ContainerError(self.path, f"{name}: {error}", "the file changed while it was read") from error
        self.num_bytes += tensor.nbytes
        return tensor


_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}
"""Their words for dtypes -> torch's."""


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _open_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    mapped = _Mapped(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise ContainerError(path, f"is not readable as safetensors: {error}", "an interrupted download") from error
    entries = {}
    for name, piece in slices.items():
        if piece.get_dtype() not in _SAFETENSORS_DTYPES:
            raise ContainerError(path, f"{name} is of dtype {piece.get_dtype()}", "a file made for inference only",
                                 "use the fp16, bf16 or fp8 file of the same model")
        word = _SAFETENSORS_DTYPES[piece.get_dtype()]
        entries[name] = Entry(tuple(piece.get_shape()), word, partial(mapped.load, name))
    return entries, metadata


_TORCH_FAULTS = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError,
                 AssertionError, OverflowError, MemoryError, ImportError, struct.error, zipfile.BadZipFile,
                 NotImplementedError)
"""What torch.load raises over damaged files."""


def _open_pth(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    import torch

    try:
        # Only the zip format can be mapped; the older one is read whole.
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ContainerError(path, "is a compressed archive, which no torch file is", "a zip with "
                                         "the weights in it, or another program's file",
                                         "unpack it, and name what is in it")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ContainerError(path, "holds objects other than tensors, which wantrain does not unpickle, or is cut off",
                             "not a plain state dict", "convert it to safetensors where you trust it") from error
    except _TORCH_FAULTS as error:
        raise ContainerError(path, f"is not readable as a torch file: {error}", "an interrupted download") from error
    entries = {}
    for name, tensor in _state_dict(path, loaded).items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            raise ContainerError(path, f"{name} is no plain tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})",
                                 "a file made for inference only", "convert it to safetensors with what made it")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ContainerError(path, f"{name} is {list(tensor.shape)}, and its bytes are fewer", "a damaged file")
        entries[name] = Entry(tuple(tensor.shape), _word(tensor.dtype), partial(_same, tensor))
    return entries, {}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _state_dict(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """The state dict itself, or the one under a trainer's outer key."""
    import torch

    for candidate in (loaded, *(loaded[key] for key in _OUTER_KEYS if isinstance(loaded, dict) and key in loaded)):
        if isinstance(candidate, Mapping) and candidate and all(
                isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in candidate.items()):
            return dict(candidate)
    holds = f"a dict of {', '.join(map(str, list(loaded)[:4]))}" if isinstance(loaded, dict) else type(loaded).__name__
    raise ContainerError(path, f"is not a state dict but {holds}", "a whole training checkpoint or another model",
                         "export its state dict to safetensors")


_MOST_FIELDS = 4_000_000
"""Numbers in a GGUF header, of which a vocabulary has the most; each costs the reader some hundred bytes."""


def _gguf_reader(path: Path) -> Any:
    """The gguf package's reader, that raises ValueError where a header points behind its file's end."""
    from gguf import GGUFReader

    num_fields = 0

    def bounded(reader: Any, offset: int, dtype: Any, count: int = 1, *order: Any, **more: Any) -> Any:
        nonlocal num_fields
        num_fields += 1
        if offset + int(count) * np.dtype(dtype).itemsize > len(reader.data) or num_fields > _MOST_FIELDS:
            raise ValueError("it ends before its header does")
        return GGUFReader._get(reader, offset, dtype, count, *order, **more)

    return type("BoundedReader", (GGUFReader,), {"_get": bounded})(path)


def _open_gguf(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        from gguf import GGUFValueType
    except ImportError as error:
        raise ContainerError(path, "is GGUF, and the package gguf is not installed", "an optional extra",
                             "pip install gguf") from error
    try:
        reader = _gguf_reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
        raise ContainerError(path, f"is not readable as GGUF: {error}", "an interrupted download") from error
    text = {name: str(value.contents()) for name, value in reader.fields.items()
            if value.types == [GGUFValueType.STRING]}
    entries = {}
    for tensor in reader.tensors:
        stated = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
        # GGML lists the axes innermost first; ComfyUI-GGUF notes the real shape of what it had to flatten.
        shape = tuple(map(int, stated.contents() if stated else reversed(tensor.shape.tolist())))
        has_runs = tensor.tensor_type.name == "Q8_0" and len(shape) == 2 and shape[1] % _RUN == 0
        entries[tensor.name] = Entry(shape, tensor.tensor_type.name, partial(_dequantised, path, tensor, shape),
                                     partial(_runs, tensor, shape) if has_runs else None)
    return entries, text


_RUN = 32
"""Weights of Q8_0 with a scale in common, which lies before them in two bytes."""


def _runs(tensor: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A Q8_0 tensor as it is stored: int8 [out, in], and float16 [out, in / _RUN]."""
    import torch

    blocks = torch.from_numpy(tensor.data.copy()).view(shape[0], -1, 2 + _RUN)
    scale, numbers = blocks[..., :2].contiguous(), blocks[..., 2:].contiguous()
    return numbers.view(torch.int8).view(shape), scale.view(torch.float16).view(shape[0], -1)


def _dequantised(path: Path, tensor: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """A GGUF tensor as float32 (float16 and integers as they are), by the gguf package's own dequantiser."""
    import torch
    from gguf import quants

    plain = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}
    try:
        array = tensor.data if tensor.tensor_type.name in plain else quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(array.copy()).reshape(shape)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ContainerError(path, f"{tensor.name} ({tensor.tensor_type.name}): {error}", "a quantisation that the "
                             "gguf package does not read", "use a Q8_0 or K-quant file") from error


OPENERS: dict[ContainerKind, Callable[[Path], tuple[dict[str, Entry], dict[str, str]]]] = {
    "safetensors": _open_safetensors, "pth": _open_pth, "gguf": _open_gguf,
}
