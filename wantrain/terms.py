"""The words of the project: constants, shared dataclasses and the one error a user sees.

Dimension letters, used as suffixes of tensor names everywhere:
B batch, C channels, F pixel frames, T latent frames, H W height and width, L text tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

NUM_TIMESTEPS = 1000
"""The timestep told to the model is NUM_TIMESTEPS * sigma, float32, formed only at the model's door."""

TEXT_LEN = 512
"""Text is zero-padded to exactly this many tokens; Wan attends to the padding (facts: official, diffusers, ComfyUI)."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: what is wrong, and the command or setting that mends it.

    `message` says the key, the value and what is allowed; `next_step` is what to do now.
    """

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.next_step}"


class Interrupted(Exception):
    """The user asked to stop, and what was done is saved."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size a clip is brought to: pixel frames (4n+1), height and width in pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}f {self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class Clip:
    """One entry of the manifest: a span of a source video (or an image, a 1-frame clip) with its caption.

    `start_s` and `end_s` bound the span in seconds of the source; `end_s` None means to its end.
    """

    id: str
    path: Path
    caption: str
    source: str
    repeats: int
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class PlannedClip:
    """A clip with the bucket it goes to and the content address of its latents."""

    clip: Clip
    bucket: Bucket
    source_digest: str


@dataclass(slots=True)
class Batch:
    """What one micro-step trains on.

    `latents_BCTHW` float32, normalised VAE output; `text_BLD` zero-padded to TEXT_LEN;
    `index_B` the samples' positions in the global batch, `ids` the clips they came from.
    """

    latents_BCTHW: torch.Tensor
    text_BLD: torch.Tensor
    index_B: list[int]
    ids: list[str]
