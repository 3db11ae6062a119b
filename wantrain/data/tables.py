"""Rows of manifests as others write them: JSON lines and arrays, CSV of any separator, in UTF-8, UTF-16 or cp1252.

(Without `datasets`, so that worker processes start at once.)
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from wantrain.data import cameras, sound
from wantrain.files import of_windows
from wantrain.terms import IMAGE_SUFFIXES, PARTNERS, VIDEO_SUFFIXES

MEDIA = ("video", *PARTNERS)
COLUMNS = (*MEDIA, "caption", "captions", "id", "start_s", "end_s", "duplicate_of")
"""What a row may say; every other column is a measurement, and a number."""

TEXTS = (*MEDIA, "caption", "captions", "id", "duplicate_of")
"""Those of them whose cells stay texts in a table without types."""

ALIASES = {
    **{kind: (f"{kind}_path", f"{kind}_file") for kind in PARTNERS},
    "video": ("video_path", "video_file", "file_name", "filename", "file", "file_path", "filepath", "path", "image",
              "image_path", "image_file", "media", "media_path"),
    "caption": ("text", "prompt", "description"),
}
"""Other tools' names of our columns: taken where a row has one of them and not ours."""

SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES

_OTHERS = {"camera": frozenset({cameras.SUFFIX}), "audio": sound.SUFFIXES | VIDEO_SUFFIXES}


def suffixes_of(kind: str) -> frozenset[str]:
    """Endings of the files of one kind of media."""
    return _OTHERS.get(kind, SUFFIXES)


JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")

SEPARATORS = ",;\t|"

Row = Mapping[str, Any]

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

_LETTERS = "àâäáãåæçèéêëìíîïñòóôöøœùúûüÿßÀÂÄÁÃÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÖØŒÙÚÛÜ"
_SIGNS = "\u2018\u2019\u201c\u201d\u2013\u2014…«»°·•€£©®™\xa0"
_CP1252 = re.compile(rf"(?:[\0-\x7f{_SIGNS}]|éé|[{_LETTERS}](?![{_LETTERS}]))*")
"""Western text: other code pages have letters here that are seldom alone, or signs that are not in this list."""

_BLANK_LETTERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"
"""Characters of no width that Unicode does not count among its formats."""


