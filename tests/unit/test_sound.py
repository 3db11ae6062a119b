"""The sound of a clip: beside it or its own film's, cut to the window by samples, in every kind of source."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import moving_square, write_tar
from tests.tiny_tasks import tone, write_sound
from wantrain.data import decode, films, manifest, media, plan, sound
from wantrain.data.manifest import ClipSource
from wantrain.models.variants import VARIANTS
from wantrain.pictures import write_mp4
from wantrain.recipe.clips import with_sound
from wantrain.terms import Bucket, Clip, Dropped, UserError

BUCKET = Bucket(5, 64, 96)
"""At 8 frames a second half a second of sound."""


def write_film(path: Path, *, hz: float = 300, rate: int = 48_000, late_s: float = 0.0, seconds: float = 1.125,
               codec: str = "pcm_s16le") -> Path:
    """A moving square at 8 fps for 1.125 s with a tone in two channels that begins `late_s` after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        film = container.add_stream("libx264", 8)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        heard = container.add_stream(codec, rate)
        heard.layout = "stereo"
        for frame in moving_square(0, 9, 64, 96):
            container.mux(film.encode(av.VideoFrame.from_ndarray(frame.movedim(0, -1).numpy(), format="rgb24")))
        container.mux(film.encode())
        samples = np.repeat(tone(hz, seconds, rate), 2)[None]
        given = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        given.sample_rate, given.time_base, given.pts = rate, Fraction(1, rate), round(late_s * rate)
        resampler = av.AudioResampler(heard.format, "stereo", rate, frame_size=1024)
        for one in [*resampler.resample(given), *resampler.resample(None)]:
            container.mux(heard.encode(one))
        container.mux(heard.encode())
    return path


def planned(clip: Clip, *buckets: Bucket) -> list:
    found = {medium: media.look(medium) for medium in plan.files_of([clip])}
    placed = plan.place([clip], found, plan.Rules(buckets or [BUCKET], 8))
    return placed.used or placed.dropped


def test_a_window_has_its_own_samples(tmp_path: Path) -> None:
    """To the bit, of a file that has the rate and the one channel already."""
    path = write_sound(tmp_path / "a.wav", 300)
    found = sound.read(path, media.probe(path), 0.25, 0.5)
    assert found.dtype == np.float32
    assert np.array_equal(found, tone(300)[4000:12000] / np.float32(32768))
    assert sound.told(found).startswith("0.50 s, -")
    assert sound.told(0 * found) == "0.50 s, silent"


@pytest.mark.parametrize(("name", "late_s", "codec"), [("a.mkv", 0.0, "pcm_s16le"), ("a.mkv", 0.2, "pcm_s16le"),
                                                       ("a.mp4", 0.0, "aac")])
def test_a_films_own_sound_runs_with_its_pictures(tmp_path: Path, name: str, late_s: float, codec: str) -> None:
    """Of another rate, in two channels, and later than the film: heard where it is played."""
    path = write_film(tmp_path / name, late_s=late_s, codec=codec)
    found = sound.read(path, media.probe(path), 0.25, 0.5)
    own = tone(300, 1.125) / 32768
    begin = round((0.25 - late_s) * 16_000)
    assert np.abs(found - own[begin:begin + 8000]).max() < (0.002 if codec != "aac" else 0.03)
    early = sound.read(path, media.probe(path), 0.0, 0.25)
    assert np.abs(early[: round(max(0, late_s - 0.03) * 16_000)]).max(initial=0) < 1e-3, "silence before it"


