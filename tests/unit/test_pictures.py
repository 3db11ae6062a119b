"""Pictures are what the file shows: kinds of films and pictures that people brought, told by the numbers they carry."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from data_tools import probing as tool
from tests import odd_files
from wantrain.data import decode, media, plan
from wantrain.data.cache import LATENTS, Cache
from wantrain.terms import WINDOW, Bucket, Clip, MediaInfo, PlannedClip, Remote, UserError

CASES = Path(__file__).parents[2] / "../shared/cases/media"


SURPRISING = {"ten bit pq.mp4": "HDR (PQ)", "interlaced.mpg": "interlaced", "24 fps.mp4": "",
              "stretched.mp4": "pixels not square (shown in their true shape)"}


def numbers(path: Path, start_s: float, num_frames: int) -> list[int]:
    """The numbers of the frames that are read at 16 fps, in the film's own size."""
    found = media.probe(path)
    bucket = Bucket(num_frames, found.height, found.width)
    frames_FHWC = decode.read_clip(path, start_s, None, 16, bucket).movedim(1, -1).numpy()
    return [odd_files.number_of(frame_HWC) for frame_HWC in frames_FHWC]


def rewritten(fault: str, folder: Path) -> Path:
    """What the command that a fault names makes, with the path of our ffmpeg."""
    command = shlex.split(fault.partition("write it anew: ")[2])
    assert command[0] == "ffmpeg"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", *command[1:]], cwd=folder, check=True)
    return Path(command[-1])


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases that came with the issue are not beside the repository")
@pytest.mark.parametrize(("name", "start_s", "expected"), [
    ("h264_bframes.avi", 10.5, [252, 253, 255, 0, 2, 3, 5, 6, 8, 9]),
    ("h264_bframes.avi", 0.0, [0, 1, 3, 4, 6, 7]),
    ("xvid_packed.avi", 0.0, [0, 1, 3, 4, 6, 7]),
    ("recorder.webm", 0.0, [0, 1, 3, 4, 6, 7]),
    ("two_videos.mp4", 0.0, [0, 1, 3, 4, 6, 7]),
    ("wrap_inside.ts", 1.0, [24, 25, 27, 28, 30, 31]),
    ("palette_smc.mov", 0.5, [12, 13, 15, 16, 18, 19]),
])
def test_the_films_of_the_issue_show_what_ffmpeg_shows(name, start_s, expected):
    assert numbers(CASES / name, start_s, len(expected)) == expected
    assert tool.probe_file(CASES / name).fault == ""


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases that came with the issue are not beside the repository")
def test_the_pictures_of_the_issue_are_read_right():
    assert media.probe(CASES / "rotated_phone.mkv").aspect == 1.5
    assert numbers(CASES / "two_videos.mp4", 1.0, 1) == [24]
    grey = np.asarray(media.read_image(CASES / "gray16.png"))
    assert len(np.unique(grey)) > 90
    hidden = np.asarray(media.read_image(CASES / "rgba_hidden.png"))
    assert not (hidden == (255, 0, 255)).all(-1).any()


def test_joined_recordings_are_refused_with_the_command_that_writes_all_of_both(tmp_path):
    for name, arguments in {"a film.mpg": ["-c:v", "mpeg2video", "-q:v", "2"], "b.mkv": ["-c:v", "mpeg4", "-q:v", "2"]
                            }.items():
        path = tmp_path / name
        frames = odd_files.numbered(odd_files.frames())
        odd_files.write_film(path.with_suffix(".mp4"), frames)
        odd_files.ffmpeg("-i", path.with_suffix(".mp4"), *arguments, path)
        path.write_bytes(path.read_bytes() * 2)
        fault = media.look(path).fault
        assert "its clock goes back" in fault
        assert tool.probe_file(path).fault.endswith(fault)
        assert numbers(rewritten(fault, tmp_path), 0.5, 16) == [
            (12 + int(k * 1.5)) % 24 for k in range(16)]


def test_a_clock_that_jumps_ahead_by_hours_is_refused(tmp_path):
    odd_files.write_film(tmp_path / "a.mp4", odd_files.frames())
    for name, offset_s in (("1.ts", 0), ("2.ts", 3600)):
        odd_files.ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-output_ts_offset", offset_s, tmp_path / name)
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "1.ts").read_bytes() + (tmp_path / "2.ts").read_bytes())
    assert "its clock jumps from" in media.look(joined).fault


