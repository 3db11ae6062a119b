"""Manifests as the tools read and write them: the rows of training's reader, every column kept, every fault with its
line.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.command import absolute, relative, shown
from wantrain.data.folders import Account, Stems, folded, read_folder
from wantrain.data.tables import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    MEDIA,
    TEXTS,
    Row,
    captions_of,
    columns_of,
    lacking,
    number_of,
    one_line,
    proposed,
    rows_of,
    spelled,
    text_of,
)
from wantrain.files import json_line, write_text
from wantrain.terms import PARTNERS, UserError


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One entry of a manifest: `values` under our names of columns, others as they are written; `place` for messages,
    `folder` that its paths begin at.
    """

    folder: Path
    place: str
    values: dict[str, Any]

    @property
    def line(self) -> str:
        """The place without its file."""
        return " ".join(self.place.split(" ")[-2:])

    @property
    def id(self) -> str:
        return str(self.values.get("id") or _normal(self.values["video"]))

    @property
    def bounds(self) -> tuple[float, float | None]:
        """Seconds of the source; None for 'to its end'."""
        end_s = self.values.get("end_s")
        return float(self.values.get("start_s") or 0), None if end_s is None else float(end_s)

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the source; infinite for 'to its end'."""
        start_s, end_s = self.bounds
        return start_s, math.inf if end_s is None else end_s

    @property
    def clip(self) -> tuple[str, float, float]:
        """The clip's identity across manifests: its file, with links followed, and its span."""
        return _real(self.where("video")), *self.span

    @property
    def captions(self) -> list[str]:
        """Every caption that says something, on one line each."""
        return list(filter(None, captions_of(self.values)))

    def where(self, column: str) -> str:
        """The path from the root, or the URL, of a video or one of its partners; '' where there is none."""
        name = self.values.get(column) or ""
        return _located(self.folder, name) if name and not is_url(name) else name


@functools.cache  # a film has many entries, and finding the way is slow
def _located(folder: Path, name: str) -> str:
    return str(absolute(folder / name))


@functools.cache
def _real(where: str) -> str:
    return where if is_url(where) else os.path.realpath(where)


def _normal(name: str) -> str:
    """A path in one spelling, as ids of training have it."""
    return name if is_url(name) else posixpath.normpath(name)


def is_url(name: str) -> bool:
    """Whether the name is a URL. The tools do not look at files on other machines."""
    return "://" in name


def read_entries(path: Path) -> tuple[list[Entry], list[str]]:
    """(entries, faults with their lines) of a manifest. UserError where the file itself cannot be read."""
    entries, faults, rows = [], [], []
    try:
        for place, row in _rows(path):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                rows.append(row)
                entries.append(understood(row, path, f"{shown(path)} {place}"))
            except (ValueError, RecursionError) as error:
                faults.append(f"{shown(path)} {place}: {error}")
        names, missing = lacking(rows, {}) if not entries else ([], [])
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}", "give a .jsonl, .csv or .parquet") from error
    if names and "video" in missing:
        raise UserError(f"{shown(path)} has the columns {', '.join(map(repr, names))}, and none that is certainly the "
                        f"video:\n  {faults[0]}", "give them our names in the file: video for "
                        f"{proposed(rows[0])['video']}, caption for {proposed(rows[0])['caption']}")
    return entries, faults


def folder_entries(folder: Path) -> list[Entry]:
    """An entry for every video and image that training finds in the folder. UserError with every fault."""
    entries, faults = [], []
    for name, row in read_folder(str(folder), Account()):
        if isinstance(row, str):
            faults.append(f"{shown(folder / name)}: {row}")
            continue
        first, *further = captions_of({"captions": row["captions"]}) or [""]
        entries.append(Entry(absolute(folder), shown(folder / name), {
            "video": name, "caption": first, **({"captions": further} if further else {}), **{
                column: row[column] for column in PARTNERS if column in row}}))
    refuse(faults, "mend these files")
    return entries


