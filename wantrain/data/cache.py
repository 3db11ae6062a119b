"""The content-addressed cache: a safetensors file for each window's latents, its mask, what its task encodes, and each
caption's features.

An entry's name is a digest of all that its content depends on, so nothing stale can be read and nothing right is
rebuilt. Entries are written to a temporary name and renamed; their tensors' digest stands in the header. One file an
entry reads as fast as any layout (docs/facts.md, "Cache") and can be written by any number of processes.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wantrain.files import digest_text, remembered, write_json
from wantrain.terms import WINDOW, PlannedClip, UserError

if TYPE_CHECKING:  # what is in a cache, and what it lacks, is told without torch
    import torch

RECIPE_VERSION = 2
"""Raise this when decoding, resizing, encoding or the layout of an entry changes."""

LATENTS, MASK, CONDITION, TEXT = "latents", "mask", "condition", "text"

Entry = tuple[str, PlannedClip | str]
"""(LATENTS, MASK or CONDITION, the window) or (TEXT, the caption)."""

Tensors = Mapping[str, "torch.Tensor"]


def describe(entry: Entry) -> str:
    """The entry as messages name it."""
    kind, what = entry
    if isinstance(what, str):
        return f"caption {what!r}"
    return f"{kind} of clip {what.name}" if kind != LATENTS else f"clip {what.name}"


def counted(entries: Mapping[Path, Entry]) -> str:
    """`3 clips, 0 masks and 2 captions`."""
    kinds = Counter(kind for kind, _ in entries.values())
    more = "".join(f", {kinds[kind]} {kind}s" for kind in (MASK, CONDITION) if kinds[kind])
    return f"{kinds[LATENTS]} clips{more} and {kinds[TEXT]} captions"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a task encodes of a window beside its latents: `digest` of the task and its encoders, `media` the names (the
    window's own is WINDOW) of what it is made of, where a window has them. None for text-to-video.
    """

    digest: str = ""
    media: tuple[str, ...] = ()

    def present_in(self, planned: PlannedClip) -> tuple[str, ...]:
        """The names of `media` that this window has."""
        return tuple(name for name in self.media if name == WINDOW or name in planned.partners)


@dataclass(frozen=True, slots=True)
class Cache:
    """Paths, reads and writes of one cache folder for one VAE, one text encoder and one task."""

    folder: Path
    vae_digest: str
    text_digest: str
    build_command: str
    conditioning: Conditioning = field(default_factory=Conditioning)

    @property
    def memo(self) -> Path:
        """Where digests of weight files are remembered."""
        return self.folder / "digests"

    def path_of(self, entry: Entry) -> Path:
        """The file of an entry."""
        kind, what = entry
        if isinstance(what, str):
            key = digest_text(kind, RECIPE_VERSION, what, self.text_digest)
        elif kind == CONDITION:
            media = {name: what.part(name) for name in self.conditioning.present_in(what)}
            key = digest_text(kind, RECIPE_VERSION, self.conditioning.digest, self.vae_digest, what.bucket,
                              *(text for name, one in media.items() for text in (name, *_content(one))))
        else:
            what = what.partners["mask"] if kind == MASK else what
            key = digest_text(kind, RECIPE_VERSION, *_content(what), self.vae_digest)
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def entries(self, planned: Iterable[PlannedClip], captions: Iterable[str]) -> dict[Path, Entry]:
        """Everything that these windows and these captions need, each once."""
        wanted: list[Entry] = [(TEXT, caption) for caption in dict.fromkeys(captions)]
        wanted += [(kind, one) for one in planned for kind in self.kinds_of(one)]
        return {self.path_of(entry): entry for entry in wanted}

    def kinds_of(self, planned: PlannedClip) -> list[str]:
        """The kinds of entries that a window has."""
        has_condition = bool(self.conditioning.present_in(planned))
        return [LATENTS, *[MASK] * ("mask" in planned.partners), *[CONDITION] * has_condition]

    def media_of(self, planned: PlannedClip, kinds: Iterable[str]) -> tuple[str, ...]:
        """The media to decode for entries of these kinds, each once."""
        own = {CONDITION: self.conditioning.present_in(planned), MASK: ("mask",), LATENTS: (WINDOW,)}
        return tuple(dict.fromkeys(name for kind in kinds for name in own[kind]))

    def write(self, entry: Entry, tensors: Tensors) -> None:
        """Write one entry. Non-finite values are refused: they would poison the training they are read into."""
        from wantrain.tensors import digest_tensors, write_tensors

        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"encoding {describe(entry)} gave non-finite values", "check the file and the base's "
                            "weights; a VAE or text encoder in the wrong dtype does this")
        write_tensors(self.path_of(entry), tensors, {"digest": digest_tensors(tensors)})

    def read(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Read one entry; a missing or altered one is a UserError that names the command that makes it."""
        path = self.path_of(entry)
        if not path.exists():
            raise UserError(f"the cache has no entry for {describe(entry)} with this model and these settings ({path})",
                            self.build_command)
        try:
            return read_entry(path)
        except UserError as error:
            raise UserError(f"the cache entry of {describe(entry)} is damaged: {path}",
                            f"rm {shlex.quote(str(path))} && {self.build_command}") from error

    @property
    def _faults(self) -> Path:
        return self.folder / "faults.jsonl"

    def faults(self) -> dict[str, str]:
        """The reasons why windows could not be decoded in earlier runs, by the name of their entry."""
        return dict(remembered(self._faults, lambda row: (row["entry"], f"{row['fault']} (found by an earlier run; to "
                                                          f"try it again: {shlex.join(['rm', str(self._faults)])})")))

    def remember_fault(self, entry: Entry, fault: str) -> None:
        """Note that the window of this entry cannot be decoded, so that the next plan knows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._faults.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"entry": self.path_of(entry).name, "fault": fault}) + "\n")

    def claim(self, run_dir: Path, name: str, entries: Mapping[Path, Entry]) -> None:
        """Note that the run of this folder needs these entries: `prune` leaves them."""
        names = sorted(str(path.relative_to(self.folder)) for path in entries)
        where = str(run_dir.resolve())
        write_json(claims_folder(self.folder) / f"{digest_text(where)}.json",
                   {"run": name, "folder": where, "entries": names})


