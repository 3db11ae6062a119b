"""Checks of the file that a verb is about to write.

A verb writes over no file that it reads, over no file of another sort, and nowhere that it cannot write.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from wantrain.models.containers import open_container, open_raw
from wantrain.models.lora_names import PEFT_WEIGHTS, is_lora
from wantrain.models.names import UnknownName, official_names
from wantrain.models.weight_files import SUFFIXES
from wantrain.terms import UserError

Sort = Literal["LoRA", "transformer", "file of another sort"]


def sort_of(path: Path) -> Sort:
    """The sort of an existing file: LoRA, transformer, or another."""
    try:
        if is_lora(open_raw(path).names()):
            return "LoRA"
        names = open_container(path).names()
        return "transformer" if "patch_embedding.weight" in official_names(names).values() else "file of another sort"
    except (UserError, UnknownName):
        return "file of another sort"


def check_file(out: Path, sort: Sort, inputs: Iterable[Path], usage: str) -> Path:
    """The .safetensors file to write. Raises UserError unless it is new, or of this sort and none of the inputs."""
    if out.is_dir():
        raise UserError(f"{out}, the last path, is what gets written, and is a folder",
                        f"name a file in it: {shlex.quote(str(out / 'new.safetensors'))}")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}, the last path, is what gets written, and does not end in .safetensors",
                        f"{usage}: write {shlex.quote(str(out.with_suffix('.safetensors')))}")
    _check_target(out, sort, _files_of(inputs), usage)
    _check_writable(out)
    return out


def check_folder(out: Path, name: str, sort: Sort, inputs: Iterable[Path], usage: str) -> Path:
    """The file `name` in the folder to write, which holds no other weights. Raises UserError as `check_file` does."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a folder is to be written", f"{usage}, with the name of a new folder")
    others = [p for p in sorted(out.glob("*")) if p.name != name and (p.suffix in SUFFIXES or p.match("*.index.json"))]
    if others:
        raise UserError(f"{out} holds other weights: {others[0].name}", "name a new folder")
    _check_target(out / name, sort, _files_of(inputs), usage)
    _check_writable(out / name)
    return out / name


def check_lora_output(out: Path, format: str, inputs: Iterable[Path], usage: str) -> None:
    """`check_file` for a LoRA, or `check_folder` where the format is a folder."""
    if format == "peft":
        if out.suffix in SUFFIXES and not out.exists():
            raise UserError(f"{out} is named as a file, and a folder is to be written",
                            f"{usage}, e.g. {shlex.quote(str(out.with_suffix('')))}")
        check_folder(out, PEFT_WEIGHTS, "LoRA", inputs, usage)
    else:
        check_file(out, "LoRA", inputs, usage)


def _files_of(inputs: Iterable[Path]) -> list[Path]:
    """Every file that is read, those of folders too."""
    return [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def _check_target(target: Path, sort: Sort, inputs: Iterable[Path], usage: str) -> None:
    if not target.exists():
        return
    if read := next((path for path in inputs if path.exists() and path.samefile(target)), None):
        raise UserError(f"{target}, the last path, is what gets written, and is also read ({read})",
                        f"{usage}, with the name of a new file")
    if (there := sort_of(target)) != sort:
        raise UserError(f"{target}, the last path, is what gets written; it exists and is no {sort}, but a {there}",
                        f"{usage}, with the name of a new file")


def _check_writable(target: Path) -> None:
    """Refuse a place where nothing can be written, before the work; the nearest folder that exists is tried."""
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{target} cannot be written: {folder}: {error.strerror or error}",
                        "name a file in a folder that can be written") from error
