"""Which form the base is stored in: a file's own numbers, four bits, and what memory.base=auto takes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from torch.utils._pytree import tree_leaves

from tests import tiny_models as tiny
from tests.allocations import Allocations
from wantrain import config, costs
from wantrain.models import base, four_bits, quantised
from wantrain.models.quantised import QuantisedLinear, relative_errors
from wantrain.models.variants import VARIANTS
from wantrain.recipe import costing
from wantrain.terms import UserError

CPU = torch.device("cpu")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {})


def of_storage(storage: tiny.Storage) -> Callable[[Path, tiny.Tensors], Path]:
    return lambda folder, weights: tiny.bare_file(folder, storage(weights)[0])


FILES: dict[str, tuple[str, Callable[[Path, tiny.Tensors], Path]]] = {
    "fp8, one scale": ("fp8", of_storage(tiny.fp8_tensor_scaled)),
    "fp8, a scale a row": ("fp8", of_storage(tiny.row_scaled(torch.float8_e4m3fn))),
    "fp8, a scale a block": ("fp8", of_storage(tiny.fp8_block_scaled)),
    "fp8 e5m2": ("fp8", of_storage(tiny.cast(torch.float8_e5m2, torch.bfloat16))),
    "int8": ("int8", of_storage(tiny.row_scaled(torch.int8))),
    "GGUF Q8_0": ("int8", lambda folder, weights: tiny.write_gguf(folder, tiny.quantised(Ggml.Q8_0, weights))),
}


@pytest.fixture(scope="module")
def weights() -> tiny.Tensors:
    """Those of the tiny base by official names."""
    return tiny.official_transformer(TINY.transformer(torch.float32, CPU))


def with_file(path: Path) -> base.Base:
    return replace(TINY, parts={**TINY.parts, "transformer": path})


@pytest.mark.parametrize("kind", FILES)
def test_numbers_that_a_file_holds_are_taken_as_they_are(kind: str, weights: tiny.Tensors, tmp_path: Path) -> None:
    form, write = FILES[kind]
    found = with_file(write(tmp_path, weights))
    assert found.stored_form() == form
    plain, stored = found.transformer(torch.float32, CPU), found.transformer(torch.float32, CPU, form=form)
    layers = {name: m for name, m in stored.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(layers) == 60
    for name, layer in layers.items():
        assert layer.weight.element_size() == 1
        assert layer.scale.is_contiguous()
        assert torch.equal(layer.dequantised(torch.float32), plain.get_submodule(name).weight), name
    assert set(relative_errors(stored).values()) == {0.0}
    by_row = kind in ("fp8, one scale", "fp8, a scale a row", "int8")
    assert all((quantised.by_rows(torch.ones(1, 16), form)[0].dtype == layer.number and layer.scale.shape[1] == 1)
               == by_row for layer in layers.values())
    other = {"int8": "fp8", "fp8": "int8"}[form]  # another form stores it anew
    assert min(relative_errors(found.transformer(torch.float32, CPU, form=other)).values()) > 0.001


def test_a_damaged_scale_is_refused_as_ever(weights: tiny.Tensors, tmp_path: Path) -> None:
    stored, _ = tiny.fp8_tensor_scaled(weights)
    name = next(name for name in stored if name.endswith("self_attn.q.scale_weight"))
    path = tiny.bare_file(tmp_path, {**stored, name: torch.tensor(torch.inf)})
    with pytest.raises(UserError, match=r"self_attn\.q\.weight is not finite"):
        with_file(path).transformer(torch.float32, CPU, form="fp8")


class OfRealTensors(Allocations):
    def count(self, tensors: object) -> None:
        super().count([t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and not t.is_meta])


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_loading_holds_one_tensor_twice_and_not_the_base(form: str) -> None:
    whole = TINY.transformer(torch.float32, CPU)
    largest = max(p.nbytes for p in whole.parameters())
    with OfRealTensors() as counted:
        stored = TINY.transformer(torch.float32, CPU, form=form)
    held = sum(t.nbytes for t in (*stored.parameters(), *stored.buffers()))
    assert held < counted.peak < held + 4 * largest < sum(p.nbytes for p in whole.parameters())


NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
"""Quantiles of the normal distribution (Dettmers et al. 2023, appendix E)."""

has_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")


@has_bitsandbytes
def test_nf4_is_the_nearest_of_sixteen_numbers_in_runs_of_64() -> None:
    weight = torch.randn(8, 192) * torch.logspace(-2, 2, 8)[:, None]
    layer = QuantisedLinear(192, 8, False, "nf4")
    layer.store(weight)
    runs = weight.view(8, 3, 64)
    largest = runs.abs().amax(2, keepdim=True)
    nearest = torch.tensor(NF4)[(runs[..., None] / largest[..., None] - torch.tensor(NF4)).abs().argmin(-1)] * largest
    torch.testing.assert_close(layer.dequantised(torch.float32), nearest.view(8, 192), rtol=1e-4, atol=1e-6)
    assert layer.weight.nbytes == weight.numel() // 2
    assert layer.scale.shape == (8, 3)
    assert layer.relative_error == pytest.approx(0.09, abs=0.02)
    given = torch.randn(5, 192, requires_grad=True)
    layer(given).sum().backward()
    torch.testing.assert_close(given.grad, layer.dequantised(torch.float32).sum(0).expand(5, -1))


@has_bitsandbytes
@pytest.mark.slow
def test_a_training_on_nf4_ends_near_one_on_the_whole(wantrain, tmp_path: Path) -> None:
    told = {}
    for form in ("dtype", "nf4"):
        run = tmp_path / form
        assert wantrain("train", "train.num_steps=8", "validation.every_steps=8", "optim.lr=0.001", f"run.dir={run}",
                        f"memory.base={form}") == 0
        told[form] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
        assert json.loads((run / "run.json").read_text())["base_form"] == form
    assert told["nf4"] == pytest.approx(told["dtype"], rel=0.05)  # measured 3.3 % after 16 steps
    assert told["nf4"] != told["dtype"]


def test_nf4_without_bitsandbytes_says_how_to_get_it(wantrain, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(four_bits.importlib.util, "find_spec", lambda _: None)
    for verb in ("check", "train"):
        assert wantrain(verb, "memory.base=nf4") == 2
        told = capsys.readouterr().err
        assert "memory.base = nf4 needs the package bitsandbytes" in told
        assert "pip install 'wantrain[nf4]'" in told


@pytest.mark.slow
def test_auto_takes_the_files_own_bytes_as_they_are_and_a_run_keeps_its_form(wantrain, weights, tmp_path, capsys
                                                                             ) -> None:
    """On a CPU fp8 multiplies by what it stands for: so the run is that over the same file read whole, to the bit."""
    file = FILES["fp8, a scale a block"][1](tmp_path / "base", weights)
    own = ["train.num_steps=2", f"model.parts.transformer={file}", "optim.lr=0.01"]
    told = {}
    for form in ("dtype", "auto"):
        assert wantrain("train", *own, f"run.dir={tmp_path / form}", f"memory.base={form}") == 0
        lines = [json.loads(line) for line in (tmp_path / form / "metrics.jsonl").read_text().splitlines()]
        told[form] = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    assert told["auto"] == told["dtype"]
    assert len(told["auto"]) == 2
    header = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert (header["base_form"], header["products_in_bytes"]) == ("fp8", False)
    assert "from 0.00%" in capsys.readouterr().out
    more = [*own, f"run.dir={tmp_path / 'auto'}", "train.num_steps=3", "memory.base=int8"]
    assert wantrain("train", *more) == 2
    refused = capsys.readouterr().err
    assert all(words in refused for words in ("memory.base: fp8 -> int8", "(products with the base): None -> int8",
                                              "train.resume=any_base"))
    assert wantrain("train", *more, "train.resume=any_base") == 0
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["start_step"] == 2
    assert wantrain("export", *own, f"run.dir={tmp_path / 'auto'}", "train.num_steps=3", "memory.base=auto") == 0


def test_auto_is_the_most_exact_that_fits() -> None:
    own = config.load(["recipe=anime_1b3", "model=wan21_t2v_14b", "memory.base=auto"])
    job = costing.job_of(own, costing.largest_bucket(own), 1)

    def form(gib: float, base_form: str | None = None, can_move: bool = True) -> str:
        room = costing.Room(costs.CARDS["h200"], gib * costs.GIB)
        return costing.policy_of(own, job, room, can_move, base_form).base

    still = [form(gib, can_move=False) for gib in (140, 60, 40, 30)]
    assert still == ["dtype", "dtype", "int8", "nf4"]
    assert form(30) == "dtype"  # where blocks may wait on the host
    assert form(140, "fp8") == "fp8"
    assert costing.policy_of(own, job, None).base == "dtype"
    with pytest.raises(UserError, match=r"lora\.kind = 'dora'.*memory\.base=dtype"):
        config.load(["recipe=demo_anime", "memory.base=auto", "lora.kind=dora"])


@pytest.mark.slow
def test_a_lora_to_start_from_or_merged_in_counts_over_a_quantised_base(wantrain, tmp_path: Path) -> None:
    """The first loss over int8 with a LoRA as the start is about that with it merged in before the base is stored."""
    def first_loss(name: str, *more: str) -> float:
        run = tmp_path / name
        assert wantrain("train", f"run.dir={run}", "memory.base=int8", "optim.lr=0.01", *more) == 0
        return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    alone = first_loss("alone", "train.num_steps=6")
    assert wantrain("export", "train.num_steps=6", f"run.dir={tmp_path / 'alone'}", "optim.lr=0.01") == 0
    file = next((tmp_path / "alone" / "export").glob("*.safetensors"))
    started = first_loss("started", "train.num_steps=1", f"lora.start_from={file}")
    merged = first_loss("merged", "train.num_steps=1", f"model.merge=[{file}]")
    assert started == pytest.approx(merged, rel=0.01)
    assert abs(started - merged) < abs(started - alone) / 5
