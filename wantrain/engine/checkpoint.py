"""Checkpoints that belong to no engine and no number of processes.

Per trainable tensor: its float32 value and what the optimizer keeps for it, by name (AdamW: two moments). With the
step, the number of skipped ones and the config's fingerprint that is all that training needs, because order, sigma,
noise and learning rate are functions of (seed, step): the process's own RNG decides nothing. What an export needs as
well (Record) is in it too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator

from wantrain.engine import is_deepspeed, mirror
from wantrain.engine.ema import Ema
from wantrain.engine.optimizers import OptimizerKind, average, beta_of
from wantrain.engine.states import COUNT, State, inner, is_zero3, link, parameters_of, sharded_like, states
from wantrain.files import digest_file, temporary_for, write_json, write_text
from wantrain.outside import Outside
from wantrain.tensors import read_tensors, write_tensors
from wantrain.terms import OF_A_PLACE, UserError, unwritable

TENSORS, STATE, CHECKSUMS = "training.safetensors", "state.json", "checksums"
VALUE, EMA, POINT = "value", "ema", "y"
"""Keys beside those of the optimizer: what the adapter is, its average, and where schedule-free trains on."""


def gather(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, kind: OptimizerKind, ema: Ema | None
           ) -> dict[str, torch.Tensor]:
    """All that the next step needs, whole and on the CPU; every process must call it.

    `NAME|value` is what the adapter is, `NAME|KEY` each tensor that the optimizer keeps for it (absent before the
    first step), `NAME|ema` its average; `(group N)|KEY` are the numbers that the optimizer keeps for a param group.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value, kept in states(accelerator, model, optimizer):
        own = {VALUE: value, **kept}
        if kind.averages:
            own |= {POINT: value, VALUE: average(value, kept["z"], beta_of(optimizer)) if kept else value}
        tensors |= {f"{name}|{key}": _saved(tensor) for key, tensor in own.items()}
    if ema is not None:
        tensors |= {f"{name}|{EMA}": _saved(tensor) for name, tensor in ema.tensors.items()}
    for number, group in enumerate(inner(accelerator, optimizer).param_groups):
        for key in kind.scalars:
            number_type = torch.int64 if isinstance(group[key], int) else torch.float64
            tensors[f"(group {number})|{key}"] = torch.tensor(group[key], dtype=number_type)
    return tensors


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()


def values(tensors: Mapping[str, torch.Tensor], key: str = VALUE) -> dict[str, torch.Tensor]:
    """The parameters' values, or the tensors of another key, by the parameters' names."""
    return {name.removesuffix(f"|{key}"): t for name, t in tensors.items() if name.endswith(f"|{key}")}


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, *, kind: OptimizerKind, ema: Ema | None,
            tensors: Mapping[str, torch.Tensor], updates: int) -> None:
    """Put back what `gather` took, under whatever engine runs now, after so many updates. Every process must call it.
    """
    parameters = parameters_of(accelerator, model)
    if set(parameters) != set(values(tensors)):
        raise UserError("the checkpoint's tensors are not this adapter's", "use the lora.* settings it was made with")
    kept: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("|")
        if name in kept and key not in (VALUE, EMA, POINT):
            kept[name][key] = tensor
    point = values(tensors, POINT if kind.averages else VALUE)
    found = [State(name, point[name], kept[name]) for name in parameters]
    if is_deepspeed(accelerator):
        _restore_deepspeed(optimizer, parameters, found)
    else:
        for name, value, own in found:
            parameter = parameters[name]
            parameter.data.copy_(sharded_like(value, parameter))
            optimizer.optimizer.state[parameter] = {key: sharded_like(tensor, parameter) for key, tensor in own.items()}
    itself = inner(accelerator, optimizer)
    for state in itself.state.values():
        if state and kind.counter is not None:
            state[COUNT] = kind.counter(updates)
    for number, group in enumerate(itself.param_groups):
        group |= {key: tensors[f"(group {number})|{key}"].item() for key in kind.scalars}
    if ema is not None:
        ema.restore(values(tensors, EMA))


