"""Clips with captions, from whatever holds them. `datasets` is imported here only.

A folder with sidecars; .jsonl, .csv or .parquet; WebDataset shards (.tar); each local or behind an fsspec URL
(s3://, hf://); and data sets of the hub (hf://datasets/OWNER/NAME). All become the same rows, and rows become clips.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import httpx2
from pyarrow import parquet

from wantrain.data.shards import read_shards
from wantrain.files import atomic_path, owner
from wantrain.terms import IMAGE_SUFFIXES, PARTNERS, VIDEO_SUFFIXES, Clip, Media, Remote, UserError

MEDIA = ("video", *PARTNERS)
COLUMNS = (*MEDIA, "caption", "captions", "id", "start_s", "end_s", "duplicate_of")
"""What a row may say; every other column is a measurement, and a number."""

SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES

datasets.disable_progress_bars()

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where clips come from and how they are used.

    `columns` maps our names of columns to those of the source. `fetched` is the folder for media that stand in rows
    as bytes.
    """

    name: str
    path: str
    repeats: float = 1.0
    speed: float = 1.0
    preserve: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    fetched: Path = Path("cache/fetched")

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


def read(source: Source) -> list[Clip]:
    """All clips of one source. Every fault of the manifest is reported at once, with its place."""
    clips: list[Clip] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    try:
        for place, row in _rows(source):
            clip, fault = _clip(row, source)
            if clip is not None and (earlier := seen.setdefault(clip.id, place)) != place:
                fault = fault or f"duplicate id {clip.id!r} (also {earlier})"
            if fault or clip is None:
                faults.append(f"{place}: {fault}")
            else:
                clips.append(clip)
    except (OSError, ImportError, ValueError, csv.Error, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"source {source.name!r}: {source.path} cannot be read: {error}",
                        f"check data.sources.{source.name}.path and your credentials") from error
    if faults:
        raise UserError(f"source {source.name!r} ({source.path}) has {len(faults)} fault(s):\n  " + "\n  ".join(faults),
                        "mend these places (nothing was dropped or changed), then run the same command again")
    if not clips:
        raise UserError(f"source {source.name!r}: no clips in {source.path}", "put videos or images with .txt captions "
                        f"there; known endings: {', '.join(sorted(SUFFIXES))}")
    return clips


def _rows(source: Source) -> Iterator[tuple[str, Row]]:
    """(place for error messages, row) of any kind of source."""
    path, suffix = source.path, PurePosixPath(source.path).suffix
    if path.startswith("hf://datasets/") and path.count("/") == 4:
        yield from _table(datasets.load_dataset(path.removeprefix("hf://datasets/"), split="train"), source)
    elif suffix == ".tar":
        yield from read_shards(path)
    elif not source.is_remote and not Path(path).expanduser().exists():
        raise UserError(f"source {source.name!r}: {path} does not exist", f"set data.sources.{source.name}.path to a "
                        "folder of clips with .txt captions, a .jsonl, .csv, .parquet or .tar, or a URL")
    elif suffix in (".jsonl", ".csv"):
        yield from _lines(path)
    elif suffix == ".parquet":
        if source.is_remote:  # datasets keeps what it fetched, also where it has changed
            with fsspec.open(path, "rb") as file:
                yield from _table(datasets.Dataset(parquet.read_table(file)), source)
        else:
            yield from _table(datasets.Dataset.from_parquet(path), source)
    elif source.is_remote or Path(path).expanduser().is_dir():
        yield from _folder(path)
    else:
        raise UserError(f"source {source.name!r}: {path} is no folder, .jsonl, .csv, .parquet or .tar",
                        "give a folder with sidecar .txt captions or convert the manifest")


def _table(table: datasets.Dataset, source: Source) -> Iterator[tuple[str, Row]]:
    """Rows of a table whose videos and images stay encoded. Text columns that we do not know are left out: sets that
    others made have many.
    """
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Video | datasets.Image):
            table = table.cast_column(name, type(feature)(decode=False))
    known = {*COLUMNS, *source.columns.values()}
    for number, row in enumerate(table):
        yield f"row {number}", {k: v for k, v in row.items() if k in known or isinstance(v, int | float)}


def _lines(path: str) -> Iterator[tuple[str, Row]]:
    with fsspec.open(path, "rt", encoding="utf-8-sig", newline="") as file:
        if path.endswith(".csv"):
            reader = csv.DictReader(file)
            yield from ((f"line {reader.line_num}", row) for row in reader)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {"fault": f"not JSON: {error}"}
    return row if isinstance(row, dict) else {"fault": "expected an object with video and caption"}


def _folder(path: str) -> Iterator[tuple[str, Row]]:
    """Media with their sidecars NAME.txt and NAME.*.txt (further captions), and partners in control/, mask/, ..."""
    filesystem, root = fsspec.core.url_to_fs(path)

    def names(folder: str) -> list[str]:
        there = filesystem.ls(folder, detail=False) if filesystem.isdir(folder) else []
        return sorted(PurePosixPath(name).name for name in there)

    here = names(root)
    media = {name: PurePosixPath(name).stem for name in here if PurePosixPath(name).suffix.lower() in SUFFIXES}
    stems, texts = {*media.values()}, dict[str, list[str]]()
    for name in here:
        if name.endswith(".txt") and filesystem.isfile(f"{root}/{name}"):
            stem = owner(name, stems)
            texts.setdefault(stem, []).insert(0 if name == f"{stem}.txt" else len(texts.get(stem, [])), name)
    partners = {kind: {PurePosixPath(n).stem: f"{kind}/{n}" for n in names(f"{root}/{kind}")
                       if PurePosixPath(n).suffix.lower() in SUFFIXES} for kind in PARTNERS}
    for name, stem in media.items():
        row = {"video": name, **{kind: by_stem[stem] for kind, by_stem in partners.items() if stem in by_stem}}
        try:
            yield name, row | {"captions": [filesystem.cat_file(f"{root}/{text}").decode("utf-8-sig")
                                            for text in texts.get(stem, [])]}
        except UnicodeDecodeError as error:
            yield name, {"fault": f"a caption of it is not UTF-8: {error}"}


