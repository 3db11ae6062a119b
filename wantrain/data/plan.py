"""Which windows of which clips go to which bucket, and why the others do not: shared by every verb."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from wantrain.data import cameras, sound
from wantrain.data.films import count_frames
from wantrain.terms import PARTNERS, Bucket, Clip, Dropped, Media, MediaInfo, PlannedClip

EXTRACTIONS = ("head", "middle", "uniform", "sliding", "random")
KINDS_OF_DROPS = ("unreadable", "outside limits", "not measured", "too short", "shape", "partner")

SAME_SHAPE = 0.03
"""Aspects are the same up to this, in log: rounding to even pixels does as much."""

MOST_CROPPED = 0.75
"""A clip that would lose more of its picture than this to the crop is dropped: nearly always a mistake."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How clips become windows: `fps` of the model, `extract` one of EXTRACTIONS, `limits` [low, high] by measurement
    (None: no bound). The video of a face becomes a square of `face_px`; a reference is shown whole, or cropped.
    """

    buckets: Sequence[Bucket]
    fps: float
    extract: str = "head"
    limits: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    face_px: int = 512
    whole_reference: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Every clip of the manifests: the windows of those that are used, and those that are not, with reasons."""

    used: list[PlannedClip]
    dropped: list[Dropped]

    @property
    def num_found(self) -> int:
        return len({p.clip.id for p in self.used}) + len(self.dropped)