def _restore_deepspeed(optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], found: Sequence[State]) -> None:
    """ZeRO keeps flat float32 partitions: give them states first, then set each tensor, then the model's own copy
    (docs/facts.md, "Engines").
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = optimizer.optimizer
    flats = zero.fp32_partitioned_groups_flat if is_zero3(zero) else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in found[0].tensors}
    link(optimizer)
    for name, whole_value, kept in found:
        parameter = parameters[name]
        value = whole_value.to(parameter.device)
        safe_set_full_fp32_param(parameter, value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        for key, tensor in kept.items():
            safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)


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


def save(store: CheckpointStore, progress: Progress, tensors: Mapping[str, torch.Tensor], record: Record) -> Path:
    """Write `step_NNNNNN/` under a temporary name, with all bytes on the disk before it is renamed; then drop old ones.

    `checksums`, written last, is what `b2sum -l 128 -c checksums` reads: without it a checkpoint is incomplete.
    """
    final = store.folder / f"step_{progress.step:06d}"
    temporary = temporary_for(final)
    for leftover in (*store.folder.glob(".step_*.tmp"), final):
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


def checksums(folder: Path) -> str:
    """A line for each file of a checkpoint."""
    return "".join(f"{digest_file(folder / name)}  {name}\n" for name in (TENSORS, STATE))


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk: a rename is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each key in which two fingerprints differ."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def refuse_another_config(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UserError where the fingerprint of now differs from a checkpoint's.

    A key that the checkpoint's version did not know yet counts as its default: the default of a new key is what was
    done before there was one.
    """
    known = {key: value for key, value in defaults.items() if key in new}
    was = {key: value for key, value in old.items() if not OF_A_PLACE.match(key)}  # earlier versions compared these
    if changed := differences({**known, **was}, new):
        raise UserError("the config is not the one this run was started with:\n  " + "\n  ".join(changed),
                        "set these back, or start a new run: run.name=ANOTHER")


def load(path: Path, fingerprint: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None
         ) -> tuple[Progress, dict[str, torch.Tensor]]:
    """(progress, tensors) of a checkpoint. Raises Damaged for one that is, UserError where the fingerprint differs.

    `fingerprint` None skips the comparison; `defaults` as for `refuse_another_config`.
    """
    try:
        intact = (path / CHECKSUMS).read_bytes() == checksums(path).encode()
    except OSError as error:
        raise Damaged(f"checkpoint {path} is incomplete: {error}", f"rm -r {path}, and start again") from error
    if not intact:
        raise Damaged(f"checkpoint {path} is damaged: its files are not those that were written",
                      f"rm -r {path}, and start again")
    progress, record = _state(path, Progress), record_of(path)
    if fingerprint is not None:
        refuse_another_config(record.fingerprint, fingerprint, defaults or {})
    try:
        tensors, _ = read_tensors(path / TENSORS)
    except UserError as error:
        raise Damaged(f"checkpoint {path} is damaged: {error.message}", f"rm -r {path}, and start again") from error
    return progress, tensors


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
        raise Damaged(f"checkpoint {path} is damaged: {STATE}: {error}", f"rm -r {path}, and start again") from error
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


class Checkpoint(NamedTuple):
    """A whole checkpoint, and why newer ones were passed over."""

    path: Path
    progress: Progress
    tensors: dict[str, torch.Tensor]
    passed: list[str]


def newest_whole(store: CheckpointStore, fingerprint: Mapping[str, Any] | None,
                 defaults: Mapping[str, Any] | None = None) -> Checkpoint | None:
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
                return Checkpoint(path, *load(path, fingerprint, defaults), passed)
            except Damaged as error:
                passed.append(error.message)
                fault = error
    if fault is not None:
        raise fault
    return None


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
