"""Clips held out of a set, so that nothing of a film, or at least nothing of a shot, is on both sides."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from wantrain.files import digest_text
from wantrain.terms import Clip, Media, MediaInfo

OF_SPLIT = re.compile(r"(?P<shot>(?P<film>.+)@\d+\.\d{3})#\d+")
"""An id that `data_tools.split` gave; its `shot_of` is the group of this name."""

OF_SCENEDETECT = re.compile(r"(?P<film>.+)-Scene-\d+")
"""The name of a file that PySceneDetect cut out of a film."""

MOST = {"film": 0.25, "shot": 0.5}
"""The largest share of a set that one film, or one shot, may be to be held out whole."""


def hold_out(clips: Sequence[Clip], found: Mapping[Media, MediaInfo], share: float) -> tuple[list[Clip], str]:
    """(about `share` of the clips, what was kept whole: film or shot). ([], "") where the set cannot be parted.

    `found` tells copies of a file, which count as one. Which ones hangs on their names alone.
    """
    wanted = max(1, round(share * len(clips)))
    for what, name_of in (("film", film_of), ("shot", shot_of)):
        groups = _grouped(clips, found, name_of)
        if held := _fitting(groups, wanted) or _smallest(groups, math.floor(MOST[what] * len(clips))):
            return held, what
    return [], ""


def film_of(clip: Clip, file: str) -> str:
    """What film a clip is of, as far as its name tells; else its `file`."""
    if made := OF_SPLIT.fullmatch(clip.id):
        return made["film"]
    made = OF_SCENEDETECT.fullmatch(clip.id.rpartition(".")[0])
    return made["film"] if made else file


def shot_of(clip: Clip, file: str) -> str:
    """What shot a clip is of, where its name tells; else its `file`."""
    made = OF_SPLIT.fullmatch(clip.id)
    return made["shot"] if made else file


def _grouped(clips: Sequence[Clip], found: Mapping[Media, MediaInfo], name_of: Callable[[Clip, str], str]
             ) -> list[list[Clip]]:
    """The clips of each film (or shot), in an order without meaning that is always the same."""
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[name_of(clip, found[clip.path].digest or str(clip.path))].append(clip)
    return sorted(groups.values(), key=lambda group: digest_text(min(clip.id for clip in group)))


def _fitting(groups: Sequence[list[Clip]], wanted: int) -> list[Clip]:
    """As many whole groups as have `wanted` clips together."""
    held: list[Clip] = []
    for group in groups if len(groups) > 1 else ():
        if len(held) + len(group) <= wanted:
            held += group
    return held


def _smallest(groups: Sequence[list[Clip]], most: int) -> list[Clip]:
    """The group of fewest clips, where those are no more than `most`."""
    smallest = min(groups, key=len)
    return smallest if len(groups) > 1 and len(smallest) <= most else []
