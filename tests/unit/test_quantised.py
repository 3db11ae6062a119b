"""A frozen base whose Linears take a byte a weight: exact for what the bytes stand for, near to what they replace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from wantrain import lora
from wantrain.config import load
from wantrain.engine import checkpoint
from wantrain.lora import Spec
from wantrain.models import base, quantised
from wantrain.models.fit import NewAdapter, fit
from wantrain.models.loading import empty_weights
from wantrain.models.quantised import QuantisedLinear, quantise, relative_errors
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.terms import UserError

CPU = torch.device("cpu")
FORMS = ("int8", "fp8")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {})


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None, form: str, may_use_bytes: bool = False
             ) -> QuantisedLinear:
    out, into = weight.shape
    made = QuantisedLinear(into, out, bias is not None, form, may_use_bytes)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    made.store(weight)
    return made


def inputs() -> dict[str, torch.Tensor | bool]:
    generator = torch.Generator().manual_seed(3)
    return {"hidden_states": torch.randn(2, 16, 2, 4, 6, generator=generator), "timestep": torch.tensor([900.0, 40.0]),
            "encoder_hidden_states": torch.randn(2, 512, 128, generator=generator), "return_dict": False}


def gradients_of(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of an adapter of random numbers."""
    generator = torch.Generator().manual_seed(5)
    for parameter in lora.trainable_parameters(transformer).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    transformer(**inputs())[0].square().mean().backward()
    return {name: p.grad for name, p in lora.trainable_parameters(transformer).items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradient_are_those_of_a_linear_with_the_dequantised_weight(form: str, with_bias: bool) -> None:
    weight, bias = torch.randn(24, 40), torch.randn(24) if with_bias else None
    layer = layer_of(weight, bias, form)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(2, 5, 40, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
                for _ in range(2))
        plain = torch.nn.functional.linear(y, layer.dequantised(dtype), None if bias is None else bias.to(dtype))
        out = layer(x)
        assert torch.equal(out, plain)
        for one in (out, plain):
            one.square().sum().backward()
        assert torch.equal(x.grad, y.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 40)).dtype == torch.bfloat16
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")


def in_bytes(matrix: torch.Tensor, form: str) -> torch.Tensor:
    """What rows of bytes stand for, float64, by the definitions of the formats."""
    largest = matrix.double().abs().amax(1, keepdim=True)
    if form == "int8":
        return (matrix.double() / largest * 127).round() * largest / 127
    steps = matrix.double() / largest * 448
    ulp = torch.exp2(steps.abs().log2().floor().clamp_min(-6) - 3)  # 3 bits behind the first; smallest exponent -6
    return (steps / ulp).round() * ulp * largest / 448