def _rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    """(place, the row or what is wrong there)."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return ((f"row {number}", row) for number, row in enumerate(parquet.read_table(path).to_pylist()))
    if path.suffix.lower() not in (*JSON_SUFFIXES, *CSV_SUFFIXES):
        raise UserError(f"{shown(path)} is no manifest: .jsonl, .csv and .parquet are read",
                        "make one of a folder: python -m data_tools.manifest build FOLDER --out manifest.jsonl")
    return rows_of(path.read_bytes(), path.suffix)


def understood(row: Row, path: Path, place: str) -> Entry:
    """The row with our names of columns and parsed cells. Raises ValueError where training would refuse the row for
    anything but its caption.
    """
    names = {theirs: ours for ours, theirs in columns_of(row, {}).items()}
    cells = {names.get(name, name): value for name, value in row.items()}
    if path.suffix.lower() in CSV_SUFFIXES:
        cells = {name: _cell(name, text) for name, text in cells.items()}
    folder = absolute(path).parent
    values = cells | {name: _path(name, cells[name], folder) for name in MEDIA if cells.get(name)}
    for name in ("start_s", "end_s"):
        number = number_of(name, cells.get(name))
        if name in cells and (number is None or isinstance(cells[name], str)):
            values[name] = number
    if isinstance(cells.get("captions"), str):
        values["captions"] = captions_of({"captions": cells["captions"]})
    captions_of(values)
    if beyond := [name for name, value in values.items() if isinstance(value, int) and abs(value) > sys.float_info.max]:
        raise ValueError(f"{beyond[0]} is a number beyond {sys.float_info.max:.0e}")  # JSON has them, no float does
    if not values.get("video"):
        raise ValueError("no video")
    entry = Entry(folder, place, values)
    start_s, end_s = entry.span
    if not 0 <= start_s < end_s:
        raise ValueError(f"span {start_s:g}..{end_s:g} s is empty")
    return entry


def _cell(name: str, text: str | None) -> Any:
    """What the text of a .csv says: a number where it is one and the column may hold it, None where it is empty."""
    if name in TEXTS or not text:
        return text or ("" if name == "caption" else None)
    with contextlib.suppress(ValueError):
        return int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else number_of(name, text)
    return text


def _path(name: str, value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a path, not {str(value)[:40]!r}")
    if "\0" in value:
        raise ValueError(f"{name}: a path cannot hold the character NUL")
    value.encode()  # UnicodeEncodeError is a ValueError
    return value if is_url(value) else spelled(folder, value)


def sound_entries(paths: Iterable[Path]) -> list[list[Entry]]:
    """The entries of each manifest. The faults of all of them are one UserError."""
    found = [read_entries(path) for path in paths]
    refuse([fault for _, faults in found for fault in faults], "mend these lines")
    return [entries for entries, _ in found]


def refuse(faults: Sequence[str], next_step: str) -> None:
    if faults:
        raise UserError(f"{len(faults)} fault(s), nothing was written:\n  " + "\n  ".join(faults),
                        f"{next_step}, then run the same command again")


def write_rows(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    check_written(out)
    write_text(out, "".join(map(json_line, rows)))


def check_written(out: Path) -> None:
    """Raise UserError for a file name with which the tools write no manifest."""
    if out.suffix != ".jsonl":
        raise UserError(f"{shown(out)}: manifests are written as .jsonl",
                        f"give --out (of split: --train, --heldout) a name such as {shown(out.with_suffix('.jsonl'))}")


def new_ids(entries: Iterable[Entry], folder: Path, prefix: str = "") -> dict[str, str]:
    """The ids of a manifest's entries once they stand in `folder`; one without an id goes by its path from there."""
    return {entry.id: prefix + (entry.id if entry.values.get("id") else _normal(_named(entry, "video", folder)))
            for entry in entries}


def _named(entry: Entry, column: str, folder: Path) -> str:
    """How `folder` calls a file of the entry: as written where that leads there as well."""
    name: str = entry.values[column]
    stays = is_url(name) or Path(name).is_absolute() or entry.folder == absolute(folder)
    return name if stays else relative(Path(entry.where(column)), absolute(folder))


def moved(entry: Entry, folder: Path, ids: Mapping[str, str]) -> dict[str, Any]:
    """The entry's values as a manifest in `folder` writes them, with new ids as `ids` maps them."""
    values = entry.values | {column: _named(entry, column, folder) for column in MEDIA if entry.values.get(column)}
    if values.get("id"):
        values["id"] = ids[entry.id]
    if values.get("duplicate_of"):
        values["duplicate_of"] = ids.get(str(values["duplicate_of"]), values["duplicate_of"])
    return values


def sidecars(clips: Iterable[Path], others: Iterable[Path]) -> tuple[dict[Path, list[Path]], list[Path]]:
    """(the texts of each clip, NAME.txt before NAME.*.txt; texts of no clip). The longest NAME has it."""
    named: dict[Path, dict[str, list[Path]]] = defaultdict(dict)
    for clip in clips:
        named[clip.parent].setdefault(clip.stem, []).append(clip)
    stems = {folder: Stems(clips_of) for folder, clips_of in named.items()}
    texts, strays = defaultdict(list), []
    for text in sorted(file for file in others if file.suffix.lower() == ".txt"):
        stem = stems[text.parent].owner(text.name) if text.parent in stems else ""
        for clip in named[text.parent][stem] if stem else ():
            texts[clip].append(text)
        strays += [] if stem else [text]
    return {clip: sorted(some, key=lambda text: folded(text.stem) != folded(clip.stem))
            for clip, some in texts.items()}, strays


def captions_in(texts: Iterable[Path]) -> tuple[list[str], str]:
    """(what these files say, each text once; '') or ([], which of them cannot be read)."""
    found = []
    for path in texts:
        try:
            found.append(one_line(text_of(path.read_bytes())))
        except (OSError, ValueError) as error:
            return [], f"its caption {path.name} cannot be read: {error}"
    return list(dict.fromkeys(filter(None, found))), ""


def has(trigger: str, text: str) -> bool:
    """Whether the trigger stands in the text as a word of its own, in this case."""
    return not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.ASCII) is not None
