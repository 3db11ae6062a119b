"""Numbers of sampled videos: how they move, whether they flicker, freeze or cut, how alike they are, what they copy.

Pure functions of frames_FCHW uint8, without weights, so a number never changes. Pictures are looked at small
(SMALL_PX high), where noise and compression do not count. What each can and cannot tell stands in METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SMALL_PX = 64
"""Height of the grey pictures in which motion is looked for."""
REACH_PX = 5
"""How far a place may have moved from one frame to the next, in these."""
PATCH_PX, STRIDE_PX = 12, 4
"""The side of the patches that are matched, and how far they lie from each other."""
PAIRS_AT_ONCE = 8
STILL = 0.25 / 255
"""Two frames whose mean difference is no larger are the same; x264 leaves less."""
CUT, CUT_TO_USUAL = 0.05, 4.0
"""A cut changes the picture by at least this mean difference that no motion explains, and so many times the clip's
usual one."""
THUMB_PX = 16
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class About:
    """What a metric is called, what it can and cannot tell, and whether 'lower' or 'higher' is better ('': neither)."""

    label: str
    tells: str
    better: str = ""


METRICS = {
    "motion": About("motion", "Speed of the fastest twentieth of the picture, in picture diagonals a second, by "
                    "matching patches; it cannot tell a subject from the camera, nor good motion from bad."),
    "smoothness": About("smoothness", "How much of the motion goes on from frame to frame: 1 is even motion or none, 0 "
                        "a new direction at each frame; it cannot tell whether motion is natural.", "higher"),
    "flicker": About("flicker", "How far the light of large patches jumps there and back from frame to frame, as a "
                     "share of white; things that pass by count a little as well.", "lower"),
    "frozen": About("frozen frames", "Share of frames that are the same as the one before; a still scene is not at "
                    "fault, a moving one that stops is."),
    "cuts": About("cuts", "Changes of the whole picture at once, as between two shots; a flash counts as two, a slow "
                  "dissolve as none.", "lower"),
    "memorised": About("nearest training frame", "Correlation of small grey pictures with the training frame that is "
                       "most alike, a mean over the video: 1 is a copy; simple scenes are alike without one, so "
                       "compare with the held-out clips.", "lower"),
    "adherence": About("prompt adherence", "How well the prompt without the trigger fits what is seen, as the encoder "
                       "says: for CLIP a cosine, for the tiny base the probability of the prompt's words; it cannot "
                       "count, and a style that the encoder does not know scores lower.", "higher"),
    "likeness": About("likeness", "Cosine of the encoder's features with those of the training clips that hold the "
                      "trigger; it sees the same subject and the same look alike, and cannot part them.", "higher"),
    "diversity": About("diversity over seeds", "Mean difference of the middle frames of one prompt's seeds, as a share "
                       "of white; it cannot tell rich from random.", "higher"),
}


def measure(frames_FCHW: torch.Tensor, fps: float) -> dict[str, float]:
    """What one video's frames alone tell; nothing of a single picture."""
    if len(frames_FCHW) < 2:
        return {}
    grey_FHW = small(frames_FCHW)
    moved_P2HW, explained_P = displacements(grey_FHW)
    return {"motion": _motion(moved_P2HW, math.hypot(*grey_FHW.shape[1:]), fps),
            "smoothness": _smoothness(moved_P2HW),
            "flicker": _flicker(grey_FHW),
            "frozen": float((_differences(grey_FHW) <= STILL).float().mean()),
            "cuts": float(_cuts(grey_FHW, explained_P))}


def small(frames_FCHW: torch.Tensor) -> torch.Tensor:
    """Grey pictures SMALL_PX high, float32 [F, H, W] in [0, 1]."""
    _, _, height, width = frames_FCHW.shape
    size = (SMALL_PX, max(2, round(width * SMALL_PX / height)))
    grey_FHW = torch.einsum("c,fchw->fhw", torch.tensor(GREY), frames_FCHW.float() / 255)
    return F.interpolate(grey_FHW[:, None], size, mode="bilinear", antialias=True, align_corners=False)[:, 0]


