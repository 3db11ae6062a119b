"""`python -m tests.weight_table` writes docs/weight-files.md: what each kind of weight file costs, by loading it."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from tests import tiny_models as tiny
from wantrain.models import detection
from wantrain.models.containers import find_parts, open_container
from wantrain.models.detection import read_architecture
from wantrain.models.loading import empty_weights, load_into
from wantrain.models.variants import VARIANTS, Architecture

PAGE = Path(__file__).parents[1] / "docs" / "weight-files.md"
COMMAND = "python -m tests.weight_table"
OTHERS = {"vae 2.1": "VAE 2.1", "vae 2.2": "VAE 2.2", "umt5": "umT5", "clip": "CLIP vision"}


def empty(part: tiny.Part) -> torch.nn.Module:
    with empty_weights():
        return part.build()


def loaded(part: tiny.Part, path: Path, dtype: torch.dtype = torch.float32, **more: Collection[str]) -> torch.nn.Module:
    container, module = open_container(path), empty(part)
    load_into(module, container, part.rename(container.names()), dtype=dtype, **more)
    return module


def read(file: tiny.File) -> tiny.Tensors:
    """A file's weights under the official names, out of the filled module."""
    path = find_parts(file.path)[file.found_as] if file.found_as else file.path
    return file.part.official(loaded(file.part, path).state_dict())


def assert_equal(own: tiny.Tensors, meant: tiny.Tensors) -> None:
    """The same names, and the same bits."""
    assert own.keys() == meant.keys(), own.keys() ^ meant.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, meant[name]), name


def _distance(own: tiny.Tensors, twin: tiny.Tensors) -> float:
    """Relative L2 over the Linear weights (all where there are none); 0 only where all tensors are equal to the bit."""
    def norm(tensors: Iterable[torch.Tensor]) -> float:
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))

    if all(torch.equal(own[name], tensor) for name, tensor in twin.items()):
        return 0.0
    compared = tiny.matrices(twin) or list(twin)
    return norm(own[name] - twin[name] for name in compared) / norm(twin[name] for name in compared)


@functools.cache
def error(part: str, container: str) -> float | None:
    """`_distance` of what is loaded to the twin, of the worse expert where there are two; None for no such file.

    AssertionError where a tensor is not, to the bit, what the file stands for.
    """
    distances = []
    with tempfile.TemporaryDirectory() as folder:
        for file in tiny.containers_of(part)[container](tiny.PARTS[part], Path(folder)):
            own = read(file)
            assert_equal(own, file.meant)
            distances.append(_distance(own, file.twin))
    return max(distances, default=None)


def _signature(a: Architecture) -> tuple[object, ...]:
    """What of an architecture decides which tensors there are."""
    return (a.in_channels, a.out_channels, a.image_dim is None, a.image_tokens is None, bool(a.vace_layers), a.ref_conv,
            a.control_adapter, a.animate is None, a.driven, a.speech is None)


def variants_of(kind: str) -> list[str]:
    """The published rows of the variants table, and the embedded base, that a tiny transformer stands for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.weights(tiny.PARTS[kind]).items()}
    own = _signature(read_architecture(shapes, "official"))
    return [v.name for v in VARIANTS.values()
            if _signature(v.architecture) == own and bool(v.experts) == (kind in tiny.EXPERTS)
            and not v.name.startswith("tiny_wan_")]


def _cell(part: str, container: str) -> str:
    value = error(part, container)
    return "-" if value is None else "exact" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _cells(columns: Mapping[str, str], containers: Iterable[str]) -> str:
    return _table(["container", *columns.values()],
                  ([container, *(_cell(part, container) for part in columns)] for container in containers))


def page() -> str:
    """The whole of docs/weight-files.md."""
    without_class = ", ".join(f"`{kind}`" for kind in tiny.TRANSFORMERS if kind not in tiny._WITH_CLASS)
    return f"""\
# Weight files

Which files wantrain reads, and what each costs. `{COMMAND}` makes this page, and a test fails where
it is out of date: it builds a tiny random model of every kind with the real tensor names, writes it in every container,
loads each file and compares it with its twin, the diffusers or transformers model that the file was made of.

- `exact`: every loaded tensor is the twin's to the bit.
- A number: every loaded tensor is to the bit what the file holds (times its scale, or as the `gguf` package
  dequantises it). The number is what that storage costs: the relative L2 error against the twin's float32 Linear
  weights, or, for a VAE, which has none, against all its weights.
- `-`: no such file.

With `memory.base=fp8` or `int8` the blocks of an fp8, int8 or Q8_0 transformer are trained in the file's own numbers
([memory.md](memory.md), "The base in fewer bits").

The twin of a K-quant file (Q2_K to Q6_K, mixed) holds what the file's random blocks stand for, as the `gguf` package
reads K-quants and does not write them.

## Transformers

{_cells({kind: f"`{kind}`" for kind in tiny.TRANSFORMERS}, tiny.CONTAINERS)}

Each column stands for these variants, which have the same tensors in other sizes:

{_table(["column", "variants"], ([f"`{kind}`", ", ".join(variants_of(kind))] for kind in tiny.TRANSFORMERS))}

For the extra tensors of some Fun models (`ref_conv`, `control_adapter`) and of S2V diffusers has no class:
{without_class}.
Their twin is a class of ours (wantrain/models/fun.py, speech.py), and `merge` writes them with `layout=official` alone.

## VAE and encoders

{_cells(OTHERS, tiny.OTHER_CONTAINERS)}

A umT5 in GGUF has llama.cpp's tensor names, which wantrain does not read.

## Refused

These families are recognised by their tensors: `inspect` names them, training refuses them with a message:
{", ".join(dict.fromkeys(detection._UNSUPPORTED.values()))}.

Files in nvfp4, mxfp8 or awq_w4a16 are refused with the name of the format: use the fp16, bf16 or fp8 file of the model.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
