"""Clips with captions, from whatever holds them. `datasets` is imported here only.

A folder with sidecars; .jsonl, .csv or .parquet; WebDataset shards (.tar); each local or behind an fsspec URL
(s3://, hf://); and data sets of the hub (hf://datasets/OWNER/NAME). All become the same rows, and rows become clips.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from wantrain.data.folders import Account, read_folder
from wantrain.data.shards import read_shards
from wantrain.data.tables import (
    COLUMNS,
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    MEDIA,
    SUFFIXES,
    Row,
    captions_of,
    columns_of,
    lacking,
    number_of,
    proposed,
    rows_of,
    spelled,
    suffixes_of,
)
from wantrain.files import atomic_path, like
from wantrain.outside import remote_errors
from wantrain.terms import PARTNERS, Clip, Media, Remote, UserError

if TYPE_CHECKING:  # a folder of clips needs none of it
    import datasets


@dataclass(frozen=True, slots=True)
class ClipSource:
    """Where clips come from and how they are used.

    `columns` maps our names of columns to those of the source. `fetched` is the folder for media that stand in rows
    as bytes. `key` is the config's key of the path.
    """

    name: str
    path: str
    repeats: float = 1.0
    speed: float = 1.0
    preserve: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    fetched: Path = Path("cache/fetched")
    key: str = ""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine, whatever its name ends in."""
        return not self.is_remote and self.local.is_dir()

    @property
    def local(self) -> Path:
        """The path on this machine, `~` spelled out. ValueError for the home of nobody."""
        try:
            return Path(self.path).expanduser()
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    @property
    def path_key(self) -> str:
        return self.key or f"data.sources.{self.name}.path"

    @property
    def columns_key(self) -> str:
        """Where columns are renamed; '' where the config has no such key."""
        return "" if self.key else f"data.sources.{self.name}.columns"


@dataclass(frozen=True, slots=True)
class Listing:
    """The clips of a source, and an account of what else is in it."""

    clips: list[Clip]
    account: Account


def read(source: ClipSource) -> list[Clip]:
    """All clips of one source. Every fault of the manifest is reported at once, with its place."""
    return listed(source).clips


def listed(source: ClipSource) -> Listing:
    """All clips of one source, with an account of what else is in it. Raises UserError as `read` does."""
    account = Account()
    try:
        clips, faults = _sorted_out(source, list(_rows(source, account)))
    except remote_errors() as error:
        raise UserError(f"source {source.name!r}: {source.path} cannot be read: {error}",
                        f"check {source.path_key} and your credentials") from error
    about = "".join(f"\n  passed over: {line}" for line in account.lines())
    if faults:
        raise UserError(f"source {source.name!r} ({source.path}) has {len(faults)} fault(s):\n  " + "\n  ".join(faults)
                        + about, "mend these places (nothing was dropped or changed), then run the same command again")
    if not clips:
        raise UserError(f"source {source.name!r}: no clips in {source.path}{about}", "put videos or images with .txt "
                        f"captions there; known endings: {', '.join(sorted(SUFFIXES))}. Of folders within folders, "
                        "wantrain-manifest build makes a manifest")
    return Listing(clips, account)


def _sorted_out(source: ClipSource, rows: Sequence[tuple[str, Row | str]]) -> tuple[list[Clip], list[str]]:
    """(clips, faults with their places) of the rows."""
    clips: list[Clip] = []
    faults: list[str] = []
    ids: dict[str, str] = {}
    files: dict[str, str] = {}
    folder = _folder_of(source).absolute()
    for place, row in rows:
        clip, fault = (None, row) if isinstance(row, str) else _clip(row, source)
        if clip is not None:
            if clip.id in ids:
                fault = fault or f"duplicate id {clip.id!r} (also {ids[clip.id]})"
            elif isinstance(clip.path, Path):
                file = os.path.normpath(clip.path.absolute())
                has_own_id = file != os.path.normpath(folder / clip.id.removeprefix(f"{source.name}/"))
                if not has_own_id:
                    fault = fault or (f"duplicate: {file} is also {files[file]}" if file in files else "")
                    files.setdefault(file, place)
            ids.setdefault(clip.id, place)
        if fault or clip is None:
            faults.append(f"{place}: {fault}")
        else:
            clips.append(clip)
    if faults and not clips:
        _refuse_columns(source, [row for _, row in rows if not isinstance(row, str)], faults[0])
    return clips, faults


def _refuse_columns(source: ClipSource, rows: Sequence[Row], fault: str) -> None:
    """Raise UserError where no row has a column for the video, or none for the caption, and say what there is."""
    names, missing = lacking(rows, source.columns)
    if not missing or not names or {*names} <= {*COLUMNS}:
        return
    pairs = {**source.columns, **{ours: theirs for ours, theirs in proposed(rows[0]).items() if ours in missing}}
    said = "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in pairs.items()) + "}"
    raise UserError(f"source {source.name!r}: {source.path} has the columns {', '.join(map(repr, names))}, and none "
                    f"that is certainly the {' and the '.join(missing)}:\n  {fault}",
                    f"say which they are: {shlex.quote(f'{source.columns_key}={said}')}" if source.columns_key else
                    f"give them these names in the file: {', '.join(missing)}")


