"""Which clip goes to which bucket: the plan that `check`, `cache` and `train` share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from wantrain.data import decode
from wantrain.files import digest_file
from wantrain.terms import Bucket, Clip, PlannedClip, UserError


def buckets(num_frames: Sequence[int], resolutions: Sequence[Sequence[int]], multiple_px: int) -> list[Bucket]:
    """Every length at every resolution. Heights and widths must be multiples of `multiple_px`."""
    for height, width in resolutions:
        if height % multiple_px or width % multiple_px:
            fixed = [max(multiple_px, round(x / multiple_px) * multiple_px) for x in (height, width)]
            raise UserError(f"data.resolutions: [{height}, {width}] is not a multiple of {multiple_px} px, which this "
                            "model's VAE and patches need", f"use {fixed}")
    return [Bucket(f, h, w) for f in sorted(num_frames) for h, w in resolutions]


def place(clips: Iterable[Clip], choices: Sequence[Bucket], fps: float, memo: Path) -> list[PlannedClip]:
    """Give each clip the bucket nearest in aspect and the longest that it fills.

    Undecodable or too short clips are reported together as one UserError: nothing is dropped in silence.
    `memo` is the folder that remembers digests of source files.
    """
    planned, faults = [], []
    for clip in clips:
        try:
            found = decode.probe(clip.path)
        except UserError as error:
            faults.append(f"{clip.id}: {error.message}")
            continue
        available = decode.count_frames(found, clip.start_s, clip.end_s, fps)
        fitting = [b for b in choices if b.num_frames <= available]
        if not fitting:
            shortest = min(b.num_frames for b in choices)
            faults.append(f"{clip.id}: {available} frames at {fps:g} fps, the shortest bucket needs {shortest}")
            continue
        best = min(fitting, key=lambda b: (abs(math.log(b.height / b.width / found.aspect)), -b.num_frames))
        planned.append(PlannedClip(clip, best, digest_file(clip.path, memo)))
    if faults:
        raise UserError(f"{len(faults)} clip(s) cannot be used:\n  " + "\n  ".join(faults),
                        "replace them, take them out of the manifest, or add a smaller length to data.num_frames")
    return planned
