"""What `data_tools.filter` measures of one clip, in a worker process: its pictures, their motion, bars and text."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from data_tools.faults import UNREADABLE, fault_of
from wantrain.data import films, media

with contextlib.suppress(ImportError):  # `filter.run` says that it is missing
    import cv2

NUM_PAIRS, GAP_S = 8, 0.125
"""Frames are looked at in pairs, this far apart: three frames at 24 fps, so that drawings held for three still move."""

LOOK_PX, FLOW_PX = 480, 128
"""Short side of the pictures that are measured (about that of training), and of those that the flow is found in."""

LONGEST = 4
"""The long side is at most this many short sides of LOOK_PX, whatever the file says."""

HASH_PX, HASH_BITS = 16, 256

FARNEBACK = (0.5, 4, 15, 3, 5, 1.1, 0)
"""OpenCV's pyr_scale, levels, winsize, iterations, poly_n, poly_sigma (1.1 is its advice for poly_n 5) and flags."""

BAR_LEVEL, BLACK_LEVEL = 10, 24
"""Grey values of 255: what lies nearer to a bar's colour is of it, and how bright a black bar may be."""

BAR_JUMP, BAR_CONTENT = 0.35, 0.15
"""Shares of a line that is not of the bar's colour: the jump at the bar's border, and most in the bar (subtitles)."""

STROKE_PX, TEXT_CONTRAST, TEXT_LEVEL, LETTERS = 15, 80, 190, 5
"""Text: strokes are thinner than this, brighter than what is around by this, at least so bright (grey values of 255;
dark text the other way round), and a line has as many letters."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """One span of a file. Measurements with an equal `key` are measurements of the same thing."""

    path: Path
    start_s: float
    end_s: float | None
    key: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one clip, or in `fault` why it could not be measured.

    `hashes` are NUM_PAIRS numbers of HASH_BITS bits.
    `sharpness`, `motion`, `letterbox` and `text` are those of the functions below. `luma` is the mean grey value (0
    black, 1 white), `black` and `white` the shares of the picture that are as good as black (up to 16 of 255) and
    white (from 250): detail that no training brings back. Bars count for none of these three.
    """

    sharpness: float = 0.0
    motion: float = 0.0
    letterbox: float = 0.0
    text: float = 0.0
    luma: float = 0.0
    black: float = 0.0
    white: float = 0.0
    hashes: tuple[int, ...] = ()
    fault: str = ""


def measure(job: Job) -> Measured:
    """Measure one span in this process. For a file that cannot be read `fault` says why; nothing is raised."""
    cv2.setNumThreads(1)  # the workers are as many as the cores
    try:
        return measure_pairs(*read_pairs(job.path, job.start_s, job.end_s))
    except UNREADABLE as error:
        return Measured(fault=fault_of(job.path, error))


def measure_pairs(pairs_P2HW: np.ndarray, gaps_s: np.ndarray) -> Measured:
    """All measurements of grey pictures (uint8), the two of a pair `gaps_s` apart (0: one and the same)."""
    top, bottom, left, right = find_bars(pairs_P2HW.reshape(-1, *pairs_P2HW.shape[2:]))
    texts_PHW = np.stack([find_text(pair[0], pair[1]) for pair in pairs_P2HW])
    rows, columns = slice(top + 2, bottom - 2), slice(left + 2, right - 2)  # a bar's border is blurred, and an edge
    inner_P2HW, inner_texts_PHW = pairs_P2HW[:, :, rows, columns], texts_PHW[:, rows, columns]
    first_PHW = inner_P2HW[:, 0]
    values = {
        "sharpness": np.median([sharpness(*both) for both in zip(first_PHW, inner_texts_PHW, strict=True)]),
        "motion": np.mean([motion(pair[0], pair[1], gap_s) for pair, gap_s in zip(inner_P2HW, gaps_s, strict=True)]),
        "letterbox": 1 - (bottom - top) * (right - left) / texts_PHW[0].size,
        "text": texts_PHW.mean(), "luma": first_PHW.mean() / 255,
        "black": (first_PHW <= 16).mean(), "white": (first_PHW >= 250).mean()}
    rounded: dict[str, Any] = {name: round(float(value), 5) for name, value in values.items()}
    return Measured(**rounded, hashes=hash_pictures(first_PHW))


