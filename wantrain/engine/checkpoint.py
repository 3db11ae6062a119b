"""Checkpoints that belong to no engine and no number of processes: written, read back, copied to a mirror.

Per trainable tensor: its float32 value and what the optimizer keeps for it, by name (AdamW: two moments). With the
step, the number of skipped ones and the config's fingerprint that is all that training needs, because order, sigma,
noise and learning rate are functions of (seed, step): the process's own RNG decides nothing. What an export needs as
well (Record) is in it too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wantrain.engine import mirror
from wantrain.engine.saved import (
    CHECKSUMS,
    STATE,
    TENSORS,
    CheckpointStore,
    Damaged,
    Progress,
    Record,
    checksums,
    damaged,
    mirrored_or_told,
    progress_of,
    record_of,
    refuse_another_config,
    step_of,
)
from wantrain.files import temporary_for, write_json, write_text
from wantrain.outside import Outside
from wantrain.tensors import read_tensors, write_tensors
from wantrain.terms import UserError

VALUE, POINT = "value", "y"
"""Keys beside those of the optimizer: what the adapter is, and, where that is an average, where training goes on."""


def values(tensors: Mapping[str, torch.Tensor], key: str = VALUE) -> dict[str, torch.Tensor]:
    """The parameters' values, or the tensors of another key, by the parameters' names."""
    return {name.removesuffix(f"|{key}"): t for name, t in tensors.items() if name.endswith(f"|{key}")}


def save(store: CheckpointStore, progress: Progress, tensors: Mapping[str, torch.Tensor], record: Record) -> Path:
    """Write `step_NNNNNN/` under a temporary name, with all bytes on the disk before it is renamed; then drop old ones.

    `checksums`, written last, is what `b2sum -l 128 -c checksums` reads: without it a checkpoint is incomplete.
    """
    final = store.folder / f"step_{progress.step:06d}"
    temporary = temporary_for(final)
    for leftover in (*store.folder.glob(".step*.tmp"), final):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary / TENSORS, tensors, {"step": str(progress.step)})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(temporary / STATE, asdict(progress) | asdict(replace(record, saved_at=now)))
        write_text(temporary / CHECKSUMS, checksums(temporary))
        _sync(temporary)
        temporary.rename(final)
        _sync(store.folder)
    except OSError as error:
        raise UserError(f"could not write {final}: {error.strerror or error}", "free some disk space, then run the "
                        "same command again: it goes on from the checkpoint before") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
    for later in store.on_disk():  # passed over as damaged: this run is about to write them anew
        if step_of(later.name) > progress.step:
            shutil.rmtree(later, ignore_errors=True)
    for name in store.too_old(path.name for path in store.on_disk()):
        shutil.rmtree(store.folder / name, ignore_errors=True)  # in use over a network: the next save tries again
    return final


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk: a rename is safe only then."""
    if os.name == "nt":  # which opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path, fingerprint: Mapping[str, Any] | None, formerly: Mapping[str, Any] | None = None,
         any_base: bool = False) -> tuple[Progress, dict[str, torch.Tensor]]:
    """(progress, tensors) of a checkpoint. Raises Damaged for one that is, UserError where the fingerprint differs.

    `fingerprint` None skips the comparison; `formerly` and `any_base` as for `refuse_another_config`.
    """
    try:
        intact = (path / CHECKSUMS).read_bytes() == checksums(path).encode()
    except OSError as error:
        raise damaged(path, f"incomplete: {error}") from error
    if not intact:
        raise damaged(path, "damaged: its files are not those that were written")
    progress, record = progress_of(path), record_of(path)
    if fingerprint is not None:
        refuse_another_config(record.fingerprint, fingerprint, formerly or {}, any_base)
    try:
        tensors, _ = read_tensors(path / TENSORS)
    except UserError as error:
        raise damaged(path, f"damaged: {error.message}") from error
    return progress, tensors


class Checkpoint(NamedTuple):
    """A whole checkpoint, and why newer ones were passed over."""

    path: Path
    progress: Progress
    tensors: dict[str, torch.Tensor]
    passed: list[str]


