"""Cameras of a clip: poses and moves from text files, cut to a window, beside the clip in every kind of source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import moving_square, write_tar
from wantrain.data import cameras, decode, manifest, media, plan
from wantrain.data.manifest import ClipSource
from wantrain.pictures import write_mp4
from wantrain.terms import Bucket, MediaInfo, UserError

FILM = MediaInfo("d", 2.0, 160, 90, "", 20)
"""Ten frames a second."""


def turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def line(k: float, lens: tuple[float, ...] = (0.6, 0.9, 0.5, 0.4)) -> str:
    matrix = np.concatenate([turn(0.05 * k), [[0.1 * k], [0.2], [0.3]]], axis=1)
    return " ".join(map(str, [1000 * k, *lens, 0, 0, *matrix.flatten()]))


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("https://example.com/film\n" + "\n".join(lines) + "\n")
    return path


def test_a_window_has_the_poses_of_its_own_frames(tmp_path: Path) -> None:
    """From 0.5 s at 5 frames a second of a film of 10: its frames 5, 7, 9, 11, 13."""
    path = write(tmp_path / "a.txt", [line(k) for k in range(20)])
    found = cameras.of_film(path, FILM, 0.5, 5, Bucket(5, 90, 160))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, :4], np.tile([0.6, 0.9, 0.5, 0.4], (5, 1)), atol=1e-6)
    for row, k in zip(found, (5, 7, 9, 11, 13), strict=True):
        np.testing.assert_allclose(row[4:].reshape(3, 4)[:, :3], turn(0.05 * 5) @ turn(-0.05 * k), atol=1e-5)
        seen = turn(-0.05 * k) @ (np.array([1.0, 2.0, 3.0]) - [0.1 * k, 0.2, 0.3])  # in the world
        np.testing.assert_allclose(row[4:].reshape(3, 4) @ [1, 2, 3, 1], turn(0.05 * 5) @ seen + [0.5, 0.2, 0.3],
                                   atol=1e-5)
    assert found[0, 4:].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_fewer_poses_than_frames_are_spread_over_the_film(tmp_path: Path) -> None:
    """Three poses over 20 frames: frame 0 has the first, 19 the last, and those between lie on straight lines."""
    path = write(tmp_path / "a.txt", [line(0), line(0, (0.8, 0.9, 0.5, 0.4)), line(0, (1.0, 0.9, 0.5, 0.4))])
    found = cameras.of_film(path, FILM, 0.0, 10, Bucket(17, 90, 160))
    np.testing.assert_allclose(found[:, 0], 0.6 + 0.4 * np.arange(17) / 19, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(90, 160), (96, 96), (48, 160)])
def test_a_point_is_seen_where_the_cropped_picture_shows_it(tmp_path: Path, height: int, width: int) -> None:
    path = write(tmp_path / "a.txt", [line(0), line(1)])
    lens = cameras.of_film(path, FILM, 0.0, 10, Bucket(1, height, width))[0, :4]
    point = np.array([0.2, -0.1, 1.3])
    x, y = (FILM.width * (0.6 * point[0] / point[2] + 0.5), FILM.height * (0.9 * point[1] / point[2] + 0.5))
    scale = max(width / FILM.width, height / FILM.height)  # covers the bucket, then the middle is cut out
    shown = [x * scale - (FILM.width * scale - width) / 2, y * scale - (FILM.height * scale - height) / 2]
    own = [width * (lens[0] * point[0] / point[2] + lens[2]), height * (lens[1] * point[1] / point[2] + 0.5)]
    np.testing.assert_allclose(own, shown, atol=1e-4)


@pytest.mark.parametrize(("said", "way", "angle"), [
    ("zoom_in 1", (0, 0, 3.0), 0), ("pan_up 0.5", (0, -0.75, 0), 0), ("clockwise 1", (0, 0, 0), 60),
    ("static 9", (0, 0, 0), 0)])
def test_a_move_is_that_of_comfyui(tmp_path: Path, said: str, way: tuple[float, ...], angle: float) -> None:
    """Of frame i of n: i / n of the way and of the angle (comfy_extras/nodes_camera_trajectory.py)."""
    (tmp_path / "a.txt").write_text(said + "\n")
    found = cameras.of_sample(tmp_path / "a.txt", Bucket(9, 720, 1280))
    np.testing.assert_allclose(found[:, :4], 0.5)
    last = found[-1, 4:].reshape(3, 4)
    np.testing.assert_allclose(last[:, 3], np.array(way) * 8 / 9, atol=1e-6)
    about_z = np.degrees(np.arctan2(last[1, 0], last[0, 0]))
    assert about_z == pytest.approx(angle * 8 / 9, abs=1e-3)
    assert f"turns {angle * 8 / 9:.0f} degrees" in cameras.told(found)


@pytest.mark.parametrize(("text", "said"), [
    ("", "line 1 is neither a pose nor a move"), ("fly 1\n", "line 1 is neither"),
    ("zoom_in fast\n", "fast is no number"), ("a film\n" + line(0) + "\n1 2 3\n", "line 3 is neither"),
    ("a film\n" + line(0).replace("0.6", "nan") + "\n", "nan is no number"),
    ("a film\n" + line(0, (0.0, 1.0, 0.5, 0.5)) + "\n", "holds no poses"),
    ("a film\n" + " ".join(["2"] * 19) + "\n", "holds no poses")])
def test_a_file_that_says_neither_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        cameras.read(path)
    assert said.split(" ", maxsplit=1)[0] in media.look(path).fault, "and so is a clip's"


def test_a_sample_needs_a_pose_a_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", [line(k) for k in range(7)])
    assert len(cameras.of_sample(path, Bucket(5, 64, 64))) == 5
    with pytest.raises(UserError, match="has 7 poses, a sample has 9 frames") as caught:
        cameras.of_sample(path, Bucket(9, 64, 64))
    assert caught.value.next_step.startswith("sampler.num_frames=5")


def test_a_folder_a_manifest_and_a_shard_bring_cameras(tmp_path: Path) -> None:
    write_mp4(tmp_path / "set" / "a.mp4", moving_square(0, 9, 64, 96), 16)
    (tmp_path / "set" / "a.txt").write_text("a square")
    poses = write(tmp_path / "set" / "camera" / "a.txt", [line(k) for k in range(9)])
    (tmp_path / "set.jsonl").write_text(
        '{"video": "set/a.mp4", "caption": "a square", "camera": "set/camera/a.txt"}\n')
    write_tar(tmp_path / "set.tar", (("a.mp4", (tmp_path / "set" / "a.mp4").read_bytes()), ("a.txt", b"a square"),
                                     ("a.camera.txt", poses.read_bytes())))
    shown = []
    for source in ("set", "set.jsonl", "set.tar"):
        clip, = manifest.read(ClipSource("s", str(tmp_path / source)))
        assert clip.caption == "a square"
        assert not clip.more_captions
        found = {medium: media.look(medium) for medium in (clip.path, clip.partners["camera"])}
        window, = plan.place([clip], found, plan.Rules([Bucket(5, 64, 96)], 8)).used
        assert window.partners["camera"].bucket == window.bucket
        shown.append(decode.read_window(window.part("camera")).numpy())
        np.testing.assert_allclose(shown[-1][:, 4:].reshape(-1, 3, 4)[4, :, :3], turn(-0.05 * 8), atol=1e-5)
    assert len({one.tobytes() for one in shown}) == 1


def test_a_clip_is_no_camera_and_a_camera_no_clip(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(0, 9, 64, 96), 16)
    write(tmp_path / "a.poses.txt", [line(0)])
    rows = {"camera": '"camera": "a.mp4"', "control": '"control": "a.poses.txt"'}
    for kind, row in rows.items():
        (tmp_path / "set.jsonl").write_text(f'{{"video": "a.mp4", "caption": "x", {row}}}\n')
        clip, = manifest.read(ClipSource("s", str(tmp_path / "set.jsonl")))
        found = {medium: media.look(medium) for medium in (clip.path, *clip.partners.values())}
        placed = plan.place([clip], found, plan.Rules([Bucket(5, 64, 96)], 8))
        assert f"its {kind}" in placed.dropped[0].reason
        assert "text file of a camera's poses" in placed.dropped[0].reason
