"""The official arithmetic that several tests hold ours against, under the official names, with nothing of diffusers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from wantrain.models.detection import Shapes

Tensor = torch.Tensor

Places = Sequence[tuple[int, ...]]
"""Of tokens, in time, height and width."""


def rotated(x: Tensor, places: Places) -> Tensor:
    """[B, L, heads, d], turned by place: pairs of numbers as complex ones."""
    d = x.shape[-1]
    parts = [d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)]
    angles = []
    for place in places:
        angles.append([p * 10000 ** (-2 * i / part) for p, part in zip(place, parts, strict=True)
                       for i in range(part // 2)])
    turn = torch.polar(torch.ones(len(angles), d // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]).flatten(-2)


def attention(w: dict[str, Tensor], name: str, heads: int, x: Tensor, other: Tensor, *, image: Tensor | None = None,
              places: Places | None = None) -> Tensor:
    def linear(part: str, given: Tensor) -> Tensor:
        return functional.linear(given, w[f"{name}.{part}.weight"], w[f"{name}.{part}.bias"])

    def normed(part: str, given: Tensor) -> Tensor:
        return given * (given.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.{part}.weight"]

    def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (heads, -1)) for one in (q, k, v))
        if places:
            q, k = rotated(q, places), rotated(k, places)
        weights = torch.einsum("blhd,bmhd->bhlm", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2)

    q = normed("norm_q", linear("q", x))
    out = seen(q, normed("norm_k", linear("k", other)), linear("v", other))
    if image is not None:
        out = out + seen(q, normed("norm_k_img", linear("k_img", image)), linear("v_img", image))
    return linear("o", out)


def heard(folder: Path, samples: np.ndarray, num_frames: int, fps: int = 16) -> Tensor:
    """[states, D, frames], by transformers' own processor and the official choice of states, frame by frame."""
    model = Wav2Vec2ForCTC.from_pretrained(folder).eval()
    processor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    given = processor(samples, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        states = torch.cat(model(given, output_hidden_states=True).hidden_states)
    length = int(states.shape[1] / 50.0 * 30)
    at_30 = functional.interpolate(states.mT, size=length, align_corners=True, mode="linear")
    chosen = []
    for frame in range(num_frames):
        place = int(np.round(frame / fps * 30))
        chosen.append(at_30[..., place] if place < length else torch.zeros_like(at_30[..., 0]))
    return torch.stack(chosen, -1)


def md5(shapes: Shapes) -> str:
    """As DiffSynth-Studio tells public files."""
    entries = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*entries, *shapes])).encode()).hexdigest()
