"""A small classifier of the tiny world's pictures: whether a sample of the tiny base shows what its prompt says.

It ships with the base; tools/tiny_world/measure.py trains it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from wantrain.tensors import read_tensors, write_tensors

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny_probe.safetensors"
SIZE_PX = (64, 96)
"""Height and width of the pictures that it was trained on."""
WIDTHS = (24, 48, 96, 96)
NUM_FEATURES = WIDTHS[-1] * 2 * 3


class Probe(nn.Module):
    """Four convolutions and one head for each kind of label; `labels` are the words of each kind."""

    def __init__(self, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.labels = {kind: tuple(words) for kind, words in labels.items()}
        layers: list[nn.Module] = []
        for c_in, c_out in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten())
        self.heads = nn.ModuleDict({kind: nn.Linear(NUM_FEATURES, len(words)) for kind, words in labels.items()})

    def forward(self, pixels_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [B, words] by kind, of pixels in [-1, 1]."""
        features = self.body(pixels_BCHW)
        return {kind: head(features) for kind, head in self.heads.items()}


def write(path: Path, probe: Probe) -> None:
    """Write weights and labels; bfloat16 holds them well enough."""
    write_tensors(path, {name: tensor.bfloat16() for name, tensor in probe.state_dict().items()},
                  {"labels": json.dumps(probe.labels)})


def read(path: Path = EMBEDDED) -> Probe:
    """The probe of a file, ready to be asked."""
    tensors, metadata = read_tensors(path)
    probe = Probe(json.loads(metadata["labels"]))
    probe.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return probe.eval().requires_grad_(False)
