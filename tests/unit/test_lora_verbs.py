"""LoRAs as people have them: every verb and key takes them rightly, or says what is wrong and what really helps."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file

from tests import tiny_models as tiny
from wantrain import cli, lora
from wantrain.models import base, lora_formats
from wantrain.models.detection import expert_named
from wantrain.models.fit import AdapterFile, fit
from wantrain.models.lora_names import is_lora, lora_argument
from wantrain.models.lora_updates import adapter_for, product_delta, product_norm, read_given
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.terms import UserError

Tensors = dict[str, torch.Tensor]
TRANSFORMER = base.EMBEDDED / "transformer"
CASES = Path(__file__).parents[3] / "shared" / "cases" / "lora"
CPU = torch.device("cpu")
Q = "diffusion_model.blocks.0.self_attn.q"


@cache
def _frozen() -> torch.nn.Module:
    return base.find(VARIANTS["tiny_wan"], "embedded", {}).transformer(torch.float32, CPU)


def tiny_wan() -> torch.nn.Module:
    return copy.deepcopy(_frozen())


def weights() -> Tensors:
    return {name: tensor.float() for name, tensor in load_file(next(TRANSFORMER.glob("*.safetensors"))).items()}


def random(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


A, B = random(4, 192), random(192, 4)
PLAIN = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


def saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def merged(folder: Path, *words: object, out: str = "merged.safetensors") -> Tensors:
    """What `merge` makes of the tiny base, float32, in official names."""
    assert cli.main(["merge", str(TRANSFORMER), *map(str, words), str(folder / out), "dtype=float32"]) == 0
    return load_file(folder / out)


def sample_with(path: Path) -> torch.nn.Module:
    transformer = tiny_wan()
    fit(transformer, CPU, [AdapterFile(path)])
    return transformer


def start_from(path: Path, kind: str = "lora", rank: int = 8) -> None:
    transformer = tiny_wan()
    given = adapter_for(read_given(path), transformer)
    lora.inject(transformer, ["all_linear"], lora.Spec(rank, rank, kind), 0)
    lora.start_from(transformer, given)


def with_merge(path: Path) -> torch.nn.Module:
    return base.find(VARIANTS["tiny_wan"], "embedded", {}, [str(path)]).transformer(torch.float32, CPU)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one message with which a verb refuses."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    return said


# The cases, made here.

def test_a_bias_of_b_is_scaled_and_added_to_the_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias, stem = random(192), "transformer.blocks.0.attn1.to_q"
    note = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2.0})}
    path = saved(tmp_path / "d.safetensors", {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B,
                                              f"{stem}.lora_B.bias": bias}, note)
    done, own = merged(tmp_path, path), weights()
    torch.testing.assert_close(done["blocks.0.self_attn.q.bias"], own["blocks.0.attn1.to_q.bias"] + 0.5 * bias)
    torch.testing.assert_close(done["blocks.0.self_attn.q.weight"], own["blocks.0.attn1.to_q.weight"] + 0.5 * B @ A)
    said = refused(capsys, "convert", path, tmp_path / "u.safetensors")
    assert "choose a format that can: comfy_updown" in said
    assert cli.main(["convert", str(path), str(tmp_path / "c.safetensors"), "format=comfy_updown"]) == 0
    torch.testing.assert_close(load_file(tmp_path / "c.safetensors")[f"{Q}.diff_b"], 0.5 * bias)
    for call in (sample_with, start_from):
        with pytest.raises(UserError, match="holds more than an adapter") as caught:
            call(path)
        assert f'model.merge=["{path}"]' in caught.value.next_step
    assert torch.equal(with_merge(path).blocks[0].attn1.to_q.bias, done["blocks.0.self_attn.q.bias"])


LOKR = {"lokr_w1": random(8, 8), "lokr_w2": random(24, 24), "alpha": torch.tensor(1e10)}


def test_several_kinds_in_one_file_are_merged_and_elsewhere_that_is_said(tmp_path: Path) -> None:
    mixed = PLAIN | {f"diffusion_model.blocks.1.self_attn.q.{leaf}": t for leaf, t in LOKR.items()}
    path = saved(tmp_path / "mixed.safetensors", mixed)
    change = torch.kron(LOKR["lokr_w1"], LOKR["lokr_w2"])
    torch.testing.assert_close(merged(tmp_path, path)["blocks.1.self_attn.q.weight"],
                               weights()["blocks.1.attn1.to_q.weight"] + change)
    for call in (sample_with, start_from):
        with pytest.raises(UserError, match=r"several kinds of adapter: LoRA .* LoKr") as caught:
            call(path)
        assert f'model.merge=["{path}"]' in caught.value.next_step
    factors = {f"{Q}.{leaf}": t for leaf, t in LOKR.items() if leaf != "alpha"}
    both = saved(tmp_path / "both.safetensors", PLAIN | factors)
    with pytest.raises(UserError, match="LoKr with LoRA"):
        sample_with(both)


def test_a_lokr_of_two_whole_factors_that_peft_would_cut_otherwise(tmp_path: Path) -> None:
    path = saved(tmp_path / "lokr.safetensors", {f"{Q}.{leaf}": t for leaf, t in LOKR.items()})
    with pytest.raises(UserError, match=r"lokr_w1: \[8, 8\] does not fit") as caught:
        sample_with(path)
    assert "model.merge=" in caught.value.next_step
    with pytest.raises(UserError, match=r"does not fit|holds lokr_w1") as caught:
        start_from(path, "lokr", 96)
    assert "model.merge" in caught.value.next_step
    assert "set lora.rank" not in caught.value.next_step
    assert not torch.equal(with_merge(path).blocks[0].attn1.to_q.weight, _frozen().blocks[0].attn1.to_q.weight)


@pytest.mark.parametrize("buffer", [torch.tensor(12), torch.tensor([3], dtype=torch.int32), torch.tensor(True)])
def test_a_buffer_that_is_no_weight_is_ignored_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                       buffer: torch.Tensor) -> None:
    stem = "lora_unet_blocks_0_self_attn_q"
    path = saved(tmp_path / "k.safetensors", {"lokr_factor": buffer, f"{stem}.alpha": torch.tensor(4),
                                              f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B})
    assert cli.main(["inspect", str(path)]) == 0
    assert "ignored   lokr_factor" in capsys.readouterr().out
    sample_with(path)
    with pytest.raises(UserError, match=r"stored as torch\.int32"):
        read_given(saved(tmp_path / "i.safetensors", PLAIN | {f"{Q}.lora_A.weight": A.to(torch.int32)}))


def test_what_overflows_float16_is_refused_and_what_was_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                    ) -> None:
    path = saved(tmp_path / "loud.safetensors", PLAIN | {f"{Q}.lora_B.weight": 1e6 * B})
    merged(tmp_path, saved(tmp_path / "calm.safetensors", PLAIN))
    before = (tmp_path / "merged.safetensors").read_bytes()
    said = refused(capsys, "merge", TRANSFORMER, path, tmp_path / "merged.safetensors", "dtype=float16")
    assert "not finite in torch.float16" in said
    assert "bfloat16" in said
    assert (tmp_path / "merged.safetensors").read_bytes() == before
    said = refused(capsys, "merge", TRANSFORMER, path, tmp_path / "folder", "dtype=float16", "layout=diffusers")
    assert not (tmp_path / "folder" / "config.json").exists()
    loud = saved(tmp_path / "louder.safetensors", PLAIN | {f"{Q}.lora_B.weight": 1e9 * B})
    said = refused(capsys, "convert", loud, tmp_path / "c.safetensors", "dtype=float16")
    assert "not finite in" in said
    assert not (tmp_path / "c.safetensors").exists()


IMAGE = {"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": A,
         "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": B,
         "diffusion_model.blocks.0.cross_attn.k_img.diff_b": random(192),
         "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": random(192),
         "diffusion_model.img_emb.proj.1.diff": random(32, 32)}


def test_image_parts_are_left_out_where_the_base_has_no_image_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                     ) -> None:
    plain = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for name, t in PLAIN.items()}
    path = saved(tmp_path / "distill.safetensors", plain | IMAGE)
    done = merged(tmp_path, path)
    assert "left out its 4 parts for CLIP image tokens" in capsys.readouterr().out
    alone = merged(tmp_path, saved(tmp_path / "alone.safetensors", plain), out="alone_merged.safetensors")
    assert done.keys() == alone.keys()
    assert all(torch.equal(done[name], alone[name]) for name in done)
    assert torch.equal(sample_with(path).blocks[0].attn1.to_q.lora_A["default"].weight, A)
    assert capsys.readouterr().out.count("left out") == 1
    only = saved(tmp_path / "only.safetensors", IMAGE)
    assert "is not in the base" in refused(capsys, "merge", TRANSFORMER, only, tmp_path / "o.safetensors")


ANSWERS = {
    "json": (b'{"error":"The creator of this asset requires you to be logged in to download it"}', "is JSON"),
    "json, 8 bytes before a brace": (b'{"data":{"error": "log in"}}', "is JSON"),
    "json list": (b'[{"error": 1}]', "is JSON"),
    "page": (b"\xef\xbb\xbf\n<!doctype html><title>Sign in</title>", "a web page"),
    "text": (b"Access denied\n", "is text"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "pt", "pth", "ckpt", "bin"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_page_or_json_is_named_as_that_with_its_first_words(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                              answer: str, suffix: str) -> None:
    content, said = ANSWERS[answer]
    (tmp_path / f"x.{suffix}").write_bytes(content)
    shown = refused(capsys, "inspect", tmp_path / f"x.{suffix}")
    assert said in shown
    assert content.decode("utf-8-sig").split()[0].strip("{[")[:8] in shown


@pytest.mark.parametrize("name", ["epoch=1-step=500.ckpt", "style=final.safetensors", "x.safetensors=3"])
def test_a_file_that_exists_is_a_file_in_every_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name.endswith("ckpt"):
        torch.save(PLAIN, name)
    else:
        saved(Path("plain.safetensors"), PLAIN).rename(name)
    assert lora_argument(name) == (Path(name), 1.0)
    assert lora_argument(f"{name}=0.5") == (Path(name), 0.5)
    if name.endswith("=3"):  # a file that no verb reads, for its suffix
        return
    assert cli.main(["inspect", name]) == 0
    assert cli.main(["convert", name, "out=1.safetensors"]) == 0
    half = merged(tmp_path, f"{name}=0.5", out="half=1.safetensors")
    whole = merged(tmp_path, name, out="whole=2.safetensors")
    key, own = "blocks.0.self_attn.q.weight", weights()["blocks.0.attn1.to_q.weight"]
    torch.testing.assert_close(2 * (half[key] - own), whole[key] - own, rtol=1e-3, atol=1e-6)
    for call in (sample_with, start_from, with_merge):
        call(Path(name))


@pytest.mark.parametrize(("word", "said"), [
    ("x.safetensors=loud", "strength 'loud' is not a number"), ("x.safetensors=nan", "no finite number"),
    ("gone=0.5", "gone does not exist"),
])
def test_strengths_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("x.safetensors"), PLAIN)
    with pytest.raises(UserError, match=said):
        lora_argument(word)


# Which expert.

@pytest.mark.parametrize(("path", "expert"), [
    ("style_high_noise.safetensors", "high"), ("Wan2.2-HighNoise-V2.safetensors", "high"),
    ("StyleLowNoise_v1.pt", "low"), ("wan_low_000002500.safetensors", "low"),
    ("low_noise_model/diffusion_pytorch_model.safetensors", "low"), ("low/style.safetensors", "low"),
    ("style-high-v2-e20.safetensors", "high"), ("style_HIGH.safetensors", "high"),
    ("x/transformer_2/a.safetensors", "low"), ("high/style_low_noise.safetensors", "low"),
    ("low_poly.safetensors", None), ("highres_fix.safetensors", None), ("follow.safetensors", None),
    ("high_quality_style.safetensors", None), ("style.safetensors", None), ("high_noise-low_noise.safetensors", None),
])
def test_names_say_the_expert(path: str, expert: str | None) -> None:
    assert expert_named(Path("/models") / path) == expert


def test_of_two_transformers_the_plain_one_is_high(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    assert expert_named(tmp_path / "transformer") is None
    (tmp_path / "transformer_2").mkdir()
    assert expert_named(tmp_path / "transformer") == "high"


@pytest.mark.parametrize(("name", "metadata"), [
    ("style_high_noise.safetensors", {}), ("HighNoise/style.safetensors", {}),
    ("style.safetensors", {"wantrain.expert": "high"}),
    ("style.safetensors", {"ss_output_name": "style_high_noise"}),
    ("style_low_noise.safetensors", {"wantrain.expert": "high"}),
])
def test_the_other_experts_lora_is_told_wherever_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                              name: str, metadata: dict[str, str]) -> None:
    path = saved(tmp_path / name, PLAIN, metadata)
    assert read_given(path, "high").pairs
    assert read_given(path).pairs
    with pytest.raises(UserError, match=r"given to the low noise expert, but its .* high noise expert's"):
        read_given(path, "low")  # lora.start_from and sampler.loras
    with pytest.raises(UserError, match="given to the low noise expert"):
        base.find(VARIANTS["tiny_wan_a14b"], None, dict.fromkeys(("high", "low", "vae", "text_encoder", "tokenizer"),
                                                                 str(tmp_path)), [str(path)])
    shutil.copytree(TRANSFORMER, tmp_path / "base_low_noise")
    assert "given to the low noise expert" in refused(capsys, "merge", tmp_path / "base_low_noise", path,
                                                      tmp_path / "out.safetensors")
    assert cli.main(["inspect", str(path)]) == 0
    assert "expert    high noise" in capsys.readouterr().out


def test_exchanged_parts_are_told_by_folder_too(tmp_path: Path) -> None:
    twin = tiny.official_transformer(tiny.transformer("t2v"))
    paths = {word: tmp_path / f"{word}_noise_model" for word in ("high", "low")}
    for path in paths.values():
        saved(path / "diffusion_pytorch_model.safetensors", twin)
    for given, word in (("high", "low"), ("low", "high")):
        part = base.Base(VARIANTS["tiny_wan_a14b"], {"transformer": paths[word]}, expert=given)
        with pytest.raises(UserError, match=f"is named as the {word} noise expert") as caught:
            part.detected()
        assert "exchange model.parts" in caught.value.next_step


def test_both_experts_in_one_file_each_takes_its_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "both.safetensors", {
        f"diffusion_model.transformer_{n}.blocks.0.self_attn.q.lora_{x}.weight": t * n for n in (1, 2)
        for x, t in (("A", A), ("B", B))})
    assert "expert=high" in refused(capsys, "inspect", path)
    assert cli.main(["convert", str(path), str(tmp_path / "l.safetensors"), "expert=low"]) == 0
    assert torch.equal(load_file(tmp_path / "l.safetensors")[f"{Q}.lora_A.weight"], 2 * A)
    assert torch.equal(read_given(path, "low").pairs["blocks.0.self_attn.q"].a, 2 * A)
    one = saved(tmp_path / "one.safetensors", {name: t for name, t in load_file(path).items() if "_2." in name})
    assert torch.equal(read_given(one).pairs["blocks.0.self_attn.q"].a, 2 * A)
    with pytest.raises(UserError, match="holds no LoRA for the high noise expert"):
        read_given(one, "high")


# Zeros, bases, DoRA.

@pytest.mark.parametrize("tensors", [
    PLAIN | {f"{Q}.lora_B.weight": torch.zeros(192, 4)}, {f"{Q}.diff": torch.zeros(192, 192)},
    {f"{Q}.lokr_w1": torch.zeros(8, 8), f"{Q}.lokr_w2": random(24, 24)},
])
def test_a_lora_of_zeros_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: Tensors
                                           ) -> None:
    path = saved(tmp_path / "zero.safetensors", tensors)
    assert cli.main(["inspect", str(path)]) == 0
    assert "a LoRA of zeros" in capsys.readouterr().out
    assert "a LoRA of zeros" in refused(capsys, "merge", TRANSFORMER, path, tmp_path / "m.safetensors")
    for call in (sample_with, start_from, with_merge):
        with pytest.raises(UserError, match="a LoRA of zeros"):
            call(path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_base_is_no_lora_whatever_its_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: str) -> None:
    twin = tiny.official_transformer(tiny.transformer("t2v"))
    path = saved(tmp_path / "base.safetensors", {prefix + name: tensor for name, tensor in twin.items()})
    assert not is_lora(prefix + name for name in twin)
    assert cli.main(["inspect", str(path)]) == 0
    assert "tensors   " in capsys.readouterr().out
    said = refused(capsys, "convert", path, tmp_path / "x.safetensors")
    assert "is no tensor of a LoRA" in said
    assert "a base goes to model.path" in said


def test_a_lora_or_a_vae_is_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "lora.safetensors", PLAIN)
    out = tmp_path / "o.safetensors"
    assert "is a LoRA, and a transformer is asked for" in refused(capsys, "merge", path, TRANSFORMER, out)
    vae, = (base.EMBEDDED / "vae").glob("*.safetensors")
    assert "not a name of" in refused(capsys, "merge", vae, path, out)
    assert "is a LoRA" in refused(capsys, "extract", path, TRANSFORMER, out)


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_dora_of_lycoris_is_converted_with_the_same_numbers(tmp_path: Path, format: str) -> None:
    magnitude = random(192).abs() + 1
    more = {f"{Q}.dora_scale": magnitude[:, None], f"{Q}.alpha": torch.tensor(2.0)}
    path = saved(tmp_path / "dora.safetensors", PLAIN | more)
    out = tmp_path / ("folder" if format == "peft" else "d.safetensors")
    assert cli.main(["convert", str(path), str(out), f"format={format}"]) == 0
    read = lora_formats.read_lora(out)
    assert torch.equal(read.extras["blocks.0.self_attn.q.lora_magnitude_vector"], magnitude)
    assert torch.equal(read.pairs["blocks.0.self_attn.q"].a, A)
    turned = weights()["blocks.0.attn1.to_q.weight"] + 0.5 * B @ A
    torch.testing.assert_close(merged(tmp_path, path)["blocks.0.self_attn.q.weight"],
                               magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("names", [
    ("lokr_w1", "lokr_w2"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2"), ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
])
def test_the_norm_of_a_product_is_that_of_its_delta(names: tuple[str, ...]) -> None:
    sizes = {"lokr_w1": (8, 6), "lokr_w2": (24, 5), "lokr_w1_a": (8, 3), "lokr_w1_b": (3, 6), "lokr_w2_a": (24, 3),
             "lokr_w2_b": (3, 5), "hada_w1_a": (150, 3), "hada_w1_b": (3, 40), "hada_w2_a": (150, 2),
             "hada_w2_b": (2, 40)}
    leaves = {name: random(*sizes[name]) for name in names} | {"alpha": torch.tensor(2.0)}
    assert product_norm(leaves) == pytest.approx(float(product_delta(leaves).norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 192), (192,), (192, 192), (4, 1)])
def test_a_dora_of_another_kind_is_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path / "dora.safetensors", PLAIN | {f"{Q}.dora_scale": random(*shape)})
    with pytest.raises(UserError, match=r"q\.dora_scale is \[.*one magnitude|q\.dora_scale is \[.*a magnitude"):
        lora_formats.read_lora(path)


def test_vace_blocks_may_attach_anywhere_if_the_config_says_where(tmp_path: Path) -> None:
    variant = VARIANTS["tiny_wan_vace"]
    layers = [0]  # of two blocks, where the table's have both
    twin = WanVACETransformer3DModel(**diffusers_config(variant) | {"vace_layers": layers})
    path = saved(tmp_path / "diffusion_pytorch_model.safetensors", tiny.official_transformer(twin)).parent
    part = base.Base(variant, {"transformer": path})
    with pytest.raises(UserError, match="no known variant"):
        part.detected()
    for stated in ([1], [0, 1], "0", [0, 0]):
        (path / "config.json").write_text(json.dumps({"model_type": "vace", "vace_layers": stated}))
        with pytest.raises(UserError, match="vace_layers"):
            part.detected()
    (path / "config.json").write_text(json.dumps({"model_type": "vace", "vace_layers": layers}))
    assert cli.main(["inspect", str(path)]) == 0
    assert "tiny_wan_vace" in part.detected()
    module = part.transformer(torch.float32, CPU)
    assert list(module.config.vace_layers) == layers
    assert torch.equal(module.vace_blocks[0].proj_out.weight, twin.vace_blocks[0].proj_out.weight)


# What merge, convert and extract write.

def test_nothing_is_written_over_what_is_read_or_is_of_another_sort(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = (saved(tmp_path / f"{x}.safetensors", PLAIN) for x in "ab")
    shutil.copy(next(TRANSFORMER.glob("*.safetensors")), "base.safetensors")
    (tmp_path / "link.safetensors").symlink_to("base.safetensors")
    os.link("base.safetensors", "hard.safetensors")
    (tmp_path / "notes.safetensors").write_text("not to be lost")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for words, said in (
        (["merge", TRANSFORMER, a, b], "exists and is no transformer, but a LoRA"),  # OUT is forgotten
        (["merge", "base.safetensors", a, "link.safetensors"], "is also read"),
        (["merge", "base.safetensors", a, "hard.safetensors"], "is also read"),
        (["merge", "base.safetensors", a, "./../" + tmp_path.name + "/base.safetensors"], "is also read"),
        (["merge", "base.safetensors", a, "notes.safetensors"], "exists and is no transformer"),
        (["merge", "base.safetensors", a, tmp_path, "layout=diffusers"], "holds other weights"),
        (["merge", "base.safetensors", a, b, "a.ckpt"], "does not end in .safetensors"),
        (["convert", a, a], "is also read"), (["convert", a, "base.safetensors"], "is no LoRA, but a transformer"),
        (["convert", a, "notes.safetensors"], "is no LoRA, but a file of another sort"),
        (["convert", a, "x.pth"], "does not end in .safetensors"), (["convert", a, tmp_path], "is a folder"),
        (["convert", a, "y.safetensors", "format=peft"], "a folder is to be written"),
        (["convert", a, b, "format=peft"], "is a file, and a folder"),
        (["convert", a, "/proc/x.safetensors"], "/proc/x.safetensors cannot be written"),
        (["convert", a, "b.safetensors/x.safetensors"], "cannot be written"),
        (["extract", "base.safetensors", TRANSFORMER, a], "hold the same weights"),
        (["extract", "base.safetensors", TRANSFORMER, "hard.safetensors"], "is also read"),
    ):
        assert said in refused(capsys, *words), words
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli.main(["convert", "a.safetensors", "b.safetensors", "format=kohya"]) == 0  # a LoRA over a LoRA


def test_a_run_or_a_checkpoint_is_named_with_the_command_that_exports(tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    saved(run / "checkpoints" / "step_000004" / "training.safetensors", {"value.x": torch.ones(2)})
    (run / "checkpoints" / "step_000004" / "state.json").write_text("{}")
    (run / "logs").mkdir()
    (run / "logs" / "process_0.log").write_text("--- 2026 host pid 1: wantrain train recipe=mine lora.rank=4\nloss\n")
    places = (run, run / "checkpoints", run / "checkpoints" / "step_000004",
              run / "checkpoints" / "step_000004" / "training.safetensors")
    for place in places:
        assert "wantrain export recipe=mine lora.rank=4" in refused(capsys, "inspect", place)
        for call in (sample_with, start_from):
            with pytest.raises(UserError, match="is a run or its checkpoint") as caught:
                call(place)
            assert "wantrain export recipe=mine lora.rank=4" in caught.value.next_step
    exported = saved(run / "export" / "mine.safetensors", PLAIN)
    for place in places:
        assert f"name its export: '{exported}'" in refused(capsys, "convert", place, tmp_path / "x.safetensors")


def test_no_remedy_sends_a_user_in_circles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {name.replace("diffusion_model", "my_model"): tensor for name, tensor in PLAIN.items()}
    path = saved(tmp_path / "own.safetensors", own)
    said = refused(capsys, "inspect", path)
    assert "download" not in said
    assert "names must begin with one of base_model.model., diffusion_model." in said


# Hostile files.

def header(text: str, size: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text.encode() + data


def entry(shape: str = "[4]", dtype: str = "F32", begin: int = 0, end: int = 16) -> str:
    return f'"{Q}.diff":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


HOSTILE: dict[str, bytes | Callable[[Path], object]] = {
    "empty": b"", "seven bytes": b"\0" * 7, "header of 2e18": header("{}", 2 * 10**18),
    "header longer than the file": header("{" + entry() + "}", 5000), "no JSON": header("{nothing}"),
    "offsets outside": header("{" + entry(begin=1000, end=1016) + "}", data=bytes(16)),
    "overlapping": header("{" + entry() + ',"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}', data=bytes(24)),
    "negative shape": header("{" + entry("[-4]") + "}", data=bytes(16)),
    "huge shape": header("{" + entry("[4611686018427387904, 4]") + "}", data=bytes(16)),
    "end before begin": header("{" + entry(begin=16, end=0) + "}", data=bytes(16)),
    "unknown dtype": header("{" + entry(dtype="F7") + "}", data=bytes(16)),
    "fp4": header("{" + entry("[32]", "F4") + "}", data=bytes(16)),
    "nothing in it": header("{}"), "empty tensor": header("{" + entry("[0]", end=0) + "}"),
    "deep metadata": header('{"__metadata__":{"lora_adapter_metadata":"' + "[" * 100_000 + '"},' + entry().replace(
        "diffusion_model.blocks.0.self_attn.q.diff", "transformer.blocks.0.attn1.to_q.lora_A.weight").replace(
        "[4]", "[1,4]") + "}", data=bytes(16)),
    "a folder": Path.mkdir, "a pipe": os.mkfifo,
    "many blocks": lambda path: saved(path, {"blocks.99999999999.x": A, "head.modulation": A, "patch_embedding.weight":
                                             torch.ones(1, 1, 1, 1, 1)}),
    "rank of nothing": lambda path: saved(path, {f"{Q}.lora_A.weight": torch.ones(0, 192),
                                                 f"{Q}.lora_B.weight": torch.ones(192, 0)}),
    "alpha of two": lambda path: saved(path, PLAIN | {f"{Q}.alpha": torch.ones(2)}),
    "an update of 4 TB": lambda path: saved(path, {f"{Q}.lora_A.weight": torch.ones(1, 10**6),
                                                   f"{Q}.lora_B.weight": torch.ones(10**6, 1)}),
    "a product of 4 TB": lambda path: saved(path, {f"{Q}.lokr_w1": torch.ones(1000, 1000),
                                                   f"{Q}.lokr_w2": torch.ones(1000, 1000)}),
    "factors of one axis": lambda path: saved(path, {f"{Q}.lokr_w1": torch.ones(8), f"{Q}.lokr_w2": torch.ones(24)}),
    "a pattern for ever": lambda path: saved(
        path, {f"transformer.blocks.0.attn1.to_q.lora_{x}.weight": t for x, t in (("A", A), ("B", B))},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.alpha_pattern": {"(b+)+(.*)*$": 1}})}),
    "alpha of words": lambda path: saved(
        path, {f"transformer.blocks.0.attn1.to_q.lora_{x}.weight": t for x, t in (("A", A), ("B", B))},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "much"})}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_message_in_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
                                                      ) -> None:
    what, path = HOSTILE[name], tmp_path / "x.safetensors"
    path.write_bytes(what) if isinstance(what, bytes) else what(path)
    out = tmp_path / "o.safetensors"
    for words in (["inspect", path], ["convert", path, out], ["merge", TRANSFORMER, path, out],
                  ["merge", path, path, out], ["extract", path, TRANSFORMER, out]):
        said = refused(capsys, *words)
        assert "next: " in said
        assert "download it again" not in said
    for call in (sample_with, start_from, with_merge):
        with pytest.raises(UserError):
            call(path)
    assert not (tmp_path / "o.safetensors").exists()


def _gguf_array(kind: int, length: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, length)


HOSTILE_OTHERS: dict[str, Callable[[Path], object]] = {
    "endless.gguf": lambda path: path.write_bytes(_gguf_array(0, 1 << 60) + bytes(1000)),
    "nested.gguf": lambda path: path.write_bytes(_gguf_array(9, 1) + struct.pack("<IQ", 9, 1) * 5000),
    "counted.gguf": lambda path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(100)),
    "stretched.pt": lambda path: torch.save({"w": torch.ones(1).expand(10**5, 10**5)}, path),
    "sparse.pt": lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path),
    "list.pt": lambda path: torch.save([1, 2], path),
}


@pytest.mark.parametrize("name", HOSTILE_OTHERS)
def test_hostile_pickles_and_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    HOSTILE_OTHERS[name](tmp_path / name)
    assert "next: " in refused(capsys, "inspect", tmp_path / name)


@pytest.mark.parametrize(("scale", "said"), [
    (None, "without a scale"), (torch.tensor(0.0), "the scale of q.weight is 0"), (torch.tensor(-1.0), "is -1"),
])
def test_lost_scales_are_refused_by_name(tmp_path: Path, scale: torch.Tensor | None, said: str) -> None:
    from wantrain.models.containers import open_container

    weight = torch.linspace(-448, 448, 64).reshape(8, 8).to(torch.float8_e4m3fn)
    scales = {} if scale is None else {"q.scale_weight": scale}
    path = saved(tmp_path / "q.safetensors", {"q.weight": weight} | scales)
    with pytest.raises(UserError, match=said):
        open_container(path).read("q.weight")
    cast = {"q.weight": torch.linspace(-2, 2, 64).reshape(8, 8).to(torch.float8_e4m3fn)}
    assert open_container(saved(tmp_path / "p.safetensors", cast)).read("q.weight").dtype == torch.float8_e4m3fn
    marked = saved(tmp_path / "m.safetensors", {**cast, "scaled_fp8": torch.zeros(1).to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match="without a scale"):
        open_container(marked).read("q.weight")


# The cases themselves, where they are at hand: what each verb and key does with each.

EXPECTED = {  # inspect, convert to comfy_updown, merge to float16, sampler.loras, lora.start_from, model.merge
    "plain": "......", "epoch=1-step=500": "......", "style=final": "......", "rank128_on_head64": "....?.",
    "diffusers_lora_bias": "...rr.", "mixed_lora_and_lokr": "...rr.", "lokr_full_8x8_alpha1e10": "...rr.",
    "lokr_with_factor_buffer": "....r.", "overflows_float16_when_merged": "..r...",
    "i2v21_distill_for_a_base_without_clip": "......", "login_json": "rrrrrr",
}


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not at hand")
@pytest.mark.parametrize("name", EXPECTED)
def test_the_cases(tmp_path: Path, name: str) -> None:
    path, = (p for p in CASES.iterdir() if p.stem == name)
    codes = "".join(".r"[cli.main([*map(str, words)]) == 2] for words in (
        ["inspect", path], ["convert", path, tmp_path / "c.safetensors", "format=comfy_updown"],
        ["merge", TRANSFORMER, path, tmp_path / "m.safetensors", "dtype=float16"]))
    for call in (sample_with, start_from, with_merge):
        try:
            call(path)
            codes += "."
        except UserError as error:
            codes += "r" if "model.merge" in error.next_step or name == "login_json" else "?"
    assert codes == EXPECTED[name]


def test_cache_refuses_a_wrong_variant_before_it_encodes(tmp_path: Path, arguments: list[str],
                                                         capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it began to encode")

    monkeypatch.setattr("wantrain.stages.cache.Encoder", never)
    wrong = saved(tmp_path / "vace.safetensors", tiny.official_transformer(tiny.transformer("vace")))
    own = [f"data.cache_dir={tmp_path / 'new'}", f"model.parts.transformer={wrong}"]
    said = refused(capsys, "cache", *arguments, *own)
    assert "no known variant" in said or "model.variant is tiny_wan" in said