def text_of(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16, UTF-32 or cp1252 where that is certain. ValueError where it is not."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding).lstrip("\ufeff")
    for encoding, zeros, others in (("utf-16-le", data[1::2], data[::2]), ("utf-16-be", data[::2], data[1::2])):
        if 2 * zeros.count(0) > len(zeros) and 0 not in others:
            return data.decode(encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("cp1252", errors="replace")
        num_letters = sum(c.isascii() and c.isalpha() for c in text)
        if _CP1252.fullmatch(text) and num_letters >= 3 * sum(not c.isascii() for c in text):
            return text
        around = text[max(0, error.start - 20): error.start + 20]
        raise ValueError(f"not UTF-8, and no other encoding is certain; as cp1252 it would say {around!r} at byte "
                         f"{error.start}: save it as UTF-8, e.g. iconv -f CP1252 -t UTF-8 OLD > NEW") from error


def one_line(text: str) -> str:
    """The text on one line; '' where it has no visible character."""
    line = " ".join(text.replace("\ufeff", " ").split())
    return line if any(unicodedata.category(c)[0] not in "ZCM" and c not in _BLANK_LETTERS for c in line) else ""


def rows_of(data: bytes, suffix: str, names: Iterable[str] = ()) -> Iterator[tuple[str, Row | str]]:
    """(place, row, or what is wrong there) of a manifest whose file ends in one of JSON_SUFFIXES or CSV_SUFFIXES.

    `names` are further names of columns that the source's user knows. ValueError where the whole cannot be read.
    """
    text = text_of(data)
    return _of_csv(text, {*names}) if suffix.lower() in CSV_SUFFIXES else _of_json(text)


def _of_json(text: str) -> Iterator[tuple[str, Row | str]]:
    lines = ((number, line) for number, line in enumerate(io.StringIO(text, newline=None), 1)
             if line.strip(" \t\r\n\ufeff"))
    first, rest = next(lines, (1, "")), lines
    if first[1].lstrip("\ufeff \t").startswith("["):
        yield from _flat(_values(text))
        return
    if isinstance(_parsed(first[1]), str):  # objects over several lines
        try:
            together = list(_flat(_values(text)))
        except ValueError:
            together = []
        if together and not any(isinstance(row, str) for _, row in together):
            yield from together
            return
    if first[1]:
        yield from _flat((number, _parsed(line)) for number, line in (first, *rest))


def _flat(values: Iterable[tuple[int, Any]]) -> Iterator[tuple[str, Row | str]]:
    """Rows from the values of lines; an object {NAME.mp4: caption, ...} is a row for each name."""
    for number, value in values:
        if isinstance(value, dict) and value and all(PurePosixPath(name).suffix.lower() in SUFFIXES for name in value):
            for name, said in value.items():
                yield f"line {number}", {"video": name, "captions" if isinstance(said, list) else "caption": said}
        elif isinstance(value, dict | str):
            yield f"line {number}", value
        else:
            yield f"line {number}", "expected an object with video and caption"


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON values that follow each other, in an array or without one; a fault ends them."""
    decoder, gap = json.JSONDecoder(object_pairs_hook=_once), re.compile(r"[\s,\ufeff]*")
    at = _end(gap, text, 0)
    is_array = text.startswith("[", at)
    at, line, counted = at + is_array, 1, 0
    while True:
        at = _end(gap, text, at)
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text) or (is_array and text[at] == "]"):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON: {error}"
            return
        yield line, value if isinstance(value, dict) else "expected an object with video and caption"
    if is_array and not re.fullmatch(r"\][\s\ufeff]*", text[at:]):
        yield line, "the array ends in the middle" if at == len(text) else "something follows the array"


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the pattern, which always matches, ends that begins here."""
    found = pattern.match(text, at)
    assert found is not None, "the pattern matches the empty text"
    return found.end()


def _parsed(line: str) -> Any:
    """The line's value, or what is wrong with it."""
    try:
        value = json.loads(line.strip(" \t\r\n\ufeff").removesuffix(","), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return "expected an object with video and caption" if isinstance(value, str) else value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, of which JSON would lose one where a name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{name!r} stands twice in one object")
    return found


def _of_csv(text: str, names: set[str]) -> Iterator[tuple[str, Row | str]]:
    file = io.StringIO(text, newline="")
    begin, skipped = 0, 0
    if re.fullmatch(r"sep=.[\r\n]*", file.readline(), re.IGNORECASE):
        begin, skipped = file.tell(), 1  # as spreadsheets write it
    file.seek(begin)
    head = next((line for line in file if line.strip()), "")
    file.seek(begin)
    separator = _separator(head, names)
    reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            place = f"line {reader.line_num + skipped}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip(" \t\ufeff") for cell in cells]
                if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
                    raise ValueError(f"column {twice[0]!r} stands twice: {', '.join(header)}")
            elif any(cells[len(header):]):
                yield place, f"{len(cells)} cells for {len(header)} columns: a text with {separator!r} in it stands " \
                             "in double quotes"
            else:
                row = dict(zip(header, cells, strict=False))
                yield place, {name: row.get(name) for name in header if name}
    except csv.Error as error:
        yield f"line {reader.line_num + skipped}", f"no CSV: {error}; is a double quote missing or one too many?"


def _separator(head: str, names: set[str]) -> str:
    """What parts the cells: of SEPARATORS the one that makes most known columns of the header, else most columns."""
    known = {*COLUMNS, *(name for some in ALIASES.values() for name in some), *map(_plain, names)}

    def found(separator: str) -> tuple[int, int]:
        cells = [_plain(cell.strip(' "\r\n')) for cell in head.split(separator)]
        return len(known & {*cells}), len(cells)

    return max(SEPARATORS, key=found)


def _plain(name: str) -> str:
    return name.strip(" \t\ufeff").casefold().replace(" ", "_").replace("-", "_")


def columns_of(names: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our names of columns -> theirs, of a row with these names: as `columns` says, else by the same name in any case,
    else by ALIASES. ValueError where two are the same.
    """
    given = list(names)
    found = {ours: theirs for ours, theirs in columns.items() if theirs in given}
    free = [name for name in given if name not in found.values()]
    for name in free:
        ours = _plain(name)
        if ours in COLUMNS and ours not in columns:
            if ours in found:
                raise ValueError(f"{found[ours]!r} and {name!r} are the same column")
            found[ours] = name
    for ours, others in ALIASES.items():
        theirs = [name for name in free if _plain(name) in others and name not in found.values()]
        if len(theirs) == 1 and ours not in found and ours not in columns:
            found[ours] = theirs[0]
    return found


def proposed(row: Row) -> dict[str, str]:
    """Which of a row's columns are most likely the video and the caption: by endings of files, then by length."""
    texts = {name: value for name, value in row.items() if isinstance(value, str) and name}
    files = [name for name, value in texts.items()
             if PurePosixPath(value.replace("\\", "/").strip()).suffix.lower() in SUFFIXES]
    others = sorted((name for name in texts if name not in files), key=lambda name: -len(texts[name]))
    return {"video": files[0] if files else "NAME", "caption": others[0] if others else "NAME"}


def lacking(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(columns that the rows have, those of "video" and "caption" that no column is known to be)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = {ours for row in rows for ours in columns_of(row, columns)}
    return names, [ours for ours in ("video", "caption") if not known & {ours, f"{ours}s"}]


def number_of(column: str, value: Any) -> float | None:
    """The number in a cell, None for an empty cell. Raises ValueError for anything else."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) and column in COLUMNS:
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{column} is a number, not {value!r}" if column in COLUMNS else f"unknown column {column!r} "
                         f"with {value!r}; known: {', '.join(COLUMNS)}; any other holds numbers (the source's "
                         "columns={OURS: THEIRS} renames)") from None
    if math.isinf(number):
        raise ValueError(f"{column} is a number, not {value!r}")
    return None if math.isnan(number) else number


def captions_of(row: Row) -> list[str]:
    """Every caption of the clip, on one line each; empty where the row has none."""
    further = row.get("captions") or []
    if isinstance(further, str) and further.startswith("["):  # a cell of a .csv
        try:
            further = json.loads(further)
        except RecursionError as error:
            raise ValueError("captions is nested too deep") from error
    if not isinstance(further, list) or not all(isinstance(text, str) for text in further):
        raise ValueError("captions is a list of texts")
    if not isinstance(row.get("caption"), str | None):
        raise ValueError(f"caption is a text, not {row['caption']!r}")
    first = [] if row.get("caption") is None else [row["caption"]]
    return list(dict.fromkeys(one_line(text) for text in [*first, *further]))


def spelled(folder: Path, name: str) -> str:
    """The path as the disk has it: as written, or without blanks around it, as one of Windows is written here, or with
    another form of accents; as written where none is there. ValueError where the disk refuses to look.
    """
    names = [name, name.strip(), of_windows(name.strip())]
    names += [unicodedata.normalize(form, names[-1]) for form in ("NFC", "NFD")]
    try:
        return next((one for one in dict.fromkeys(names) if (folder / one).is_file()), name)
    except OSError as error:
        raise ValueError(f"{folder / name}: {error.strerror}") from error