def test_sixteen_bits_of_grey_and_of_colour_are_read_by_their_upper_eight(tmp_path):
    ramp_HW = np.linspace(0, 65535, 64 * 96).astype(np.uint16).reshape(64, 96)
    Image.fromarray(ramp_HW).save(tmp_path / "grey.png")
    assert (np.asarray(media.read_image(tmp_path / "grey.png")) == (ramp_HW >> 8)[..., None]).all()
    raw = tmp_path / "raw.rgb"
    raw.write_bytes(np.stack([ramp_HW, ramp_HW[::-1], ramp_HW], -1).astype("<u2").tobytes())
    odd_files.ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "96x64", "-i", raw, tmp_path / "colour.png")
    colour = np.asarray(media.read_image(tmp_path / "colour.png"))
    assert (colour == np.stack([ramp_HW, ramp_HW[::-1], ramp_HW], -1) >> 8).all()
    Image.fromarray(ramp_HW.astype(np.float32)).save(tmp_path / "float.png", format="TIFF")
    with pytest.raises(UserError, match="none says what is white"):
        media.read_image(tmp_path / "float.png")


@pytest.mark.parametrize(("name", "density", "said"), [
    ("a.png", (300, 600), "300:600"), ("a.jpg", (300, 600), "300:600"), ("film.png", None, "16:11"),
    ("film.jpg", None, "16:11"), ("a.png", (300, 300), ""), ("a.png", (300, 301), ""), ("a.jpg", (0, 72), ""),
    ("a.jpg", (72, 72), ""), ("a.webp", (300, 600), ""),
])
def test_images_whose_pixels_are_not_square_are_refused_by_name(tmp_path, name, density, said):
    """The PNG standard counts pixels a metre, so 16:11 are narrow ones; ffmpeg writes 16:11 for wide ones."""
    path = tmp_path / name
    if density:
        Image.new("RGB", (96, 64)).save(path, dpi=density)
    else:
        odd_files.ffmpeg("-f", "lavfi", "-i", "color=s=96x64,setsar=16/11", "-frames:v", "1", path)
    found = media.look(path)
    assert ("not square" in found.fault, said in found.fault) == (bool(said), True)
    if said:
        assert "setsar=1" in found.fault
        with pytest.raises(UserError, match=f"{name} cannot be decoded: .*not square"):
            media.read_image(path)


def test_what_is_transparent_is_laid_on_white_and_told(tmp_path):
    odd_files.make(tmp_path, ["hidden colour.png", "clear.mov", "clear.webm", "moving.gif"])
    shown = np.asarray(media.read_image(tmp_path / "hidden colour.png"))
    assert (shown[:32] == (255, 0, 0)).all()
    assert (shown[32:] == 255).all()
    indexed = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8), 48)[None].repeat(64, 0), mode="P")
    indexed.putpalette([255, 0, 255, 0, 0, 255])
    indexed.save(tmp_path / "indexed.png", transparency=0)
    Image.fromarray(np.full((64, 96), 4660, np.uint16)).save(tmp_path / "deep.png", transparency=4660)
    for name, pixel in {"indexed.png": (0, 0), "deep.png": (5, 5)}.items():
        assert np.asarray(media.read_image(tmp_path / name))[pixel].tolist() == [255, 255, 255]
        assert "transparent" in media.look(tmp_path / name).surprises
    told = {name: media.look(tmp_path / name).surprises for name in ("hidden colour.png", "clear.mov", "moving.gif")}
    assert told == {"hidden colour.png": "transparent (laid on white)", "clear.mov": "transparent (laid on white)",
                    "moving.gif": ""}


def test_what_surprises_is_told_by_the_look_and_of_partners_too(tmp_path):
    odd_files.make(tmp_path, SURPRISING)
    told = {name: media.look(tmp_path / name) for name in SURPRISING}
    assert {name: one.surprises for name, one in told.items()} == SURPRISING
    clip = Clip("a", tmp_path / "24 fps.mp4", "x", "s")
    window = PlannedClip(clip, Bucket(5, 64, 96), told["interlaced.mpg"], 16.0, partners={
        "control": PlannedClip(clip, Bucket(5, 64, 96), told["ten bit pq.mp4"], 16.0)})
    assert plan.surprises_of(window) == ["interlaced", "HDR (PQ) (control)"]


