"""What a film is: its stream, its clock, how its pictures are shown, and its frames through PyAV. (Without torch or
decord, so that worker processes start at once.)
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import SideData

from wantrain.terms import MediaInfo, UserError

POINTERS = (b"ffconcat", b"#EXTM3U", b"<?xml", b"<MPD")
"""How playlists begin: what they name would be opened before their format is known."""

PLAYLISTS = frozenset({"hls", "dash", "concat", "imf"})
"""Formats that only point to other files or addresses: never followed."""

LONGEST_FRAME_S = 60
"""A film whose frames last longer than this on average has no times to go by."""

FINE_GRACE_S, COARSE_GRACE_S = 1e-4, 5.1e-4

NO_DISPLAY_TIMES = frozenset({"avi", "h264", "hevc", "vvc", "evc", "m4v", "mpegvideo", "vc1", "cavsvideo", "avs2",
                              "avs3"})
"""Formats that store pictures in the order of decoding, and not when they are shown."""

JUMPY = frozenset({"mpeg", "mpegts"})
"""Formats of broadcasts, whose clocks jump where recordings were joined."""

FALLS_BACK_S = 0.1
"""A clock that goes back by more than this is another recording's; by less, it is badly kept."""

HDR = {16: "HDR (PQ)", 18: "HDR (HLG)"}
"""ITU-T H.273 transfer characteristics (SMPTE ST 2084 and ARIB STD-B67)."""

TRANSPARENT = "transparent (laid on white)"

NOT_SQUARE = "pixels not square (shown in their true shape)"

LONGEST_PIXEL = 8
"""Pixels that are said to be further from square than this are a fault of the file; those of tapes and discs are not.
"""

NARROW_PX = 64
"""decord 0.6 takes the padding of a row for more colour channels below this width (seen: 48 px gave 4 channels)."""


@dataclass(frozen=True, slots=True)
class Upright:
    """How stored pictures become upright ones: rows and columns change places, then what is named is reversed."""

    swaps: bool = False
    reverses_rows: bool = False
    reverses_columns: bool = False

    def __call__(self, picture_HWC: np.ndarray) -> np.ndarray:
        picture = picture_HWC.swapaxes(0, 1) if self.swaps else picture_HWC
        return picture[:: -1 if self.reverses_rows else 1, :: -1 if self.reverses_columns else 1]


@dataclass(frozen=True, slots=True)
class Probe:
    """What demuxing and one frame tell: shown frames' times (seconds, sorted), duration in seconds, size in pixels as
    shown (upright, of square pixels), who reads.

    Times count from the first frame that has one, which is `start_s` on the file's own clock, of ticks of `tick_s`.
    `stream` is the film's index among the file's streams, `pixel_aspect` a stored pixel's width by its height. Where
    `in_order`, the file does not say when frames are shown: they follow each other as they are decoded. Without
    `seeks`, decoding must begin at the file's beginning, and frames in order are counted. `surprises` is what a person
    would want to know, or empty. `sound_s` is when the sound ends, 0 where there is none.
    """

    times_s: np.ndarray
    duration_s: float
    width: int
    height: int
    why_not_decord: str
    start_s: Fraction = Fraction(0)
    tick_s: Fraction = Fraction(0)
    stream: int = 0
    upright: Upright = Upright()
    pixel_aspect: float = 1.0
    in_order: bool = False
    seeks: bool = True
    surprises: str = ""
    sound_s: float = 0.0

    @property
    def grace_s(self) -> float:
        """The seconds by which a frame's stated time may be later than the frame was on screen.

        Matroska, FLV and ASF count in milliseconds, which is too coarse for most frame rates. Finer clocks, and those
        with one tick a frame, need almost nothing.
        """
        return COARSE_GRACE_S if 2 * FINE_GRACE_S < self.tick_s < 4 * COARSE_GRACE_S else FINE_GRACE_S

    @property
    def aspect(self) -> float:
        return self.height / self.width


class Unreachable(UserError):
    """A file that cannot be read at this time, which says nothing about its content."""


def broken(path: Path, reason: object) -> UserError:
    """The error for a file that does not decode."""
    return UserError(f"{path} cannot be decoded: {reason}",
                     "replace the file or take it out of the manifest, then run the same command again")


def unreachable(path: Path, error: OSError) -> UserError:
    """The error for a file that is not there, or that the system does not let one read."""
    return Unreachable(f"{path} cannot be decoded: {error.strerror or error}",
                       "see that it is there and may be read, then run the same command again")


def count_frames(found: Probe | MediaInfo, start_s: float, end_s: float | None, fps: float) -> int:
    """How many of the times start_s + k / fps lie in the span (1 for an image)."""
    end = found.duration_s if end_s is None else min(end_s, found.duration_s)
    return max(math.ceil((end - start_s) * fps - 1e-3), 1 if found.duration_s == 0 else 0)


