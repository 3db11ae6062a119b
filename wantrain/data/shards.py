"""WebDataset shards: tar files whose members KEY.mp4, KEY.txt, KEY.json make one sample.

Only headers and texts are read here. A medium becomes the place of its bytes in the shard, so that a step can read
the samples it wants, in any order, from a local disk or through an fsspec URL: every sample is known, counted and
placed in a bucket before training, and the order is exact for any number of processes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from wantrain.data.folders import Account
from wantrain.data.tables import suffixes_of, text_of
from wantrain.terms import PARTNERS, Remote, UserError

Row = dict[str, Any]

SMALLEST_END, LARGEST_END = 2 * tarfile.BLOCKSIZE, 1 << 20
"""A tar ends with two empty blocks, which may be filled up with more; one that does not was cut off."""

TEXTS = ("caption", "captions", "id", "start_s", "end_s", "duplicate_of")
"""What a sample's json may say besides numbers, under these names."""

LONGEST_TEXT_BYTES = 1 << 20


def read_shards(pattern: str, names: Collection[str], account: Account) -> Iterator[tuple[str, Row | str]]:
    """(place, row, or what is wrong with it) of every sample of the shards that a path or URL names; it may hold
    wildcards.

    KEY.txt and KEY.*.txt are captions, KEY.json holds columns (of texts those that we know, and `names`),
    KEY.control.mp4, KEY.camera.txt, KEY.audio.wav and their like are partners, and members of other kinds are passed
    over.
    """
    import fsspec  # only where there are shards

    filesystem, _, paths = fsspec.core.get_fs_token_paths(pattern)
    shards = [path for path in sorted(paths) if filesystem.isfile(path)]
    if not shards:
        raise UserError(f"no shard matches {pattern}", "give the path of .tar files, e.g. 'shards/*.tar'")
    for path in shards:
        with filesystem.open(path, "rb") as file:
            url = filesystem.unstrip_protocol(path) if "://" in pattern else path
            try:
                rows = _samples(file, url, str(filesystem.ukey(path)), {*TEXTS, *names}, account)
            except tarfile.TarError as error:
                raise UserError(f"{url} is not a readable tar: {error}", "make or fetch it again") from error
        yield from ((f"{url} {key}", row) for key, row in rows.items())


def _samples(file: Any, url: str, version: str, texts: Collection[str], account: Account) -> dict[str, Row | str]:
    """The rows of one shard by key, or what is wrong with them."""
    members: dict[str, list[tuple[str, Any]]] = {}
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            path = PurePosixPath(member.name)
            key, _, kind = path.name.lower().partition(".")
            if not member.isfile() or not key:
                if not member.isdir():
                    account.pass_over("no files" if key else "hidden", member.name)
                continue
            value: Any = None
            media = kind.rpartition(".")[0] or "video"
            if path.suffix.lower() in suffixes_of(media):
                kind = media
                value = Remote(url, path.name, version, member.offset_data, member.size)
            elif path.suffix.lower() in (".txt", ".json"):
                opened = tar.extractfile(member)
                assert opened is not None
                value = opened.read(LONGEST_TEXT_BYTES + 1)
            else:
                account.pass_over(path.suffix.lower() or "without an ending", member.name)
            if value is not None:
                members.setdefault(str(path.with_name(path.name.partition(".")[0])), []).append((kind, value))
    file.seek(end)
    rest = file.read(LARGEST_END + 1)
    if len(rest) < SMALLEST_END or len(rest) > LARGEST_END or any(rest):
        raise tarfile.ReadError(f"its end is not at byte {end}, where its members end: it was cut off or damaged")
    found: dict[str, Row | str] = {}
    for key, some in members.items():
        row = _row(some, texts)
        found[key] = row if isinstance(row, str) else {"id": f"{PurePosixPath(url).name}/{key}"} | row
    return found


def _row(members: Sequence[tuple[str, Any]], texts: Collection[str]) -> Row | str:
    """The columns of a sample; those of its json give way to its members."""
    row: Row = {}
    columns: Row = {}
    for kind, value in members:
        try:
            if isinstance(value, Remote):
                if kind in row:
                    raise ValueError(f"there is more than one {kind}")
                row[kind] = value
            elif kind == "json":
                columns = _columns(value, texts)
            else:
                said = row.setdefault("captions", [])
                said.insert(0 if kind == "txt" else len(said), _text(value))
        except (ValueError, RecursionError) as error:
            return f"its {kind}: {error}"
    further = [*row.get("captions", []), *columns.pop("captions", [])]
    return columns | row | ({"captions": further} if further else {})


def _text(data: bytes) -> str:
    if len(data) > LONGEST_TEXT_BYTES:
        raise ValueError(f"longer than {LONGEST_TEXT_BYTES} bytes")
    return text_of(data)


def _columns(data: bytes, texts: Collection[str]) -> Row:
    """What the json says that we know, and its numbers: sets that others made have many other texts."""
    given = json.loads(_text(data))
    if not isinstance(given, dict):
        raise ValueError("no object with columns")
    if not isinstance(given.get("captions", []), list):
        raise ValueError("captions is a list of texts")
    if media := sorted({"video", *PARTNERS} & given.keys()):
        raise ValueError(f"it names a {media[0]}, which is a member of the shard itself")
    return {k: v for k, v in given.items() if k in texts or isinstance(v, int | float)}
