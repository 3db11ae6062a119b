"""Cut films into shots: spans of a manifest, without touching or re-encoding the film.

    python -m data_tools.split films/ --out manifest.jsonl --min-s 1 --max-s 10

Cuts are found by PySceneDetect's AdaptiveDetector: a frame differs from the one before by a multiple of what its
neighbours do. On 150 s of Big Buck Bunny it finds all 27 hard cuts and no other, also at 0.4 of the brightness or
half the contrast, where ContentDetector at its default of 27 misses 1 and 2; only with 5 of 6 frames taken out is it
the worse one (1 missed, 1 false; none). Neither sees a dissolve (one in that film): `--detector transnetv2` sees most,
and leaves their frames out. Animation shows each drawing for several frames: detectors are shown only the first frame
of such a hold (see `Held`), and their cuts are carried back to the film's frames. Times are on the clock of
`wantrain.data.decode`, and `end_s` is so placed that no frame of the next shot is read at any fps.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import glob
import itertools
import math
import os
import sys
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_tools import transnet
from data_tools.command import (
    SCENEDETECT,
    add_job_arguments,
    answer,
    check_openable,
    find_files,
    json_line,
    needed,
    positive,
    relative,
    shown,
    stamp,
)
from data_tools.journal import UNREADABLE, Journal, Outcomes, by_workers, fault_of
from data_tools.rows import check_written, sound_entries
from wantrain.data import films, media
from wantrain.data.films import COARSE_GRACE_S
from wantrain.files import atomic_path, digest_text, write_text
from wantrain.jobs import Ending
from wantrain.terms import IMAGE_SUFFIXES, UserError

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

VERSION = 1
"""Raise this when shots are found otherwise: what is remembered of another version is found again."""

FLASH_LEVEL = 40.0
"""A change of the whole picture by this (hue, saturation and value, mean of 0..255) is a cut whatever its neighbours
do: two cuts within WINDOW frames hide each other from a ratio."""

LONGEST_NAME = 215
"""Bytes of a film's name to which a span's time and what a temporary file needs can be added: 255 in all."""

TOO_SHORT, STATIC, DISSOLVE = "too short", "static", "dissolve"

THRESHOLDS = {"adaptive": 3.0, "transnetv2": 0.5}
"""The detectors, and where each draws the line: a ratio, a probability."""


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
    """Find the shots of one film. A film that cannot be read is told by `fault`, not by an exception."""
    try:
        check_openable(path)
        found = media.probe(path)
        transitions, motion_F = find_shots(path, found.times_s, rules)
    except UNREADABLE as error:
        return Split(str(path), fault=fault_of(path, error))
    return Split(str(path), tuple(judge(found, transitions, motion_F, rules)))


Transitions = list[tuple[int, int]]
"""(first frame after the one shot, first frame of the next), in order; the same frame for a cut."""


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
    """Shows a detector every frame but the repeats of held drawings; its transitions are those of the film's frames.

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
    """How many frames of a film with these times a drawing is held at most."""
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


TICKS = 90_000
"""Of a second, on the clock of what is written."""


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


@dataclass(frozen=True, slots=True)
class Job:
    """One film to split; with `cut_to`, its kept spans are written there, in files named after it.

    `key` is what the outcome hangs on.
    """

    path: Path
    rules: Rules
    cut_to: Path | None
    key: str

    def target(self, span: Span) -> Path | None:
        """The file of a kept span that is to be cut out."""
        if self.cut_to is None or span.reason:
            return None
        return self.cut_to / f"{self.path.name}@{span.start_s:.3f}.mp4"


def do(job: Job) -> Split:
    """Split one film and, if wanted, write its spans as files."""
    found = split_file(job.path, job.rules)
    targets = [(span, target) for span in found.spans if (target := job.target(span))]
    try:
        write_spans(job.path, targets)
    except UserError as error:
        return dataclasses.replace(found, unwritten=error.message)
    except (OSError, av.FFmpegError) as error:
        return dataclasses.replace(found, unwritten=f"could not write into {shown(job.cut_to or Path())}: "
                                                    f"{error.strerror or error}")
    return found


@contextlib.contextmanager
def _no_half_files(jobs: Sequence[Job]) -> Iterator[None]:
    """Removes what workers that were ended leave of the files that they were writing."""
    try:
        yield
    finally:
        for job in jobs:
            for half in job.cut_to.glob(f".{glob.escape(job.path.name)}@*.tmp") if job.cut_to else ():
                half.unlink(missing_ok=True)


