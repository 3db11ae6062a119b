"""Who looks at a video and at a text: a CLIP model by path, or the probe of the tiny base.

CLIP: Radford et al. 2021; likeness as cosines of image features: Ruiz et al. 2023 (DreamBooth).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from wantrain.models import probe
from wantrain.terms import UserError

NUM_SEEN = 3
"""Frames of a video that are looked at, spread evenly."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Seer(Protocol):
    """Looks at frames_FCHW uint8."""

    def features(self, frames_FCHW: torch.Tensor) -> torch.Tensor: ...
    def adherence(self, prompt: str, frames_FCHW: torch.Tensor) -> float | None: ...


def _pixels(frames_FCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """NUM_SEEN of the frames at a size, float32 in [0, 1]."""
    places = torch.linspace(0, len(frames_FCHW) - 1, min(NUM_SEEN, len(frames_FCHW))).round().long()
    return F.interpolate(frames_FCHW[places].float(), size, mode="bicubic", antialias=True).clamp(0, 255) / 255


class TinySeer:
    """The probe of the tiny world."""

    def __init__(self) -> None:
        self._probe = probe.read()

    def features(self, frames_FCHW: torch.Tensor) -> torch.Tensor:
        """What the video looks like [D], of length 1."""
        return F.normalize(self._probe.body(_pixels(frames_FCHW, probe.SIZE_PX) * 2 - 1).mean(0), dim=0)

    def adherence(self, prompt: str, frames_FCHW: torch.Tensor) -> float | None:
        """The probability of the tiny world's words in the prompt, a mean over kinds; None where it has none."""
        said = set(re.findall(r"\w+", prompt.lower()))
        logits = self._probe(_pixels(frames_FCHW, probe.SIZE_PX) * 2 - 1)
        found = []
        for kind, words in self._probe.labels.items():
            if named := [place for place, word in enumerate(words) if word in said]:
                found.append(float(logits[kind].softmax(1)[:, named].sum(1).mean()))
        return sum(found) / len(found) if found else None


class ClipSeer:
    """A CLIP model of a folder in transformers' layout."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizerFast

        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"evaluate.encoder = {folder} is not read as a CLIP model: {error}", "name a folder with "
                            "config.json, model.safetensors and a tokenizer, e.g. of openai/clip-vit-base-patch32; or "
                            "evaluate.encoder=null") from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.eval().to(self._device)
        self._px = self._model.config.vision_config.image_size

    @torch.no_grad()
    def features(self, frames_FCHW: torch.Tensor) -> torch.Tensor:
        """What the video looks like [D], of length 1: the mean of its frames."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pixels = (_pixels(frames_FCHW, (self._px, self._px)) - mean) / std
        seen = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
        return F.normalize(F.normalize(self._model.visual_projection(seen), dim=1).mean(0), dim=0).cpu()

    @torch.no_grad()
    def adherence(self, prompt: str, frames_FCHW: torch.Tensor) -> float | None:
        """The cosine of the prompt and the video."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt").to(self._device)
        read = self._model.text_projection(self._model.text_model(**tokens).pooler_output)[0]
        return float(F.normalize(read, dim=0).cpu() @ self.features(frames_FCHW))