def displacements(grey_FHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how far each patch moved to the next frame, (y, x) in pixels [F-1, 2, patches high, patches wide]; which share
    of the change that explains [F-1]).

    The shift of at most REACH_PX that differs least, to a part of a pixel. It counts where it explains more than half
    of the difference, once both frames have one brightness and contrast; so noise, fades and flashes are not motion.
    """
    found = [_matched(grey_FHW[begin : begin + PAIRS_AT_ONCE + 1])
             for begin in range(0, len(grey_FHW) - 1, PAIRS_AT_ONCE)]
    moved, explained = zip(*found, strict=True)
    return torch.cat(moved), torch.cat(explained)


def _matched(grey_FHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    before, after = grey_FHW[:-1], grey_FHW[1:]
    means, stds = ([measured((1, 2), keepdim=True) for measured in (getattr(before, what), getattr(after, what))]
                   for what in ("mean", "std"))
    after = (after - means[1]) * (stds[0] / stds[1].clamp(1e-3)).clamp(max=4) + means[0]
    wide = F.pad(after[:, None], [REACH_PX] * 4, mode="replicate")[:, 0]
    height, width = before.shape[1:]
    reach = range(2 * REACH_PX + 1)
    costs = torch.stack([F.avg_pool2d((before - wide[:, y : y + height, x : x + width]).abs()[:, None], PATCH_PX,
                                      STRIDE_PX)[:, 0] for y in reach for x in reach], dim=1)
    side = len(reach)
    still_PHW, place_PHW = costs[:, side * REACH_PX + REACH_PX], costs.argmin(dim=1)
    y, x = place_PHW // side, place_PHW % side
    cube = costs.view(len(costs), side, side, *costs.shape[2:])
    along_y = cube.gather(2, x[:, None, None].expand(-1, side, 1, -1, -1))[:, :, 0]
    along_x = cube.gather(1, y[:, None, None].expand(-1, 1, side, -1, -1))[:, 0]
    (beside_y, gain_y), (beside_x, gain_x) = _between(along_y, y), _between(along_x, x)
    least_PHW = (costs.amin(dim=1) - gain_y - gain_x).clamp(0)
    counts_PHW = (least_PHW < still_PHW / 2) & (still_PHW > STILL)
    moved = torch.stack([y + beside_y, x + beside_x], dim=1) - REACH_PX
    explained_P = 1 - torch.where(counts_PHW, least_PHW, still_PHW).mean((1, 2)) / still_PHW.mean((1, 2)).clamp(1e-9)
    return torch.where(counts_PHW[:, None], moved, 0.0), explained_P


def _between(costs_PSHW: torch.Tensor, place_PHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the least cost lies beside its place, in [-0.5, 0.5], and how much less it is there: absolute differences
    grow alike on both sides of it.
    """
    inner = place_PHW.clamp(1, costs_PSHW.shape[1] - 2)
    low, middle, high = (costs_PSHW.gather(1, (inner + step)[:, None])[:, 0] for step in (-1, 0, 1))
    slope = (torch.maximum(low, high) - middle).clamp(1e-6)
    is_inner = inner == place_PHW
    return (torch.where(is_inner, ((low - high) / (2 * slope)).clamp(-0.5, 0.5), 0.0),
            torch.where(is_inner, (low - high).abs() / 2, 0.0))


def _motion(moved_P2HW: torch.Tensor, diagonal_px: float, fps: float) -> float:
    lengths_PN = moved_P2HW.norm(dim=1).flatten(1)
    fastest = lengths_PN.topk(math.ceil(lengths_PN.shape[1] / 20), dim=1).values.mean()
    return float(fastest) / diagonal_px * fps


def _smoothness(moved_P2HW: torch.Tensor) -> float:
    lengths = moved_P2HW.norm(dim=1)
    total = (lengths[1:] + lengths[:-1]).sum()
    if total < 1:  # less than a pixel of all pictures together
        return 1.0
    return 1 - float((moved_P2HW[1:] - moved_P2HW[:-1]).norm(dim=1).sum() / total)


def _flicker(grey_FHW: torch.Tensor) -> float:
    if len(grey_FHW) < 3:
        return 0.0
    light = F.avg_pool2d(grey_FHW[:, None], SMALL_PX // 4)
    return float((light[1:-1] - (light[:-2] + light[2:]) / 2).abs().mean())


def _differences(grey_FHW: torch.Tensor) -> torch.Tensor:
    """Mean difference of each frame from the one before."""
    return (grey_FHW[1:] - grey_FHW[:-1]).abs().mean((1, 2))


def _cuts(grey_FHW: torch.Tensor, explained_P: torch.Tensor) -> int:
    unexplained_P = _differences(grey_FHW) * (1 - explained_P)
    return int((unexplained_P > max(CUT, CUT_TO_USUAL * float(unexplained_P.median()))).sum())


def thumbs(frames_FCHW: torch.Tensor) -> torch.Tensor:
    """Small grey pictures to be compared, without their mean and of length 1: [F, THUMB_PX ** 2]."""
    grey_FHW = torch.einsum("c,fchw->fhw", torch.tensor(GREY), frames_FCHW.float() / 255)
    tiny_FN = F.adaptive_avg_pool2d(grey_FHW[:, None], THUMB_PX).flatten(1)
    return F.normalize(tiny_FN - tiny_FN.mean(1, keepdim=True), dim=1)


def memorised(frames_FCHW: torch.Tensor, trained_NK: torch.Tensor) -> float:
    """How like its nearest training frame each frame is, a mean over the video; `trained_NK` are their `thumbs`."""
    return float((thumbs(frames_FCHW) @ trained_NK.T).amax(1).mean())


def diversity(pictures_CHW: Sequence[torch.Tensor]) -> float:
    """Mean difference of all pairs of pictures of one size, uint8, as a share of white."""
    tiny = [F.adaptive_avg_pool2d(picture_CHW.float() / 255, THUMB_PX) for picture_CHW in pictures_CHW]
    pairs = [float((a - b).abs().mean()) for place, a in enumerate(tiny) for b in tiny[:place]]
    return sum(pairs) / len(pairs)