def _content(planned: PlannedClip) -> tuple[object, ...]:
    """What a window's frames depend on; how they are read, where that is out of the ordinary."""
    found = planned.found
    when = (found.why_not_decord, planned.start_s, planned.fps) if found.duration_s else ()
    return found.digest, *filter(None, (*when[:1], found.surprises)), *when[1:], planned.bucket


def missing(entries: Mapping[Path, Entry]) -> dict[Path, Entry]:
    """Those of the entries that are not in the cache yet."""
    return {path: entry for path, entry in entries.items() if not path.exists()}


def read_entry(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one entry; one that is alone is called `x`. UserError where the file is damaged."""
    from wantrain.tensors import digest_tensors, read_tensors

    tensors, metadata = read_tensors(path)
    if metadata != {"digest": digest_tensors(tensors)}:
        raise UserError(f"{path} is damaged: its checksum differs",
                        f"rm {shlex.quote(str(path))}    then run `wantrain cache` again")
    return tensors


def claims_folder(folder: Path) -> Path:
    """Where runs note what they need of the cache in `folder`."""
    return folder / "used_by"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a run needs of a cache: the run's name and folder ('' in older notes), the note's file, and the entries, as
    paths relative to the cache's folder.
    """

    run: str
    folder: str
    note: Path
    entries: list[str]

    def __str__(self) -> str:
        return f"{self.run} ({self.folder})" if self.folder else self.run


def claims(folder: Path) -> list[Claim]:
    """Read the claims of all runs on the cache in `folder`."""
    found = []
    for note in sorted(claims_folder(folder).glob("*.json")):
        try:
            content = json.loads(note.read_text(encoding="utf-8"))
            found.append(Claim(str(content["run"]), str(content.get("folder", "")), note, list(content["entries"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{note}, which says what a run needs, is damaged: {error}",
                            f"rm {shlex.quote(str(note))}    then run `wantrain cache` of that recipe again") from error
    return sorted(found, key=lambda claim: (claim.run, claim.folder))


def entry_files(folder: Path) -> Iterator[Path]:
    """Every entry in a cache's folder."""
    for kind in (LATENTS, MASK, CONDITION, TEXT):
        yield from sorted((folder / kind).glob("*/*.safetensors"))


def leftovers(folder: Path, before_s: float) -> Sequence[Path]:
    """Temporary files of processes that were killed: those not touched since `before_s` (seconds of the epoch)."""
    found = []
    for path in (*folder.rglob(".*.tmp"), *folder.rglob(".tmp*")):  # ours, and those of safetensors
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before_s:
                found.append(path)
    return found