def read_pairs(path: Path, start_s: float, end_s: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(pairs_P2HW uint8, seconds between the two of each): NUM_PAIRS pairs spread evenly over the span.

    Raises UserError, av.FFmpegError or ValueError where the span does not decode.
    """
    found = media.probe(path)
    if found.why_not_decord == "image":
        image = media.read_image(path).convert("L")
        picture = np.asarray(image.resize(_look_size(*image.size), Image.Resampling.BOX))
        return np.broadcast_to(picture, (1, 2, *picture.shape)), np.zeros(1)
    times_s = found.times_s
    stop = int(np.searchsorted(times_s, math.inf if end_s is None else end_s - 1e-6))
    first = max(0, int(np.searchsorted(times_s, start_s + 1e-4, side="right")) - 1)
    if start_s >= found.duration_s or stop <= first:
        raise ValueError(f"no frame from {start_s:g} s to {'its end' if end_s is None else f'{end_s:g} s'}; the film "
                         f"lasts {found.duration_s:g} s")
    length_s = times_s[stop - 1] - times_s[first]
    gap_s = min(GAP_S, length_s)
    begin_P = times_s[first] + (np.arange(NUM_PAIRS) + 0.5) / NUM_PAIRS * (length_s - gap_s)
    index_P2 = np.searchsorted(times_s, np.stack([begin_P, begin_P + gap_s], 1) + 1e-4, side="right") - 1
    pictures = _decode(path, found, np.unique(index_P2))
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise ValueError("its frames change their size: cut it there")
    return np.stack([np.stack([pictures[int(i)] for i in pair]) for pair in index_P2]), np.diff(times_s[index_P2])[:, 0]


def _decode(path: Path, found: films.Probe, index: np.ndarray) -> dict[int, np.ndarray]:
    """The grey pictures of these frames, as they are shown."""
    kept: dict[int, np.ndarray] = {}
    scaler = VideoReformatter()  # kept, for a frame's own is set up anew each time
    for i, frame in films.frames_at(path, found, index):
        width, height = _look_size(max(1, round(frame.width * found.pixel_aspect)), frame.height)
        opaque = frame
        if films.has_alpha(frame):
            opaque = av.VideoFrame.from_ndarray(films.pixels_of(frame), format="rgb24")
        how = "AREA" if width < frame.width else "BILINEAR"
        rgb = scaler.reformat(opaque, width, height, "rgb24", interpolation=how).to_ndarray()
        kept[i] = found.upright(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    return kept


def _look_size(width: int, height: int) -> tuple[int, int]:
    scale = min(LOOK_PX / min(width, height), LONGEST * LOOK_PX / max(width, height))
    return max(FLOW_PX, round(width * scale)), max(FLOW_PX, round(height * scale))


def find_bars(pictures_FHW: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the picture between its bars; the whole where there are none.

    A bar reaches from an edge to a straight border, where the share of pixels that ever differ from the bar's colour
    jumps: a night sky ends in a skyline, which does not jump. Black bars may be on one side only and hold subtitles;
    bars of another colour are believed in opposite pairs. Bars under 1 % of the side are not seen, nor are blurred
    copies of the picture beside an upright film, nor black bars where all that touches them is black as well.
    """
    top, left = 0, 0
    bottom, right = pictures_FHW.shape[1:]
    for _ in range(2):  # with bars on four sides the wider ones hide the others
        inner = pictures_FHW[:, top:bottom, left:right]
        above, below = _opposite_bars(inner)
        before, after = _opposite_bars(inner[:, above : inner.shape[1] - below].swapaxes(1, 2))
        top, bottom, left, right = top + above, bottom - below, left + before, right - after
    return top, bottom, left, right


def _opposite_bars(pictures_FHW: np.ndarray) -> tuple[int, int]:
    """Thickness in pixels of the bars above and below."""
    (above, colour), (below, other) = _bar(pictures_FHW), _bar(pictures_FHW[:, ::-1])
    if above and below and abs(colour - other) <= BAR_LEVEL:
        return above, below
    return (above if colour <= BLACK_LEVEL else 0), (below if other <= BLACK_LEVEL else 0)


def _bar(pictures_FHW: np.ndarray) -> tuple[int, float]:
    """(thickness in pixels, colour) of a bar at the top, 0 where there is none."""
    colour = float(np.median(pictures_FHW[:, :2]))
    low, high = pictures_FHW.min(0).astype(np.int16), pictures_FHW.max(0).astype(np.int16)
    differing_H = ((high > colour + BAR_LEVEL) | (low < colour - BAR_LEVEL)).mean(1)
    steps = differing_H[3:] - differing_H[:-3]  # over three rows, as scaling blurs the border
    if not (steps >= BAR_JUMP).any():
        return 0, colour
    row = int(np.argmax(steps >= BAR_JUMP))
    edge = row + 1 + int(np.argmax(np.diff(differing_H[row : row + 4])))
    is_bar = edge >= len(differing_H) / 100 and differing_H[:edge].mean() <= BAR_CONTENT
    return edge if is_bar else 0, colour


def sharpness(picture_HW: np.ndarray, text_HW: np.ndarray) -> float:
    """How steep the strong edges are, as a share of a perfect edge (1); text is left out, being sharp in any film.

    An edge blurred by a Gaussian of s pixels keeps 1 / sqrt(1 + s^2) of its steepness, seen through one of 1 pixel; s
    is told by how much more of it is lost through one of 2 pixels (Zhuo & Sim 2011, "Defocus map estimation from a
    single image"). The median of the steepest 1 % of the pixels: depth of field leaves it high, and neither contrast
    nor grain move it much, while the variance of the Laplacian (Pech-Pacheco et al. 2000) takes grain for detail and
    a clear sky for blur. 1 is what LOOK_PX can show, films of 180 lines have about 0.45, no edge at all is 0.
    """
    fine, coarse = (_steepness(cv2.GaussianBlur(picture_HW.astype(np.float32), (0, 0), s)) for s in (1, 2))
    fine = np.where(cv2.dilate(text_HW.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0, 0, fine)
    most, nearly_all = np.percentile(fine, (99, 99.9))
    strong = fine >= max(most, 0.7 * nearly_all, 0.5)  # the flanks of few edges are no edges
    if not strong.any():
        return 0.0
    ratio = np.median(fine[strong] / np.maximum(coarse[strong], 1e-3))
    return math.sqrt(min(1.0, max(0.0, (float(ratio) ** 2 - 1) / 3)))


def _steepness(picture_HW: np.ndarray) -> np.ndarray:
    return cv2.magnitude(*(cv2.Sobel(picture_HW, cv2.CV_32F, dx, 1 - dx, scale=1 / 8) for dx in (1, 0)))


def motion(first_HW: np.ndarray, second_HW: np.ndarray, gap_s: float) -> float:
    """Speed of the fastest twentieth of the picture, in its diagonals a second: a small subject before a still
    background counts like a slow pan. 0 for an image.

    Optical flow of Farneback (2003), after the second picture is brought to the brightness and contrast of the first.
    It counts where it explains more than half of their difference: so noise, fades, flashes and dissolves are not
    motion. Speeds above about 0.6 are told too low.
    """
    if not gap_s:
        return 0.0
    scale = FLOW_PX / min(first_HW.shape)
    first, second = (cv2.GaussianBlur(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                                      .astype(np.float32), (0, 0), 1) for picture in (first_HW, second_HW))
    contrast = first.std() / second.std() if min(first.std(), second.std()) > 2 else 1.0
    second = ((second - second.mean()) * contrast + first.mean()).clip(0, 255)
    height, width = first.shape
    flow_HW2 = cv2.calcOpticalFlowFarneback(first.astype(np.uint8), second.astype(np.uint8),
                                            np.zeros((height, width, 2), np.float32), *FARNEBACK)
    x, y = (grid + flow_HW2[..., i] for i, grid in enumerate(np.meshgrid(*map(np.arange, (width, height)))))
    warped = cv2.remap(second, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR,
                       borderMode=cv2.BORDER_REPLICATE)
    before, after = (cv2.blur(np.abs(first - other), (9, 9)) for other in (second, warped))
    lengths = np.where(after < before / 2, np.hypot(*flow_HW2.transpose(2, 0, 1)), 0).ravel()
    fastest = np.partition(lengths, -(lengths.size // 20))[-(lengths.size // 20):]
    return float(fastest.mean()) / math.hypot(height, width) / gap_s


def find_text(first_HW: np.ndarray, second_HW: np.ndarray) -> np.ndarray:
    """Where both pictures show the same lines of text: 1 inside their boxes, 0 elsewhere.

    Strokes are what the top-hat keeps: thin, near white beside something darker, or near black the other way round.
    Connected strokes are taken for letters by their shape, and for a line where LETTERS or more of like height stand
    side by side on one base. No model and no language in it. On 150 s of Big Buck Bunny and 8 s of a city it marks
    nothing where nothing is written, and finds Latin subtitles that are outlined or boxed in every clip, bare white
    ones in most. Short watermarks, faint or transparent ones, strokes wider than a thirtieth of the picture (titles),
    joined scripts and handwriting it mostly misses; signs in a still picture it does not tell from what was burnt in.
    """
    square = np.ones((STROKE_PX, STROKE_PX), np.uint8)
    text_HW = np.zeros_like(first_HW)
    for pictures in ((first_HW, second_HW), (255 - first_HW, 255 - second_HW)):
        stroke_HW = np.minimum(*(cv2.morphologyEx(picture, cv2.MORPH_TOPHAT, square) for picture in pictures))
        for left, top, right, bottom in _lines((stroke_HW >= TEXT_CONTRAST) & (np.minimum(*pictures) >= TEXT_LEVEL)):
            text_HW[top:bottom, left:right] = 1
    return text_HW


def _lines(strokes_HW: np.ndarray) -> list[Box]:
    """(left, top, right, bottom) of every line of text among the strokes."""
    if not strokes_HW.any():  # most pictures have none, and what follows is a third of all the work
        return []
    short = min(strokes_HW.shape)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(strokes_HW.astype(np.uint8), connectivity=8)
    x, y, w, h, area = boxes[1:].T
    is_letter = ((h >= 0.015 * short) & (h <= 0.15 * short) & (w <= 2.5 * h) & (w >= 0.08 * h) & (area >= 0.2 * w * h))
    x, y, w, h = (side[is_letter] for side in (x, y, w, h))
    if len(x) < LETTERS:
        return []
    joined_HW = np.zeros(strokes_HW.shape, np.uint8)  # every letter's middle, so wide that neighbours touch
    for left, top, width, height in zip(x, y, w, h, strict=True):
        reach = int(0.45 * height) + 1
        joined_HW[top + height // 4 : top + height - height // 4 + 1, max(0, left - reach) : left + width + reach] = 1
    count, labels_HW = cv2.connectedComponents(joined_HW, connectivity=4)
    line_of = labels_HW[y + h // 2, x + w // 2]
    found = []
    for line in np.flatnonzero(np.bincount(line_of, minlength=count) >= LETTERS):
        mine = line_of == line
        tops, bottoms, heights = y[mine], (y + h)[mine], h[mine]
        left, right = int(x[mine].min()), int((x + w)[mine].max())
        slack = 0.15 * np.median(heights) + 1
        aligned = (np.abs(tops - np.median(tops)) <= slack) | (np.abs(bottoms - np.median(bottoms)) <= slack)
        if (aligned.mean() >= 0.7 and right - left >= 3 * np.median(heights) and heights.std() <= 0.4 * heights.mean()):
            found.append((left, int(tops.min()), right, int(bottoms.max())))
    return found


def hash_pictures(pictures_FHW: np.ndarray) -> tuple[int, ...]:
    """A perceptual hash of HASH_BITS bits a picture: which of its low frequencies lie above their median.

    The DCT hash of Zauner (2010, "Implementation and benchmarking of perceptual image hash functions") with 16 x 16
    frequencies: blind to size, bars, brightness and coding. Of 33 shots of Big Buck Bunny and a city the two
    most alike (the same three animals, the same camera) are 35 bits apart; copies re-encoded, smaller, letterboxed,
    brighter or subtitled 19 at most. Mirrored copies are not found, nor those cropped by 6 %, nor all that begin
    elsewhere in a shot.
    """
    hashes = []
    for picture in pictures_FHW:
        small = cv2.resize(picture, (4 * HASH_PX, 4 * HASH_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
        waves = cv2.dct(small)[1 : HASH_PX + 1, 1 : HASH_PX + 1]
        hashes.append(int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big"))
    return tuple(hashes)
