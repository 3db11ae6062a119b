"""What LoRA files of every kind do to weights: against PEFT and diffusers, through every format, and merged."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from tests import tiny_models as tiny
from wantrain import lora
from wantrain.lora import KINDS, Spec
from wantrain.models.containers import ContainerError, open_container
from wantrain.models.lora_formats import LoraFile, LoraPair, read_lora, split_extra
from wantrain.models.lora_updates import (
    from_adapter,
    low_rank,
    merged_tensor,
    plan_merge,
    to_adapter,
    updates,
    worst_difference,
    write_proven,
)
from wantrain.models.names import official_names, transformer_to_official
from wantrain.terms import UserError

FORMATS = {
    "lora": ("universal", "comfy_updown", "fun", "kohya", "diffusers", "peft", "lycoris", "diffsynth_pipe",
             "diffsynth"),
    "dora": ("diffusers", "peft"),
    "loha": ("comfy_updown", "kohya", "lycoris"),
    "lokr": ("comfy_updown", "kohya", "lycoris"),
}
FORMATS["rslora"] = FORMATS["lora"]
"""Where each kind is known to load rightly (docs/facts.md, "LoRA loaders"), not the table in lora_formats."""


def adapted(spec: Spec, targets: list[str]) -> torch.nn.Module:
    """The tiny T2V transformer with an adapter far from its start."""
    module = copy.deepcopy(tiny.transformer("t2v"))
    lora.inject(module, targets, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable_parameters(module).values():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def file_of(module: torch.nn.Module) -> LoraFile:
    return LoraFile(Path("trained"), "universal",
                    *from_adapter(lora.adapter_state(lora.trainable_parameters(module), lora.scales(module))))


@torch.no_grad()
def output(module: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return module(torch.randn(1, 16, 2, 4, 4, generator=generator), torch.tensor([500.0]),
                  torch.randn(1, 512, 32, generator=generator), return_dict=False)[0]


@torch.no_grad()
def with_updates(file: LoraFile, strength: float = 1.0) -> torch.nn.Module:
    module = copy.deepcopy(tiny.transformer("t2v"))
    changes = updates(file, strength)
    for name, parameter in module.named_parameters():
        if update := changes.get(transformer_to_official(name)):
            parameter.copy_(update(parameter))
    return module


subsets = st.lists(st.sampled_from(["attn", r".*to_v", r"blocks\.1\..*", r"blocks\.0\.ffn.*", "proj_out"]), min_size=1,
                   max_size=3, unique=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rank=st.integers(1, 20), alpha=st.floats(0.125, 40.0, width=32), targets=subsets)
def test_a_trained_adapter_comes_back_from_every_format(kind: str, rank: int, alpha: float, targets: list[str],
                                                        tmp_path: Path) -> None:
    file = file_of(adapted(Spec(rank, alpha, kind, {targets[0]: 3}, {targets[-1]: 2.0}), targets))
    base = tiny.official_transformer(tiny.transformer("t2v"))
    for format in FORMATS[kind]:
        path = tmp_path / format / ("adapter" if format == "peft" else "lora.safetensors")
        assert write_proven(replace(file, path=path), format, {}, "float32") < 1e-6
        back = read_lora(path)
        for name, update in updates(file).items():
            torch.testing.assert_close(updates(back)[name](base[name]), update(base[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_formats_that_load_it_wrongly_are_refused_and_another_is_named(kind: str, tmp_path: Path) -> None:
    file = file_of(adapted(Spec(4, 4, kind), ["attn"]))
    for format in set(FORMATS["lora"]) - set(FORMATS[kind]):
        with pytest.raises(UserError, match=f"the format {format} cannot hold") as caught:
            write_proven(replace(file, path=tmp_path / "no"), format, {}, "float32")
        assert all(able in caught.value.next_step for able in FORMATS[kind])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_diffusers_and_peft_compute_what_was_trained(kind: str, tmp_path: Path) -> None:
    trained = adapted(Spec(4, 6, kind, {"attn": 3}), ["attn_ffn"])
    write_proven(replace(file_of(trained), path=tmp_path / "d.safetensors"), "diffusers", {}, "float32")
    write_proven(replace(file_of(trained), path=tmp_path / "p"), "peft", {}, "float32")
    loaded = copy.deepcopy(tiny.transformer("t2v"))
    state, metadata = WanPipeline.lora_state_dict(str(tmp_path / "d.safetensors"), return_lora_metadata=True)
    WanPipeline.load_lora_into_transformer(state, loaded, metadata=metadata)
    peft = PeftModel.from_pretrained(copy.deepcopy(tiny.transformer("t2v")), str(tmp_path / "p"))
    assert (output(trained) - output(tiny.transformer("t2v"))).abs().max() > 0.05
    for module in (loaded, peft.merge_and_unload(), with_updates(file_of(trained))):
        torch.testing.assert_close(output(module), output(trained), rtol=1e-4, atol=1e-5)


def test_a_padded_file_becomes_an_adapter_of_its_own_ranks(tmp_path: Path) -> None:
    """So that training goes on from an export of the same rank_pattern."""
    trained = adapted(Spec(4, 6, "lora", {"attn": 2}), ["attn_ffn"])
    write_proven(replace(file_of(trained), path=tmp_path / "x.safetensors"), "universal", {}, "float32")
    file = read_lora(tmp_path / "x.safetensors")
    assert {pair.rank for pair in file.pairs.values()} == {4}
    state = to_adapter(file)
    assert {name: leaves["lora_A"].shape[0] for name, leaves in state.tensors.items()} == {
        name: 4 if "ffn" in name else 2 for name in state.tensors}
    again = copy.deepcopy(tiny.transformer("t2v"))
    lora.attach(again, state)
    torch.testing.assert_close(output(again), output(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize(("storage", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_products_are_stored_in_the_dtype_asked_for(kind: str, storage: str, dtype: torch.dtype, tmp_path: Path
                                                    ) -> None:
    lora = replace(file_of(adapted(Spec(4, 6, kind), ["attn"])), path=tmp_path / "x.safetensors")
    write_proven(lora, "kohya", {}, storage)
    extras = read_lora(tmp_path / "x.safetensors").extras
    stored = {split_extra(name)[1]: tensor.dtype for name, tensor in extras.items()}
    assert stored.pop("alpha") == torch.float32
    assert set(stored.values()) == {dtype}


def test_strength_halves_what_a_kind_does() -> None:
    for kind in KINDS:
        file = file_of(adapted(Spec(4, 6, kind), [r"blocks\.0\.attn1\.to_q"]))
        weight = tiny.official_transformer(tiny.transformer("t2v"))["blocks.0.self_attn.q.weight"]
        half, whole = (updates(file, s)["blocks.0.self_attn.q.weight"](weight) - weight for s in (0.5, 1.0))
        torch.testing.assert_close(2 * half, whole, rtol=1e-4, atol=1e-5)


def test_lokr_and_loha_as_comfyui_computes_them() -> None:
    """alpha/rank counts for LoHa always, for LoKr only where a factor is decomposed: docs/facts.md, "LoHa, LoKr, DoRA".
    """
    generator = torch.Generator().manual_seed(0)
    r = {name: torch.randn(shape, generator=generator) for name, shape in {
        "hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32), "lokr_w1": (4, 8),
        "lokr_w2": (8, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 4)}.items()}
    alpha = {"alpha": torch.tensor(5.0)}
    loha = 2.5 * torch.einsum("ia,aj,ib,bj->ij", r["hada_w1_a"], r["hada_w1_b"], r["hada_w2_a"], r["hada_w2_b"])
    whole = torch.einsum("ij,kl->ikjl", r["lokr_w1"], r["lokr_w2"]).reshape(32, 32)
    narrow = 5 / 3 * torch.einsum("ij,ka,al->ikjl", r["lokr_w1"], r["lokr_w2_a"], r["lokr_w2_b"]).reshape(32, 32)
    for leaves, wanted in ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), loha),
                           (("lokr_w1", "lokr_w2"), whole), (("lokr_w1", "lokr_w2_a", "lokr_w2_b"), narrow)):
        extras = {f"blocks.0.self_attn.q.{leaf}": t for leaf, t in ({x: r[x] for x in leaves} | alpha).items()}
        change, = updates(LoraFile(Path("x"), "kohya", {}, extras)).values()
        torch.testing.assert_close(change(torch.zeros(32, 32)), wanted, rtol=1e-4, atol=1e-4)


DISTILLED = {
    "blocks.0.self_attn.q.diff_b": torch.full((32,), 1.0), "blocks.0.norm3.diff": torch.full((32,), 2.0),
    "head.head.diff": torch.full((64, 32), 3.0), "blocks.0.diff_m": torch.full((1, 6, 32), 4.0),
    "head.diff_m": torch.full((1, 2, 32), 5.0), "blocks.1.self_attn.q.diff": torch.full((32, 32), 6.0),
}
PAIR = {"blocks.1.self_attn.q": LoraPair(torch.ones(2, 32), torch.ones(32, 2), 2.0)}


def test_whole_differences_reach_weights_biases_and_modulation(tmp_path: Path) -> None:
    path = tiny.bare_file(tmp_path, tiny.official_transformer(tiny.transformer("t2v")))
    container = open_container(path)
    file = LoraFile(Path("x"), "comfy_updown", PAIR, DISTILLED)
    plan = plan_merge(container, [(file, 0.5), (file, 0.5)])
    for name, added in {"blocks.0.self_attn.q.bias": 1, "blocks.0.norm3.weight": 2, "head.head.weight": 3,
                        "blocks.0.modulation": 4, "head.modulation": 5, "blocks.1.self_attn.q.weight": 6 + 2}.items():
        before = container.read(name)
        torch.testing.assert_close(merged_tensor(plan, name, before) - before, torch.full_like(before, added))
    untouched = container.read("blocks.0.ffn.0.weight")
    assert merged_tensor(plan, "blocks.0.ffn.0.weight", untouched) is untouched
    with pytest.raises(ContainerError, match=r"holds more than an adapter.* and 3 more.*"):
        to_adapter(file)


def test_what_does_not_fit_a_base_is_refused(tmp_path: Path) -> None:
    container = open_container(tiny.bare_file(tmp_path, tiny.official_transformer(tiny.transformer("t2v"))))
    image = {"blocks.0.cross_attn.k_img": LoraPair(torch.ones(2, 32), torch.ones(32, 2), 2.0)}
    with pytest.raises(ContainerError, match=r"changes blocks\.0\.cross_attn\.k_img\.weight, which is not in the base"):
        plan_merge(container, [(LoraFile(Path("x"), "universal", image), 1.0)])
    wide = {"blocks.0.self_attn.q": LoraPair(torch.ones(2, 64), torch.ones(32, 2), 2.0)}
    plan = plan_merge(container, [(LoraFile(Path("x"), "universal", wide), 1.0)])
    with pytest.raises(ContainerError, match=r"is \[32, 64\], the base's tensor is \[32, 32\]"):
        merged_tensor(plan, "blocks.0.self_attn.q.weight", container.read("blocks.0.self_attn.q.weight"))
    for suffix in ("set_weight", "lokr_t2", "lora_mid.weight", "lora_B.bias", "dora_scale"):
        unknown = LoraFile(Path("x"), "comfy_updown", PAIR, {f"blocks.1.self_attn.q.{suffix}": torch.ones(3)})
        with pytest.raises(ContainerError, match=f"does not apply blocks.1.self_attn.q.{suffix}"):
            plan_merge(container, [(unknown, 1.0)])


def test_lycoris_dora_is_pefts(tmp_path: Path) -> None:
    trained = file_of(adapted(Spec(4, 6, "dora"), [r"blocks\.0\.attn1\.to_q"]))
    (name, magnitude), = trained.extras.items()
    comfy = LoraFile(Path("x"), "kohya", trained.pairs, {f"{split_extra(name)[0]}.dora_scale": magnitude[:, None]})
    weight = tiny.official_transformer(tiny.transformer("t2v"))["blocks.0.self_attn.q.weight"]
    one, other = (updates(f)["blocks.0.self_attn.q.weight"](weight) for f in (trained, comfy))
    assert torch.equal(one, other)
    assert "lora_magnitude_vector" in to_adapter(comfy).tensors["blocks.0.attn1.to_q"]


def test_low_rank_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(96, 5, generator=generator) @ torch.randn(5, 64, generator=generator)
    pair, kept = low_rank(change, 5)
    assert kept == pytest.approx(1, abs=1e-6)
    assert (pair.delta() - change).norm() < 1e-5 * change.norm()
    full = torch.randn(300, 200, generator=generator)  # the hardest case: a flat spectrum
    pair, kept = low_rank(full, 16)
    s = torch.linalg.svdvals(full)
    best = float((s[:16] ** 2).sum() / (s ** 2).sum())
    assert best * 0.995 < kept <= best * 1.000001
    assert float((full - pair.delta()).norm() ** 2 / full.norm() ** 2) == pytest.approx(1 - kept, abs=1e-5)
    assert torch.equal(pair.a, low_rank(full, 16)[0].a)
    assert low_rank(torch.randn(8, 4), 32)[0].rank == 4
    for size in (1e-30, 1e36):
        pair, kept = low_rank(change * size, 5)
        assert kept == pytest.approx(1, abs=1e-6)
        assert (pair.delta() / size - change).norm() < 1e-5 * change.norm()


def test_worst_difference_sees_every_kind_of_change() -> None:
    file = file_of(adapted(Spec(4, 6, "dora"), [r"blocks\.0\.attn1\.to_q"]))
    products = file_of(adapted(Spec(4, 6, "loha"), [r"blocks\.0\.attn1\.to_q"]))
    assert worst_difference(file, copy.deepcopy(file)) == (0.0, "blocks.0.self_attn.q.lora_magnitude_vector")
    for one, key in ((file, "lora_magnitude_vector"), (products, "hada_w2_b"), (products, "alpha")):
        other = copy.deepcopy(one)
        name = f"blocks.0.self_attn.q.{key}"
        other.extras[name] = other.extras[name] * 1.01
        assert worst_difference(one, other)[0] == pytest.approx(0.01, rel=0.02)
        del other.extras[name]
        assert worst_difference(one, other) == (math.inf, name)


def test_official_names_of_either_layout() -> None:
    twin = tiny.transformer("t2v").state_dict()
    official = tiny.official_transformer(tiny.transformer("t2v"))
    assert official_names(list(official)) == {name: name for name in official}
    assert official_names(list(twin)) == {name: transformer_to_official(name) for name in twin}
