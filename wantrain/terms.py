"""The words of the project: constants, shared dataclasses and the one error a user sees.

Dimension letters, used as suffixes of tensor names everywhere:
B batch, C channels, F pixel frames, T latent frames, H W height and width, L text tokens, D features.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the worker processes that look into files need no torch
    import torch

NUM_TIMESTEPS = 1000
"""The timestep told to the model is NUM_TIMESTEPS * sigma, float32, formed only at the model's door."""

SOUND_RATE = 16_000
"""Samples a second of the sound that wav2vec2 hears (docs/facts.md, "Sound")."""

TEXT_LEN = 512
"""Text is zero-padded to exactly this many tokens, and Wan attends to the padding (docs/facts.md, "Encoders")."""

EXIT_USER_ERROR = 2
"""A fault that a person must mend: the same command would meet it again."""
EXIT_STALLED = 75
"""A process is gone or stands still: the same command may go through (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""A signal asked to stop, what was done is saved: the same command goes on."""


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


class Stalled(UserError):
    """A process is gone or stands still, or another has what this one needs: later the same may go through."""


ROOM = ("free some disk space (or point the folder elsewhere), then run the same command again: what was finished is "
        "kept")


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a path of the user's that cannot be written."""
    advice = {
        errno.EROFS: "its disk is read-only: choose another folder",
        errno.EACCES: "allow this user to write there, or choose another folder",
        errno.EPERM: "allow this user to write there, or choose another folder",
        errno.ENAMETOOLONG: "give it a shorter name",
        errno.ENOENT: "no folder can be made there: choose another one",
        errno.ENOTDIR: "a file is where a folder should be: move it, or choose another folder",
        errno.EEXIST: "a file is where a folder should be: move it, or choose another folder",
        errno.EISDIR: "a folder is where a file should be: move it, or choose another name",
    }
    return UserError(f"could not write {path}: {error.strerror or error}",
                     advice.get(error.errno or 0, ROOM))



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

    def num_tokens(self, multiple_px: int) -> int:
        """Transformer tokens of a clip: latent frames x patches of `multiple_px` pixels."""
        return (1 + (self.num_frames - 1) // 4) * (self.height // multiple_px) * (self.width // multiple_px)


VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m4v", ".gif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True, slots=True)
class Remote:
    """Bytes that are no local file of their own: what an fsspec URL names, or a member of a tar shard.

    `size` bytes from `offset` on; -1 is all of it. `key` changes whenever the bytes may have changed.
    """

    url: str
    name: str
    key: str
    offset: int = 0
    size: int = -1

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def __str__(self) -> str:
        return f"{self.url}!{self.name}" if self.offset else self.url


Media = Path | Remote
"""Where the bytes of a video or image are."""

OF_A_PLACE = re.compile(r"data\.sources\.[^.]*\.(path$|columns(\.|$))")
"""Keys of a config that say where clips and captions are. What they are is compared itself: they may have moved."""

WINDOW = "clip"
"""The name of a window itself among its partners."""

