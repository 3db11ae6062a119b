"""Shots of one film, in a worker process: where they begin and end, which spans stay, and their films."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_tools import transnet
from data_tools.command import (
    SCENEDETECT,
    check_openable,
    needed,
)
from data_tools.faults import UNREADABLE, fault_of
from wantrain.data import films, media
from wantrain.data.films import COARSE_GRACE_S
from wantrain.files import atomic_path

GUARD_S = COARSE_GRACE_S + 1e-5
"""A span ends this much before the next shot begins: further than `decode.choose_frames` looks ahead of a time."""

LOOK_PX, TINY_PX = 160, 40
"""Longest side of the pictures that cuts and motion are judged by."""

MOTION_GAP_S = 0.25
"""Motion is the difference between a frame and the one this long before it."""

WINDOW = 2
"""Frames on either side that a frame is held against."""

HOLD_S, HOLD_FRAMES = 0.21, 4
"""A drawing of an animation is held as long as the longer of these: five frames at 24 fps. What stands for longer is a
still, and is judged frame by frame."""

HOLD_SHARE, HOLD_CHANGE = 0.2, 2.0
"""A repeat changes the picture by less than this share of what the drawings around it do, for coding is never exact;
and drawings change it by at least so much (mean of 0..255): less never looks like a cut."""

FLASH_LEVEL = 40.0
"""A change of the whole picture by this (hue, saturation and value, mean of 0..255) is a cut whatever its neighbours
do: two cuts within WINDOW frames hide each other from a ratio."""

TOO_SHORT, STATIC, DISSOLVE = "too short", "static", "dissolve"

Transitions = list[tuple[int, int]]
"""(first frame after the one shot, first frame of the next), in order; the same frame for a cut."""

TICKS = 90_000
"""Of a second, on the clock of what is written."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of a shot. `threshold` is the detector's, `drop_static` a mean difference of 0..255 or None."""

    threshold: float
    min_s: float
    max_s: float
    drop_static: float | None
    detector: str = "adaptive"


@dataclass(frozen=True, slots=True)
class Span:
    """Frames `first` to `stop` - 1 of a film, in seconds from its first frame; `end_s` is exclusive.

    `shot_s` is where its shot begins, `part` counts the parts of a shot from 1. `motion` is the mean difference of
    grey values (0..255) over MOTION_GAP_S seconds, infinite where that cannot be said. `reason` is empty if kept.
    """

    first: int
    stop: int
    start_s: float
    end_s: float
    shot_s: float
    part: int
    motion: float
    reason: str


@dataclass(frozen=True, slots=True)
class Split:
    """All spans of one film, kept or not, or why there are none."""

    path: str
    spans: tuple[Span, ...] = ()
    fault: str = ""
    unwritten: str = ""
    """Why its spans could not be written as files."""


def split_file(path: Path, rules: Rules) -> Split:
    """Find the shots of one film. For a film that cannot be read `fault` says why; nothing is raised."""
    try:
        check_openable(path)
        found = media.probe(path)
        transitions, motion_F = find_shots(path, found.times_s, rules)
    except UNREADABLE as error:
        return Split(str(path), fault=fault_of(path, error))
    return Split(str(path), tuple(judge(found, transitions, motion_F, rules)))


class Detector(Protocol):
    """What finds shots: it is shown pictures of a film's frames in order, each made of a frame and it at LOOK_PX."""

    def picture(self, frame: av.VideoFrame, small: av.VideoFrame) -> np.ndarray: ...

    def see(self, picture_HWC: np.ndarray) -> None: ...

    def transitions(self) -> Transitions: ...


class Adaptive:
    """Cuts by PySceneDetect."""

    def __init__(self, threshold: float) -> None:
        self.library = needed("scenedetect", "--detector adaptive", SCENEDETECT, "data")
        self.detectors = (self.library.AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1,
                                                        window_width=WINDOW),
                          self.library.ContentDetector(threshold=FLASH_LEVEL, min_scene_len=0))
        self.num_shown = 0
        self.last_HWC: np.ndarray | None = None
        self.cuts: set[int] = set()

    def picture(self, frame: av.VideoFrame, small: av.VideoFrame) -> np.ndarray:
        return small.to_ndarray()

    def see(self, picture_HWC: np.ndarray) -> None:
        self._show(picture_HWC, 1 if self.num_shown else 1 + WINDOW)
        self.last_HWC = picture_HWC

    def transitions(self) -> Transitions:
        if self.last_HWC is not None:
            self._show(self.last_HWC, WINDOW)
        return [(cut, cut) for cut in sorted(self.cuts) if cut > 0]

    def _show(self, look_HWC: np.ndarray, times: int) -> None:
        """The detectors are blind to the first and the last WINDOW frames of what they are shown: these come again."""
        for _ in range(times):
            timecode = self.library.FrameTimecode(self.num_shown, 25.0)  # any rate will do
            self.cuts |= {cut.frame_num - WINDOW for detector in self.detectors
                          for cut in detector.process_frame(timecode, look_HWC)}
            self.num_shown += 1


