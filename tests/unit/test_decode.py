"""Which frames are read, compared by content with an independent decoder on files made here."""

import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import moving_square
from wantrain import pictures
from wantrain.data import decode, films
from wantrain.terms import Bucket, UserError

FOOTAGE = Path(__file__).parents[2] / "wantrain/assets/demo/footage/01_ears-up.mp4"


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def every_frame(path):
    """All shown frames, decoded in order by PyAV."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A 24 fps film of 72 numbered frames with B-frames and several keyframes."""
    folder = tmp_path_factory.mktemp("film")
    pictures.write_mp4(folder / "raw.mp4", moving_square(3, 72, 64, 96), 24)
    ffmpeg("-i", folder / "raw.mp4", "-c:v", "libx264", "-bf", "2", "-g", "24", "-pix_fmt", "yuv420p",
           folder / "film.mp4")
    return folder / "film.mp4"


def test_frames_are_chosen_by_what_is_on_screen():
    at_24 = np.arange(48) / 24
    assert decode.choose_frames(at_24, 0, 16, 5).tolist() == [0, 1, 3, 4, 6]
    assert decode.choose_frames(at_24, 0.5, 24, 3).tolist() == [12, 13, 14]
    assert decode.choose_frames(np.arange(10) / 12, 0, 24, 5).tolist() == [0, 0, 1, 1, 2]
    uneven = np.array([0.0, 0.02, 0.5, 0.52, 1.0])
    assert decode.choose_frames(uneven, 0, 4, 5).tolist() == [0, 1, 2, 3, 4]


def test_decord_gives_the_frames_that_pyav_gives(film):
    reference = every_frame(film)
    got = decode.read_clip(film, 0.25, None, 16, Bucket(9, 64, 96))
    chosen = [int((0.25 + k / 16 + 1e-6) * 24) for k in range(9)]
    assert np.array_equal(got.movedim(1, -1).numpy(), reference[chosen])


def test_a_span_ends_where_it_says(film):
    assert films.count_frames(decode.probe(film), 1.0, 2.0, 16) == 16
    assert films.count_frames(decode.probe(film), 0.0, None, 16) == 48
    with pytest.raises(UserError, match="8 frames at 16 fps"):
        decode.read_clip(film, 1.0, 1.5, 16, Bucket(9, 64, 96))


def test_an_edit_list_goes_to_pyav_and_shows_what_players_show(film, tmp_path):
    cut = tmp_path / "cut.mp4"
    ffmpeg("-ss", "0.7", "-i", film, "-c", "copy", cut)
    found = decode.probe(cut)
    assert found.why_not_decord == "edit list"
    reference = every_frame(cut)
    assert len(found.times_s) == len(reference)
    got = decode.read_clip(cut, 0, None, 24, Bucket(9, 64, 96))
    assert np.array_equal(got.movedim(1, -1).numpy(), reference[:9])


def test_far_spans_are_reached_by_seeking_and_are_the_right_frames(film, tmp_path):
    long = tmp_path / "long.mp4"
    ffmpeg("-stream_loop", "4", "-i", film, "-c:v", "libx264", "-g", "48", "-x264-params", "open-gop=1", long)
    reference = every_frame(long)
    got = decode.read_clip(long, 11.0, None, 24, Bucket(5, 64, 96))
    assert np.array_equal(got.movedim(1, -1).numpy(), reference[264:269])


def test_variable_frame_rate_is_read_by_timestamps(tmp_path):
    path = tmp_path / "vfr.mkv"
    frames = moving_square(1, 12, 32, 32).movedim(1, -1).contiguous().numpy()
    shown_ms = [0, 20, 40, 60, 80, 100, 500, 600, 700, 800, 900, 1000]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, milliseconds in zip(frames, shown_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reference = every_frame(path)
    got = decode.read_clip(path, 0, None, 4, Bucket(5, 32, 32))
    assert np.array_equal(got.movedim(1, -1).numpy(), reference[[0, 5, 6, 8, 11]])


def test_rotation_is_honoured(film, tmp_path):
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", film, "-c", "copy", turned)
    found = decode.probe(turned)
    assert (found.height, found.width) == (96, 64)
    got = decode.read_clip(turned, 0, None, 24, Bucket(1, 96, 64))[0].movedim(0, -1).numpy()
    assert np.array_equal(got, np.rot90(every_frame(film)[0]))


def test_narrow_films_keep_three_channels(tmp_path):
    """decord takes a padded row for a fourth channel here."""
    pictures.write_mp4(tmp_path / "narrow.mp4", moving_square(1, 5, 32, 48), 16)
    got = decode.read_clip(tmp_path / "narrow.mp4", 0, None, 16, Bucket(5, 32, 48))
    assert np.array_equal(got.movedim(1, -1).numpy(), every_frame(tmp_path / "narrow.mp4"))


def test_truncated_and_foreign_files_are_named(film, tmp_path):
    for name, content in {"cut.mp4": film.read_bytes()[:1500], "text.mp4": b"not a video", "empty.mp4": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            decode.read_clip(tmp_path / name, 0, None, 24, Bucket(5, 64, 96))


def test_a_file_cut_off_inside_its_frames_is_an_error_not_a_shorter_clip(tmp_path):
    whole = tmp_path / "whole.mp4"
    ffmpeg("-i", FOOTAGE, "-c:v", "libx264", "-movflags", "+faststart", whole)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        decode.read_clip(cut, 0, None, 24, Bucket(45, 48, 64))


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(np.full((40, 60, 3), 7, np.uint8)).save(tmp_path / "still.png")
    found = decode.probe(tmp_path / "still.png")
    assert films.count_frames(found, 0, None, 16) == 1
    frames = decode.read_clip(tmp_path / "still.png", 0, None, 16, Bucket(1, 32, 48))
    assert frames.shape == (1, 3, 32, 48)
    assert frames.unique().tolist() == [7]


def test_fit_keeps_the_aspect_and_crops_the_centre():
    frames = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    frames[..., :20] = 255
    assert int(decode.fit(frames, 40, 40).max()) == 0
    whole = decode.fit(frames, 20, 40)
    assert whole.shape == (1, 3, 20, 40)
    assert int(whole[..., :8].min()) == 255
    assert int(whole[..., 12:].max()) == 0


def test_a_stream_cut_inside_a_group_of_pictures_never_gives_other_frames(film, tmp_path):
    """Its first frames have times and do not decode: what is asked for by time comes, or an error, never another frame.
    """
    ffmpeg("-i", film, "-c", "copy", tmp_path / "whole.ts")
    packets = (tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(packets[188 * (len(packets) // 188 // 4):])
    found = decode.probe(tmp_path / "cut.ts")
    with av.open(str(tmp_path / "cut.ts")) as container:
        stream = container.streams.video[0]
        decoded = {round(float(f.pts * stream.time_base - found.start_s), 4): f.to_ndarray(format="rgb24")
                   for f in container.decode(stream)}
    assert len(decoded) < len(found.times_s)
    read = 0
    for index, time_s in enumerate(found.times_s):
        bucket = Bucket(1, found.height, found.width)
        try:
            frames = decode.read_clip(tmp_path / "cut.ts", float(time_s), None, 24, bucket)
        except UserError:
            continue
        read += 1
        assert np.array_equal(frames[0].movedim(0, -1).numpy(), decoded[round(float(time_s), 4)]), index
    assert read > len(found.times_s) // 3
