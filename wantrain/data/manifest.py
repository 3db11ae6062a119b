"""Clips with captions from a folder with sidecars, a JSONL or a CSV. `datasets` is imported here only."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from wantrain.terms import Clip, UserError

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m4v", ".gif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
COLUMNS = ("video", "caption", "id", "start_s", "end_s")

datasets.disable_progress_bars()


def read(path: str, source: str, repeats: int = 1) -> list[Clip]:
    """All clips of one source. Every fault of the manifest is reported at once, with its place.

    `path`: a folder whose videos and images each have a sidecar .txt; or a .jsonl or .csv with the columns
    video, caption and, if wanted, id, start_s, end_s (paths relative to the manifest's folder).
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"source {source!r}: {root} does not exist", f"set data.sources.{source}.path to a folder "
                        "of clips with .txt captions, a .jsonl or a .csv")
    folder = root if root.is_dir() else root.parent
    clips: list[Clip] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for place, row in _rows(root, source):
        clip, fault = _clip(row, folder, source, repeats)
        if clip is not None and (earlier := seen.setdefault(clip.id, place)) != place:
            fault = fault or f"duplicate id {clip.id!r} (also {earlier})"
        if fault or clip is None:
            faults.append(f"{place}: {fault}")
        else:
            clips.append(clip)
    if faults:
        raise UserError(f"source {source!r} ({root}) has {len(faults)} fault(s):\n  " + "\n  ".join(faults),
                        "mend these places (nothing was dropped or changed), then run the same command again")
    if not clips:
        raise UserError(f"source {source!r}: no clips in {root}", "put videos or images with .txt captions there; "
                        f"known endings: {', '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))}")
    return clips


def _rows(root: Path, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for error messages, row) of a folder or a file."""
    if root.is_dir():
        media = sorted(p for p in root.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES)
        rows = [{"video": p.name, "caption": _sidecar(p)} for p in media]
        yield from ((p.name, row) for p, row in zip(media, datasets.Dataset.from_list(rows), strict=True))
        return
    if root.suffix not in (".jsonl", ".csv"):
        raise UserError(f"source {source!r}: {root} is neither a folder, nor .jsonl, nor .csv",
                        "give a folder with sidecar .txt captions or convert the manifest")
    lines = list(_lines(root))
    for (number, _), row in zip(lines, datasets.Dataset.from_list([r for _, r in lines]), strict=True):
        yield f"line {number}", row


def _sidecar(media: Path) -> str | None:
    text = media.with_suffix(".txt")
    return text.read_text(encoding="utf-8") if text.exists() else None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) with exactly the known columns; a malformed line is a UserError naming it."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            numbered: Iterator[tuple[int, Any]] = ((reader.line_num, row) for row in reader)
        else:
            numbered = ((n, _parse(path, n, line)) for n, line in enumerate(file, 1) if line.strip())
        for number, row in numbered:
            if stray := sorted(set(map(str, row)) - set(COLUMNS)):
                raise UserError(f"{path} line {number}: unknown column(s) {stray}; known: {', '.join(COLUMNS)}",
                                "rename or remove the column")
            yield number, {c: None if row.get(c) is None else str(row[c]) for c in COLUMNS}


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: not JSON: {error}", "mend the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number}: expected an object with video and caption", "mend the line")
    return row


def _clip(row: Mapping[str, Any], folder: Path, source: str, repeats: int) -> tuple[Clip | None, str]:
    """The row as a clip, and what is wrong with it ('' if nothing)."""
    video = row.get("video")
    if not video:
        return None, "no video"
    path = folder / str(video)
    identity = f"{source}/{row.get('id') or video}"
    if row.get("caption") is None:
        fault = f"no caption for {video} (a sidecar {Path(str(video)).with_suffix('.txt').name} or a caption column)"
    elif not str(row["caption"]).strip():
        fault = f"empty caption for {video}"
    elif not path.is_file():
        fault = f"missing file {path}"
    else:
        fault = ""
    try:
        start_s = float(row.get("start_s") or 0)
        end_s = float(row["end_s"]) if row.get("end_s") not in (None, "") else None
    except ValueError as error:
        return None, f"start_s and end_s are seconds: {error}"
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        fault = f"span {start_s}..{end_s} s is empty"
    caption = " ".join(str(row.get("caption") or "").split())
    return Clip(identity, path, caption, source, repeats, start_s, end_s), fault