class Held:
    """Shows a detector every frame except repeats of held drawings, and maps its transitions back to the film's frames.

    `longest` is how many frames a drawing is held at most. Pictures of twice as many are kept, until what follows is
    known.
    """

    def __init__(self, detector: Detector, longest: int) -> None:
        self.detector, self.longest = detector, longest
        self.change = [math.inf]
        """How much each frame differs from the one before, at LOOK_PX; a film's ends are changes."""
        self.waiting: collections.deque[np.ndarray] = collections.deque()
        self.num_judged, self.shown = 0, list[int]()
        self.last_HWC: np.ndarray | None = None

    def see(self, frame: av.VideoFrame, small: av.VideoFrame) -> None:
        """The next frame of the film, and the same at LOOK_PX (bgr24)."""
        look_HWC = small.to_ndarray().astype(np.int16)
        if self.last_HWC is not None:
            self.change.append(float(np.abs(look_HWC - self.last_HWC).mean()))
        self.last_HWC = look_HWC
        self.waiting.append(self.detector.picture(frame, small))
        if len(self.waiting) > 2 * self.longest:
            self._judge()

    def transitions(self) -> Transitions:
        self.change.append(math.inf)
        while self.waiting:
            self._judge()
        places = [*self.shown, len(self.change) - 1]
        return [(places[stop], places[start]) for stop, start in self.detector.transitions()]

    def _judge(self) -> None:
        picture_HWC = self.waiting.popleft()
        if not is_repeat(self.change, self.num_judged, self.longest):
            self.shown.append(self.num_judged)
            self.detector.see(picture_HWC)
        self.num_judged += 1


def is_repeat(change: Sequence[float], i: int, longest: int) -> bool:
    """Whether frame `i` repeats a drawing that is held for at most `longest` frames: it lies between two frames that
    change far more, and so does a third, as near. (Of two alone the shot between them may be a short one.)
    """
    level = max(change[i] / HOLD_SHARE, HOLD_CHANGE)
    first = next((j for j in range(i - 1, max(-1, i - longest), -1) if change[j] >= level), None)
    stop = next((j for j in range(i + 1, min(len(change), i + longest)) if change[j] >= level), None)
    if first is None or stop is None or stop - first > longest:
        return False
    return max([*change[max(0, first - longest):first], *change[stop + 1:stop + 1 + longest]], default=0) >= level


def find_shots(path: Path, times_s: np.ndarray, rules: Rules) -> tuple[Transitions, np.ndarray]:
    """(where shots end and begin, difference of every frame to the one MOTION_GAP_S before, NaN where there is none).

    Raises UserError where not every frame that has a time decodes.
    """
    detector = Held(make_detector(rules), longest_hold(times_s))
    motion_F = np.full(len(times_s), np.nan)
    scalers = VideoReformatter(), VideoReformatter()  # kept, for a frame's own is set up anew each time
    earlier: collections.deque[tuple[float, np.ndarray]] = collections.deque()
    for i, (frame, time_s) in enumerate(_timed_frames(path)):
        small = _small(scalers[0], frame, LOOK_PX, "bgr24")
        detector.see(frame, small)
        tiny = _small(scalers[1], small, TINY_PX, "gray").to_ndarray().astype(np.int16)
        while len(earlier) > 1 and earlier[1][0] <= time_s - MOTION_GAP_S + 1e-3:
            earlier.popleft()
        if earlier and earlier[0][0] <= time_s - MOTION_GAP_S + 1e-3:
            motion_F[i] = np.abs(tiny - earlier[0][1]).mean()
        earlier.append((time_s, tiny))
    return detector.transitions(), motion_F


def make_detector(rules: Rules) -> Detector:
    if rules.detector == "transnetv2":
        return transnet.Detector(rules.threshold)
    return Adaptive(rules.threshold)


def longest_hold(times_s: np.ndarray) -> int:
    """For how many frames, at most, a drawing may be held in a film whose frames have these times."""
    gap_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else HOLD_S
    return max(HOLD_FRAMES, round(HOLD_S / max(gap_s, 1e-3)))


def _timed_frames(path: Path) -> Iterator[tuple[av.VideoFrame, float]]:
    """Every frame as it is stored, with its time, in order. Raises UserError where one does not decode."""
    found = replace(media.probe(path), seeks=False)
    for i, frame in films.frames_at(path, found, range(len(found.times_s))):
        yield frame, float(found.times_s[i])


