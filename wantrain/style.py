"""How far two sets of pictures are apart in style: colours, and texture by Gram matrices of a fixed filter bank.

Colours: total variation distance of joint RGB histograms. Texture: relative distance of Gram matrices (Gatys et al.
2015) of Gabor energies (Jain & Farrokhnia 1991) at three scales: fixed filters instead of a downloaded network, so
that the number needs no weights and never changes. Both lie in [0, 1]; the style distance is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BINS = 6
NUM_ORIENTATIONS = 4
NUM_SCALES = 3
FILTER_PX = 9
OPPONENT = ((0.299, 0.587, 0.114), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))
"""Luminance, red-green, yellow-blue."""
PIXELS_AT_ONCE = 2**18
"""Of how many pixels the filters' answers are held at once, some 400 bytes each; a frame that is larger goes alone."""


@dataclass(frozen=True, slots=True)
class Style:
    """Mean histogram [BINS^3] and Gram vector of a set of videos."""

    histogram: torch.Tensor
    gram: torch.Tensor


def describe(videos: Iterable[torch.Tensor]) -> Style:
    """The style of a set of frames_FCHW uint8, each video weighing the same; memory for a few frames of one at a time.
    """
    return mean([_of_video(frames_FCHW) for frames_FCHW in videos])


def mean(styles: Sequence[Style]) -> Style:
    """The style of the sets together, each weighing the same."""
    return Style(torch.stack([s.histogram for s in styles]).mean(0), torch.stack([s.gram for s in styles]).mean(0))


def _of_video(frames_FCHW: torch.Tensor) -> Style:
    """Sums over its frames, of which as many at once as have PIXELS_AT_ONCE."""
    num_frames, _, height, width = frames_FCHW.shape
    histogram = torch.zeros(BINS**3, dtype=torch.float64)
    grams = torch.zeros(NUM_SCALES, 3 * NUM_ORIENTATIONS, 3 * NUM_ORIENTATIONS, dtype=torch.float64)
    for part in torch.split(frames_FCHW, max(1, PIXELS_AT_ONCE // (height * width))):
        histogram += _histogram(part)
        grams += torch.stack(_grams(part))
    triangles = [gram[tuple(torch.triu_indices(*gram.shape))] for gram in grams / num_frames]
    return Style(histogram / histogram.sum(), torch.cat(triangles).sqrt().float())


def distance(a: Style, b: Style) -> dict[str, float]:
    """colour, texture and their mean, `style`: each 0 for equal sets, at most 1."""
    colour = 0.5 * float((a.histogram - b.histogram).abs().sum())
    texture = float((a.gram - b.gram).norm() / (a.gram.norm() + b.gram.norm()))
    return {"style": (colour + texture) / 2, "colour": colour, "texture": texture}


def _histogram(frames_FCHW: torch.Tensor) -> torch.Tensor:
    """Joint RGB histogram, a sum over pixels: each is shared between neighbouring bins, so that it has no cliffs."""
    position_3N = frames_FCHW.movedim(1, 0).flatten(1).double() / 255 * (BINS - 1)
    low = position_3N.floor().clamp(max=BINS - 2)
    weight_high = position_3N - low
    histogram = torch.zeros(BINS**3, dtype=torch.float64)
    for corner in range(8):
        bits = torch.tensor([corner >> c & 1 for c in range(3)]).view(3, 1)
        index = low.long() + bits
        weight = torch.where(bits.bool(), weight_high, 1 - weight_high).prod(0)
        flat = (index[0] * BINS + index[1]) * BINS + index[2]
        histogram.scatter_add_(0, flat, weight)
    return histogram


def _filters() -> torch.Tensor:
    """Quadrature pairs of Gabor filters, zero mean, [2 * NUM_ORIENTATIONS, 1, FILTER_PX, FILTER_PX]."""
    axis = torch.arange(FILTER_PX, dtype=torch.float64) - FILTER_PX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    envelope = torch.exp(-(x**2 + y**2) / (2 * 1.8**2))
    bank = []
    for k in range(NUM_ORIENTATIONS):
        angle = math.pi * k / NUM_ORIENTATIONS
        phase = 2 * math.pi / 5 * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (torch.cos(phase), torch.sin(phase)):
            kernel = envelope * wave
            kernel = kernel - envelope * kernel.sum() / envelope.sum()
            bank.append(kernel / kernel.norm())
    return torch.stack(bank).unsqueeze(1).float()


def _grams(frames_FCHW: torch.Tensor) -> list[torch.Tensor]:
    """The Gram matrix of every scale, float64, a mean over a frame's pixels and a sum over frames."""
    matrix = torch.tensor(OPPONENT)
    opponent = torch.einsum("oc,fchw->fohw", matrix, frames_FCHW.float() / 255)
    bank = _filters()
    grams = []
    for _ in range(NUM_SCALES):
        f, o, h, w = opponent.shape
        padded = F.pad(opponent.reshape(f * o, 1, h, w), [FILTER_PX // 2] * 4, mode="replicate")
        pairs = F.conv2d(padded, bank).view(f, o, NUM_ORIENTATIONS, 2, h, w)
        energy_KN = pairs.square().sum(3).sqrt().movedim(0, 2).reshape(o * NUM_ORIENTATIONS, -1)
        grams.append((energy_KN @ energy_KN.T).double() / (h * w))
        opponent = F.avg_pool2d(opponent, 2)
    return grams