def probe(path: Path) -> Probe:
    """Demux a film, decoding no more than a frame. Raises UserError."""
    try:
        with opened(path) as container:
            return _probe(container, path)
    except (FileNotFoundError, PermissionError) as error:
        raise unreachable(path, error) from error
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise broken(path, error) from error


def opened(path: Path) -> av.container.InputContainer:
    """The container, forbidden to reach beyond this machine's files. ValueError for a list that points to others."""
    with path.open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(POINTERS):
            raise ValueError("a playlist, not a film")
    return av.open(str(path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="replace")


def film_of(container: av.container.InputContainer) -> av.VideoStream:
    """The stream that players show: the default one, of several the largest; never a cover. ValueError for none."""
    if container.format.name in PLAYLISTS:
        raise ValueError(f"a playlist ({container.format.name}), not a film")
    flags = av.stream.Disposition
    films = [s for s in container.streams.video if not s.disposition & (flags.attached_pic | flags.timed_thumbnails)]
    if not films:
        raise ValueError("no video in it" + (", only audio" if container.streams.audio else ""))
    return max(films, key=lambda s: (bool(s.disposition & flags.default), s.width * s.height))


def decoder_of(stream: av.VideoStream) -> av.video.codeccontext.VideoCodecContext:
    """What decodes the stream: libvpx where VP8 or VP9 has alpha, which the usual decoders drop."""
    if stream.metadata.get("alpha_mode") != "1" or stream.codec_context.name not in ("vp8", "vp9"):
        return stream.codec_context
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.codec_context.name]
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, av.video.codeccontext.VideoCodecContext)
    return decoder


@dataclass(slots=True)
class _Demuxed:
    """What the packets of a film told, in ticks of `tick_s`: the first frame that decodes, which came out `delay`
    packets late; in the order of the packets, `shown` their pts and `decoded` their dts; the end of the last one shown;
    what a frame lasts.
    """

    first: av.VideoFrame
    delay: int
    tick_s: Fraction
    shown: list[int]
    decoded: list[int]
    end: int
    step: Fraction
    num_packets: int
    num_discarded: int


def _demux(container: av.container.InputContainer, stream: av.VideoStream) -> _Demuxed:
    """All packets of the stream, of which only those up to the first frame are decoded. ValueError where none is."""
    decoder = decoder_of(stream)
    packets: list[tuple[int | None, int | None, int, bool]] = []
    first, delay = None, 0
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(decoder.decode(packet)), None)
            delay = len(packets) - (packet.size == 0)
        if packet.size:
            packets.append((packet.pts, packet.dts, packet.duration or 0, packet.is_discard))
    if not packets:
        raise ValueError("no video frames")
    if first is None:
        raise ValueError("no frame decodes")
    assert stream.time_base is not None
    tick_s = stream.time_base
    kept = [(pts, dts, duration) for pts, dts, duration, is_discarded in packets if not is_discarded]
    lasts = [duration for _, _, duration in kept if duration]
    return _Demuxed(first, delay, tick_s, [pts for pts, _, _ in kept if pts is not None],
                    [dts for _, dts, _ in kept if dts is not None],
                    max((pts + duration for pts, _, duration in kept if pts is not None), default=0),
                    Fraction(lasts[-1]) if lasts else 1 / ((stream.average_rate or 25) * tick_s),
                    len(packets), len(packets) - len(kept))


def _probe(container: av.container.InputContainer, path: Path) -> Probe:
    stream = film_of(container)
    seen = _demux(container, stream)
    _refuse_joined(seen, container.format.name, stream.guessed_rate or 1 / (seen.step * seen.tick_s), path)
    num_kept = seen.num_packets - seen.num_discarded
    in_order = 2 * len(seen.shown) < num_kept or (container.format.name in NO_DISPLAY_TIMES and seen.delay > 0)
    is_counted = in_order and len(seen.decoded) < num_kept
    times, end = _times(seen, in_order, is_counted)
    duration_s = (end - times[0]) * seen.tick_s
    if duration_s > LONGEST_FRAME_S * len(times):
        raise ValueError(f"{len(times)} frames in {float(duration_s):.0f} s: its times are broken")
    upright = _upright(seen.first)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / LONGEST_PIXEL <= aspect <= LONGEST_PIXEL:
        command = ["ffmpeg", "-i", str(path), "-c", "copy", "-aspect", f"{stream.width}:{stream.height}",
                   f"{path.with_suffix('')}-square{path.suffix}"]
        raise ValueError(f"its pixels are said to be {float(aspect):g} times as wide as high; where they are square, "
                         f"write it anew: {shlex.join(command)}")
    width, height = max(1, round(stream.codec_context.width * aspect)), stream.codec_context.height
    if upright.swaps:
        width, height = height, width
    num, den = seen.tick_s.as_integer_ratio()
    heard_s = sound_s(container, times[0] * seen.tick_s)
    return Probe(np.array([float((time - times[0]) * num / den) for time in times]), float(duration_s), width, height,
                 _why_not_decord(container, stream, seen, in_order, upright), times[0] * seen.tick_s, seen.tick_s,
                 stream.index, upright, float(aspect), in_order,
                 seeks=not (seen.first.format.has_palette or is_counted), surprises=_surprises(seen.first, aspect),
                 sound_s=float(duration_s) if heard_s is None else heard_s)


