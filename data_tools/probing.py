"""What one video or image is, and what is broken in it, told by decoding it from its first frame to its last."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from data_tools.command import check_openable, shown, stamp
from wantrain.data import media
from wantrain.data.films import HDR, Probe, decoder_of, film_of, has_alpha, opened
from wantrain.jobs import Ending, Failure
from wantrain.terms import IMAGE_SUFFIXES, UserError

EXIF_ORIENTATION = 0x0112
EXIF_TURNS_DEG = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}
"""Counter-clockwise turn that shows the picture upright, by Exif orientation (4, 5 and 7 are also mirrored)."""

TRANSFERS = {16: "pq", 18: "hlg"}
"""Names of those of `HDR`."""

DURATION_IN_HEADER = frozenset({"matroska,webm", "flv", "asf"})
"""Containers whose header tells the duration but not the number of frames; the others tell it or only estimate."""


@dataclass(frozen=True, slots=True)
class Probed:
    """What one file holds. `fault` is empty for a usable file; for a faulty one the other fields may be unset.

    `width`, `height` in pixels as shown, after `rotation_deg` (counter-clockwise). `fps` is the constant rate, or the
    mean one when `is_variable_fps`; 0 for one frame. `min_gap_s`, `max_gap_s` lie between neighbouring frames.
    `num_frames` were decoded, `num_frames_claimed` are in the header (0: it does not say). `pixel_aspect` is not 1
    where stored pixels are not square (`width` and `height` are those of the true shape). `has_alpha`: some pixel is
    not opaque. `reader` is decord, pyav or pillow, `reader_reason` why it is not decord. `is_timed_out`: the fault is
    that it took too long, which another call may not find.
    """

    path: str
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    kind: str = ""
    container: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    rotation_deg: int = 0
    pixel_aspect: float = 1.0
    fps: float = 0.0
    is_variable_fps: bool = False
    min_gap_s: float = 0.0
    max_gap_s: float = 0.0
    num_frames: int = 0
    num_frames_claimed: int = 0
    duration_s: float = 0.0
    pixel_format: str = ""
    bit_depth: int = 0
    transfer: str = ""
    is_hdr: bool = False
    is_interlaced: bool = False
    has_alpha: bool = False
    has_audio: bool = False
    reader: str = ""
    reader_reason: str = ""
    fault: str = ""
    is_timed_out: bool = False


def failed(path: Path, failure: Failure) -> Probed:
    """The result for a file whose probe took too long or crashed."""
    return Probed(str(path), *stamp(path), fault=f"{shown(path)}: {failure}",
                  is_timed_out=failure.ending is Ending.TIMED_OUT)


def probe_file(path: Path) -> Probed:
    """Decode the whole file in this process. For a bad file `fault` says what is wrong; nothing is raised."""
    found = Probed(str(path), *stamp(path))
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else the last file's message may come late, in this file's log
    with av.logging.Capture(local=False) as log:
        try:
            check_openable(path)
            found = (_probe_image if path.suffix.lower() in IMAGE_SUFFIXES else _probe_video)(path, found)
        except UserError as error:
            cause = error.message.partition(" cannot be decoded: ")[2] or error.message
        except av.FFmpegError as error:
            cause = str(error.strerror)
        except FileNotFoundError:
            cause = "a link to nothing, or gone by now"
        except (OSError, ValueError, IndexError, Image.DecompressionBombError) as error:
            cause = str(error)
        else:
            cause = found.fault
    av.logging.set_level(level)
    if not cause:
        return found
    details = [line.strip() for _, _, text in log for line in text.splitlines() if line.strip()]
    detail = f" ({details[0]})" if details and details[0] not in cause else ""
    return dataclasses.replace(found, fault=f"{shown(path)}: {cause}{detail}")


def _probe_image(path: Path, found: Probed) -> Probed:
    try:
        with Image.open(path) as image:
            image.load()
            num_frames = getattr(image, "n_frames", 1)
            container = image.format or ""
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            has_alpha = image.has_transparency_data and _transparent(np.asarray(image.convert("RGBA")))
            mode = image.mode
    except UnidentifiedImageError as error:
        with contextlib.suppress(av.FFmpegError), opened(path) as film:
            if film.streams.video and not _is_picture(film):
                raise ValueError(f"by its content a film ({film.format.name}): give it the ending of one") from error
        raise ValueError("not an image by its content") from error
    size = media.probe(path)
    first_only = f", only the first of its {num_frames} frames is read" if num_frames > 1 else ""
    return dataclasses.replace(
        found, kind="image", container=container.lower(), codec=container.lower(), width=size.width,
        height=size.height, rotation_deg=EXIF_TURNS_DEG.get(orientation, 0), num_frames=num_frames,
        num_frames_claimed=num_frames, pixel_format=mode.lower(), has_alpha=has_alpha,
        bit_depth={"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8),
        reader="pillow", reader_reason=f"image{first_only}")


def _probe_video(path: Path, found: Probed) -> Probed:
    with opened(path) as container:
        if _is_picture(container):
            raise ValueError(f"by its content an image ({container.format.name.removesuffix('_pipe')}): "
                             "give it the ending of one")
        stream = film_of(container)
        demuxed = media.probe(path)
        seen = _decode_all(container, stream)
        assert stream.time_base is not None
        names = container.format.name.split(",")
        suffix = path.suffix.lower().removeprefix(".")
        transfer = int(stream.codec_context.color_trc)
        fps, is_variable, gaps_s = rate(demuxed.times_s, stream.time_base, (stream.average_rate, stream.guessed_rate))
        return dataclasses.replace(
            found, kind="video", container=suffix if suffix in names else names[0],
            codec=stream.codec_context.codec.canonical_name, width=demuxed.width, height=demuxed.height,
            rotation_deg=seen.rotation_deg, pixel_aspect=demuxed.pixel_aspect, fps=fps,
            is_variable_fps=is_variable, min_gap_s=gaps_s[0], max_gap_s=gaps_s[1], num_frames=seen.num_frames,
            num_frames_claimed=stream.frames, duration_s=round(demuxed.duration_s, 6),
            pixel_format=seen.pixel_format, bit_depth=seen.bit_depth, is_interlaced=seen.is_interlaced,
            transfer=TRANSFERS.get(transfer, "" if transfer == 2 else str(transfer)),
            is_hdr=transfer in HDR, has_audio=bool(container.streams.audio),
            has_alpha=seen.has_alpha or stream.metadata.get("alpha_mode") == "1",
            reader="pyav" if demuxed.why_not_decord else "decord", reader_reason=demuxed.why_not_decord,
            fault=_incomplete(container, stream.frames, demuxed, seen))


def _is_picture(container: av.container.InputContainer) -> bool:
    return container.format.name.endswith("_pipe") or container.format.name == "image2"


@dataclass(slots=True)
class _Seen:
    """What decoding told. `end_s` is the end of the last packet of any stream, from the container's start."""

    num_frames: int = 0
    num_damaged: int = 0
    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    rotation_deg: int = 0
    pixel_format: str = ""
    bit_depth: int = 0
    is_interlaced: bool = False
    has_alpha: bool = False
    end_s: float = 0.0
    broken_off: str = ""


