"""Any number of LoRAs in the sampler, each at its strength, an expert's own where there are two."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny_models
from wantrain import lora
from wantrain.config import load
from wantrain.models import base
from wantrain.models.fit import AdapterFile, exchange, fit
from wantrain.models.variants import VARIANTS
from wantrain.options import split_strengths
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import lora_files, open_sampling, sampler_settings
from wantrain.terms import UserError

CPU = torch.device("cpu")
MODULES = {"blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.1.ffn.2": "blocks.1.ffn.net.2",
           "blocks.1.cross_attn.v": "blocks.1.attn2.to_v"}


def transformer() -> torch.nn.Module:
    """A copy of the tiny text-to-video one."""
    return copy.deepcopy(tiny_models.transformer("t2v"))


def write(path: Path, modules: list[str], rank: int, alpha: float, seed: int, **more: str) -> dict[str, torch.Tensor]:
    """A comfy_updown file; what it adds to the weight of each module (diffusers name), by hand."""
    generator, own, deltas = torch.Generator().manual_seed(seed), dict(transformer().named_modules()), {}
    tensors = {}
    for module in modules:
        linear = own[MODULES[module]]
        down, up = (torch.randn(shape, generator=generator) / 4 for shape in (
            (rank, linear.in_features), (linear.out_features, rank)))
        stem = f"diffusion_model.{module}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": torch.tensor(alpha)}
        deltas[MODULES[module]] = alpha / rank * up @ down
    save_file(tensors, path, metadata={"format": "pt", **more})
    return deltas


def inputs() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    own = transformer().config
    return {"hidden_states": torch.randn(1, own.in_channels, 2, 4, 6, generator=generator),
            "timestep": torch.tensor([700.0]),
            "encoder_hidden_states": torch.randn(1, 512, own.text_dim, generator=generator), "return_dict": False}


@torch.no_grad()
def plain_of_fit() -> torch.Tensor:
    """The base, fitted for the CPU but without a LoRA."""
    module = transformer()
    fit(module, CPU)
    return module(**inputs())[0]


@torch.no_grad()
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, -2.0), (0.25,)])
def test_loras_add_up_at_their_strengths(tmp_path: Path, strengths: tuple[float, ...]) -> None:
    given = [(["blocks.0.self_attn.q", "blocks.1.ffn.2"], 2, 3.0),
             (["blocks.1.ffn.2", "blocks.1.cross_attn.v"], 3, 1.0)]
    files, by_hand = [], transformer()
    for i, (strength, (modules, rank, alpha)) in enumerate(zip(strengths, given, strict=False)):
        path = tmp_path / f"{i}.safetensors"
        for module, delta in write(path, modules, rank, alpha, i).items():
            by_hand.get_submodule(module).weight += strength * delta
        files.append(AdapterFile(path, None, strength))
    loaded = transformer()
    plain = loaded(**inputs())[0]
    fit(loaded, CPU, files)
    wanted = by_hand(**inputs())[0]
    assert (wanted - plain).abs().max() > 0.02
    torch.testing.assert_close(loaded(**inputs())[0], wanted, atol=2e-5, rtol=1e-4)
    lora.set_strength(loaded, 0)
    assert torch.equal(loaded(**inputs())[0], plain_of_fit())
    lora.set_strength(loaded, 0.5)  # all of them together
    half = transformer()
    for i, (strength, (modules, rank, alpha)) in enumerate(zip(strengths, given, strict=False)):
        for module, delta in write(tmp_path / "again", modules, rank, alpha, i).items():
            half.get_submodule(module).weight += strength / 2 * delta
    torch.testing.assert_close(loaded(**inputs())[0], half(**inputs())[0], atol=2e-5, rtol=1e-4)


def test_what_does_not_add_up_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", ["blocks.1.ffn.2"], 2, 2.0, 0)
    own = transformer().get_submodule("blocks.1.ffn.net.2")
    stem = "diffusion_model.blocks.1.ffn.2"
    save_file({f"{stem}.hada_w{i}_{x}": torch.ones(shape) for i in (1, 2) for x, shape in (
        ("a", (own.out_features, 2)), ("b", (2, own.in_features)))} | {f"{stem}.alpha": torch.tensor(2.0)},
        tmp_path / "loha.safetensors")
    fit(transformer(), CPU, [AdapterFile(tmp_path / "loha.safetensors", None, 0.5)])  # alone it can be weaker
    with pytest.raises(UserError, match=r"loha.*only LoRAs of pairs add up") as caught:
        fit(transformer(), CPU, [AdapterFile(tmp_path / f"{name}.safetensors") for name in ("a", "loha")])
    assert "model.merge" in caught.value.next_step


def recipe_of(variant: str, *loras: str) -> Recipe:
    config = load(["recipe=demo_anime", f"model.variant={variant}", f"sampler.loras=[{', '.join(loras)}]"])
    return Recipe(config, base.Base(VARIANTS[variant], {expert: Path(expert) for expert in VARIANTS[variant].experts}))


def test_an_expert_has_strengths_of_its_own(tmp_path: Path) -> None:
    pair = {expert: tmp_path / f"style_{expert}_noise.safetensors" for expert in ("high", "low")}
    for path in (*pair.values(), tmp_path / "fast.safetensors"):
        write(path, ["blocks.1.ffn.2"], 2, 2.0, 0)
    found = lora_files(recipe_of("tiny_wan_a14b", f"{tmp_path}/style_{{expert}}_noise.safetensors=1.2/0.6",
                                 f"{tmp_path}/fast.safetensors=0/0.5"), [])
    assert found == {"high": [(pair["high"], 1.2)], "low": [(pair["low"], 0.6), (tmp_path / "fast.safetensors", 0.5)]}
    with pytest.raises(UserError, match="the model has one transformer"):
        lora_files(recipe_of("tiny_wan", f"{tmp_path}/fast.safetensors=1/2"), [])
    with pytest.raises(UserError, match="no finite number"):
        lora_files(recipe_of("tiny_wan", f"{tmp_path}/fast.safetensors=nan"), [])


@pytest.mark.parametrize(("word", "file", "strengths"), [
    ("a.safetensors", "a.safetensors", [1.0]), ("a.safetensors=0.5", "a.safetensors", [0.5]),
    ("a=b.safetensors=-1", "a=b.safetensors", [-1.0]), ("a.safetensors=1/0.5", "a.safetensors", [1.0, 0.5]),
    ("epoch=1-step=500.ckpt", "epoch=1-step=500.ckpt", [1.0]), ("a=1/2/3", "a=1/2/3", [1.0])])
def test_a_strength_stands_behind_the_last_equals_sign(word: str, file: str, strengths: list[float]) -> None:
    assert split_strengths(word) == (file, strengths)


@torch.no_grad()
def test_loras_are_exchanged_as_if_the_others_had_never_been_there(tmp_path: Path) -> None:
    """To the bit, also for another kind, and for none."""
    write(tmp_path / "a.safetensors", ["blocks.0.self_attn.q", "blocks.1.ffn.2"], 2, 3.0, 0)
    write(tmp_path / "b.safetensors", ["blocks.1.ffn.2", "blocks.1.cross_attn.v"], 3, 1.0, 1)
    first, second = ([AdapterFile(tmp_path / f"{name}.safetensors", None, 0.7)] for name in "ab")
    fresh = transformer()
    fit(fresh, CPU, second)
    wanted = fresh(**inputs())[0]
    module = transformer()
    fit(module, CPU, first)
    lora.set_strength(module, 0.5)
    assert not torch.equal(module(**inputs())[0], wanted)
    exchange(module, second)
    assert torch.equal(module(**inputs())[0], wanted)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in fresh.named_modules()]
    exchange(module, [])
    assert torch.equal(module(**inputs())[0], plain_of_fit())
    assert not any("lora" in name for name, _ in module.named_modules())


def test_a_few_step_lora_lies_under_everything_and_sets_steps_and_guidance(tmp_path: Path) -> None:
    write(tmp_path / "fast.safetensors", ["blocks.1.ffn.2"], 2, 2.0, 0)
    own = ["recipe=demo_anime", f"sampler.fast_lora={tmp_path / 'fast.safetensors'}=0.5"]
    config = load([*own, "sampler.num_steps=null", "sampler.guidance=null"])
    recipe = open_sampling(config)
    assert recipe.base.each()[0].merged == [(tmp_path / "fast.safetensors", 0.5)]
    assert recipe.config == config, "what a video says of itself is what was asked for"
    settings = sampler_settings(recipe)
    assert (settings.num_steps, settings.guidance) == (4, (1.0, 1.0))
    asked = sampler_settings(open_sampling(load([*own, "sampler.num_steps=6", "sampler.guidance=2"])))
    assert (asked.num_steps, asked.guidance) == (6, (2.0, 2.0))
    plain = sampler_settings(open_sampling(load(["recipe=demo_anime", "sampler.num_steps=null"])))
    assert plain.num_steps == recipe.variant.num_steps
