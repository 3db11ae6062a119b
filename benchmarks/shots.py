"""What each detector of data_tools.split finds in a film, and of dissolves and fades made of that film's own shots.

    python -m benchmarks.shots FILM

The true shots are what the adaptive detector finds in the film itself (check that first: for 150 s of Big Buck Bunny
it is right but for one dissolve). A transition counts as found where one is told that overlaps it; others are false.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import av
import numpy as np

from data_tools import shots, split
from wantrain.data import decode

LONGEST = 100
"""Frames that are used of a shot."""


def small_frames(path: Path) -> np.ndarray:
    """frames_FHWC of the whole film, at shots.LOOK_PX."""
    with av.open(str(path)) as container:
        height = container.streams.video[0].height * shots.LOOK_PX // container.streams.video[0].width
        return np.stack([frame.reformat(shots.LOOK_PX, height, "rgb24", interpolation="AREA").to_ndarray()
                         for frame in container.decode(video=0)])


def dissolved(shots: list[np.ndarray], length: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(frames_FHWC of all shots that are long enough, each dissolving into the next; where the dissolves are)."""
    used = [shot.astype(np.float32) for shot in shots if len(shot) >= 2 * length + 4]
    share = ((np.arange(length) + 1) / (length + 1))[:, None, None, None]
    parts, spans, position = [used[0][:-length]], [], len(used[0]) - length
    for before, after in itertools.pairwise(used):
        body = after[length:-length]
        parts += [before[-length:] * (1 - share) + after[:length] * share, body]
        spans.append((position, position + length))
        position += length + len(body)
    return np.concatenate(parts).round().astype(np.uint8), spans


def faded(shots: list[np.ndarray], length: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The same, each shot fading to black and from it within `length` frames."""
    half, parts, spans, position = length // 2, [], [], 0
    light = ((np.arange(half) + 0.5) / half)[:, None, None, None]
    for shot in (shot.astype(np.float32) for shot in shots if len(shot) >= length + 10):
        shot[:half] *= light
        shot[-half:] *= light[::-1]
        parts.append(shot)
        position += len(shot)
        spans.append((position - half, position + half))
    return np.concatenate(parts).round().astype(np.uint8), spans[:-1]


def told(name: str, threshold: float, frames_FHWC: np.ndarray) -> shots.Transitions:
    rules = shots.Rules(threshold, 0.1, 1e9, None, name)
    detector = shots.Held(shots.make_detector(rules), shots.longest_hold(np.arange(len(frames_FHWC)) / 24))
    for picture in frames_FHWC:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        detector.see(frame, frame.reformat(format="bgr24"))
    return detector.transitions()


def scored(found: shots.Transitions, spans: list[tuple[int, int]]) -> str:
    hits = [any(first <= stop and last >= start for first, last in found) for start, stop in spans]
    false = [t for t in found if not any(t[0] <= stop and t[1] >= start for start, stop in spans)]
    return f"{sum(hits):3} of {len(spans)} found, {len(false)} false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path)
    film = parser.parse_args().film
    frames_FHWC, rules = small_frames(film), shots.Rules(split.THRESHOLDS["adaptive"], 0.1, 1e9, None)
    cuts, _ = shots.find_shots(film, decode.probe(film).times_s, rules)
    edges = [0, *(start for _, start in cuts), len(frames_FHWC)]
    films_shots = [frames_FHWC[first:stop][:LONGEST] for first, stop in itertools.pairwise(edges) if stop - first >= 40]
    work = {"the film": (frames_FHWC, cuts), "fades through black, 24 frames": faded(films_shots, 24),
            **{f"dissolves of {length} frames": dissolved(films_shots, length) for length in (6, 12, 24, 40)}}
    for what, (frames, spans) in work.items():
        for name, threshold in (("adaptive", 3.0), ("transnetv2", 0.5), ("transnetv2", 0.35)):
            began = time.perf_counter()
            found = told(name, threshold, frames)
            print(f"{what:32}{name:11}{threshold:5g}  {scored(found, spans)}, "
                  f"{len(frames) / (time.perf_counter() - began):.0f} frames/s", flush=True)


if __name__ == "__main__":
    main()
