"""Atomic writes, digests and the run folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wantrain.terms import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    The name holds the process id, so that several processes may write the same entry at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"could not write {path}: {error.strerror or error}",
            "free some disk space (or point the folder elsewhere), then run the same command again: "
            "what was finished is kept",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. A full disk is a UserError and leaves nothing half-written."""
    with atomic_path(path) as temporary:
        try:
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error


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


def digest_text(*parts: object) -> str:
    """A 128-bit hex digest of the parts' text, unambiguous about where one part ends."""
    return hashlib.blake2b(json.dumps([str(p) for p in parts]).encode(), digest_size=16).hexdigest()


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A 128-bit hex digest of names, shapes, dtypes and bytes, independent of the order of the mapping."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest_file(path: Path, memo: Path | None = None) -> str:
    """A 128-bit hex digest of a file's bytes.

    `memo`, a folder, remembers it under (path, size, mtime), so that gigabytes are hashed once.
    """
    status = path.stat()
    note = memo / digest_text(path.resolve(), status.st_size, status.st_mtime_ns) if memo else None
    if note and note.exists():
        return note.read_text()
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    if note:
        write_text(note, state.hexdigest())
    return state.hexdigest()


def digest_folder(folder: Path, memo: Path | None = None) -> str:
    """A digest of every file below `folder`: relative names and bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest_text(*(f"{p.relative_to(folder)} {digest_file(p, memo)}" for p in files))


def digest_path(path: Path, memo: Path | None = None) -> str:
    """A digest of a file, or of every file below a folder."""
    return digest_folder(path, memo) if path.is_dir() else digest_file(path, memo)