def _rows(source: ClipSource, account: Account) -> Iterator[tuple[str, Row | str]]:
    """(place for error messages, row, or what is wrong there) of any kind of source."""
    path, suffix = source.path, PurePosixPath(source.path).suffix.lower()
    if source.is_folder:
        yield from read_folder(str(source.local), account)
    elif path.startswith("hf://datasets/") and path.count("/") == 4:
        yield from _table(source)
    elif suffix == ".tar":
        yield from read_shards(path, source.columns.values(), account)
    elif not source.is_remote and not source.local.exists():
        if source.local.is_symlink():
            source.local.stat()  # says that it is a loop of links
        words = [source.path_key, like(path) or "FOLDER"]
        raise UserError(f"source {source.name!r}: {path} does not exist",
                        (shlex.join(words) if words[0].startswith("--") else shlex.quote("=".join(words)))
                        + "    a folder of clips with .txt captions, a .jsonl, .csv, .parquet or .tar, or a URL")
    elif suffix in (*JSON_SUFFIXES, *CSV_SUFFIXES):
        import fsspec

        with fsspec.open(path, "rb") as file:
            yield from rows_of(file.read(), suffix, source.columns.values())
    elif suffix == ".parquet":
        yield from _table(source)
    elif source.is_remote:
        yield from read_folder(path, account)
    else:
        raise UserError(f"source {source.name!r}: {path} is no folder, .jsonl, .csv, .parquet or .tar",
                        "give a folder with sidecar .txt captions or convert the manifest")


def _table(source: ClipSource) -> Iterator[tuple[str, Row]]:
    """Rows of a data set of the hub or of a Parquet file, whose videos and images stay encoded. Text columns that we do
    not know are left out: sets that others made have many.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        table = _loaded(source)
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Video | datasets.Image):
                table = table.cast_column(name, type(feature)(decode=False))
        known = {*COLUMNS, *source.columns.values(), *columns_of(table.features, source.columns).values()}
        for number, row in enumerate(table):
            yield f"row {number}", {k: v for k, v in row.items() if k in known or isinstance(v, int | float)}
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error)) from error


def _loaded(source: ClipSource) -> datasets.Dataset:
    import datasets
    import fsspec
    from pyarrow import parquet

    if not source.path.lower().endswith(".parquet"):
        return datasets.load_dataset(source.path.removeprefix("hf://datasets/"), split="train")
    if not source.is_remote:
        return datasets.Dataset.from_parquet(str(source.local))
    with fsspec.open(source.path, "rb") as file:  # datasets keeps what it fetched, also where it has changed
        return datasets.Dataset(parquet.read_table(file))


def _clip(given: Row, source: ClipSource) -> tuple[Clip | None, str]:
    """The row as a clip, and what is wrong with it ('' if nothing)."""
    try:
        theirs = columns_of(given, source.columns)
        measured = {name: value for name, value in given.items() if name not in {*theirs.values()}}
        row = {ours: given[name] for ours, name in theirs.items()}
        if not (video := row.get("video")):
            return None, "no video"
        name = _name(video, source)
        name.encode()  # UnicodeEncodeError is a ValueError
        measures = {str(column): number_of(str(column), value) for column, value in measured.items()}
        start_s, end_s = number_of("start_s", row.get("start_s")) or 0.0, number_of("end_s", row.get("end_s"))
        captions, where = captions_of(row), {kind: _media(row.get(kind), source) for kind in MEDIA}
    except (ValueError, RecursionError) as error:
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


def _name(media: Any, source: ClipSource) -> str:
    """How a row's medium is called; a path in one spelling, whatever the row's."""
    if isinstance(media, Mapping):
        return str(media.get("path") or _name(media.get("bytes"), source))
    if isinstance(media, bytes):
        return hashlib.blake2b(media, digest_size=8).hexdigest()
    if isinstance(media, Remote):
        return media.name
    name = str(media)
    if "://" in name:
        return name
    return posixpath.normpath(name if source.is_remote else spelled(_folder_of(source), name))


def _folder_of(source: ClipSource) -> Path:
    """Where the paths of a source of this machine begin."""
    return source.local if source.is_folder else source.local.parent


def _media(value: Any, source: ClipSource) -> Media | None:
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
    if source.is_remote or remote:
        import fsspec
    if source.is_remote and not remote:
        filesystem, root = fsspec.core.url_to_fs(source.path)
        folder = root if filesystem.isdir(root) else str(PurePosixPath(root).parent)
        remote = filesystem.unstrip_protocol(f"{folder}/{name}")
    if remote:
        filesystem, place = fsspec.core.url_to_fs(remote)
        if not filesystem.isfile(place):
            raise ValueError(f"missing file {remote}")
        return Remote(remote, PurePosixPath(name).name, str(filesystem.ukey(place)))
    folder = _folder_of(source)
    path = folder / spelled(folder, name)
    if not path.is_file():
        raise ValueError(f"missing file {path}" + ("; its \\ is a part of the name here" if "\\" in name else ""))
    return path


def _kept(data: bytes, suffix: str, folder: Path) -> Path:
    """Bytes from a row as a file, named by its content."""
    if suffix.lower() not in SUFFIXES | suffixes_of("audio"):
        suffix = ".png" if data[:4] in (b"\x89PNG", b"RIFF") or data[:3] == b"\xff\xd8\xff" else ".mp4"
    path = folder / f"{hashlib.blake2b(data, digest_size=16).hexdigest()}{suffix.lower()}"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path
