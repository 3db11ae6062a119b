"""Frames from a source file: which ones, read by whom, brought to the bucket's size. decord is imported here only.

decord is wrong without saying so on edit lists and, at random access, on open GOP, and fails on some containers
(docs/facts.md, "Decoders"). So it reads sequentially, files that a demux-only look finds unsafe go to PyAV,
and readers open and close inside one call, never across a fork.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np
import torch

from wantrain.data import cameras, sound
from wantrain.data.films import FINE_GRACE_S, Unreachable, count_frames, frames_at, pixels_of
from wantrain.data.media import local, probe, read_image
from wantrain.terms import WINDOW, Bucket, PlannedClip, UserError

FAR_S = 10.0
"""A span that starts later than this is reached by PyAV's seek instead of decoding the film up to it."""


def choose_frames(times_s: np.ndarray, start_s: float, fps: float, num_frames: int, grace_s: float = FINE_GRACE_S
                  ) -> np.ndarray:
    """Indices of the frames on screen at start_s + k / fps: true resampling by timestamps, for any frame rate.

    A frame counts `grace_s` before its time, which may be rounded (`Probe.grace_s`). Speed is never changed: a 60 fps
    source loses frames, a 12 fps source repeats some.
    """
    wanted = start_s + np.arange(num_frames) / fps
    return np.clip(np.searchsorted(times_s, wanted + grace_s, side="right") - 1, 0, len(times_s) - 1)


def read_clip(path: Path, start_s: float, end_s: float | None, fps: float, bucket: Bucket, *, contain: bool = False
              ) -> torch.Tensor:
    """The first bucket.num_frames frames of the span at `fps`, covering the bucket and cropped to its centre, or with
    `contain` whole on white.

    frames_FCHW uint8. Raises UserError when the span holds fewer frames than promised or does not decode.
    """
    found = probe(path)
    available = count_frames(found, start_s, end_s, fps)
    if available < bucket.num_frames:
        raise UserError(f"{path}: {available} frames at {fps:g} fps from {start_s:g} s, but {bucket.num_frames} are "
                        "needed", "lengthen the span, or add a smaller length to data.num_frames")
    index_F = choose_frames(found.times_s, start_s, fps, bucket.num_frames, found.grace_s)

    shown = found.height, found.width

    def fitted(frame_HWC: np.ndarray) -> torch.Tensor:  # at once: 81 frames of 4K would be 2 GB
        frame_1CHW = torch.from_numpy(np.ascontiguousarray(frame_HWC)).movedim(-1, 0)[None]
        return (fit_whole if contain else fit)(frame_1CHW, bucket.height, bucket.width, shown)

    if found.why_not_decord == "image":
        return fitted(np.array(read_image(path)))
    kept = None if found.why_not_decord or start_s > FAR_S else _read_decord(path, index_F, fitted)
    if kept is None:
        kept = {i: fitted(found.upright(pixels_of(frame))) for i, frame in frames_at(path, found, index_F)}
    return torch.cat([kept[int(i)] for i in index_F])


Fit = Callable[[np.ndarray], torch.Tensor]


def _read_decord(path: Path, index_F: np.ndarray, fitted: Fit) -> dict[int, torch.Tensor] | None:
    """The frames at these indices, decoded in order from the first; None where decord gives up, which is no proof that
    a film is broken.
    """
    wanted = set(map(int, index_F))
    kept = {}
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)  # a name may look like an address
        for i in range(int(max(index_F)) + 1):
            frame = reader.next()
            if i in wanted:
                kept[i] = fitted(frame.asnumpy())
        del reader
    except (decord.DECORDError, RuntimeError, StopIteration):
        return None
    return kept


def read_window(planned: PlannedClip) -> torch.Tensor:
    """The frames of a planned window as training sees them, frames_FCHW uint8; or its cameras [F, 16], or the
    samples of its sound, float32. Raises UserError.
    """
    clip, path = planned.clip, None
    try:
        with local(clip.path) as path:
            if planned.found.why_not_decord == cameras.KIND:
                return torch.from_numpy(cameras.of_film(path, planned.found, planned.start_s, planned.fps,
                                                        planned.bucket))
            if planned.found.why_not_decord == sound.KIND:
                seconds = (planned.bucket.num_frames - 1) / planned.fps
                return torch.from_numpy(sound.read(path, probe(path), planned.start_s, seconds))
            return read_clip(path, planned.start_s, clip.end_s, planned.fps, planned.bucket,
                             contain=planned.contain)
    except UserError as error:
        message = error.message.replace(str(path), str(clip.path)) if path else error.message
        raise type(error)(f"clip {clip.id}: {message}", error.next_step) from error


Wanted = tuple[PlannedClip, tuple[str, ...]]
"""A window, and which of itself and its partners are to be decoded."""


def frames_in_worker(wanted: Wanted) -> tuple[dict[str, np.ndarray], str, str]:
    """(frames_FCHW by name, '', '') or ({}, the name of the one that does not decode, why not), in a worker process: as
    arrays, for a tensor would go through shared memory, of which containers have little.

    No name is given of one that cannot be reached: that says nothing about its content.
    """
    torch.set_num_threads(1)
    planned, names = wanted
    frames = {}
    for name in names:
        try:
            frames[name] = read_window(planned.part(name)).numpy()
        except UserError as error:
            fault = error.message if name == WINDOW else f"{name} of {error.message}"
            return {}, "" if isinstance(error, Unreachable) else name, fault
    return frames, "", ""


def fit(frames_FCHW: torch.Tensor, height: int, width: int, shown: tuple[int, int] | None = None) -> torch.Tensor:
    """Resize (antialiased bicubic) until the size is covered, then crop the centre; uint8 to uint8.

    The aspect is kept, or made that of `shown` (height, width), where pixels are not square.
    """
    h, w = shown or frames_FCHW.shape[2:]
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size != tuple(frames_FCHW.shape[2:]):
        resized = torch.nn.functional.interpolate(frames_FCHW.float(), size, mode="bicubic", antialias=True)
        frames_FCHW = resized.round().clamp(0, 255).to(torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames_FCHW[:, :, top : top + height, left : left + width].contiguous()


def fit_whole(frames_FCHW: torch.Tensor, height: int, width: int, shown: tuple[int, int] | None = None) -> torch.Tensor:
    """Resize (antialiased bicubic) until the whole picture fits, centred on white; uint8 to uint8. `shown` as in `fit`.

    How the official VACE shows a reference image.
    """
    h, w = shown or frames_FCHW.shape[2:]
    scale = min(height / h, width / w)
    size = (min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale))))
    canvas = frames_FCHW.new_full((*frames_FCHW.shape[:2], height, width), 255)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas[:, :, top : top + size[0], left : left + size[1]] = fit(frames_FCHW, *size, shown)
    return canvas
