"""What can never be exported is known before training: an adapter on the meta device, in the writer's own words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.loader_table import base_of
from wantrain import lora
from wantrain.lora import KINDS, AdapterState, Spec
from wantrain.models import base as bases
from wantrain.models.lora_formats import GRAMMARS, LoraFile
from wantrain.models.lora_updates import STORAGE, from_adapter, refuse_unexportable, write_proven
from wantrain.models.variants import VARIANTS
from wantrain.terms import UserError

PRESETS = ("attn", "attn_ffn", "all_linear")
FAMILIES = {"t2v": "t2v", "ti2v": "t2v", "i2v": "i2v", "flf2v": "i2v", "control": "i2v", "control_reference": "i2v",
            "control_inpaint": "t2v", "camera": "i2v", "camera_inpaint": "t2v", "vace": "vace", "animate": "animate",
            "animate2": "i2v", "s2v": "t2v"}


def state_of(module: torch.nn.Module, preset: str, kind: str, rank: int = 4, alpha: float = 3) -> AdapterState:
    lora.inject(module, [preset], Spec(rank, alpha, kind), seed=0)
    return lora.adapter_state(lora.trainable_parameters(module), lora.scales(module))


def refusal(state: AdapterState, format: str, storage: str = "float32") -> str:
    """What is said before training; empty where nothing is."""
    try:
        refuse_unexportable(state, format, storage)
    except UserError as error:
        return str(error)
    return ""


def written(state: AdapterState, format: str, path: Path, storage: str = "float32") -> str:
    """What writing a real adapter says, read back and compared; empty where it succeeds."""
    try:
        write_proven(LoraFile(path, format, *from_adapter(state)), format, {}, storage)
    except UserError as error:
        return str(error)
    return ""


def meta_twin(family: str) -> torch.nn.Module:
    module = base_of(family).module
    with torch.device("meta"):
        return type(module).from_config(module.config)


def real_twin(family: str) -> torch.nn.Module:
    module = meta_twin(family).to_empty(device="cpu")
    module.load_state_dict(base_of(family).module.state_dict())
    return module


def path_of(folder: Path, format: str) -> Path:
    return folder / (format if format == "peft" else f"{format}.safetensors")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("family", "kind"), [("t2v", "dora"), ("vace", "loha"), ("animate", "lora")])
def test_the_answer_is_what_writing_does(family: str, kind: str, preset: str, tmp_path: Path) -> None:
    _assert_alike(family, kind, preset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES.values())))
def test_the_answer_is_what_writing_does_everywhere(family: str, kind: str, preset: str, tmp_path: Path) -> None:
    _assert_alike(family, kind, preset, tmp_path)


def _assert_alike(family: str, kind: str, preset: str, tmp_path: Path) -> None:
    before, after = state_of(meta_twin(family), preset, kind), state_of(real_twin(family), preset, kind)
    assert all(tensor.is_meta for leaves in before.tensors.values() for tensor in leaves.values())
    answers = {format: refusal(before, format) for format in GRAMMARS}
    assert answers == {format: written(after, format, path_of(tmp_path, format)) for format in GRAMMARS}
    assert not answers["peft"] or kind in ("loha", "lokr")


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_scale_that_bfloat16_cannot_fold_is_known_before(kind: str, tmp_path: Path) -> None:
    for rank, alpha in ((4, 3), (8, 2)):
        answers = {}
        before, after = (state_of(make("t2v"), "attn", kind, rank, alpha) for make in (meta_twin, real_twin))
        for format in ("universal", "diffusers", "kohya"):
            answers[format] = refusal(before, format, "bfloat16")
            assert answers[format] == written(after, format, path_of(tmp_path, format), "bfloat16")
        scale = alpha / (rank if kind == "lora" else rank**0.5)
        assert bool(answers["universal"]) == bool(answers["diffusers"]) == (scale not in (0.25, 0.5, 1, 2))
        assert not answers["kohya"]


def test_a_rank_above_a_modules_size_is_exported(tmp_path: Path) -> None:
    """The head of the tiny twin has 64 outputs, its attention 32 inputs."""
    before, after = (state_of(make("t2v"), "all_linear", "lora", 80) for make in (meta_twin, real_twin))
    for format in GRAMMARS:
        assert refusal(before, format) == written(after, format, path_of(tmp_path, format)) == ""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_real_variants_answer_as_their_tiny_twins(name: str) -> None:
    variant = VARIANTS[name]
    on_meta = bases.Base(variant, {"transformer": Path("none")}).meta_transformer
    for preset in PRESETS:
        for kind in KINDS:
            real, twin = (state_of(make(), preset, kind) for make in (
                on_meta, lambda: meta_twin(FAMILIES[variant.task])))
            for format in GRAMMARS:
                for storage in STORAGE:
                    assert bool(refusal(real, format, storage)) == bool(refusal(twin, format, storage))