def test_a_seek_changes_nothing(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", 300, seconds=6)
    found = sound.read(path, media.probe(path), 4.5, 1.0)
    assert np.array_equal(found, tone(300, 6)[72_000:88_000] / np.float32(32768))


def test_a_folder_a_manifest_and_a_shard_bring_sounds_and_a_film_its_own(tmp_path: Path) -> None:
    write_film(tmp_path / "set" / "a.mkv", hz=500)
    (tmp_path / "set" / "a.txt").write_text("a square")
    beside = write_sound(tmp_path / "set" / "audio" / "a.wav", 200)
    (tmp_path / "set.jsonl").write_text('{"video": "set/a.mkv", "caption": "a square", "audio": "set/audio/a.wav"}\n')
    write_tar(tmp_path / "set.tar", (("a.mkv", (tmp_path / "set" / "a.mkv").read_bytes()), ("a.txt", b"a square"),
                                     ("a.audio.wav", beside.read_bytes())))
    for source in ("set", "set.jsonl", "set.tar"):
        clip, = with_sound(VARIANTS["tiny_wan_s2v"], manifest.read(ClipSource("s", str(tmp_path / source))))
        window, = planned(clip)
        found = decode.read_window(window.part("audio")).numpy()
        assert np.array_equal(found, tone(200)[:8000] / np.float32(32768)), source
    clip, = with_sound(VARIANTS["tiny_wan_s2v"], [Clip("a", tmp_path / "set" / "a.mkv", "x", "s")])
    window, = planned(clip)
    found = decode.read_window(window.part("audio")).numpy()
    assert np.abs(found - tone(500, 1.125)[:8000] / 32768).max() < 0.002
    assert with_sound(VARIANTS["tiny_wan"], [clip]) == [clip], "a task that hears nothing has none"


def test_a_film_at_another_speed_has_the_sound_of_its_own_seconds(tmp_path: Path) -> None:
    """Twice as fast: a window of half a second shows a whole one, and hears it."""
    path = write_film(tmp_path / "a.mkv")
    window, = planned(Clip("a", path, "x", "s", partners={"audio": path}, speed=2.0))
    assert len(decode.read_window(window.part("audio"))) == 16_000


def why(dropped: Iterable[object]) -> str:
    one, = dropped
    assert isinstance(one, Dropped)
    assert one.kind == "partner"
    return one.reason


def test_a_clip_without_sound_or_with_too_little_is_dropped_by_name(tmp_path: Path) -> None:
    film = tmp_path / "silent.mp4"
    write_mp4(film, moving_square(0, 9, 64, 96), 8)
    heard, short = write_film(tmp_path / "a.mkv"), write_sound(tmp_path / "short.wav", 200, 0.4)

    def clip(path: Path, audio: Path) -> Clip:
        return Clip("a", path, "x", "s", partners={"audio": audio})

    assert why(planned(clip(film, film))) == f"its audio {film} has no sound"
    assert why(planned(clip(film, short))) == f"its audio {short} ends before it, after 0.4 s"
    assert planned(clip(film, heard))[0].part("audio").found.sound_s == pytest.approx(1.125, abs=0.01)
    assert why(planned(clip(heard, heard), Bucket(1, 64, 96))) == \
        f"its audio {heard} goes with a window of one frame, which has none"
    assert why(planned(Clip("a", heard, "x", "s", partners={"control": short}))) == f"its control {short} is a sound"
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF of no sound")
    assert str(bad) in why(planned(clip(film, bad)))


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", 200)
    with pytest.raises(UserError, match=r"a\.wav: the sound ends after 1\.00 s, and 1\.25 s are needed"):
        sound.read(path, media.probe(path), 0.75, 0.5)
    assert len(sound.read(path, media.probe(path), 0.5, 0.501)) == 8016, "a thousandth of a second is no lack"
    write_mp4(tmp_path / "silent.mp4", moving_square(0, 9, 64, 96), 8)
    with pytest.raises(UserError, match=r"silent\.mp4 has no sound"):
        sound.read(tmp_path / "silent.mp4", media.probe(tmp_path / "silent.mp4"), 0.0, 0.5)


def test_a_film_that_does_not_say_how_long_its_sound_is_is_a_film(tmp_path: Path, monkeypatch) -> None:
    """As browsers record them: then its sound is taken to be as long as its pictures."""
    path = write_film(tmp_path / "a.mkv")
    monkeypatch.setattr(films, "sound_s", lambda *_: None)
    assert media.look(path).sound_s == media.look(path).duration_s == pytest.approx(1.125)
    said = media.look(write_sound(tmp_path / "a.wav", 200)).fault
    assert said == "it does not say how long it is: write it anew with ffmpeg"
