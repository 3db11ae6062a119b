"""Small files that show a clip in a browser, which plays few of the codecs that sources have."""

from __future__ import annotations

import math
from pathlib import Path

from wantrain import pictures
from wantrain.data import decode, films, media
from wantrain.files import atomic_path
from wantrain.terms import IMAGE_SUFFIXES, Bucket


def suffix_of(source: Path) -> str:
    """How the name of a source's preview ends."""
    return ".jpg" if source.suffix.lower() in IMAGE_SUFFIXES else ".mp4"


def write(source: Path, target: Path, start_s: float, end_s: float | None, *, fps: float, longest_px: int,
          most_s: float) -> None:
    """Write the span of a source at `fps`, made smaller, its first `most_s` seconds; a picture as one.

    ValueError for an empty span; otherwise whatever reading raises.
    """
    if target.suffix == ".jpg":
        image = media.read_image(source).convert("RGB")
        image.thumbnail((longest_px, longest_px))
        with atomic_path(target) as temporary:
            image.save(temporary, "JPEG", quality=92)
        return
    found = media.probe(source)
    available = films.count_frames(found, start_s, end_s, fps)
    if available < 1:
        raise ValueError(f"the span from {start_s:g} s on is empty: it is {found.duration_s:.2f} s long")
    scale = min(1.0, longest_px / max(found.width, found.height)) / 2
    height, width = (2 * max(1, round(side * scale)) for side in (found.height, found.width))
    bucket = Bucket(min(available, math.ceil(most_s * fps)), height, width)
    pictures.write_mp4(target, decode.read_clip(source, start_s, end_s, fps, bucket), fps)