def windows(available: int, num_frames: int, extract: str) -> list[int]:
    """First frames of the windows of `num_frames` frames in `available` ones.

    head: the first; middle: the one in the middle; uniform: the fewest that miss no frame, spread evenly; sliding:
    each begins half a window after the one before; random: from anywhere, drawn later.
    """
    last = available - num_frames
    if extract == "middle":
        return [last // 2]
    if extract == "uniform" and last:
        number = math.ceil(available / num_frames)
        return [round(i * last / (number - 1)) for i in range(number)]
    if extract == "sliding":
        return list(range(0, last + 1, max(1, num_frames // 2)))
    return [0]


def files_of(clips: Sequence[Clip]) -> list[Media]:
    """Every file that the clips are made of, each once, those of one film together."""
    partners = (c.partners[name] for name in PARTNERS for c in clips if name in c.partners)
    return list(dict.fromkeys(itertools.chain((c.path for c in clips), partners)))


def place(clips: Sequence[Clip], found: Mapping[Media, MediaInfo], rules: Rules) -> Plan:
    """Give each clip the bucket nearest in aspect, of those the longest that it fills, and take its windows.

    `found` is what looking into the clips' files told. Nothing is lost: used + dropped = clips.
    """
    used: list[PlannedClip] = []
    dropped: list[Dropped] = []
    for clip in clips:
        placed = _place(clip, found, rules)
        if isinstance(placed, Dropped):
            dropped.append(placed)
        else:
            used += placed
    return Plan(used, dropped)


def _place(clip: Clip, found: Mapping[Media, MediaInfo], rules: Rules) -> list[PlannedClip] | Dropped:
    seen = found[clip.path]
    if seen.fault or seen.why_not_decord == cameras.KIND:
        return Dropped(clip, "unreadable", f"{clip.path}: {seen.fault or 'poses of a camera, not a video'}")
    for column, (low, high) in rules.limits.items():
        value = clip.measures.get(column)
        if value is None:
            return Dropped(clip, "not measured", f"data.limits.{column} is set, and the clip has no {column}")
        if (low is not None and value < low) or (high is not None and value > high):
            side = f"below {low:g}" if low is not None and value < low else f"above {high:g}"
            return Dropped(clip, "outside limits", f"{column} = {value:g} is {side}")
    fps = rules.fps / clip.speed
    available = count_frames(seen, clip.start_s, clip.end_s, fps)
    fitting = [b for b in rules.buckets if b.num_frames <= available]
    if not fitting:
        shortest = min(b.num_frames for b in rules.buckets)
        return Dropped(clip, "too short", f"{available} frame{'s' * (available != 1)} at {rules.fps:g} fps, the "
                       f"shortest bucket needs {shortest}" + ("; add 1 to data.num_frames" * (not seen.duration_s)))
    aspect = seen.height / seen.width
    best = min(fitting, key=lambda b: (-b.num_frames, abs(math.log(b.height / b.width / aspect)), -b.height * b.width))
    if (lost := cropped(best, seen)) > MOST_CROPPED:
        return Dropped(clip, "shape", f"{seen.width}x{seen.height} would lose {lost:.0%} of its picture in {best}")
    last = available - best.num_frames
    planned = [PlannedClip(clip, best, seen, fps, round(clip.start_s + first / fps, 6),
                           round(clip.start_s + last / fps, 6) if rules.extract == "random" and last else None)
               for first in windows(available, best.num_frames, rules.extract)]
    return _with_partners(planned, found, rules)


def _with_partners(planned: list[PlannedClip], found: Mapping[Media, MediaInfo], rules: Rules
                   ) -> list[PlannedClip] | Dropped:
    """The windows with those of their partners; one that is too short, or a reference that moves, drops the clip."""
    clip = planned[0].clip
    for kind, medium in clip.partners.items():
        if fault := _fault_of_partner(planned, kind, found[medium]):
            return Dropped(clip, "partner", f"its {kind} {medium}{fault}")

    def partner(p: PlannedClip, kind: str, medium: Media) -> PlannedClip:
        seen = found[medium]
        if kind == "camera":  # its poses belong to the frames of the clip's own film
            own = replace(p.found, digest=seen.digest, why_not_decord=cameras.KIND, surprises="")
            return replace(p, clip=replace(clip, path=medium), found=own)
        if kind == "audio":
            return replace(p, clip=replace(clip, path=medium), found=replace(seen, why_not_decord=sound.KIND,
                                                                             surprises=""))
        bucket = p.bucket if seen.duration_s else replace(p.bucket, num_frames=1)
        if kind == "face":
            bucket = replace(bucket, height=rules.face_px, width=rules.face_px)
        return replace(p, clip=replace(clip, path=medium), bucket=bucket, found=seen,
                       contain=kind == "reference" and rules.whole_reference)

    return [replace(p, partners={kind: partner(p, kind, m) for kind, m in clip.partners.items()}) for p in planned]


def _fault_of_partner(planned: Sequence[PlannedClip], kind: str, seen: MediaInfo) -> str:
    """Why a partner cannot be used with these windows of its clip, to be put behind its name; '' where it can."""
    if seen.fault:
        return f": {seen.fault}"
    if (kind == "camera") != (seen.why_not_decord == cameras.KIND):
        return f" is {'no' if kind == 'camera' else 'a'} text file of a camera's poses"
    if kind == "audio":
        return _fault_of_sound(planned, seen)
    if seen.why_not_decord == sound.KIND:
        return " is a sound"
    return "" if kind == "camera" else _fault_of_picture(planned, kind, seen)


def _fault_of_picture(planned: Sequence[PlannedClip], kind: str, seen: MediaInfo) -> str:
    """As `_fault_of_partner`, of a film or an image."""
    own, clip = planned[0].found, planned[0].clip
    if kind == "reference" and seen.duration_s:
        return f" is a video of {seen.duration_s:g} s, not an image"
    of_same_frame = kind not in ("reference", "face")
    if of_same_frame and abs(math.log(seen.height / seen.width * own.width / own.height)) > SAME_SHAPE:
        return (f" is {seen.width}x{seen.height}, the clip {own.width}x{own.height}: of another shape they would be "
                "cropped to other places")
    needed = max(p.latest_s or p.start_s for p in planned)
    moves = seen.duration_s or kind in ("control", "background", "face")  # an image stands for a still mask
    is_too_short = moves and count_frames(seen, needed, clip.end_s, planned[0].fps) < planned[0].bucket.num_frames
    return f" ends before it, after {seen.duration_s:g} s" if is_too_short else ""


def _fault_of_sound(planned: Sequence[PlannedClip], seen: MediaInfo) -> str:
    """As `_fault_of_partner`. Of a window's frames the first has no sound."""
    num_frames = planned[0].bucket.num_frames - 1
    if not seen.sound_s:
        return " has no sound"
    if not num_frames:
        return " goes with a window of one frame, which has none"
    ends_s = max(p.latest_s or p.start_s for p in planned) + num_frames / planned[0].fps
    return f" ends before it, after {seen.sound_s:g} s" if seen.sound_s < ends_s - sound.GRACE_S else ""


def cropped(bucket: Bucket, found: MediaInfo) -> float:
    """The share of the picture that is lost to the crop."""
    scale = max(bucket.height / found.height, bucket.width / found.width)
    return 1 - bucket.height * bucket.width / (found.height * found.width * scale * scale)


def enlarged(bucket: Bucket, found: MediaInfo) -> float:
    """The factor by which the picture is enlarged; below 1 it shrinks."""
    return max(bucket.height / found.height, bucket.width / found.width)


def surprises_of(planned: PlannedClip) -> list[str]:
    """What a person would want to know of the clip's pictures and of its partners', each with the partner's name."""
    own = planned.found.surprises
    return [*filter(None, own.split(", ")), *(f"{what} ({kind})" for kind, one in planned.partners.items()
                                              for what in one.found.surprises.split(", ") if what)]


def trimmed_s(planned: Sequence[PlannedClip]) -> float:
    """Seconds of one clip's span that no window shows; `planned` are its windows."""
    clip, seen, fps = planned[0].clip, planned[0].found, planned[0].fps
    if not seen.duration_s or planned[0].latest_s is not None:
        return 0.0
    available = count_frames(seen, clip.start_s, clip.end_s, fps)
    shown: set[int] = set()
    for p in planned:
        first = round((p.start_s - clip.start_s) * fps)
        shown.update(range(first, first + p.bucket.num_frames))
    return (available - len(shown)) / fps
