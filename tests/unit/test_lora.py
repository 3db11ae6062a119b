"""Adapters: exact targets, exact trainable set, step 0 equal to the base, merge equal to adapter."""

import pytest
import torch

from wantrain import lora
from wantrain.models import base
from wantrain.models.variants import VARIANTS
from wantrain.terms import UserError

CPU = torch.device("cpu")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {})


@pytest.fixture
def transformer():
    return TINY.transformer(torch.float32, CPU)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return {"hidden_states": torch.randn(2, 16, 2, 4, 6, generator=generator), "timestep": torch.tensor([900.0, 250.5]),
            "encoder_hidden_states": torch.randn(2, 512, 128, generator=generator), "return_dict": False}


def randomize(transformer):
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable(transformer).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


@torch.no_grad()
def test_at_step_0_the_adapted_base_is_the_base_bitwise(transformer):
    before = transformer(**inputs())[0]
    lora.inject(transformer, ["attn_ffn"], 8, 8, seed=0)
    assert torch.equal(before, transformer(**inputs())[0])


def test_the_trainable_set_is_exactly_the_targets(transformer):
    names = lora.inject(transformer, ["attn"], 4, 4, seed=0)
    expected = [f"blocks.{i}.attn{k}.{p}" for i in range(6) for k in (1, 2)
                for p in ("to_q", "to_k", "to_v", "to_out.0")]
    assert sorted(names) == sorted(expected)
    assert set(lora.trainable(transformer)) == {f"{n}.lora_{x}.default.weight" for n in expected for x in "AB"}
    assert {p.dtype for p in lora.trainable(transformer).values()} == {torch.float32}


@pytest.mark.parametrize(("targets", "number"), [(["attn_ffn"], 60), (["all_linear"], 66),
                                                 ([r"blocks\.[01]\.ffn\..*"], 4)])
def test_presets_and_patterns(transformer, targets, number):
    assert len(lora.match_targets(transformer, targets)) == number


@pytest.mark.parametrize("targets", [["to_qq"], ["attn", "blocks.9.*"], ["(["]])
def test_a_target_that_matches_nothing_is_refused(transformer, targets):
    with pytest.raises(UserError, match=r"lora\.targets"):
        lora.inject(transformer, targets, 4, 4, seed=0)


def test_the_start_is_a_function_of_the_seed(transformer):
    lora.inject(transformer, ["attn"], 4, 4, seed=3)
    other = TINY.transformer(torch.float32, CPU)
    torch.manual_seed(99)
    lora.inject(other, ["attn"], 4, 4, seed=3)
    pairs = zip(lora.trainable(transformer).values(), lora.trainable(other).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_merged_weights_equal_the_adapter_and_switching_off_equals_the_base(transformer):
    before = transformer(**inputs())[0]
    lora.inject(transformer, ["attn_ffn"], 8, 4, seed=0)
    randomize(transformer)
    adapted = transformer(**inputs())[0]
    assert (adapted - before).abs().max() > 0.01
    with lora.switched_off(transformer):
        assert torch.equal(before, transformer(**inputs())[0])
    assert torch.equal(adapted, transformer(**inputs())[0])
    lora.merge(transformer)
    torch.testing.assert_close(transformer(**inputs())[0], adapted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_deltas_are_what_the_adapter_adds(transformer):
    reference = TINY.transformer(torch.float32, CPU)
    lora.inject(transformer, ["attn_ffn"], 8, 12, seed=0)
    randomize(transformer)
    for name, delta in lora.adapter_state(lora.trainable(transformer), 8, 12).deltas():
        reference.get_submodule(name).weight += delta
    torch.testing.assert_close(reference(**inputs())[0], transformer(**inputs())[0], atol=2e-5, rtol=1e-4)


def test_state_and_named_tensors_are_inverse(transformer):
    lora.inject(transformer, ["attn"], 4, 4, seed=0)
    randomize(transformer)
    tensors = lora.trainable(transformer)
    back = lora.named_tensors(lora.adapter_state(tensors, 4, 4))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_loading_an_adapter_that_does_not_fit_is_refused(transformer):
    lora.inject(transformer, ["attn"], 4, 4, seed=0)
    tensors = {n: p.detach().clone() for n, p in lora.trainable(transformer).items()}
    lora.load_adapter(transformer, tensors)
    first = next(iter(tensors))
    with pytest.raises(UserError, match="missing"):
        lora.load_adapter(transformer, {n: t for n, t in tensors.items() if n != first})
    with pytest.raises(UserError, match="does not fit"):
        lora.load_adapter(transformer, {**tensors, first: torch.zeros(2, 2)})