PARTNERS = ("control", "control_mask", "background", "reference", "face", "camera", "audio", "mask")
"""What may go with a clip: a control video, the mask of what is to be made anew (white), the background without it, a
reference image, the video of a face, a text file of camera poses, a sound, and the mask of where the loss looks
(white)."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One entry of the manifest: a span of a source video (or an image, a 1-frame clip) with its caption.

    `start_s` and `end_s` bound the span in seconds of the source; `end_s` None means to its end. `repeats` is how
    often an epoch shows it. `speed` 2 shows two seconds of the source in one. `partners` are media of the same span by
    name (PARTNERS), `measures` the numeric columns of the manifest, `more_captions` others that fit the clip as well.
    With `preserve` the adapter learns what the frozen base predicts of it.
    """

    id: str
    path: Media
    caption: str
    source: str
    repeats: float = 1.0
    start_s: float = 0.0
    end_s: float | None = None
    more_captions: tuple[str, ...] = ()
    partners: Mapping[str, Media] = field(default_factory=dict)
    speed: float = 1.0
    measures: Mapping[str, float | None] = field(default_factory=dict)
    preserve: bool = False


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a look into a file told: digest of its bytes, length, size as shown, number of frames, and who reads it.

    `why_not_decord` is empty when decord does, "image" for an image. `surprises` is what a person would want to know
    of its pictures (HDR, interlaced, transparent, ...), or empty. `fault` is empty for a usable file. `sound_s` is when
    its sound ends, 0 where it has none.
    """

    digest: str = ""
    duration_s: float = 0.0
    width: int = 0
    height: int = 0
    why_not_decord: str = ""
    num_frames: int = 0
    surprises: str = ""
    fault: str = ""
    sound_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PlannedClip:
    """A window of a clip with the bucket it goes to: bucket.num_frames frames from `start_s` on, `fps` a second.

    `start_s` and 1 / `fps` are seconds of the source. With `latest_s`, each sample begins at a moment of its own
    from `start_s` to there. `partners` are the same windows of its control video, masks and reference, by name. With
    `contain` the picture is shown whole, on white, instead of cropped.
    """

    clip: Clip
    bucket: Bucket
    found: MediaInfo
    fps: float
    start_s: float = 0.0
    latest_s: float | None = None
    partners: Mapping[str, PlannedClip] = field(default_factory=dict)
    contain: bool = False

    @property
    def kind(self) -> str:
        """Windows of one kind can be batched: the same bucket, and with a reference or without."""
        return f"{self.bucket} with a reference" if "reference" in self.partners else str(self.bucket)

    def part(self, name: str) -> PlannedClip:
        """The window itself (name WINDOW), or the same window of the partner of this name."""
        return self if name == WINDOW else self.partners[name]

    @property
    def name(self) -> str:
        """The clip's id, with the window's start where that is not the clip's."""
        return self.clip.id + (f"+{self.start_s - self.clip.start_s:.3f}" if self.start_s != self.clip.start_s else "")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A clip of the manifest that is not used. `kind` is one of KINDS_OF_DROPS, `reason` says it with its numbers."""

    clip: Clip
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A window as its cache entries hold it: latents_CTHW float32, mask_1THW or None, and what its task encodes."""

    latents_CTHW: torch.Tensor
    mask_1THW: torch.Tensor | None = None
    condition: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample without its noise.

    `condition` holds what the transformer takes beside noisy latents and text (wantrain.models.conditioning).
    `known_T` is 1 for latent frames that are given clean. `class_text_LD` is the caption with the class words in place
    of the trigger, where that is trained as well.
    """

    latents_CTHW: torch.Tensor
    text_LD: torch.Tensor
    mask_1THW: torch.Tensor | None = None
    condition: Mapping[str, torch.Tensor] = field(default_factory=dict)
    known_T: torch.Tensor | None = None
    class_text_LD: torch.Tensor | None = None


@dataclass(slots=True)
class Batch:
    """The samples of one micro-step.

    `latents_BCTHW` float32, normalised VAE output; `text_BLD` zero-padded to TEXT_LEN; `mask_B1THW` float32 in [0, 1],
    where the loss looks (None: everywhere); `condition` by name, stacked; `known_BT` 1 for latent frames that are given
    clean (None: none is); `class_text_BLD` zeros where a sample has none (None: no sample is trained so);
    `noise_BCTHW` and `sigma_B` float32; `index_B` the samples' places in the global batch, `planned_B` their windows.
    """

    latents_BCTHW: torch.Tensor
    text_BLD: torch.Tensor
    mask_B1THW: torch.Tensor | None
    condition: dict[str, torch.Tensor]
    known_BT: torch.Tensor | None
    class_text_BLD: torch.Tensor | None
    noise_BCTHW: torch.Tensor
    sigma_B: torch.Tensor
    index_B: list[int]
    planned_B: list[PlannedClip]

    @property
    def ids(self) -> list[str]:
        """The windows' names."""
        return [p.name for p in self.planned_B]

    @property
    def sigma(self) -> torch.Tensor:
        """sigma_B, or sigma_BT where latent frames are given clean: those have 0."""
        return self.sigma_B if self.known_BT is None else self.sigma_B[:, None] * (1 - self.known_BT)
