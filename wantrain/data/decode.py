"""Frames from a source file: which ones, read by whom, brought to the bucket's size. decord is imported here only.

decord is wrong without saying so on edit lists and, at random access, on open GOP, and fails on some containers
(facts/dependencies.md section 5). So it reads sequentially, files that a demux-only look finds unsafe go to PyAV,
and readers open and close inside one call, never across a fork.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from wantrain.data.manifest import IMAGE_SUFFIXES
from wantrain.terms import Bucket, UserError

FAR_S = 10.0
"""A span that starts later than this is reached by PyAV's seek instead of decoding the film up to it."""

NARROW_PX = 64
"""decord 0.6 takes the padding of a row for more colour channels below this width (seen: 48 px gave 4 channels)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What demuxing tells: shown frames' times (seconds, sorted), duration in seconds, size in pixels, who reads.

    Times count from the first frame that has one, which is `start_s` on the file's own clock.
    """

    times_s: np.ndarray
    duration_s: float
    width: int
    height: int
    why_not_decord: str
    start_s: Fraction = Fraction(0)

    @property
    def aspect(self) -> float:
        return self.height / self.width


def _broken(path: Path, reason: object) -> UserError:
    return UserError(f"{path} cannot be decoded: {reason}",
                     "replace the file or take it out of the manifest, then run the same command again")