def test_pixels_that_are_not_square_are_cropped_by_what_is_shown(tmp_path):
    """A film of 4:3 pixels in a bucket of its true shape loses nothing: its right edge is there."""
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    frames[:, :, -8:] = 255
    odd_files.write_film(tmp_path / "square.mp4", frames)
    odd_files.ffmpeg("-i", tmp_path / "square.mp4", "-vf", "setsar=4/3", "-qp", 0, tmp_path / "a.mp4")
    for contain in (False, True):
        got = decode.read_clip(tmp_path / "a.mp4", 0, None, 16, Bucket(1, 64, 128), contain=contain)[0]
        assert int(got[:, :, -6:].min()) > 240
        assert int(got[:, :, :110].max()) < 16
    found = media.look(tmp_path / "a.mp4")
    assert (found.width, found.height) == (128, 64)
    assert plan.cropped(Bucket(1, 64, 128), found) == 0


def test_a_file_of_the_same_size_and_time_is_another_file(tmp_path):
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    for one, value in ((path, 1), (other, 2)):
        one.write_bytes(b"")
        Image.fromarray(np.full((64, 96, 3), value, np.uint8)).save(one, compress_level=0)
    size = path.stat().st_size
    first, before = media.look_all([path], tmp_path / "cache", 1, 60), tool.probe_file(path)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))  # touch -r
    other.replace(path)
    assert path.stat().st_size == size
    assert media.look_all([path], tmp_path / "cache", 1, 60)[path].digest != first[path].digest
    assert tool.stamp(path) != (before.size_bytes, before.mtime_ns, before.ctime_ns)


@pytest.fixture
def window(tmp_path) -> PlannedClip:
    return PlannedClip(Clip("a", tmp_path / "a.mp4", "x", "s"), Bucket(5, 64, 96), MediaInfo("digest", 3.0), 16.0)


def test_what_is_read_out_of_the_ordinary_has_entries_of_its_own(tmp_path, window):
    cache = Cache(tmp_path, "vae", "text", "wantrain cache")
    ordinary, other = window, [replace(window, found=replace(window.found, **how)) for how in (
        {"why_not_decord": "turned or mirrored"}, {"surprises": "pixels not square (shown in their true shape)"})]
    paths = {cache.path_of((LATENTS, one)) for one in (ordinary, *other)}
    assert len(paths) == 3
    image = replace(window, found=MediaInfo("digest", why_not_decord="image"))
    assert cache.path_of((LATENTS, image)) == cache.path_of((LATENTS, replace(image, found=MediaInfo("digest"))))


@pytest.mark.parametrize("place", ["gone.mp4", Remote("http://127.0.0.1:9/a.mp4", "a.mp4", "key")])
def test_a_file_out_of_reach_is_not_said_to_be_broken(tmp_path, window, place):
    unreached = replace(window, clip=replace(window.clip, path=tmp_path / place if isinstance(place, str) else place))
    frames, name, fault = decode.frames_in_worker((unreached, (WINDOW,)))
    assert (frames, name) == ({}, "")
    assert "clip a: " in fault
    (tmp_path / "a.mp4").write_bytes(b"no film")
    assert decode.frames_in_worker((window, (WINDOW,)))[1] == WINDOW


def test_what_is_remembered_as_a_fault_is_forgotten_by_the_command_it_names(tmp_path, window):
    cache = Cache(tmp_path / "a cache", "vae", "text", "wantrain cache")
    cache.remember_fault((LATENTS, window), "cannot be decoded")
    (fault,) = cache.faults().values()
    assert fault.startswith("cannot be decoded (found by an earlier run; to try it again: rm ")
    subprocess.run(shlex.split(fault.partition("again: ")[2].removesuffix(")")), check=True)
    assert cache.faults() == {}


def test_what_decord_gives_up_on_is_read_by_pyav(tmp_path, monkeypatch):
    odd_files.write_film(tmp_path / "a.mp4", odd_files.numbered(odd_files.frames()))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[00:00:00] /src/video_reader.cc:151: cannot find video stream")

    monkeypatch.setattr(decode.decord, "VideoReader", refuse)
    assert numbers(tmp_path / "a.mp4", 0.0, 6) == [0, 1, 3, 4, 6, 7]
