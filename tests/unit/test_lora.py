"""Adapters of every kind: targets and trainable set, step 0 equal to the base, file and merge equal to the adapter."""

import math
from pathlib import Path

import pytest
import torch

from wantrain import lora
from wantrain.lora import KINDS, Spec
from wantrain.models import base
from wantrain.models.lora_formats import LoraFile
from wantrain.models.lora_updates import from_adapter, to_adapter, updates
from wantrain.models.names import transformer_to_official
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
    """Far from the start, where every kind has an effect of its own."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable_parameters(transformer).values():
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1


def state_of(transformer):
    return lora.adapter_state(lora.trainable_parameters(transformer), lora.scales(transformer))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_the_adapted_base_is_the_base_bitwise(kind, dtype):
    transformer = TINY.transformer(dtype, CPU)
    given = {name: value.to(dtype) if name in ("hidden_states", "encoder_hidden_states") else value
             for name, value in inputs().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        before = transformer(**given)[0]
        lora.inject(transformer, ["attn_ffn"], Spec(8, 8, kind), seed=0)
        assert torch.equal(before, transformer(**given)[0])


def test_the_trainable_set_is_exactly_the_targets(transformer):
    names = lora.inject(transformer, ["attn"], Spec(4, 4), seed=0)
    expected = [f"blocks.{i}.attn{k}.{p}" for i in range(6) for k in (1, 2)
                for p in ("to_q", "to_k", "to_v", "to_out.0")]
    assert sorted(names) == sorted(expected)
    parameters = lora.trainable_parameters(transformer)
    assert set(parameters) == {f"{n}.lora_{x}.default.weight" for n in expected for x in "AB"}
    assert {p.dtype for p in parameters.values()} == {torch.float32}


@pytest.mark.parametrize(("targets", "number"), [(["attn_ffn"], 60), (["all_linear"], 66),
                                                 ([r"blocks\.[01]\.ffn\..*"], 4)])
def test_presets_and_patterns(transformer, targets, number):
    assert len(lora.match_targets(transformer, targets)) == number


@pytest.mark.parametrize("targets", [["to_qq"], ["attn", "blocks.9.*"], ["(["]])
def test_a_target_that_matches_nothing_is_refused(transformer, targets):
    with pytest.raises(UserError, match=r"lora\.targets"):
        lora.inject(transformer, targets, Spec(4, 4), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_alphas_by_module(transformer, kind):
    ranks, alphas = {"attn": 3, r"blocks\.1\..*": 5}, {r".*\.ffn\..*": 6.0}
    lora.inject(transformer, ["attn_ffn"], Spec(8, 4, kind, ranks, alphas), seed=0)
    state = state_of(transformer)
    for module, rank, alpha in (("blocks.0.attn1.to_q", 3, 4.0), ("blocks.1.attn1.to_q", 5, 4.0),
                                ("blocks.1.ffn.net.2", 5, 6.0), ("blocks.2.ffn.net.2", 8, 6.0)):
        inner = next(t for leaf, t in state.tensors[module].items() if leaf in ("lora_A", "hada_w1_b", "lokr_w2_b"))
        assert inner.shape[0] == rank
        assert state.scales[module] == alpha / (math.sqrt(rank) if kind == "rslora" else rank)
    for key, wrong in (("lora.rank_pattern", {"blocks.9.*": 2}), ("lora.rank_pattern", {"([": 2})):
        with pytest.raises(UserError, match=key):
            lora.inject(TINY.meta_transformer(), ["attn"], Spec(8, 4, kind, wrong), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_a_function_of_the_seed(transformer, kind):
    lora.inject(transformer, ["attn"], Spec(4, 4, kind), seed=3)
    other, third = (TINY.transformer(torch.float32, CPU) for _ in range(2))
    torch.manual_seed(99)
    lora.inject(other, ["attn"], Spec(4, 4, kind), seed=3)
    lora.inject(third, ["attn"], Spec(4, 4, kind), seed=4)
    one, two, three = ([p.detach() for p in lora.trainable_parameters(t).values()] for t in (transformer, other, third))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_the_files_updates_compute_what_the_adapter_does(transformer, kind):
    before = transformer(**inputs())[0]
    lora.inject(transformer, ["attn_ffn"], Spec(8, 12, kind, {r"blocks\.0\..*": 96}), seed=0)  # 96: whole LoKr factors
    randomize(transformer)
    adapted = transformer(**inputs())[0]
    assert (adapted - before).abs().max() > 0.05
    lora.set_strength(transformer, 0)
    assert torch.equal(before, transformer(**inputs())[0])
    lora.set_strength(transformer, 1)
    assert torch.equal(adapted, transformer(**inputs())[0])
    strength = 1.0 if kind == "dora" else 0.5  # a DoRA in PEFT keeps its magnitudes whole at any strength
    file = LoraFile(Path("x"), "universal", *from_adapter(state_of(transformer)))
    lora.set_strength(transformer, strength)
    adapted = transformer(**inputs())[0]
    merged = TINY.transformer(torch.float32, CPU)
    changes = updates(file, strength)
    assert len(changes) == 60
    for name, parameter in merged.named_parameters():
        if update := changes.get(transformer_to_official(name)):
            parameter.copy_(update(parameter))
    torch.testing.assert_close(merged(**inputs())[0], adapted, atol=5e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_out_of_a_file_computes_what_it_came_from(transformer, kind):
    lora.inject(transformer, ["attn_ffn"], Spec(8, 12, kind, {r"blocks\.0\..*": 96, r"blocks\.1\..*": 3}), seed=0)
    randomize(transformer)
    file = LoraFile(Path("x"), "universal", *from_adapter(state_of(transformer)))
    other = TINY.transformer(torch.float32, CPU)
    lora.attach(other, to_adapter(file))
    torch.testing.assert_close(other(**inputs())[0], transformer(**inputs())[0], atol=5e-5, rtol=1e-4)


def test_a_larger_rank_starts_with_the_delta_of_a_smaller_one(transformer):
    lora.inject(transformer, ["attn"], Spec(4, 6), seed=0)
    randomize(transformer)
    given = state_of(transformer)
    wider = TINY.transformer(torch.float32, CPU)
    lora.inject(wider, ["attn_ffn"], Spec(6, 1.5), seed=1)
    lora.start_from(wider, given)
    own = state_of(wider)
    for module, leaves in given.tensors.items():
        assert own.tensors[module]["lora_A"].shape[0] == 6
        delta = own.scales[module] * own.tensors[module]["lora_B"] @ own.tensors[module]["lora_A"]
        torch.testing.assert_close(delta, given.scales[module] * leaves["lora_B"] @ leaves["lora_A"])
    assert not own.tensors["blocks.0.ffn.net.2"]["lora_B"].any()


@pytest.mark.parametrize(("targets", "spec", "said"), [
    (["attn"], Spec(2, 2), "above lora.rank = 2"), ([r"blocks\.0\..*"], Spec(4, 4), "lora.targets does not match"),
    (["attn"], Spec(4, 4, "loha"), "set lora.kind"), (["attn"], Spec(4, 4, "dora"), "set lora.kind"),
])
def test_starting_from_what_does_not_fit_is_refused(transformer, targets, spec, said):
    lora.inject(transformer, ["attn"], Spec(4, 4), seed=0)
    other = TINY.transformer(torch.float32, CPU)
    lora.inject(other, targets, spec, seed=0)
    with pytest.raises(UserError) as caught:
        lora.start_from(other, state_of(transformer))
    assert said in str(caught.value)
