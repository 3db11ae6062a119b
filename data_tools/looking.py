"""What the files of a manifest hold, looked at in worker processes and remembered."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.command import (
    check_openable,
    stamp,
)
from data_tools.rows import (
    Entry,
    is_url,
)
from wantrain.data import media
from wantrain.data.tables import MEDIA
from wantrain.files import digest_text
from wantrain.journal import Journal, by_workers
from wantrain.terms import MediaInfo, UserError


@dataclass(frozen=True, slots=True)
class Medium(MediaInfo):
    """What a file holds, and its mean rate; 0 for one frame."""

    fps: float = 0.0


def look(path: str) -> Medium:
    """Demux the file. For a bad file `fault` says what is wrong."""
    try:
        check_openable(Path(path))
        seen = media.probe(Path(path))
    except UserError as error:
        return Medium(fault=error.message.partition(" cannot be decoded: ")[2] or error.message)
    except FileNotFoundError:
        return Medium(fault="missing file")
    except (OSError, ValueError) as error:
        return Medium(fault=str(error))
    fps = (len(seen.times_s) - 1) / float(seen.times_s[-1] or math.inf)
    return Medium("", round(seen.duration_s, 6), seen.width, seen.height, fps=round(fps, 2))


def look_at(rows: Iterable[Entry], manifest: Path, jobs: int, timeout_s: float) -> dict[str, Medium]:
    """The files of the rows by path, URLs left out. They are remembered beside the manifest as long as they do not
    change; faults are not, for they may be mended without a trace.
    """
    files = {where for row in rows for column in MEDIA if (where := row.where(column)) and not is_url(where)}
    by_key = {digest_text(file, *stamp(Path(file))): file for file in sorted(files)}
    memory = manifest.with_name(manifest.name + ".looked")
    journal = Journal(memory if os.access(memory.parent, os.W_OK) else Path(os.devnull), lambda row: Medium(**row))
    found = journal.filled(journal.read(), list(by_key), by_workers(
        look, by_key, lambda _, failure: Medium(fault=str(failure)), jobs, timeout_s), "file", "look")
    return {file: found[key] for key, file in by_key.items()}


def seconds_of(row: Entry, found: Mapping[str, Medium]) -> float:
    """How long the clip is; 0 for an image, and for a file that cannot be looked into."""
    start_s, end_s = row.span
    known = found.get(row.where("video"), Medium()).duration_s
    return max(0.0, (min(end_s, known) if known or math.isinf(end_s) else end_s) - start_s)