def _clip(given: Row, source: Source) -> tuple[Clip | None, str]:
    """The row as a clip, and what is wrong with it ('' if nothing)."""
    row = {**given} | {ours: given.get(theirs) for ours, theirs in source.columns.items()}
    theirs = {name for ours, name in source.columns.items() if name != ours}
    video = row.get("video")
    if not video or row.get("fault"):
        return None, str(row.get("fault") or "no video")
    name = _name(video)
    try:
        name.encode()  # UnicodeEncodeError is a ValueError
        measures = {str(c): _number(str(c), v) for c, v in row.items() if c not in COLUMNS and c not in theirs}
        start_s, end_s = _number("start_s", row.get("start_s")) or 0.0, _number("end_s", row.get("end_s"))
        captions, where = _captions(row), {kind: _media(row.get(kind), source) for kind in MEDIA}
    except ValueError as error:
        return None, str(error)
    clip = Clip(f"{source.name}/{row.get('id') or name}", where["video"] or Path(), captions[0] if captions else "",
                source.name, source.repeats, start_s, end_s, tuple(captions[1:]),
                {kind: m for kind in PARTNERS if (m := where[kind]) is not None}, source.speed, measures,
                source.preserve)
    if not captions:
        return clip, f"no caption for {name} (a sidecar {PurePosixPath(name).with_suffix('.txt').name} or a caption " \
                     "column)"
    if not all(captions):
        return clip, f"empty caption for {name}"
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        return clip, f"span {start_s}..{end_s} s is empty"
    return clip, ""


def _name(media: Any) -> str:
    """How a row's medium is called."""
    if isinstance(media, Mapping):
        return str(media.get("path") or _name(media.get("bytes")))
    if isinstance(media, bytes):
        return hashlib.blake2b(media, digest_size=8).hexdigest()
    return media.name if isinstance(media, Remote) else str(media)


def _number(column: str, value: Any) -> float | None:
    """The number, None where there is none. ValueError for anything else."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{column} is a number, not {value!r}" if column in COLUMNS else f"unknown column {column!r} "
                         f"with {value!r}; known: {', '.join(COLUMNS)}; any other holds numbers") from None
    if math.isinf(number):
        raise ValueError(f"{column} is a number, not {value!r}")
    return None if math.isnan(number) else number


def _captions(row: Row) -> list[str]:
    """Every caption of the clip, on one line each; empty where the row has none."""
    further = row.get("captions") or []
    if isinstance(further, str) and further.startswith("["):  # a cell of a .csv
        further = json.loads(further)
    if not isinstance(further, list) or not all(isinstance(text, str) for text in further):
        raise ValueError("captions is a list of texts")
    if not isinstance(row.get("caption"), str | None):
        raise ValueError(f"caption is a text, not {row['caption']!r}")
    first = [] if row.get("caption") is None else [row["caption"]]
    return list(dict.fromkeys(" ".join(text.split()) for text in [*first, *further]))


def _media(value: Any, source: Source) -> Media | None:
    """Where the bytes are. ValueError where they are not."""
    if isinstance(value, Mapping | bytes):
        data = value if isinstance(value, bytes) else value.get("bytes")
        name = "" if isinstance(value, bytes) else str(value.get("path") or "")
        if not isinstance(data, bytes | None):
            raise ValueError(f"bytes are no bytes: {data!r}")
        return _kept(data, PurePosixPath(name).suffix, source.fetched) if data else _media(name, source)
    if not value or isinstance(value, Remote):
        return value or None
    name = str(value)
    remote = name if "://" in name else None
    if source.path.startswith("hf://datasets/") and Path(name).is_absolute() and Path(name).is_file():
        return Path(name)  # datasets has downloaded it
    if source.is_remote and not remote:
        filesystem, root = fsspec.core.url_to_fs(source.path)
        folder = root if filesystem.isdir(root) else str(PurePosixPath(root).parent)
        remote = filesystem.unstrip_protocol(f"{folder}/{name}")
    if remote:
        filesystem, place = fsspec.core.url_to_fs(remote)
        if not filesystem.isfile(place):
            raise ValueError(f"missing file {remote}")
        return Remote(remote, PurePosixPath(name).name, str(filesystem.ukey(place)))
    root = Path(source.path).expanduser()
    path = (root if root.is_dir() else root.parent) / name
    if not path.is_file():
        raise ValueError(f"missing file {path}")
    return path


def _kept(data: bytes, suffix: str, folder: Path) -> Path:
    """Bytes from a row as a file, named by its content."""
    if suffix.lower() not in SUFFIXES:
        suffix = ".png" if data[:4] in (b"\x89PNG", b"RIFF") or data[:3] == b"\xff\xd8\xff" else ".mp4"
    path = folder / f"{hashlib.blake2b(data, digest_size=16).hexdigest()}{suffix.lower()}"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path