def _decode_all(container: av.container.InputContainer, stream: av.VideoStream) -> _Seen:
    """Decode every frame of the stream, keeping none."""
    seen = _Seen()
    decoder = decoder_of(stream)
    decoder.thread_type = "NONE"
    start = Fraction(container.start_time or 0, av.time_base)
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base - start
                seen.end_s = max(seen.end_s, float(end))
            if packet.stream is not stream:
                continue
            for frame in decoder.decode(packet):
                _look_at(frame, seen)
    except av.FFmpegError as error:
        seen.broken_off = str(error.strerror)
    return seen


def _look_at(frame: av.VideoFrame, seen: _Seen) -> None:
    if not seen.num_frames:
        seen.pixel_format, seen.rotation_deg = frame.format.name, frame.rotation % 360
        seen.bit_depth = max(c.bits for c in frame.format.components)
    seen.num_frames += 1
    seen.num_damaged += frame.is_corrupt
    seen.sizes.add((frame.width, frame.height))
    seen.is_interlaced |= frame.interlaced_frame
    if not seen.has_alpha and has_alpha(frame):
        seen.has_alpha = _transparent(frame.to_ndarray(format="rgba"))


def _transparent(rgba_HWC: np.ndarray) -> bool:
    return bool(rgba_HWC[..., 3].min() < 255)


def _incomplete(container: av.container.InputContainer, claimed: int, demuxed: Probe, seen: _Seen) -> str:
    """What is wrong with a film that opens, '' if nothing."""
    num_timed = len(demuxed.times_s)
    header_s = (container.duration or 0) / av.time_base if container.format.name in DURATION_IN_HEADER else 0.0
    sizes = ", ".join(f"{width}x{height}" for width, height in sorted(seen.sizes))
    faults = {
        f"truncated: the header claims {claimed} frames, {seen.num_frames} decode":
            "truncated" in demuxed.why_not_decord,
        f"truncated: the header claims {header_s:.2f} s, the data ends after {seen.end_s:.2f} s":
            header_s - seen.end_s > max(0.5, 0.02 * header_s),
        f"damaged: decoding stops after {seen.num_frames} of {num_timed} frames: {seen.broken_off}":
            bool(seen.broken_off),
        f"damaged: {seen.num_damaged} of {seen.num_frames} frames decode with errors": seen.num_damaged > 0,
        f"damaged: {num_timed} frames have a time, {seen.num_frames} decode; write it anew with ffmpeg":
            seen.num_frames != num_timed and not demuxed.in_order,  # there, a packet may say "as before"
        f"its frames change their size ({sizes}): cut it there": len(seen.sizes) > 1,
    }
    return next((text for text, found in faults.items() if found), "")


def rate(times_s: np.ndarray, tick: Fraction, claims: Iterable[Fraction | None]
         ) -> tuple[float, bool, tuple[float, float]]:
    """(fps, whether it varies, smallest and largest gap in seconds) of frames shown at `times_s` (sorted, from 0).

    The rate is constant when every frame lies on its grid, but for the rounding of times to `tick` seconds or a tenth
    of a frame of jitter. A claim of the header is believed only where the times confirm it.
    """
    if len(times_s) < 2:
        return 0.0, False, (0.0, 0.0)
    gaps_s = np.diff(times_s)
    gap_s, index = float(np.median(gaps_s)), np.arange(len(times_s))
    rounding_s = min(1.01 * float(tick), 0.3 * gap_s) + 1e-9
    extremes = (round(float(gaps_s.min()), 6), round(float(gaps_s.max()), 6))
    for claim in claims:
        if claim and np.abs(times_s - index / float(claim)).max() <= rounding_s:
            return round(float(claim), 6), False, extremes
    mean = (len(times_s) - 1) / float(times_s[-1] or 1)
    is_variable = np.abs(times_s - index / mean).max() > max(rounding_s, 0.1 * gap_s)
    return round(mean, 3), bool(is_variable), extremes
