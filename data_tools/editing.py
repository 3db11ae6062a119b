"""A manifest whose captions a person edits: every other byte stays as it is."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.command import shown, stamp
from data_tools.rows import read_entries, understood
from wantrain.data.tables import Row, columns_of, number_of, rows_of
from wantrain.files import atomic_path, digest_text, json_line
from wantrain.terms import UserError


class Conflict(Exception):
    """Something else writes the manifest at this moment."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one row as it stands in the manifest, with its end of line; `values` None where there is no row in it
    (an empty line, the header of a .csv, or a fault).
    """

    text: str
    values: dict[str, Any] | None = None
    fault: str = ""

    def value(self, column: str) -> Any:
        """What an edited column says; a caption or captions that are not there are empty."""
        values = self.values or {}
        default = {"caption": "", "captions": []}.get(column)
        return values[column] if values.get(column) is not None else default


@dataclass(frozen=True, slots=True)
class Edit:
    """Columns of the row `key`: their values when the person began to edit, and the new values."""

    key: str
    was: Mapping[str, Any]
    now: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Content:
    """A manifest as it was when the file had this `stamp`.

    `places` says where in `pieces` each row is, by a key that no edit here changes; equal rows have keys of their own.
    """

    stamp: tuple[int, int, int]
    pieces: list[Piece]
    places: dict[str, int]

    @property
    def faults(self) -> list[str]:
        return [piece.fault for piece in self.pieces if piece.fault]


def remedy(path: Path) -> str:
    """What to do with what cannot be edited as it is."""
    if path.is_dir():
        return f"python -m data_tools.manifest build {shlex.quote(shown(path))} --out manifest.jsonl"
    with contextlib.suppress(UserError):
        entries, faults = read_entries(path)
        if entries and not faults:
            files = [shown(path), "--out", shown(path.with_name(f"{path.stem}_lines.jsonl"))]
            return f"python -m data_tools.manifest merge {shlex.join(files)}    makes a row a line, in UTF-8: edit that"
    return "mend these lines (nothing was changed), then run the same command again"


class Manifest:
    """A .jsonl or .csv that other programs may change at any time."""

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in (".jsonl", ".csv"):
            raise UserError(f"{shown(path)} is no manifest that can be edited: .jsonl and .csv can", remedy(path))
        self.path = path.resolve()
        self.is_csv = path.suffix.lower() == ".csv"
        self._lock = threading.Lock()
        self._content = self.read()

    def read(self) -> Content:
        """The file as it is now. UserError where it cannot be read."""
        seen, places = stamp(self.path), dict[str, int]()
        try:
            text = self.path.read_bytes().decode("utf-8")
            pieces = list((_records if self.is_csv else _lines)(text, self.path))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{shown(self.path)} cannot be read: {error}", remedy(self.path)) from error
        for place, piece in enumerate(pieces):
            if piece.values is not None:
                key = digest_text(*(piece.values.get(column) for column in ("video", "id", "start_s", "end_s")))
                while key in places:
                    key = digest_text(key)
                places[key] = place
        return Content(seen, pieces, places)

    def content(self) -> Content:
        """The same as `read`, but the file is read again only if it has changed."""
        if self._content.stamp != stamp(self.path):
            self._content = self.read()
        return self._content

    def save(self, edits: Sequence[Edit]) -> tuple[dict[str, Piece | None], list[str]]:
        """(rows of these edits as they are in the file now, None where gone; keys of the edits that were refused).

        An edit is refused whole where a column neither says what it `was` nor what it shall be `now`. Raises Conflict,
        and UserError where the file cannot be read or written; then nothing was saved.
        """
        with self._lock:
            found, refused = self.read(), []
            pieces = list(found.pieces)
            for edit in edits:
                place = found.places.get(edit.key)
                if place is None or any(pieces[place].value(column) not in (edit.was[column], now)
                                        for column, now in edit.now.items()):
                    refused.append(edit.key)
                elif any(pieces[place].value(column) != now for column, now in edit.now.items()):
                    (_apply_csv if self.is_csv else _apply_json)(pieces, place, edit.now)
            written = found.stamp
            if pieces != found.pieces:
                written = self._write("".join(piece.text for piece in pieces), found.stamp)
            self._content = Content(written, pieces, found.places)
            return {e.key: pieces[found.places[e.key]] if e.key in found.places else None for e in edits}, refused

    def _write(self, text: str, seen: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the stamp of what was written."""
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(text.encode("utf-8"))
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())  # here, for it takes long: after the look only the renaming is left
            written = stamp(temporary)
            if stamp(self.path) != seen:
                raise Conflict
        return written