def sound_s(container: av.container.InputContainer, start_s: Fraction) -> float | None:
    """How many seconds after `start_s` the first sound of a file ends, as its header says; 0 where there is none, None
    where it does not say.
    """
    if not container.streams.audio:
        return 0.0
    own = container.streams.audio[0]
    if own.duration is not None and own.time_base is not None:
        return max(0.0, float(((own.start_time or 0) + own.duration) * own.time_base - start_s))
    if container.duration is None:
        return None
    return max(0.0, float(Fraction((container.start_time or 0) + container.duration, av.time_base) - start_s))


def _times(seen: _Demuxed, in_order: bool, is_counted: bool) -> tuple[Sequence[Fraction | int], Fraction | int]:
    """(when each frame is shown, when the last ends) in ticks of the file's clock."""
    times: Sequence[Fraction | int]
    if is_counted:
        times = [i * seen.step for i in range(seen.num_packets - seen.num_discarded)]
    elif in_order:  # one comes out with each packet, `delay` packets late: so ffmpeg dates them
        times = [*seen.decoded[seen.delay :], *(seen.decoded[-1] + (i + 1) * seen.step for i in range(seen.delay))]
    else:
        times = sorted(seen.shown)
        if seen.end > times[-1]:
            return times, seen.end
    return times, times[-1] + seen.step


def _surprises(first: av.VideoFrame, aspect: Fraction) -> str:
    surprises = {
        HDR.get(int(first.color_trc), ""): int(first.color_trc) in HDR,
        "interlaced": first.interlaced_frame,
        TRANSPARENT: has_alpha(first) and bool((pixels_of(first) != first.to_ndarray(format="rgb24")).any()),
        NOT_SQUARE: aspect != 1,
    }
    return ", ".join(what for what, is_so in surprises.items() if is_so)


def _why_not_decord(container: av.container.InputContainer, stream: av.VideoStream, seen: _Demuxed, in_order: bool,
                    upright: Upright) -> str:
    """What decord fails on, or reads wrongly without a word; empty for a film that it may read."""
    name, pixels = container.format.name, seen.first.format.name
    num_told = seen.num_packets
    if name == "avi" and seen.decoded:  # an empty chunk shows the picture before it once more, and is no packet
        num_told = max(num_told, seen.decoded[-1] + 1)
    unsafe = {
        "edit list": seen.num_discarded > 0,
        name: name in ("mpegts", "gif"),
        "av1": stream.codec_context.name in ("av1", "libdav1d", "libaom-av1"),
        "truncated": num_told < stream.frames,
        f"narrower than {NARROW_PX} px": min(stream.codec_context.width, stream.codec_context.height) < NARROW_PX,
        # others it takes for more colour channels than there are (cinepak's rgb24), or shows black (palettes)
        f"pixels {pixels}": not pixels.startswith(("yuv4", "yuvj4")) and name != "gif",
        "no display times": in_order,
        "turned or mirrored": upright != Upright(),
        "no duration": container.duration is None,
        "several video streams": len(container.streams.video) > 1,
    }
    return ", ".join(reason for reason, found in unsafe.items() if found)


def _refuse_joined(seen: _Demuxed, format_name: str, fps: Fraction, path: Path) -> None:
    """ValueError where the clock (in the order of packets) begins anew: nothing says how the parts follow each other.
    """
    clock = seen.decoded or seen.shown
    back, ahead = -FALLS_BACK_S / seen.tick_s, LONGEST_FRAME_S / seen.tick_s if format_name in JUMPY else math.inf
    for before, after in itertools.pairwise(clock):
        if not back <= after - before <= ahead:
            from_s, to_s = (float((time - clock[0]) * seen.tick_s) for time in (before, after))
            command = ["ffmpeg", "-i", str(path), "-an", "-vf", f"setpts=N/({fps})/TB", "-r", str(fps), "-crf", "12",
                       f"{path.with_suffix('')}-joined.mp4"]
            raise ValueError(f"recordings joined end to end: its clock {'goes back' if after < before else 'jumps'} "
                             f"from {from_s:.2f} s to {to_s:.2f} s; write it anew: {shlex.join(command)}")


