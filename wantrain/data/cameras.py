"""Where the camera is in every frame of a clip: read from a text file of poses, or made of a named move.

A file of poses is RealEstate10K's, as VideoX-Fun reads it: a line of any text, then one line a frame: a number that is
not read, the focal lengths and the centre as shares of width and height (fx fy cx cy), two more that are not read, and
the 12 numbers of the 3 x 4 matrix from the world to the camera. A move is one line, `pan_left 0.5`: its name and its
speed. Sources: docs/facts.md, "Cameras". (Without torch, so that worker processes start at once.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wantrain.terms import Bucket, MediaInfo, UserError

SUFFIX = ".txt"
KIND = "camera"
"""What MediaInfo.why_not_decord says of such a file."""

MOVES = {
    "static": ((0, 0, 0), (0, 0, 0)), "pan_up": ((0, 0, 0), (0, -1, 0)), "pan_down": ((0, 0, 0), (0, 1, 0)),
    "pan_left": ((0, 0, 0), (-1, 0, 0)), "pan_right": ((0, 0, 0), (1, 0, 0)), "zoom_in": ((0, 0, 0), (0, 0, 2)),
    "zoom_out": ((0, 0, 0), (0, 0, -2)), "anticlockwise": ((0, 0, -1), (0, 0, 0)), "clockwise": ((0, 0, 1), (0, 0, 0)),
}
"""ComfyUI's moves: angles about x, y, z, and a way, of a whole clip at speed 1."""

ANGLE, WAY = np.pi / 3, 1.5
"""One of an angle in radians, and of a way in the units of the poses."""

LENS = (0.5, 0.5, 0.5, 0.5)
"""fx, fy, cx and cy of a move."""

NUMBERS = 19
"""Of a line of a file of poses."""

WIDE = 1280, 720
"""Width and height of the picture that a move's lens is told for, and one that goes with no film."""


@dataclass(frozen=True, slots=True)
class Move:
    """A named move of a whole clip."""

    name: str
    speed: float

    def poses(self, num_frames: int) -> np.ndarray:
        """[F, 16] as of `read`."""
        angles, way = (np.array(part, dtype=float) for part in MOVES[self.name])
        rows = []
        for frame in range(num_frames):
            part = frame / num_frames * self.speed
            place = np.eye(4)
            place[:3, :3], place[:3, 3] = turned(part * ANGLE * angles), part * WAY * way
            rows.append([*LENS, *np.linalg.inv(place)[:3].flatten()])
        return np.array(rows)


def turned(angles: np.ndarray) -> np.ndarray:
    """The 3 x 3 rotation about x, then y, then z."""
    whole = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(3)
        one[[i, j], [i, j]] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        whole = one @ whole
    return whole


def read(path: Path) -> Move | np.ndarray:
    """What a file says: a move, or poses [F, 16]: fx, fy, cx, cy and the matrix from the world to the camera. Raises
    UserError.
    """
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0]) == 2 and lines[0][0] in MOVES:
        return Move(lines[0][0], _number(path, 1, lines[0][1]))
    if len(lines) < 2 or any(len(line) != NUMBERS for line in lines[1:]):
        wrong = next((number for number, line in enumerate(lines[1:], 2) if len(line) != NUMBERS), 1)
        raise UserError(f"{path} line {wrong} is neither a pose nor a move", "write a line of any text, then "
                        f"{NUMBERS} numbers a frame (RealEstate10K); or one line MOVE SPEED, MOVE one of "
                        f"{', '.join(MOVES)}")
    poses = np.array([[_number(path, row, word) for word in line] for row, line in enumerate(lines[1:], 2)])
    if (poses[:, 1:3] <= 0).any() or not np.isclose(np.linalg.det(poses[:, 7:].reshape(-1, 3, 4)[:, :, :3]), 1,
                                                    atol=0.05).all():
        raise UserError(f"{path} holds no poses: a focal length is not above 0, or a matrix is no rotation",
                        "write fx fy cx cy as shares of the picture, and matrices from the world to the camera")
    return np.delete(poses, (0, 5, 6), axis=1)


def _number(path: Path, row: int, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise UserError(f"{path} line {row}: {word} is no number", "write the file again")
    return number


def of_film(path: Path, found: MediaInfo, start_s: float, fps: float, bucket: Bucket) -> np.ndarray:
    """[F, 16] float32 of a window of the film that `found` tells of. The poses of the file belong to the film's frames,
    one each, or are spread evenly over them.
    """
    said = read(path)
    if isinstance(said, Move):
        return relative(said.poses(bucket.num_frames), bucket, WIDE)
    frame_s = found.duration_s / max(1, found.num_frames)
    frames = np.zeros(bucket.num_frames) if not frame_s else np.minimum(
        (start_s + np.arange(bucket.num_frames) / fps + 1e-3) // frame_s, found.num_frames - 1)
    places = frames * (len(said) - 1) / max(1, found.num_frames - 1)
    poses = np.stack([np.interp(places, np.arange(len(said)), column) for column in said.T], axis=1)
    return relative(poses, bucket, (found.width, found.height))


def of_sample(path: Path, bucket: Bucket) -> np.ndarray:
    """[F, 16] float32 of a sample: a move, or the file's first poses, one a frame."""
    said = read(path)
    if not isinstance(said, Move) and len(said) < bucket.num_frames:
        raise UserError(f"{path} has {len(said)} poses, a sample has {bucket.num_frames} frames",
                        f"sampler.num_frames={(len(said) - 1) // 4 * 4 + 1}, or a longer file")
    poses = said.poses(bucket.num_frames) if isinstance(said, Move) else said[: bucket.num_frames]
    return relative(poses, bucket, WIDE)


def told(cameras_F16: np.ndarray) -> str:
    """How far a window's camera goes, and turns, from its first frame to its last."""
    last = cameras_F16[-1, 4:].reshape(3, 4)
    angle = np.degrees(np.arccos(np.clip((np.trace(last[:, :3]) - 1) / 2, -1, 1)))
    return f"goes {', '.join(f'{way:.2f}' for way in last[:, 3])} (right, down, forward), turns {angle:.0f} degrees"


def relative(poses: np.ndarray, bucket: Bucket, shown: tuple[int, int]) -> np.ndarray:
    """[F, 16] float32: the lens as shares of the bucket's sides, which cover a picture of `shown` (width, height), and
    the 3 x 4 matrix from each camera to the first one.
    """
    lens, whole = poses[:, :4].copy(), np.tile(np.eye(4), (len(poses), 1, 1))
    whole[:, :3] = poses[:, 4:].reshape(-1, 3, 4)
    wider = shown[0] / shown[1] * bucket.height / bucket.width
    lens[:, 0] *= max(1, wider)
    lens[:, 1] *= max(1, 1 / wider)
    places = whole[0] @ np.linalg.inv(whole)
    places[0] = np.eye(4)
    return np.concatenate([lens, places[:, :3].reshape(-1, 12)], axis=1).astype(np.float32)
