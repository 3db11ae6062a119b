"""The content-addressed cache: one safetensors file a clip's latents, one a caption's text features.

An entry's name is a digest of all that its content depends on, so nothing stale can be read and nothing right is
rebuilt. Entries are written to a temporary name and renamed; their tensors' digest stands in the header.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from wantrain.files import digest_tensors, digest_text, read_tensors, write_tensors
from wantrain.terms import PlannedClip, UserError

RECIPE_VERSION = 1
"""Raise this when decoding, resizing, encoding or the layout of an entry changes."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Paths, reads and writes of one cache folder for one VAE, one text encoder and one frame rate."""

    folder: Path
    vae_digest: str
    text_digest: str
    fps: float
    build_command: str

    @property
    def memo(self) -> Path:
        """Where digests of source files are remembered."""
        return self.folder / "digests"

    def latents_path(self, planned: PlannedClip) -> Path:
        clip = planned.clip
        key = digest_text("latents", RECIPE_VERSION, planned.source_digest, clip.start_s, clip.end_s, self.fps,
                          planned.bucket, self.vae_digest)
        return self.folder / "latents" / key[:2] / f"{key}.safetensors"

    def text_path(self, caption: str) -> Path:
        key = digest_text("text", RECIPE_VERSION, caption, self.text_digest)
        return self.folder / "text" / key[:2] / f"{key}.safetensors"

    def write(self, path: Path, tensor: torch.Tensor, describes: str) -> None:
        """Write one entry. Non-finite values are refused: they would poison the training they are read into."""
        if not tensor.isfinite().all():
            raise UserError(f"encoding {describes} gave non-finite values", "check the file and the base's weights; "
                            "a VAE or text encoder in the wrong dtype does this")
        write_tensors(path, {"x": tensor}, {"digest": digest_tensors({"x": tensor})})

    def read(self, path: Path, describes: str) -> torch.Tensor:
        """Read one entry; a missing or altered one is a UserError that names the command that makes it."""
        if not path.exists():
            raise UserError(f"the cache has no entry for {describes} with this model and these settings ({path})",
                            self.build_command)
        tensors, metadata = read_tensors(path)
        if metadata.get("digest") != digest_tensors(tensors):
            raise UserError(f"the cache entry of {describes} is damaged: {path}", f"rm {path} && {self.build_command}")
        return tensors["x"]

    def missing(self, planned: list[PlannedClip], captions: list[str]) -> tuple[list[PlannedClip], list[str]]:
        """The clips and captions (each once) that have no entry yet."""
        clips = {self.latents_path(p): p for p in planned}
        texts = {self.text_path(c): c for c in captions}
        return ([p for path, p in clips.items() if not path.exists()],
                [c for path, c in texts.items() if not path.exists()])