def _small(scaler: VideoReformatter, frame: av.VideoFrame, longest_px: int, pix_fmt: str) -> av.VideoFrame:
    scale = min(1.0, longest_px / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    return scaler.reformat(frame, width, height, pix_fmt, interpolation="AREA")


def judge(found: films.Probe, transitions: Transitions, motion_F: np.ndarray, rules: Rules) -> Iterator[Span]:
    """The spans of all shots, and of what is between them, in order and without a gap: long ones in equal parts, each
    with its reason to go.
    """
    times_s = found.times_s
    dissolves = {stop for stop, start in transitions if stop < start}
    starts = sorted({0, *itertools.chain.from_iterable(transitions)} - {len(times_s)})
    for shot, shot_stop in zip(starts, [*starts[1:], len(times_s)], strict=True):
        inner = _inner_edges(times_s[shot:shot_stop], _end_s(found, shot_stop), rules.max_s)
        edges = [shot, *(shot + edge for edge in inner), shot_stop]
        for part, (first, stop) in enumerate(itertools.pairwise(edges), 1):
            start_s, end_s = round(float(times_s[first]), 6), _end_s(found, stop)
            inside = times_s[first:stop] >= start_s + MOTION_GAP_S - 1e-3  # what came before was of this span
            motions = motion_F[first:stop][inside]
            motion = round(float(motions.mean()), 3) if len(motions) else math.inf
            reason = ""
            if shot in dissolves:
                reason = DISSOLVE
            elif end_s - start_s < rules.min_s - 2 * GUARD_S:
                reason = TOO_SHORT
            elif rules.drop_static is not None and motion < rules.drop_static:
                reason = STATIC
            yield Span(first, stop, start_s, end_s, round(float(times_s[shot]), 6), part, motion, reason)


def _end_s(found: films.Probe, stop: int) -> float:
    end_s = found.times_s[stop] - GUARD_S if stop < len(found.times_s) else found.duration_s
    return round(float(end_s), 6)


def _inner_edges(times_s: np.ndarray, end_s: float, max_s: float) -> list[int]:
    """Frames of a shot that begin the second and later of its equal parts, none longer than `max_s` (unless one frame
    is); `times_s` are those of the shot's frames.
    """
    length_s = end_s - float(times_s[0])
    if length_s <= max_s:
        return []
    gap_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else length_s
    number = min(len(times_s), math.ceil(length_s / max(max_s - gap_s, gap_s)))
    edges_s = times_s[0] + np.arange(1, number) * length_s / number
    return sorted({*map(int, np.searchsorted(times_s, edges_s))} - {0, len(times_s)})


def write_spans(path: Path, targets: Sequence[tuple[Span, Path]]) -> None:
    """Write every span as an mp4 of its own: upright, silent, 8 bit, at the film's size, with its frames' times."""
    frames, position = _timed_frames(path) if targets else iter(()), 0
    for span, target in targets:
        with atomic_path(target) as temporary, av.open(str(temporary), "w", format="mp4",
                                                       container_options={"movflags": "faststart"}) as container:
            _encode(container, itertools.islice(frames, span.first - position, span.stop - position),
                    media.probe(path))
        position = span.stop


def _encode(container: av.container.OutputContainer, frames: Iterator[tuple[av.VideoFrame, float]], found: films.Probe
            ) -> None:
    first, start_s = next(frames)
    # Without B-frames the first frame comes at 0 s and needs no edit list.
    fps = Fraction(len(found.times_s) / found.duration_s).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=fps, options={"crf": "14", "preset": "veryfast", "bf": "0"})
    stream.width, stream.height = found.width, found.height
    stream.pix_fmt = "yuv444p" if found.width % 2 or found.height % 2 else "yuv420p"
    stream.codec_context.time_base = Fraction(1, TICKS)
    shape = _upright(first, found)
    for field in ("color_range", "colorspace", "color_primaries", "color_trc"):
        setattr(stream.codec_context, field, int(getattr(shape, field)))
    for frame, time_s in itertools.chain([(first, start_s)], frames):
        upright = _upright(frame, found).reformat(found.width, found.height, stream.pix_fmt)
        upright.pts, upright.time_base = round((time_s - start_s) * TICKS), Fraction(1, TICKS)
        container.mux(stream.encode(upright))
    container.mux(stream.encode())


def _upright(frame: av.VideoFrame, found: films.Probe) -> av.VideoFrame:
    """The frame as it is shown, but for the shape of its pixels."""
    if found.upright == films.Upright() and not films.has_alpha(frame):
        return frame
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(found.upright(films.pixels_of(frame))), format="rgb24")
