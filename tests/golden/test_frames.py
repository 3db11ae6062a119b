"""Which frames are read, of films of every odd kind, against a path of its own: the frames and the clock of another
build of ffmpeg than our decoders', and the definition: at start + k / fps, the frame that is on screen.

Frames are told apart by their content, not by anyone's numbers, so there is no table of constants to keep.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests import odd_files
from wantrain.data import decode
from wantrain.terms import Bucket

FILMS = [name for name, (_, truth) in (odd_files.FINE | odd_files.HELD).items() if truth["kind"] == "video"]
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


def through_ffmpeg(path: Path) -> Film:
    """The film as ffmpeg shows it: the stream it chooses, upright, of square pixels, laid on white by Pillow."""
    decoder = ["-c:v", "libvpx-vp9"] if path.name == "clear.webm" else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", *decoder, "-i", str(path), "-vf",
               "showinfo,scale=iw*sar:ih,format=rgba", "-fps_mode", "passthrough", "-f", "rawvideo", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    told = done.stderr.decode(errors="replace")
    tick_s = Fraction(re.findall(r"config in time_base: (\d+/\d+)", told)[0])
    times_s = [int(pts) * tick_s for pts in re.findall(r"n: *\d+ pts: *(-?\d+)", told)]
    width, height = map(int, re.findall(r"rawvideo[^\n]*?, (\d+)x(\d+)", told)[-1])
    rgba_FHWC = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 4)
    white = Image.new("RGBA", (width, height), "white")
    shown = [np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB")) for rgba in rgba_FHWC]
    return Film(np.stack(shown), [time_s - times_s[0] for time_s in times_s], tick_s)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """name -> (its path, what it holds), made when first asked for."""
    folder, made = tmp_path_factory.mktemp("films"), {}

    def get(name: str) -> tuple[object, Film]:
        if name not in made:
            odd_files.make(folder, [name])
            made[name] = folder / name, through_ffmpeg(folder / name)
        return made[name]

    return get


def read(path, film: Film, start_s: Fraction, fps: Fraction) -> np.ndarray:
    """frames_FHWC in the film's own size, as many as there are up to NUM_FRAMES."""
    available = int((film.times_s[-1] - start_s) * fps) + 1
    height, width = film.frames_FHWC.shape[1:3]
    bucket = Bucket(min(NUM_FRAMES, available), height, width)
    return decode.read_clip(path, float(start_s), None, float(fps), bucket).movedim(1, -1).numpy()


@pytest.mark.parametrize("name", FILMS)
def test_the_frames_on_screen_are_the_ones_that_are_read(shelf, name, monkeypatch):
    path, film = shelf(name)
    later_s = film.times_s[-1] * Fraction(2, 5)
    for fps in (Fraction(16), Fraction(24), Fraction(8), Fraction(12)):
        for start_s, far_s in ((Fraction(0), 10.0), (later_s, 10.0 if fps < 16 else 0.0)):
            monkeypatch.setattr(decode, "FAR_S", far_s)  # a seek finds the same frames
            for k, frame_HWC in enumerate(read(path, film, start_s, fps)):
                expected = film.on_screen(start_s + k / fps)
                assert film.seen_in(frame_HWC) & expected, f"frame {k} at {fps} fps from {start_s} s"


@pytest.mark.parametrize("suffix", ["mp4", "mov", "ts", "mkv", "webm"])
def test_a_film_at_the_models_own_rate_is_read_frame_by_frame(tmp_path, suffix):
    """No frame twice and none left out, however coarse the clock of the container."""
    path = tmp_path / f"film.{suffix}"
    codec = {"webm": "libvpx"}.get(suffix, "libx264")
    odd_files.write_film(path, odd_files.frames(), 24, codec)
    found = decode.probe(path)
    assert decode.choose_frames(found.times_s, 0, 24, 24, found.grace_s).tolist() == list(range(24))
