"""Rows of a manifest as the tools read and write them: every column kept, every fault with its line."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.command import absolute, json_line, relative, shown
from wantrain.files import write_text
from wantrain.terms import PARTNERS, UserError

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("video", *PARTNERS), (str, "a path")), "caption": (str, "a text"),
    "captions": (list, "a list of texts"), "start_s": ((int, float), "a number of seconds"),
    "end_s": ((int, float), "a number of seconds"), "id": ((str, int), "a text"), "duplicate_of": ((str, int), "an id")}
"""What the columns of `wantrain.data.manifest` hold; any other is a measurement. (Its module would be imported by every
worker process, and takes seconds.)"""

LARGEST = sys.float_info.max
"""Integers beyond it, of which JSON has any, are no numbers to compute with."""

MEDIA = ("video", *PARTNERS)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a manifest: `values` as they are written, `place` for messages, `folder` that its paths begin at."""

    folder: Path
    place: str
    values: dict[str, Any]

    @property
    def line(self) -> str:
        """The place without its file."""
        return " ".join(self.place.split(" ")[-2:])

    @property
    def id(self) -> str:
        return str(self.values.get("id") or self.values["video"])

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the source; infinite for 'to its end'."""
        end_s = self.values.get("end_s")
        return float(self.values.get("start_s") or 0), math.inf if end_s is None else float(end_s)

    @property
    def clip(self) -> tuple[str, float, float]:
        """What makes it the same clip in another manifest: the file, its links followed, and the span."""
        return _real(self.where("video")), *self.span

    @property
    def captions(self) -> list[str]:
        """Every caption that says something, on one line each."""
        texts = [self.values.get("caption") or "", *(self.values.get("captions") or [])]
        return list(dict.fromkeys(line for text in texts if (line := " ".join(text.split()))))

    def where(self, column: str) -> str:
        """The path from the root, or the URL, of a video or one of its partners; '' where there is none."""
        name = self.values.get(column) or ""
        return _located(self.folder, name) if name and not is_url(name) else name


@functools.cache  # a film has many rows, and finding the way is slow
def _located(folder: Path, name: str) -> str:
    return str(absolute(folder / name))


@functools.cache
def _real(where: str) -> str:
    return where if is_url(where) else os.path.realpath(where)


def is_url(name: str) -> bool:
    """Whether it names what is on another machine, which is not looked into here."""
    return "://" in name


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """(rows, faults with their lines) of a .jsonl, .csv or .parquet. UserError where the file itself cannot be read."""
    rows, faults = [], []
    try:
        for place, values in _lines(path):
            fault = values if isinstance(values, str) else _fault(values)
            if fault or isinstance(values, str):
                faults.append(f"{shown(path)} {place}: {fault}")
            else:
                rows.append(Row(path.absolute().parent, f"{shown(path)} {place}", values))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}", "give a .jsonl, .csv or .parquet") from error
    return rows, faults


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, the row or what is wrong with the line)."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        yield from ((f"row {number}", row) for number, row in enumerate(parquet.read_table(path).to_pylist()))
        return
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{shown(path)} is no manifest: .jsonl, .csv and .parquet are read",
                        "make one of a folder: python -m data_tools.manifest build FOLDER --out manifest.jsonl")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            yield from ((f"line {reader.line_num}", _of_cells(row)) for row in reader)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not an object with video and caption"


def _of_cells(row: Mapping[str | None, Any]) -> dict[str, Any] | str:
    if None in row:
        return "more cells than columns"
    return {str(column): _cell(str(column), text) for column, text in row.items() if text or column == "caption"}


def _cell(column: str, text: str | None) -> Any:
    kind = KINDS.get(column, (float, ""))[0]
    if kind is str or kind == (str, int):
        return text or ""
    for parse in (int, float, json.loads):
        with contextlib.suppress(ValueError, RecursionError):
            return parse(text or "")
    return text


def _fault(values: Mapping[str, Any]) -> str:
    """Why nothing can be done with a row, '' if something can."""
    if not values.get("video"):
        return "no video"
    if beyond := [column for column, value in values.items() if isinstance(value, int) and abs(value) > LARGEST]:
        return f"{beyond[0]} is a number beyond {LARGEST:.0e}"
    for column, (kind, wanted) in KINDS.items():
        value = values.get(column)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            return f"{column} is {wanted}, not {str(value)[:40]!r}"
        if column in MEDIA and "\0" in (value or ""):
            return f"{column}: a path cannot hold the character NUL"
    if not all(isinstance(text, str) for text in values.get("captions") or []):
        return "captions is a list of texts"
    start_s, end_s = Row(Path(), "", dict(values)).span
    return "" if 0 <= start_s < end_s else f"span {start_s:g}..{end_s:g} s is empty"


def sound_rows(paths: Iterable[Path]) -> list[list[Row]]:
    """The rows of each manifest. The faults of all of them are one UserError."""
    found = [read_rows(path) for path in paths]
    refuse([fault for _, faults in found for fault in faults], "mend these lines")
    return [rows for rows, _ in found]


def refuse(faults: Sequence[str], next_step: str) -> None:
    if faults:
        raise UserError(f"{len(faults)} fault(s), nothing was written:\n  " + "\n  ".join(faults),
                        f"{next_step}, then run the same command again")


def write_rows(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    check_written(out)
    write_text(out, "".join(map(json_line, rows)))


def check_written(out: Path) -> None:
    """UserError for a name that no manifest is written under."""
    if out.suffix != ".jsonl":
        raise UserError(f"{shown(out)}: manifests are written as .jsonl", f"{out.with_suffix('.jsonl')}")


def new_ids(rows: Iterable[Row], folder: Path, prefix: str = "") -> dict[str, str]:
    """The ids of a manifest's rows once they stand in `folder`; a row without an id goes by its path from there."""
    return {row.id: f"{prefix}{row.id}" if row.values.get("id") else _named(row, "video", folder) for row in rows}


def _named(row: Row, column: str, folder: Path) -> str:
    where = row.where(column)
    return where if is_url(where) else relative(Path(where), folder)


def moved(row: Row, folder: Path, ids: Mapping[str, str]) -> dict[str, Any]:
    """The row's values for a manifest in `folder`, with the ids that `ids` gives."""
    values = row.values | {column: _named(row, column, folder) for column in MEDIA if row.where(column)}
    if values.get("id"):
        values["id"] = ids[row.id]
    if values.get("duplicate_of"):
        values["duplicate_of"] = ids.get(str(values["duplicate_of"]), values["duplicate_of"])
    return values


def has(trigger: str, text: str) -> bool:
    """Whether the trigger stands in the text as a word of its own, in this case."""
    return not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.ASCII) is not None