def _jobs(paths: Sequence[Path], films: Sequence[Path], rules: Rules, cut_to: Path | None) -> list[Job]:
    """The films' jobs. Below `cut_to` the folders are those below the path that leads to the film."""
    folders = sorted((path.absolute() for path in paths if path.is_dir()), key=lambda p: -len(p.parts))
    jobs = []
    for film in films:
        root = next((folder for folder in folders if film.is_relative_to(folder)), film.parent)
        folder = cut_to.absolute() / film.relative_to(root).parent if cut_to else None
        key = (VERSION, film, *stamp(film), dataclasses.astuple(rules), folder)
        jobs.append(Job(film, rules, folder, digest_text(*key)))
    if too_long := [film.name for film in films if cut_to and len(os.fsencode(film.name)) > LONGEST_NAME]:
        raise UserError(f"--cut-to {cut_to}: names of more than {LONGEST_NAME} bytes leave no room for the time that "
                        f"is added to them: {', '.join(map(repr, too_long))}", "give these films shorter names")
    named = collections.Counter((job.cut_to, job.path.name) for job in jobs if job.cut_to)
    if clashes := [name for (_, name), number in named.items() if number > 1]:
        raise UserError(f"--cut-to {cut_to}: several films would be cut into files of the same names: "
                        f"{', '.join(clashes)}", "rename one of them, or call split once for each folder")
    return jobs


def run(paths: Sequence[Path], out: Path, rules: Rules, cut_to: Path | None, *, jobs: int, timeout_s: float
        ) -> tuple[list[Split], list[Path]]:
    """Write the kept spans of every film below `paths` into the manifest `out`: (films as sorted, files ignored).

    Rows of other films stay as they are, and a span that was there keeps its caption. What was found is remembered in
    a file beside `out`, so that a killed call goes on and other calls look only at what is new or changed.
    """
    check_written(out)
    if rules.detector == "adaptive":
        needed("scenedetect", "--detector adaptive", SCENEDETECT, "data")
    else:
        transnet.check_installed()
        if rules.threshold >= 1:
            raise UserError(f"--threshold {rules.threshold:g} is no probability below 1, which --detector transnetv2 "
                            "wants", f"--threshold {THRESHOLDS['transnetv2']:g}")
    if rules.max_s < 2 * rules.min_s:
        raise UserError(f"--max-s {rules.max_s:g} is less than twice --min-s {rules.min_s:g}: a shot a little longer "
                        "than the one would be cut into parts shorter than the other",
                        f"--max-s {2 * rules.min_s:g} or more")
    files, ignored = find_files(paths)
    films = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    if not films:
        raise UserError(f"no film in {', '.join(map(shown, paths))}: {len(files)} images, {len(ignored)} other files",
                        "give films, or folders of films")
    todo = _jobs(paths, films, rules, cut_to)
    by_key = {job.key: job for job in todo}
    do_all = by_workers(do, by_key, lambda job, failure: Split(str(job.path), fault=f"{shown(job.path)}: {failure}"),
                        jobs, timeout_s)

    def work(missing: Sequence[str]) -> Generator[Outcomes[str, Split]]:
        with _no_half_files([by_key[key] for key in missing]), contextlib.closing(do_all(missing)) as coming:
            for some in coming:
                if unwritten := "".join(outcome.result.unwritten for outcome in some.values()):
                    raise UserError(unwritten, "make room, or give another --cut-to, then run the same command again: "
                                    "what was finished is kept")
                yield some

    journal = journal_of(out)
    known = {key: split for key, split in journal.read().items() if key in by_key and all(
        target.exists() for span in split.spans if (target := by_key[key].target(span)))}
    done = journal.filled(known, list(by_key), work, "film", "split")
    rows = [_row(job, span, out) for job in todo for span in done[job.key].spans if not span.reason]
    write_text(out, "".join(map(json_line, _merged(out, {relative(film, out.parent) for film in films}, rows))))
    return [done[job.key] for job in todo], sorted({*ignored, *files} - {*films})


def journal_of(out: Path) -> Journal[Split]:
    """Where shots are remembered; a film that took too long or crashed its reader is tried again."""
    return Journal(out.with_name(out.name + ".shots"), lambda row: Split(**row | {
        "spans": tuple(Span(**span) for span in row["spans"])}), (Ending.DONE, Ending.FAULT))


def _row(job: Job, span: Span, out: Path) -> dict[str, Any]:
    """The manifest's row of a kept span."""
    film = relative(job.path, out.parent)
    identity = f"{film}@{span.shot_s:.3f}#{span.part}"
    if target := job.target(span):
        return {"video": relative(target, out.parent), "id": identity, "caption": ""}
    return {"video": film, "start_s": span.start_s, "end_s": span.end_s, "id": identity, "caption": ""}


def shot_of(identity: str) -> str:
    """What all spans of one shot have in common, given a span's id: FILM@SECONDS."""
    return identity.rpartition("#")[0]