def _upright(frame: av.VideoFrame) -> Upright:
    """The frame's display matrix. ValueError where it is none of quarter turns and mirrors."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, SideData):
        return Upright()
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).astype(np.float64).tolist()
    straight, across = max(abs(a), abs(d)), max(abs(b), abs(c))
    if not straight and not across:
        return Upright()
    if min(straight, across) > max(straight, across) * math.sin(math.radians(1)):
        raise ValueError(f"its display matrix turns it by {frame.rotation} degrees, which is no quarter turn: write it "
                         "anew with ffmpeg, which turns the picture itself")
    swaps = across > straight
    return Upright(swaps, (b if swaps else d) < 0, (c if swaps else a) < 0)


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether pixels of the frame may be transparent."""
    return frame.format.has_palette or any(c.is_alpha for c in frame.format.components)


def pixels_of(frame: av.VideoFrame) -> np.ndarray:
    """The stored picture in RGB, laid on white where it is transparent: uint8 HWC."""
    if not has_alpha(frame):
        return frame.to_ndarray(format="rgb24")
    rgba_HWC = frame.to_ndarray(format="rgba")
    if frame.format.has_palette and not rgba_HWC[..., 3].any():  # a palette that has no alpha
        return rgba_HWC[..., :3]
    return on_white(rgba_HWC)


def on_white(rgba_HWC: np.ndarray) -> np.ndarray:
    """Lay a picture with transparency on white: uint8 HW3."""
    colour, alpha = rgba_HWC[..., :3].astype(np.uint16), rgba_HWC[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def frames_at(path: Path, found: Probe, index: Iterable[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame as it is stored) of the wanted frames through PyAV, by timestamp: from the keyframe before the
    first, or, where a seek goes too far (transport streams have no index), from the file's beginning.

    Raises UserError where one of them does not decode.
    """
    missing = set(map(int, index))
    number = len(missing)
    try:
        for seeks in (True, False) if found.seeks else (False,):
            for i, frame in _decode(path, found, tuple(missing), seeks):
                missing.discard(i)
                yield i, frame
            if not missing:
                return
    except av.FFmpegError as error:
        raise broken(path, error) from error
    raise broken(path, f"{number - len(missing)} of {number} frames decode")


def _decode(path: Path, found: Probe, wanted: Iterable[int], seeks: bool) -> Iterator[tuple[int, av.VideoFrame]]:
    """Those of the wanted frames that decode, once each; from the keyframe before the first where it `seeks`.

    By the file's clock and not from the first frame that decodes: a stream that was cut inside a group of pictures
    begins with frames that have a time and do not.
    """
    times_s = {round(float(found.times_s[i]), 4): i for i in sorted(wanted)}
    with opened(path) as container:
        stream = container.streams[found.stream]
        assert isinstance(stream, av.VideoStream)
        assert stream.time_base is not None
        if seeks:
            first_s = found.start_s + Fraction(float(min(times_s)))
            try:
                container.seek(int(first_s / stream.time_base), stream=stream)
            except av.FFmpegError:  # a raw stream
                return
        decoder = decoder_of(stream)
        decoded = (frame for packet in container.demux(stream) for frame in decoder.decode(packet))
        yield from (_held if found.in_order else _dated)(decoded, found, stream.time_base, times_s)


def _dated(decoded: Iterable[av.VideoFrame], found: Probe, tick_s: Fraction, times_s: Mapping[float, int]
           ) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames that have exactly these times."""
    missing = dict(times_s)
    for frame in decoded:
        if frame.pts is not None:
            index = missing.pop(round(float(frame.pts * tick_s - found.start_s), 4), None)
            if index is not None:
                yield index, frame
        if not missing:
            return


def _held(decoded: Iterable[av.VideoFrame], found: Probe, tick_s: Fraction, times_s: Mapping[float, int]
          ) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames on screen at these times, of a film whose frames are dated by the packet that brings them out of the
    decoder. One that says 'as before' (MPEG-4's N-VOP) brings none, and the frame before stays.
    """
    missing = sorted(times_s)
    held, at_s = None, 0.0
    step_s = found.duration_s / len(found.times_s)
    for frame in decoded:
        at_s = at_s + step_s if held else 0.0
        if frame.dts is not None and found.seeks:
            at_s = float(frame.dts * tick_s - found.start_s)
        while missing and held and missing[0] < at_s - step_s / 2:
            yield times_s[missing.pop(0)], held
        if not missing:
            return
        held = frame if held or at_s <= missing[0] + step_s / 2 else None
    while missing and held and missing[0] < at_s + step_s / 2:
        yield times_s[missing.pop(0)], held
