"""Tensors in safetensors files: written atomically, digested, read back."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wantrain.files import atomic_path
from wantrain.terms import UserError


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, the same bytes for the same content.

    A full disk is a UserError and leaves nothing half-written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Bring the metadata into the order of its keys: the library writes them in another order every time."""
    with path.open("r+b") as file:
        length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # always, but for metadata that JSON may spell in two ways
            file.seek(8)
            file.write(text.ljust(length))


_SAFETENSORS_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def stream_tensors(path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterable[torch.Tensor],
                   metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically with one tensor in memory at a time, and read it back to prove it.

    `tensors` come in the order of `shapes` and are cast to `dtype`. (The library can only write what is all in
    memory, and a 14B transformer is 28 GB.)
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_WORDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = []
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for shape, given in zip(shapes.values(), tensors, strict=True):
                tensor = given.detach().to("cpu", dtype).reshape(tuple(shape)).contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                written.append((data.nbytes, hashlib.blake2b(data).digest()))
        with safe_open(temporary, framework="pt") as readable, temporary.open("rb") as file:
            file.seek(8 + len(text))
            if set(readable.keys()) != shapes.keys() or any(
                    hashlib.blake2b(file.read(size)).digest() != digest for size, digest in written):
                raise OSError("it reads back differently from what was written")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file (owned memory, not views of a map) and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.offset_keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}", f"delete it and make it again: rm {path}"
                        ) from error


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A 128-bit hex digest of names, shapes, dtypes and bytes, independent of the order of the mapping."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