def _merged(out: Path, films: Collection[str], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's rows of other films, then these with the captions that they had.

    UserError where a caption would be lost, because its span is no longer there.
    """
    old = sound_entries([out])[0] if out.exists() else []
    ours = {entry.id: entry.values for entry in old if shot_of(entry.id).rpartition("@")[0] in films}
    lost = [row["id"] for row in ours.values() if row.get("caption")]
    for row in rows:
        earlier = ours.get(row["id"], {})
        if all(row.get(key) == earlier.get(key) for key in ("video", "start_s", "end_s")) and earlier.get("caption"):
            row["caption"] = earlier["caption"]
            lost.remove(row["id"])
    if lost:
        raise UserError(f"{out} has captions for {len(lost)} span(s) that these settings do not give, among them "
                        f"{lost[0]}", "give the settings of the first call, or another --out")
    return [entry.values for entry in old if entry.id not in ours] + list(rows)


def rejected_rows(found: Sequence[Split], folder: Path) -> list[dict[str, Any]]:
    """A row for every span and film that is not in the manifest, with its reason."""
    rows: list[dict[str, Any]] = []
    for film in found:
        video = relative(Path(film.path), folder)
        rows += [{"video": video, "reason": film.fault}] if film.fault else []
        rows += [{"video": video, "start_s": span.start_s, "end_s": span.end_s, "reason": span.reason,
                  "motion": span.motion if math.isfinite(span.motion) else None} for span in film.spans if span.reason]
    return rows


def summary(found: Sequence[Split], ignored: Sequence[Path], rules: Rules) -> str:
    """Counts that add up: films, shots, spans kept and rejected with their reasons, and every fault."""
    spans = [span for film in found for span in film.spans]
    faulty = [film.fault for film in found if film.fault]
    shots = sum(span.part == 1 and span.reason != DISSOLVE for span in spans)
    lines = [f"found {len(found) + len(ignored)} = {len(found) - len(faulty)} films split + {len(faulty)} faulty "
             f"+ {len(ignored)} ignored (images and other files)",
             f"  {shots} shots, {len(spans)} spans after cutting those longer than {rules.max_s:g} s"]
    for reason, limit in (("", ""), (DISSOLVE, " (between two shots)"), (TOO_SHORT, f" (under {rules.min_s:g} s)"),
                          (STATIC, f" (motion under {rules.drop_static or 0:g})")):
        lengths_s = sorted(span.end_s - span.start_s for span in spans if span.reason == reason)
        if lengths_s or not reason:
            lines.append(f"  {reason or 'kept':10}{len(lengths_s)}, {sum(lengths_s):.1f} s{limit}" + (
                f", {lengths_s[0]:.2f} to {lengths_s[-1]:.2f} s, median {lengths_s[len(lengths_s) // 2]:.2f} s"
                if lengths_s else ""))
    return "\n".join(lines + [f"  fault: {fault}" for fault in faulty])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (also where films are faulty: they are named), 2, 130."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.split", description="Find the shots of films and write them into a manifest as "
        "spans (captions are left empty for a later tool). Films are only read. Hard cuts are found; dissolves and "
        "fades only by --detector transnetv2, most of them, and their frames are left out: look at the report.",
        epilog="The same command again goes on where it was stopped. Outcomes are remembered in FILE.shots.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a film, or a folder of films at any depth")
    parser.add_argument("--out", type=Path, default=Path("manifest.jsonl"), metavar="FILE",
                        help="the manifest; rows of other films and captions of the same spans are kept (default: "
                        "%(default)s)")
    parser.add_argument("--min-s", type=positive(float), default=1.0, metavar="S",
                        help="shorter spans are left out (default: %(default)g)")
    parser.add_argument("--max-s", type=positive(float), default=10.0, metavar="S",
                        help="longer shots are cut into equal parts (default: %(default)g: a half still gives 81 "
                        "frames at 16 fps)")
    parser.add_argument("--detector", choices=THRESHOLDS, default="adaptive",
                        help="what finds shots: PySceneDetect's AdaptiveDetector, or TransNetV2, a network that sees "
                        "dissolves and fades as well, 15 times slower (pip install "
                        f'"{transnet.REQUIREMENT}"; default: %(default)s)')
    parser.add_argument("--threshold", type=positive(float), metavar="X",
                        help="lower finds more. adaptive: a cut changes the picture this many times as much as its "
                        f"neighbours do (default: {THRESHOLDS['adaptive']:g}); transnetv2: how probably a frame is in "
                        f"a transition, below 1 (default: {THRESHOLDS['transnetv2']:g})")
    parser.add_argument("--drop-static", type=positive(float), nargs="?", const=0.3, metavar="D",
                        help="leave out spans in which grey values (0..255, at 40 px) change by less than this in "
                        f"{MOTION_GAP_S} s (without a number: %(const)s; default: keep them)")
    parser.add_argument("--rejected", type=Path, metavar="FILE",
                        help="write what is left out here, a JSON line each with its reason")
    parser.add_argument("--cut-to", type=Path, metavar="FOLDER",
                        help="also write every kept span as an mp4 (silent, crf 14) there, and name these in "
                        "the manifest")
    add_job_arguments(parser, 3600)

    def work(args: argparse.Namespace) -> str:
        rules = Rules(args.threshold or THRESHOLDS[args.detector], args.min_s, args.max_s, args.drop_static,
                      args.detector)
        found, ignored = run(args.paths, args.out, rules, args.cut_to, jobs=args.jobs, timeout_s=args.timeout_s)
        if args.rejected:
            write_text(args.rejected, "".join(map(json_line, rejected_rows(found, args.rejected.absolute().parent))))
        if all(film.fault for film in found):
            raise UserError(summary(found, ignored, rules), "give films that can be read: python -m data_tools.probe "
                            "tells what is wrong with these")
        return summary(found, ignored, rules)

    return answer(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