def probe(path: Path) -> Probe:
    """Demux `path` without decoding a frame (an image is one frame at 0 s)."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        width, height = _image(path).size
        return Probe(np.zeros(1), 0.0, width, height, "image")
    try:
        with av.open(str(path)) as container:
            return _probe(container)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _broken(path, error) from error


def _probe(container: av.container.InputContainer) -> Probe:
    if not container.streams.video:
        raise ValueError("no video in it")
    stream = container.streams.video[0]
    assert stream.time_base is not None
    times, ends, num_discarded = [], [], 0
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        num_discarded += packet.is_discard
        if not packet.is_discard:
            times.append(packet.pts * stream.time_base)
            ends.append((packet.pts + (packet.duration or 0)) * stream.time_base)
    if not times:
        raise ValueError("no video frames")
    start = min(times)
    width, height = stream.codec_context.width, stream.codec_context.height
    unsafe = {
        "edit list": num_discarded > 0,
        container.format.name: container.format.name in ("mpegts", "gif"),
        "av1": stream.codec_context.name in ("av1", "libdav1d", "libaom-av1"),
        "truncated": len(times) + num_discarded < stream.frames,
        f"narrower than {NARROW_PX} px": min(width, height) < NARROW_PX,
    }
    if _quarter_turns(container, stream) % 2:
        width, height = height, width
    step = Fraction(1) / (stream.average_rate or 25)
    duration = max(*ends, max(times) + (step if max(ends) == max(times) else 0)) - start
    why = ", ".join(reason for reason, found in unsafe.items() if found)
    return Probe(np.array(sorted(float(t - start) for t in times)), float(duration), width, height, why, start)


def _quarter_turns(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
    """Quarter turns of the display matrix, read from the first decodable frame."""
    container.seek(0)
    for frame in container.decode(stream):
        return (frame.rotation // 90) % 4
    raise ValueError("no frame decodes")


def count_frames(found: Probe, start_s: float, end_s: float | None, fps: float) -> int:
    """How many of the times start_s + k / fps lie in the span (1 for an image)."""
    end = found.duration_s if end_s is None else min(end_s, found.duration_s)
    return max(math.ceil((end - start_s) * fps - 1e-3), 1 if found.duration_s == 0 else 0)


def choose_frames(times_s: np.ndarray, start_s: float, fps: float, num_frames: int) -> np.ndarray:
    """Indices of the frames on screen at start_s + k / fps: true resampling by timestamps, for any frame rate.

    Speed is never changed: a 60 fps source loses frames, a 12 fps source repeats some.
    """
    wanted = start_s + np.arange(num_frames) / fps
    return np.clip(np.searchsorted(times_s, wanted + 1e-4, side="right") - 1, 0, len(times_s) - 1)


def read_clip(path: Path, start_s: float, end_s: float | None, fps: float, bucket: Bucket) -> torch.Tensor:
    """The first bucket.num_frames frames of the span at `fps`, covering the bucket and cropped to its centre.

    frames_FCHW uint8. Raises UserError when the span holds fewer frames than promised or does not decode.
    """
    found = probe(path)
    available = count_frames(found, start_s, end_s, fps)
    if available < bucket.num_frames:
        raise UserError(f"{path}: {available} frames at {fps:g} fps from {start_s:g} s, but {bucket.num_frames} are "
                        "needed", "lengthen the span, or add a smaller length to data.num_frames")
    index_F = choose_frames(found.times_s, start_s, fps, bucket.num_frames)
    if found.why_not_decord == "image":
        frames_FHWC = np.array(_image(path).convert("RGB"))[None]
    elif found.why_not_decord or start_s > FAR_S:
        frames_FHWC = _read_pyav(path, found, index_F)
    else:
        frames_FHWC = _read_decord(path, index_F)
    return fit(torch.from_numpy(np.ascontiguousarray(frames_FHWC)).movedim(-1, 1), bucket.height, bucket.width)


def _image(path: Path) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except (UnidentifiedImageError, OSError) as error:
        raise _broken(path, error) from error
    assert image is not None
    return image


def _read_decord(path: Path, index_F: Sequence[int] | np.ndarray) -> np.ndarray:
    """The frames at these indices (sorted, repeats allowed), decoded in order from the first."""
    wanted = set(map(int, index_F))
    kept = {}
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        for i in range(int(max(index_F)) + 1):
            frame = reader.next()
            if i in wanted:
                kept[i] = frame.asnumpy()
        del reader
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        raise _broken(path, str(error).strip().splitlines()[-1]) from error
    return np.stack([kept[int(i)] for i in index_F])


def _read_pyav(path: Path, found: Probe, index_F: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same through PyAV, by timestamp: from the keyframe before the first, or, where a seek goes too far (transport
    streams have no index), from the file's beginning.
    """
    wanted = {round(float(found.times_s[i]), 4): int(i) for i in index_F}
    first_s = found.start_s + Fraction(float(min(wanted)))
    try:
        kept = _decode_at(path, found.start_s, wanted, first_s)
        if len(kept) < len(wanted):
            kept = _decode_at(path, found.start_s, wanted, None)
    except av.FFmpegError as error:
        raise _broken(path, error) from error
    if len(kept) < len(wanted):
        raise _broken(path, f"{len(kept)} of {len(wanted)} frames decode")
    return np.stack([kept[int(i)] for i in index_F])


def _decode_at(path: Path, start_s: Fraction, wanted: Mapping[float, int], seek_s: Fraction | None
               ) -> dict[int, np.ndarray]:
    """The frames at the wanted seconds after `start_s`, by index; those that decode from `seek_s` of the file's clock.

    The file's clock and not the first frame that decodes: a stream that was cut inside a group of pictures begins with
    frames that have a time and do not.
    """
    kept: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        if seek_s is not None:
            container.seek(int(seek_s / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            index = wanted.get(round(float(frame.pts * stream.time_base - start_s), 4))
            if index is not None:
                kept[index] = np.rot90(frame.to_ndarray(format="rgb24"), (frame.rotation // 90) % 4)
            if len(kept) == len(wanted):
                break
    return kept


def fit(frames_FCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (antialiased bicubic, aspect kept) until the size is covered, then crop the centre; uint8 to uint8."""
    _, _, h, w = frames_FCHW.shape
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size != (h, w):
        resized = torch.nn.functional.interpolate(frames_FCHW.float(), size, mode="bicubic", antialias=True)
        frames_FCHW = resized.round().clamp(0, 255).to(torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames_FCHW[:, :, top : top + height, left : left + width].contiguous()