def newest_whole(store: CheckpointStore, fingerprint: Mapping[str, Any] | None,
                 formerly: Mapping[str, Any] | None = None, any_base: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole, out of the folder or else its mirror; None where there is none at all.

    Raises Damaged where none of them is whole: to begin anew is for the user to say. A mirror that cannot be read is
    told in `passed`; where the folder has nothing, its fault is raised: it is not known what there is to go on from.
    """
    mirrored, passed = mirrored_or_told(store)
    fault: Damaged | None = None
    for name in sorted({*mirrored, *(path.name for path in store.on_disk())}, key=step_of, reverse=True):
        path = store.folder / name
        for fetched in (False, True):
            if fetched and name not in mirrored:
                break
            if not fetched and not path.exists():
                continue
            try:
                if fetched:
                    _fetch(store, path)
                return Checkpoint(path, *load(path, fingerprint, formerly, any_base), passed)
            except Damaged as error:
                passed.append(error.message)
                fault = error
    if fault is not None:
        raise fault
    return None


def _fetch(store: CheckpointStore, path: Path) -> None:
    """Bring a checkpoint from the mirror. Raises Damaged where it does not come."""
    assert store.mirror is not None
    try:
        mirror.fetch(store.mirror, path)
    except UserError as error:
        raise Damaged(f"{path.name}: {error.message}", error.next_step) from error


class Writer:
    """Writes checkpoints off the training's path: one at a time, in a thread, out of tensors that no step changes.

    What keeps them from the mirror costs a message, and a mirror that hangs no more than `patience_s` seconds, once.
    """

    def __init__(self, store: CheckpointStore, patience_s: float = 300.0) -> None:
        self.store, self._patience_s = store, patience_s
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._mirror = Outside("the mirror lacks the last checkpoint", "nothing: the training goes on, and its next "
                               "checkpoint tries again")
        self._hangs = False

    def write(self, progress: Progress, tensors: Mapping[str, torch.Tensor], record: Record) -> None:
        """Begin to write a checkpoint, once the one before is written. Raises the error that that one ended with."""
        self.finish()
        self._writing = self._pool.submit(self._write, replace(progress), tensors, record)

    def _write(self, progress: Progress, tensors: Mapping[str, torch.Tensor], record: Record) -> None:
        save(self.store, progress, tensors, record)
        self.copy()

    def copy(self) -> None:
        """Begin to copy the checkpoints that the mirror lacks, if there is a mirror and it is not still copying."""
        if self.store.mirror is not None and self._mirror.is_idle:
            self._mirror.call(self._copy)

    def _copy(self) -> None:
        """Bring to the mirror what it lacks, and take away there what need not stay."""
        assert self.store.mirror is not None
        there, here = self.store.mirrored(), self.store.on_disk()
        newest = here[-1]
        for path in here:
            if path.name not in there or path == newest:
                mirror.put(self.store.mirror, path, CHECKSUMS)
        known = {name for name in there if step_of(name) < step_of(newest.name)}  # later ones will be written anew
        for name in set(there).intersection(self.store.too_old({*known, newest.name})):
            mirror.drop(self.store.mirror, name)

    @property
    def failed(self) -> bool:
        """Whether the last writing ended in an error, which `finish` raises."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def news(self) -> str:
        """Problems with the mirror since the last call, each told once; empty if there are none."""
        return self._mirror.news()

    def finish(self) -> None:
        """Wait until what was begun is written, also for a mirror that is not known to hang. Raises UserError where it
        could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        if not self._hangs and not self._mirror.wait(self._patience_s):
            self._mirror.tell(f"train.mirror = {self.store.mirror} took no checkpoint within {self._patience_s:g} s: "
                              "the training goes on without waiting for it")
            self._hangs = True
        self._hangs = self._hangs and not self._mirror.is_idle

    def close(self) -> str:
        """Call `finish`. Returns what kept the last checkpoint from the mirror; empty if it is there."""
        self.finish()
        return "it hangs" if self._hangs else self._mirror.fault
