"""The checkpoints of a run as files: where they are, which of them stay, and what each says of its training. No torch.

Their tensors are in `checkpoint`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from wantrain.engine import mirror
from wantrain.files import digest_file, temporary_for
from wantrain.terms import OF_A_PLACE, UserError, unwritable

TENSORS, STATE, CHECKSUMS = "training.safetensors", "state.json", "checksums"


@dataclass(slots=True)
class Progress:
    """How far a run is: steps done, how many of those left the adapter as it was (their numbers were not finite), and
    its id in a tracker.
    """

    step: int = 0
    skipped: int = 0
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """What a checkpoint says of its training besides tensors, so that an export needs nothing else.

    `fingerprint` is what a resume compares. `kind`, `scales` (the factor on each module's product) and `metadata` (what
    a LoRA file says of itself) are what an export needs; `saved_at` is the moment of writing, ISO 8601.
    """

    fingerprint: Mapping[str, Any]
    kind: str = ""
    scales: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    saved_at: str = ""


class Damaged(UserError):
    """A checkpoint whose files are incomplete, or differ from those that were written."""


def damaged(path: Path, what: str) -> Damaged:
    """The error for a checkpoint of which this is wrong."""
    return Damaged(f"checkpoint {path} is {what}", f"rm -r {shlex.quote(str(path))}    then run the same command again")


class CheckpointStore(NamedTuple):
    """Where a run's checkpoints are: its folder, perhaps a copy behind an fsspec URL, and which of them stay: the
    newest `keep` and those of every `keep_every` steps.
    """

    folder: Path
    mirror: str | None = None
    keep: int = 1
    keep_every: int | None = None

    def on_disk(self) -> list[Path]:
        """Checkpoints by rising step."""
        return steps_on_disk(self.folder)

    def mirrored(self) -> list[str]:
        """The names of those that the mirror has."""
        return [name for name in mirror.names(self.mirror) if step_of(name) >= 0] if self.mirror else []

    def too_old(self, names: Iterable[str]) -> list[str]:
        """The checkpoints among these names that may be deleted."""
        return [name for name in sorted(names, key=step_of)[:-self.keep]
                if not self.keep_every or step_of(name) % self.keep_every]


def step_of(name: str) -> int:
    """The step in a checkpoint's name, -1 where this is none."""
    found = re.fullmatch(r"step_(\d{6,})", name)
    return int(found[1]) if found else -1


def steps_on_disk(folder: Path) -> list[Path]:
    """Checkpoints by rising step."""
    return sorted((p for p in folder.glob("step_*") if step_of(p.name) >= 0), key=lambda path: step_of(path.name))


def checksums(folder: Path) -> str:
    """A line for each file of a checkpoint."""
    return "".join(f"{digest_file(folder / name)}  {name}\n" for name in (TENSORS, STATE))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each key in which two fingerprints differ."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


BASE_FORM, BASE_PRODUCTS = "memory.base", "(products with the base)"
"""Keys of fingerprints: the form of the frozen base, and that of products with it where these are computed in bytes."""


def refuse_another_config(old: Mapping[str, Any], new: Mapping[str, Any], formerly: Mapping[str, Any],
                          any_base: bool = False) -> None:
    """Raise UserError where the fingerprint of now differs from a checkpoint's; with `any_base`, but for BASE_FORM and
    BASE_PRODUCTS.

    A key that the checkpoint's version did not know yet counts as what `formerly` says was done before there was one.
    """
    known = {key: value for key, value in formerly.items() if key in new}
    was = {key: value for key, value in old.items() if not OF_A_PLACE.match(key)}  # earlier versions compared these
    free = {key: new.get(key) for key in (BASE_FORM, BASE_PRODUCTS)} if any_base else {}
    if changed := differences({**known, **was, **free}, new):
        only_base = all(change.startswith((BASE_FORM, BASE_PRODUCTS)) for change in changed)
        raise UserError("the config is not the one this run was started with:\n  " + "\n  ".join(changed),
                        "set these back, or start a new run: run.name=ANOTHER"
                        + ("; or go on with other numbers: train.resume=any_base" if only_base else ""))


def progress_of(path: Path) -> Progress:
    """How far the training of a whole checkpoint is."""
    return _state(path, Progress)


def record_of(path: Path) -> Record:
    """Read the Record of a whole checkpoint."""
    return _state(path, Record)


T = TypeVar("T", Progress, Record)


def _state(path: Path, made: type[T]) -> T:
    """One of the two parts of a checkpoint's state; fields of a version before keep their defaults.

    Raises Damaged where its values are not of their kinds.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        found = made(**{field.name: state[field.name] for field in fields(made) if field.name in state})
        if not _is_sound(found):
            raise ValueError("a value that wantrain never writes")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"damaged: {STATE}: {error}") from error
    return found


def _is_sound(state: Progress | Record) -> bool:
    """Whether the values are of their kinds: the checksums may be right and the file edited."""
    if isinstance(state, Progress):
        return all(type(count) is int and count >= 0 for count in (state.step, state.skipped)) \
            and isinstance(state.run_id, str)
    if state.saved_at:
        datetime.fromisoformat(state.saved_at)
    return (isinstance(state.kind, str) and isinstance(state.fingerprint, dict)
            and all(isinstance(scale, float) and math.isfinite(scale) for scale in state.scales.values())
            and all(isinstance(text, str) and text.encode() is not None for text in state.metadata.values()))


def mirrored_or_told(store: CheckpointStore) -> tuple[list[str], list[str]]:
    """(names that the mirror has, why it could not be read). Raises UserError where the folder has no checkpoint."""
    try:
        return store.mirrored(), []
    except UserError as error:
        if not store.on_disk():
            raise
        return [], [error.message]


def refuse_unwritable(store: CheckpointStore) -> list[str]:
    """Raise UserError where no checkpoint could be written in the folder; what is wrong with the mirror is only told.
    """
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_for(store.folder / "step")
        temporary.mkdir()
        temporary.rmdir()
    except OSError as error:
        raise unwritable(store.folder, error) from error
    if store.mirror is None:
        return []
    try:
        mirror.probe(store.mirror)
    except UserError as error:
        return [f"{error.message}\n  the training goes on, and tries again with each checkpoint"]
    return []