def _apply_json(pieces: list[Piece], place: int, now: Mapping[str, Any]) -> None:
    old = pieces[place]
    row = next(dict(row) for _, row in rows_of(old.text.encode(), ".jsonl") if not isinstance(row, str))
    indent, bare = old.text[:old.text.index("{")], old.text.rstrip("\r\n")
    line = json_line(_edited(row, _theirs(row, now)))
    pieces[place] = Piece(indent + line.rstrip("\n") + old.text[len(bare):], _edited(old.values or {}, now))


def _apply_csv(pieces: list[Piece], place: int, now: Mapping[str, Any]) -> None:
    head, old = pieces[0].text, pieces[place]
    columns = next(csv.reader([head.lstrip("\ufeff")]))
    cells = next(csv.reader(io.StringIO(old.text, newline="")))
    theirs = _theirs(columns, now)
    if new := [column for column, value in theirs.items() if column not in columns and value is not None]:
        bare = head.rstrip("\r\n")  # rows without the new cells stay as they are: absent means empty
        pieces[0] = Piece(",".join([bare, *new]) + head[len(bare):])
    row = {**dict(zip(columns, cells, strict=False)), **theirs}
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=old.text[len(old.text.rstrip("\r\n")):]).writerow(
        [row.get(column) for column in columns + new])
    pieces[place] = Piece(file.getvalue(), {**(old.values or {}), **now})


def _theirs(columns: Iterable[str], now: Mapping[str, Any]) -> dict[str, Any]:
    """What shall stand in the row, by the names that it has for our columns."""
    names = columns_of(columns, {})
    return {names.get(column, column): value for column, value in now.items()}


def _edited(row: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what shall stand in it. A mark or captions that were taken out leave no column; a caption does."""
    return {column: value for column, value in {**row, **now}.items()
            if column not in now or isinstance(value, str) or value not in (None, [])}


def _lines(text: str, path: Path) -> Iterator[Piece]:
    """The pieces of JSON lines."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        rows = [row for _, row in rows_of(line.encode(), ".jsonl")]
        row = rows[0] if len(rows) == 1 else f"{len(rows)} rows on one line"
        yield _piece(line, row, path, number) if rows else Piece(line)


def _records(text: str, path: Path) -> Iterator[Piece]:
    """The pieces of a .csv: its header, then a record each, which may have several lines."""
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines)
    columns, begin = [c.lstrip("\ufeff") for c in next(reader, [])], reader.line_num
    is_known = "video" in columns_of(columns, {})
    yield Piece("".join(lines[:begin]), None, "" if is_known else "line 1: no column video between commas")
    for cells in reader if is_known else ():
        piece, begin = "".join(lines[begin:reader.line_num]), reader.line_num
        row = {name: cell for name, cell in itertools.zip_longest(columns, cells) if name}
        fault = "more cells than columns" if len(cells) > len(columns) else ""
        yield _piece(piece, fault or row, path, begin) if any(cell.strip() for cell in cells) else Piece(piece)


def _piece(text: str, row: Row | str, path: Path, line: int) -> Piece:
    """The piece of a row, with what training's reader understands of it, or the fault why it cannot be edited."""
    try:
        if isinstance(row, str):
            raise ValueError(row)
        values = understood(row, path, "").values
        number_of("keep", values.get("keep"))
    except (ValueError, RecursionError) as error:
        return Piece(text, None, f"line {line}: {error}")
    return Piece(text, values)
