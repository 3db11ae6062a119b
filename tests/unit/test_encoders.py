"""The encoders under a budget: a byte a weight, texts first, and the largest of them let go before the next."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from transformers import UMT5Config, UMT5EncoderModel

from tests.conftest import arguments_for, opened
from tests.tiny_tasks import write_a14b, write_checkpoint
from wantrain import cli
from wantrain.config import load
from wantrain.data.cache import LATENTS, TEXT, missing
from wantrain.models import base, conditioning, encode, loading, sampling
from wantrain.models.loading import empty_weights
from wantrain.models.quantised import QuantisedLinear, quantise, relative_errors
from wantrain.models.sizes import UMT5_XXL
from wantrain.models.variants import VARIANTS
from wantrain.recipe import samples
from wantrain.recipe.clips import conditioning_of
from wantrain.recipe.recipe import open_recipe
from wantrain.recipe.sampler import load_pipeline, sampled

CPU = torch.device("cpu")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {})
CAPTIONS = ("sqstyle, square number 1", "a red tower at night, seen from a boat")


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_quantised_text_encoder_answers_nearly_as_the_whole(form: str, bound: float) -> None:
    whole, stored = TINY.text(torch.float32, CPU), TINY.text(torch.float32, CPU, form)
    linears = {name for name, m in whole.text_encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {name for name, m in stored.text_encoder.named_modules() if isinstance(m, QuantisedLinear)}
    assert found == linears
    assert all(name.startswith("encoder.block.") for name in found)
    assert all(0.001 < error < 0.04 for error in relative_errors(stored.text_encoder).values())
    for caption in CAPTIONS:
        want, got = encode.encode_text(whole, caption), encode.encode_text(stored, caption)
        assert want.shape == got.shape
        assert 1e-4 < float((got - want).norm() / want.norm()) < bound


def test_umt5_fits_a_small_card_in_a_byte_a_weight() -> None:
    """10.6 GiB in bfloat16, 6.3 with the Linears of its blocks in a byte (docs/memory.md)."""
    with empty_weights():
        whole = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
        in_bfloat16 = sum(2 * p.numel() for p in whole.parameters()) / 2**30
        quantise(whole, "int8")
    stored = {id(m.weight) for m in whole.modules() if isinstance(m, QuantisedLinear)}
    size = sum((1 if id(p) in stored else 2) * p.numel() for p in whole.parameters()) / 2**30
    assert in_bfloat16 == pytest.approx(10.58, abs=0.01)
    assert size == pytest.approx(6.27, abs=0.01)


def test_the_text_encoder_is_let_go_once_all_texts_are_written(arguments, tmp_path: Path, monkeypatch) -> None:
    recipe, clips = opened([*arguments, f"data.cache_dir={tmp_path / 'cache'}"])
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = base.Base.text

    def text(*given: object) -> WanPipeline:
        made = load(*given)
        loaded.append(weakref.ref(made.text_encoder))
        return made

    monkeypatch.setattr(base.Base, "text", text)
    gc.disable()  # it must be let go, not found by chance
    try:
        for _ in range(2):  # the second time nothing is missing, and nothing is loaded
            samples.write_texts(recipe, clips.cache, clips.captions[:2], CPU, True)
            assert [one() for one in loaded] == [None]
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["cache", "train"])
def test_the_text_encoder_is_gone_before_the_vae_is_loaded(arguments, tmp_path: Path, monkeypatch, verb: str) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []
    load_text, load_vae = base.Base.text, base.Base.vae

    def text(*given: object) -> WanPipeline:
        made = load_text(*given)
        loaded.append(weakref.ref(made.text_encoder))
        return made

    def vae(*given: object) -> torch.nn.Module:
        alive.append(sum(one() is not None for one in loaded))
        return load_vae(*given)

    monkeypatch.setattr(base.Base, "text", text)
    monkeypatch.setattr(base.Base, "vae", vae)
    gc.disable()  # it must be let go, not found by chance
    try:
        assert cli.main([verb, *arguments, f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1",
                         *["data.mode=stream", "train.num_steps=1"] * (verb == "train")]) == 0
    finally:
        gc.enable()
    assert len(loaded) == 1
    assert alive == [0]


def test_streaming_writes_every_text_and_nothing_else_and_claims_them(arguments, tmp_path: Path, monkeypatch) -> None:
    own = [*arguments, f"data.cache_dir={tmp_path / 'cache'}"]
    recipe, clips = opened(own)
    asked: list[str] = []
    real = encode.encode_text
    monkeypatch.setattr(encode, "encode_text", lambda text, caption: asked.append(caption) or real(text, caption))
    for process in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", process)
        samples.prepare_texts(recipe, clips, CPU)
    captions = list(dict.fromkeys(clips.captions))
    assert sorted(asked) == sorted([*captions, "a square"])  # the second process finds all done; a prompt to sample
    assert asked[0] != captions[0]  # and the last of them begins elsewhere
    assert {kind for kind, _ in missing(clips.entries).values()} == {LATENTS}
    assert clips.cache.read((TEXT, captions[0]))["x"].shape[1] == 128
    assert len(list((tmp_path / "cache" / "used_by").glob("*.json"))) == 1


def test_a_form_changes_the_address_of_what_it_changes_and_no_other(arguments) -> None:
    _, clips = opened(arguments)
    window, caption = clips.planned[0], clips.captions[1]
    entries = ((LATENTS, window), (TEXT, caption))

    def paths(*more: str) -> tuple[Path, ...]:
        return tuple(opened([*arguments, *more])[1].cache.path_of(entry) for entry in entries)

    plain = paths()
    assert paths("memory.gib=12") == plain  # tiles give the same numbers
    both = {form: paths(f"memory.encoders={form}", f"memory.vae={dtype}")
            for form, dtype in (("fp8", "bfloat16"), ("dtype", "float16"), ("int8", "float32"))}
    assert both["dtype"][1] == plain[1]
    assert both["int8"][0] == plain[0]
    assert len({plain[1], both["int8"][1], both["fp8"][1]}) == 3
    assert len({plain[0], both["dtype"][0], both["fp8"][0]}) == 3


def test_the_image_encoders_form_is_in_the_address_of_conditions(tmp_path: Path) -> None:
    found = base.find(VARIANTS["tiny_wan_i2v"], str(write_checkpoint(tmp_path / "checkpoint", "tiny_wan_i2v")), {})
    plain, stored = (conditioning_of(found, tmp_path / "memo", form).digest for form in ("", "fp8"))
    assert plain != stored
    tower, quantised = found.image_encoder(torch.float32, CPU), found.image_encoder(torch.float32, CPU, "int8")
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    want, got = (one(pixels, output_hidden_states=True).hidden_states[-2] for one in (tower, quantised))
    assert 1e-5 < float((got - want).norm() / want.norm()) < 0.05


def test_what_a_device_can_take(monkeypatch) -> None:
    assert loading.free_bytes(CPU) == float("inf")
    assert loading.free_bytes(CPU, 2.0) == 2 * 2**30
    for name, value in {"mem_get_info": (10 * 2**30, 24 * 2**30), "memory_allocated": 5 * 2**30,
                        "memory_reserved": 8 * 2**30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    card = torch.device("cuda")  # 24 GiB, 6 of them another process's; of our 8, 3 can be used again
    assert loading.free_bytes(card) == loading.ROOM * 13 * 2**30
    assert loading.free_bytes(card, 12.0) == (loading.ROOM * 12 - 5) * 2**30
    assert loading.free_bytes(card, 24.0) == loading.ROOM * 13 * 2**30


class Waiting(torch.nn.Linear):
    """A transformer that notes where it is sent."""

    def __init__(self, name: str, sent: list[str]) -> None:
        super().__init__(1, 1)
        self.name, self.sent = name, sent

    def to(self, *given: object, **named: object) -> Waiting:
        self.sent.append(f"{self.name} {given[0]}")
        return self


def test_the_expert_that_does_not_work_makes_room_first() -> None:
    sent: list[str] = []
    pair = [Waiting("high", sent), Waiting("low", sent)]
    encoders = conditioning.Encoders(TINY.vae(CPU), None)
    pipeline = sampling.Pipeline(VARIANTS["tiny_wan_a14b"], pair, encode.Texts(lambda: None), encoders, torch.float32)
    pipeline.put_to_work(pair[0])
    assert sent == []  # there is room for both
    pipeline = replace(pipeline, in_turn=True, encoders=replace(encoders, vae=SimpleNamespace(device="meta")))
    for timestep in (999.0, 100.0):
        transformer, _ = pipeline.at(timestep)
        pipeline.put_to_work(transformer)
    assert sent == ["low cpu", "high meta", "high cpu", "low meta"]


def test_texts_are_encoded_together_by_an_encoder_that_is_gone_afterwards() -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def load() -> WanPipeline:
        made = TINY.text(torch.float32, CPU)
        loaded.append(weakref.ref(made.text_encoder))
        return made

    texts = encode.Texts(load)
    gc.disable()
    try:
        texts.prepare([*CAPTIONS, CAPTIONS[0]])
        assert [one() for one in loaded] == [None]
    finally:
        gc.enable()
    whole = TINY.text(torch.float32, CPU)
    assert all(torch.equal(texts(caption), encode.encode_text(whole, caption)) for caption in CAPTIONS)
    assert len(loaded) == 1
    assert texts("one that nobody announced").shape[1] == 128
    assert len(loaded) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("gib", "in_turn"), [(1e-6, True), (16.0, False)])
def test_two_experts_within_a_budget_sample_the_same(clips, cache_dir, tmp_path: Path, gib, in_turn) -> None:
    own = [*arguments_for(clips, cache_dir, tmp_path / "run"), "model.variant=tiny_wan_a14b",
           f"model.path={write_a14b(tmp_path / 'a14b')}"]
    found = []
    for more in ([], [f"memory.gib={gib}"]):
        recipe = open_recipe(load([*own, *more]))
        pipeline = load_pipeline(recipe, {}, ["a square"])
        found.append(sampled(recipe, pipeline, "a square", seed=0, strength=0.0, inputs=sampling.Inputs()))
    assert pipeline.in_turn is in_turn
    assert (found[0].int() - found[1].int()).abs().max() <= 1  # decoded in tiles where the budget is small