@pytest.fixture
def fp8_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card that multiplies fp8: the CPU has the operation, only no use for it."""
    monkeypatch.setattr(quantised, "has_products", lambda form, _: form in FORMS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [3, 50])
def test_a_product_in_bytes_is_that_of_the_rounded_rows(form: str, num_rows: int, fp8_here, monkeypatch) -> None:
    monkeypatch.setattr(quantised, "SLICE", 20)
    torch.manual_seed(1)
    weights, biases = [torch.randn(32, 48), torch.randn(64, 48)], [torch.randn(32), None]
    layers = [layer_of(*pair, form, may_use_bytes=True) for pair in zip(weights, biases, strict=True)]
    given = torch.randn(num_rows, 48) * torch.logspace(-3, 3, num_rows)[:, None]
    gradients = [torch.randn(num_rows, 32), torch.randn(num_rows, 64)]
    bound = {"int8": 3e-3, "fp8": 4e-3}[form]  # a number between two may round otherwise; fp8 answers in bfloat16

    def assert_near(found: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
        off, rounding = ((found - other).norm(dim=1) / want.norm(dim=1) for other in (want, exact))
        assert off.max() < bound < rounding.min()

    for answer, weight, bias in zip(quantised.products(given, layers, torch.float32), weights, biases, strict=True):
        more = 0 if bias is None else bias
        assert_near(answer - more, in_bytes(given, form) @ in_bytes(weight, form).T, given @ weight.T)
    pairs = list(zip(gradients, weights, strict=True))
    want = sum(in_bytes(gradient * weight.abs().amax(1), form) / weight.abs().amax(1) @ in_bytes(weight, form)
               for gradient, weight in pairs)
    assert_near(quantised.input_gradient(gradients, layers, torch.float32), want,
                sum(gradient @ weight for gradient, weight in pairs))


def test_what_is_not_finite_stays_so(fp8_here) -> None:
    """Else a training would go on over a row that became no number."""
    for form in FORMS:
        layer, given = layer_of(torch.randn(32, 48), None, form, may_use_bytes=True), torch.randn(4, 48)
        given[1, 3], given[2, 3] = torch.nan, torch.inf
        assert layer(given).isfinite().all(1).tolist() == [True, False, False, True]


def test_who_multiplies_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    ampere, ada = torch.device("cuda:0"), torch.device("cuda:9")
    assert [quantised.has_products("int8", device) for device in (CPU, ampere, ada)] == [True] * 3
    assert [quantised.has_products("fp8", device) for device in (CPU, ampere, ada)] == [False, False, True]
    assert not quantised.has_products("", ada)
    odd, even = (layer_of(torch.randn(16, size), None, "int8", may_use_bytes=True) for size in (40, 48))
    assert (odd.uses_bytes(CPU), even.uses_bytes(CPU)) == (False, True)
    assert not any(m.may_use_bytes for m in TINY.text(torch.float32, CPU, "int8").text_encoder.modules()
                   if isinstance(m, QuantisedLinear))


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.01), ("fp8", 0.04)])
def test_a_loras_gradient_in_bytes_is_nearly_that_over_the_dequantised_weights(form, bound, fp8_here) -> None:
    """Measured 0.006 and 0.023."""
    found = []
    for may_use_bytes in (False, True):
        transformer = TINY.transformer(torch.float32, CPU, form=form)
        for layer in transformer.modules():
            if isinstance(layer, QuantisedLinear):
                layer.may_use_bytes = may_use_bytes
        fit(transformer, CPU, NewAdapter(["attn_ffn"], Spec(2, 2.0), 0))
        found.append(torch.cat([g.flatten() for g in gradients_of(transformer).values()]))
    want, got = found
    assert bound / 20 < float((got - want).norm() / want.norm()) < bound


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_no_weight_is_further_off_than_its_form_allows(form: str, bound: float) -> None:
    weight = torch.randn(16, 64) * torch.logspace(-6, 6, 16)[:, None]  # every row has its own scale
    weight[3] = 0
    layer = layer_of(weight, None, form)
    largest = weight.abs().amax(1, keepdim=True)
    off = (layer.dequantised(torch.float32) - weight).abs()
    if form == "int8":
        assert (off <= bound * largest * 1.001).all()
    else:  # relative to each weight, but for the smallest, which are below its normal numbers
        assert (off <= bound * weight.abs() + 2.0**-10 * largest / 448 * 1.001).all()
    assert (layer.dequantised(torch.float32)[3] == 0).all()
    torch.testing.assert_close(layer.dequantised(torch.float32).abs().amax(1)[:3], largest[:3, 0], rtol=1e-6, atol=0)
    assert layer.relative_error == pytest.approx(float(off.norm() / weight.norm()), rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_the_blocks_linears_alone_are_stored_so_and_the_base_answers_nearly_as_before(form: str) -> None:
    plain, stored = TINY.transformer(torch.float32, CPU), TINY.transformer(torch.float32, CPU, form=form)
    wanted = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)
              and name.startswith("blocks.")}
    found = {name: module for name, module in stored.named_modules() if isinstance(module, QuantisedLinear)}
    assert found.keys() == wanted
    for name, tensor in plain.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in wanted and leaf == "weight":
            torch.testing.assert_close(found[owner].dequantised(torch.float32), tensor, rtol=0.07,
                                       atol=float(tensor.abs().max()) / 200)
        else:
            assert torch.equal(stored.state_dict()[name], tensor), name
    with torch.no_grad():
        want, got = plain(**inputs())[0], stored(**inputs())[0]
    assert 1e-4 < float((got - want).norm() / want.norm()) < 0.05
    errors = relative_errors(stored)
    assert len(errors) == 10  # q, k, v and out of two attentions, and two of the feed-forward
    assert all(0.001 < error < 0.04 for error in errors.values())


def test_a_weight_takes_a_byte() -> None:
    """Of the 14B: 13.1 GiB of Linears in place of 26.2 in bfloat16 (docs/memory.md)."""
    with empty_weights():
        transformer = WanTransformer3DModel.from_config(diffusers_config(VARIANTS["wan21_t2v_14b"]))
        linears = sum(m.weight.numel() for m in transformer.blocks.modules() if isinstance(m, torch.nn.Linear))
        quantise(transformer, "int8")
    assert linears / 2**30 == pytest.approx(13.09, abs=0.01)
    assert sum(m.weight.numel() for m in transformer.modules() if isinstance(m, QuantisedLinear)) == linears
    layer = layer_of(torch.randn(64, 32), None, "fp8")
    assert layer.weight.element_size() == 1
    assert layer.scale.numel() == 64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_every_adapted_layer_is_pefts_ordinary_one_over_ours_and_has_its_gradient(form: str, kind: str) -> None:
    stored, plain = TINY.transformer(torch.float32, CPU, form=form), TINY.transformer(torch.float32, CPU)
    for name, module in plain.named_modules():  # the same numbers, in full
        if isinstance(own := stored.get_submodule(name), QuantisedLinear):
            module.weight.data, own.may_use_bytes = own.dequantised(torch.float32), False
    before = {name: p.clone() for name, p in stored.named_parameters()}
    gradients = []
    for transformer in (stored, plain):
        modules = fit(transformer, CPU, NewAdapter(["attn_ffn"], Spec(2, 2.0, kind), 0))
        gradients.append(gradients_of(transformer))
        kinds = {type(transformer.get_submodule(name)).__module__ for name in modules}
        assert len(kinds) == 1
        assert next(iter(kinds)).startswith("peft.tuners.")
        assert "bnb" not in next(iter(kinds))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-8)
    assert all(torch.equal(p, before[name.replace(".base_layer", "")]) for name, p in stored.named_parameters()
               if name.replace(".base_layer", "") in before)


@pytest.mark.parametrize("form", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_training_on_a_quantised_base_ends_as_one_on_the_whole(wantrain, tmp_path: Path, form: str) -> None:
    own = ["train.num_steps=8", "validation.every_steps=8", "optim.lr=0.01"]
    told = {}
    for base_form in ("dtype", form):
        run = tmp_path / base_form
        assert wantrain("train", *own, f"run.dir={run}", f"memory.base={base_form}") == 0
        told[base_form] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
        header = json.loads((run / "run.json").read_text())
        assert header["base_form"] == base_form
        assert len(header["base_errors"]) == (0 if base_form == "dtype" else 10)
    assert told[form]["validation_loss"] == pytest.approx(told["dtype"]["validation_loss"], rel=0.01)
    assert told[form]["validation_loss"] != told["dtype"]["validation_loss"]
    run = tmp_path / form
    assert wantrain("export", *own, f"run.dir={run}", f"memory.base={form}") == 0
    assert wantrain("sample", *own, f"run.dir={run}", f"memory.base={form}", "sampler.strengths=[0,1]",
                    "sampler.num_steps=2") == 0
    assert len(list((run / "samples").glob("*.mp4"))) == 2


def test_ten_steps_are_five_and_resume_and_five_and_another_form_is_refused(wantrain, tmp_path: Path, capsys) -> None:
    own = ["memory.base=int8"]
    assert wantrain("train", *own, "train.num_steps=4", f"run.dir={tmp_path / 'whole'}") == 0
    parts = f"run.dir={tmp_path / 'parts'}"
    assert wantrain("train", *own, "train.num_steps=2", parts) == 0
    assert wantrain("train", *own, "train.num_steps=4", parts) == 0
    one, other = (checkpoint.load(tmp_path / name / "checkpoints" / "step_000004", None)[1]
                  for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert wantrain("train", "train.num_steps=6", parts) == 2
    assert "memory.base: int8 -> dtype" in capsys.readouterr().err


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"lora\.kind = 'dora'.*memory\.base=dtype"):
        load(["recipe=demo_anime", "memory.base=fp8", "lora.kind=dora"])
    with pytest.raises(UserError, match=r"memory\.base = 'int4'"):
        load(["recipe=demo_anime", "memory.base=int4"])
