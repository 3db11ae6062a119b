"""Atomic writes and digests of files. (Without torch, so that worker processes start at once.)"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, TypeVar

from wantrain.terms import UserError, unwritable

T = TypeVar("T")

NAME_MAX = 255
"""The most bytes of a file's name."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    The name is drawn, so that processes on any machines may write the same entry at once.
    """
    temporary = temporary_for(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def set_in_place(path: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside `path`. What the block makes there, a file or a folder of
    files, takes its place at `path` when the block ends well, and vanishes when it does not.
    """
    folder = temporary_for(path)
    made = folder / path.name
    try:
        folder.mkdir(parents=True)
        yield made
        if made.is_dir():
            path.mkdir(exist_ok=True)
        for file in sorted(made.iterdir()) if made.is_dir() else [made]:
            file.replace(path / file.name if made.is_dir() else path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def temporary_for(path: Path) -> Path:
    """A hidden name beside `path` that no other process has, on no machine, and that is short enough."""
    own = f".{secrets.token_hex(6)}.tmp"
    kept = os.fsencode(path.name)[:NAME_MAX - 1 - len(own)]
    return path.with_name(f".{kept.decode(errors='ignore')}{own}")


def leftovers(folder: Path, before_s: float) -> Iterator[Path]:
    """Temporary files directly in the folder that were not touched since `before_s` (seconds of the epoch)."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < before_s:
                yield path


def owner(name: str, stems: Container[str]) -> str:
    """The longest of the stems that a sidecar belongs to: NAME.txt and NAME.*.txt to NAME. '' where there is none."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in stems:
            return name
    return ""


def like(path: str) -> str:
    """What lies in the same folder and is called nearly so, as the path is written; "" where nothing does."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        asked = Path(path)
        names = {one.name for one in asked.expanduser().parent.iterdir()}
        for name in difflib.get_close_matches(asked.name, names, 1, 0.75):
            return str(asked.with_name(name))
    return ""


def of_windows(path: str) -> str:
    """A path of Windows as it is written here: / for \\, and WSL's /mnt/c for C:. Others stay as they are."""
    return re.sub(r"^([A-Za-z]):(?=/)", lambda drive: f"/mnt/{drive[1].lower()}", path.replace("\\", "/"))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_line(row: dict[str, Any]) -> str:
    """One line of JSON: readable names, escapes only for names that are not UTF-8."""
    text = json.dumps(row, ensure_ascii=False)
    return (text if text == text.encode("utf-8", "ignore").decode() else json.dumps(row)) + "\n"


def remembered(path: Path, make: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What `make` makes of the rows of a journal of JSON lines, none where it is not there.

    Left out are a line that a kill cut off and rows that `make` refuses, such as those with fields of another version.
    """
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield make(row)


def digest_text(*parts: object) -> str:
    """A 128-bit hex digest of the parts' text, unambiguous about where one part ends."""
    return hashlib.blake2b(json.dumps([str(p) for p in parts]).encode(), digest_size=16).hexdigest()


def digest_file(path: Path, memo: Path | None = None) -> str:
    """A 128-bit hex digest of a file's bytes.

    `memo`, a folder, remembers it under (path, size, times of change), so that gigabytes are hashed once; where it
    cannot be written, such as on a read-only mount, they are hashed again.
    """
    status = path.stat()
    note = memo / digest_text(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns) if memo else None
    if note and note.exists():
        return note.read_text("utf-8")
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    if note:
        with contextlib.suppress(UserError):
            write_text(note, state.hexdigest())
    return state.hexdigest()


def digest_folder(folder: Path, memo: Path | None = None) -> str:
    """A digest of every file below `folder`: relative names and bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest_text(*(f"{p.relative_to(folder)} {digest_file(p, memo)}" for p in files))


def digest_path(path: Path, memo: Path | None = None) -> str:
    """A digest of a file, or of every file below a folder."""
    return digest_folder(path, memo) if path.is_dir() else digest_file(path, memo)
