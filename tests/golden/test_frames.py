"""Which frames are read, of films of every odd kind, against a path of its own: each frame decoded in order, its time
as the stream says it, and the definition: at start + k / fps, the frame that is on screen.

Frames are told apart by their content, not by anyone's numbers, so there is no table of constants to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest

from tests import odd_files
from wantrain.data import decode
from wantrain.terms import Bucket

FILMS = [name for name, (_, truth) in odd_files.FINE.items() if truth["kind"] == "video"]
NUM_FRAMES = 5
MOST_APART = 12.0
"""Mean difference of one picture by two converters to RGB, of 255; other frames of these films are further away."""


@dataclass(frozen=True)
class Film:
    """Every frame as shown, frames_FHWC, its time in seconds from the first, and the tick of its clock."""

    frames_FHWC: np.ndarray
    times_s: list[Fraction]
    tick_s: Fraction

    def on_screen(self, at_s: Fraction) -> set[int]:
        """The frame at this moment; two where the rounding of the film's clock leaves it open."""
        return {max(i for i, time_s in enumerate(self.times_s) if time_s <= at_s + late_s)
                for late_s in (Fraction(0), self.tick_s / 2)}

    def seen_in(self, frame_HWC: np.ndarray) -> set[int]:
        """The frames that this one looks like: the nearest, and those that look the same as it."""
        apart = np.abs(self.frames_FHWC.astype(np.int16) - frame_HWC.astype(np.int16)).mean((1, 2, 3))
        assert apart.min() < MOST_APART
        return set(np.flatnonzero(apart == apart.min()).tolist())


def turned(frame: av.VideoFrame) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24")
    return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """name -> (its path, what it holds), made when first asked for."""
    folder, made = tmp_path_factory.mktemp("films"), {}

    def get(name: str) -> tuple[object, Film]:
        if name not in made:
            odd_files.make(folder, [name])
            with av.open(str(folder / name)) as container:
                stream = container.streams.video[0]
                decoded = [(frame.pts * stream.time_base, turned(frame)) for frame in container.decode(stream)]
            first_s = min(time_s for time_s, _ in decoded)
            made[name] = folder / name, Film(np.stack([picture for _, picture in decoded]),
                                             [time_s - first_s for time_s, _ in decoded], stream.time_base)
        return made[name]

    return get


def read(path, film: Film, start_s: Fraction, fps: Fraction) -> np.ndarray:
    """frames_FHWC in the film's own size, as many as there are up to NUM_FRAMES."""
    available = int((film.times_s[-1] - start_s) * fps) + 1
    height, width = film.frames_FHWC.shape[1:3]
    bucket = Bucket(min(NUM_FRAMES, available), height, width)
    return decode.read_clip(path, float(start_s), None, float(fps), bucket).movedim(1, -1).numpy()


@pytest.mark.parametrize("name", FILMS)
def test_the_frames_on_screen_are_the_ones_that_are_read(shelf, name):
    path, film = shelf(name)
    later_s = film.times_s[-1] * Fraction(2, 5)
    for model_fps in (16, 24):
        for speed in (1, 2):
            fps = Fraction(model_fps, speed)
            for start_s in (Fraction(0), later_s):
                frames_FHWC = read(path, film, start_s, fps)
                for k, frame_HWC in enumerate(frames_FHWC):
                    expected = film.on_screen(start_s + k / fps)
                    assert film.seen_in(frame_HWC) & expected, f"frame {k} at {model_fps} fps from {start_s} s"


@pytest.mark.parametrize("suffix", ["mp4", "mov", "ts", "mkv", "webm"])
def test_a_film_at_the_models_own_rate_is_read_frame_by_frame(tmp_path, suffix):
    """No frame twice and none left out, however coarse the clock of the container."""
    path = tmp_path / f"film.{suffix}"
    codec = {"webm": "libvpx"}.get(suffix, "libx264")
    odd_files.write_film(path, odd_files.frames(), 24, codec)
    found = decode.probe(path)
    assert decode.choose_frames(found.times_s, 0, 24, 24, found.grace_s).tolist() == list(range(24))
