"""WebDataset shards: tar files whose members KEY.mp4, KEY.txt, KEY.json make one sample.

Only headers and texts are read here. A medium becomes the place of its bytes in the shard, so that a step can read
the samples it wants, in any order, from a local disk or through an fsspec URL: every sample is known, counted and
placed in a bucket before training, and the order is exact for any number of processes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import fsspec

from wantrain.terms import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Remote, UserError

Row = dict[str, Any]

END_MARK = bytes(1024)
"""A tar ends with two empty blocks; one that does not was cut off."""

LONGEST_TEXT_BYTES = 1 << 20


def read_shards(pattern: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of every sample of the shards that a path or URL names; it may hold wildcards.

    KEY.txt and KEY.*.txt are captions, KEY.json holds columns, KEY.control.mp4 and KEY.mask.mp4 are partners, and
    members of other kinds are left alone.
    """
    filesystem, _, paths = fsspec.core.get_fs_token_paths(pattern)
    shards = [path for path in sorted(paths) if filesystem.isfile(path)]
    if not shards:
        raise UserError(f"no shard matches {pattern}", "give the path of .tar files, e.g. 'shards/*.tar'")
    for path in shards:
        with filesystem.open(path, "rb") as file:
            url = filesystem.unstrip_protocol(path) if "://" in pattern else path
            try:
                rows = _samples(file, url, str(filesystem.ukey(path)))
            except tarfile.TarError as error:
                raise UserError(f"{url} is not a readable tar: {error}", "make or fetch it again") from error
        yield from ((f"{url} {key}", row) for key, row in rows.items())


def _samples(file: Any, url: str, version: str) -> dict[str, Row]:
    """The rows of one shard by key."""
    rows: dict[str, Row] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            path = PurePosixPath(member.name)
            key, _, kind = path.name.partition(".")
            row = rows.setdefault(str(path.with_name(key)), {"id": f"{PurePosixPath(url).name}/{path.with_name(key)}"})
            suffix = PurePosixPath(path.name).suffix.lower()
            if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                _add(row, kind.rpartition(".")[0] or "video",
                     Remote(url, path.name, version, member.offset_data, member.size))
            elif suffix in (".txt", ".json"):
                opened = tar.extractfile(member)
                assert opened is not None
                _add_text(row, kind, opened.read(LONGEST_TEXT_BYTES))
    file.seek(-len(END_MARK), 2)
    if file.read() != END_MARK:
        raise tarfile.ReadError("it has no end: it was cut off")
    return rows


def _add(row: Row, column: str, value: Any) -> None:
    if column in row:
        row["fault"] = f"it has more than one {column}"
    row[column] = value


def _add_text(row: Row, kind: str, data: bytes) -> None:
    try:
        text = data.decode("utf-8-sig")
        if kind == "txt":
            _add(row, "caption", text)
        elif kind.endswith("txt"):
            row.setdefault("captions", []).append(text)
        else:
            row.update(json.loads(text))
    except ValueError as error:
        row["fault"] = f"its {kind} cannot be read: {error}"
