"""The base as we load it, against diffusers and transformers; and the same weights from other layouts."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from tests import tiny_models as tiny
from wantrain.models import base, encode
from wantrain.models.names import t5_to_official, transformer_to_official
from wantrain.models.variants import VARIANTS
from wantrain.terms import UserError

CPU = torch.device("cpu")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {})


def assert_same(module, reference):
    own, theirs = module.state_dict(), reference.state_dict()
    assert own.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_parts_are_bitwise_those_of_from_pretrained(dtype):
    assert_same(TINY.transformer(dtype, CPU), WanTransformer3DModel.from_pretrained(base.EMBEDDED / "transformer",
                                                                                   dtype=dtype))
    assert_same(TINY.vae(CPU), AutoencoderKLWan.from_pretrained(base.EMBEDDED / "vae", dtype=torch.float32))
    assert_same(TINY.text(dtype, CPU).text_encoder, UMT5EncoderModel.from_pretrained(base.EMBEDDED / "text_encoder",
                                                                                    dtype=dtype))


@pytest.fixture
def official(tmp_path):
    """The tiny base in the official folder's names and files, VAE from its diffusers folder (its shape is ours)."""
    transformer = load_file(base.EMBEDDED / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({transformer_to_official(n): t for n, t in transformer.items()},
              tmp_path / "diffusion_pytorch_model.safetensors")
    text = load_file(base.EMBEDDED / "text_encoder" / "model.safetensors")
    torch.save({t5_to_official(n): t for n, t in text.items() if n != "encoder.embed_tokens.weight"},
               tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(base.EMBEDDED / "tokenizer", tmp_path / "google" / "umt5-xxl")
    return tmp_path


def test_an_official_folder_and_single_files_give_the_same_transformer(official, tmp_path):
    parts = {"vae": str(base.EMBEDDED / "vae"), "text_encoder": str(base.EMBEDDED / "text_encoder")}
    folder = base.find(VARIANTS["tiny_wan"], str(official), parts)
    assert folder.parts["tokenizer"] == official / "google" / "umt5-xxl"
    reference = TINY.transformer(torch.float32, CPU)
    assert "official names" in folder.detected()
    assert_same(folder.transformer(torch.float32, CPU), reference)
    single = tmp_path / "comfy.safetensors"
    save_file({f"model.diffusion_model.{n}": t for n, t in
               load_file(official / "diffusion_pytorch_model.safetensors").items()}, single)
    files = base.find(VARIANTS["tiny_wan"], "embedded", {"transformer": str(single)})
    assert_same(files.transformer(torch.float32, CPU), reference)


def test_a_variant_that_the_tensors_are_not_is_refused():
    wrong = base.find(VARIANTS["wan21_t2v_1b3"], "embedded", {})
    with pytest.raises(UserError, match="fit only tiny_wan"):
        wrong.transformer(torch.float32, CPU)


def test_missing_parts_name_the_key(tmp_path):
    with pytest.raises(UserError, match=r"model\.path: .*/none does not exist"):
        base.find(VARIANTS["tiny_wan"], str(tmp_path / "none"), {})
    with pytest.raises(UserError, match=r"model\.parts\.vae: .*gone\.pth does not exist"):
        base.find(VARIANTS["tiny_wan"], "embedded", {"vae": str(tmp_path / "gone.pth")})
    with pytest.raises(UserError, match=r"model\.parts\.clip"):
        base.find(VARIANTS["tiny_wan"], "embedded", {"clip": "x"})


@torch.no_grad()
def test_text_is_what_the_pipeline_encodes_padded_to_512():
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    text = TINY.text(torch.float32, CPU)
    for caption in ("", "a red house by the sea", "  odd &amp;amp; spaces\n here ", "word " * 600):
        want, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        short = encode.encode_text(text, caption)
        torch.testing.assert_close(encode.pad_text(short), want[0], atol=1e-5, rtol=0)
        assert short.shape[0] == min(encode.count_tokens(text.tokenizer, caption), 512)


@torch.no_grad()
def test_latents_are_the_normalised_mode_and_decode_back():
    vae = TINY.vae(CPU)
    frames = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)
    latents = encode.encode_frames(vae, frames)
    assert latents.shape == (16, 2, 4, 6)
    config = json.loads((base.EMBEDDED / "vae" / "config.json").read_text())
    mean, std = (torch.tensor(config[k]).view(16, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    pixels = (frames.movedim(0, 1)[None].float() / 127.5 - 1)
    mode = vae.encode(pixels).latent_dist.mean[0]
    torch.testing.assert_close(latents, (mode - mean) / std)
    decoded = encode.decode_latents(vae, latents)
    assert decoded.shape == frames.shape
    want = vae.decode(mode[None]).sample[0].clamp(-1, 1).movedim(0, 1)
    assert (decoded.float() / 127.5 - 1 - want).abs().max() < 0.01


def test_an_official_folder_with_its_own_config_is_built_from_the_variant(official):
    """Its keys (dim, num_heads) are not diffusers': taken for them they build another model."""
    (official / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 192, "num_heads": 6}))
    parts = {"vae": str(base.EMBEDDED / "vae"), "text_encoder": str(base.EMBEDDED / "text_encoder")}
    folder = base.find(VARIANTS["tiny_wan"], str(official), parts)
    assert_same(folder.transformer(torch.float32, CPU), TINY.transformer(torch.float32, CPU))
    assert {n: p.shape for n, p in folder.meta_transformer().named_parameters()} == {
        n: p.shape for n, p in TINY.meta_transformer().named_parameters()}


@pytest.fixture
def comfy_text_encoder(tmp_path):
    """A ComfyUI text encoder file: HF names and a SentencePiece model inside, trained here."""
    lines = ["a red house by the sea", "a blue boat at night", "green trees in the wind", "small birds on a wire"] * 50
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=buffer, vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2)
    weights = load_file(base.EMBEDDED / "text_encoder" / "model.safetensors")
    spiece = {"spiece_model": torch.tensor(list(buffer.getvalue()), dtype=torch.uint8)}
    save_file({**weights, **spiece}, tmp_path / "umt5.safetensors")
    return tmp_path / "umt5.safetensors", sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def test_a_comfyui_text_encoder_brings_its_tokenizer(comfy_text_encoder, monkeypatch):
    file, own = comfy_text_encoder
    parts = {"transformer": str(base.EMBEDDED / "transformer"), "vae": str(base.EMBEDDED / "vae"),
             "text_encoder": str(file)}
    found = base.find(VARIANTS["tiny_wan"], None, parts)
    assert found.parts["tokenizer"] == file
    config = json.loads((base.EMBEDDED / "text_encoder" / "config.json").read_text())
    monkeypatch.setattr(base.sizes, "UMT5_XXL", config)
    text = found.text(torch.float32, CPU)
    assert_same(text.text_encoder, TINY.text(torch.float32, CPU).text_encoder)
    for caption in ("a red house by the sea", "small boat, at night"):
        assert text.tokenizer(caption).input_ids == [*own.encode(caption), own.eos_id()]
    parts["text_encoder"] = str(base.EMBEDDED / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.parts\.tokenizer is not set") as caught:
        base.find(VARIANTS["tiny_wan"], None, parts)
    assert "google/umt5-xxl" in caught.value.next_step


def test_a_vae_of_the_other_generation_is_refused_and_its_own_variant_loads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(base.sizes, "VAES", tiny.VAES)
    file = tiny.pickle_file(tmp_path, tiny.weights(tiny.PARTS["vae 2.2"]))
    parts = {**{part: str(path) for part, path in TINY.parts.items()}, "vae": str(file)}
    with pytest.raises(UserError, match="makes latents of 48 channels, tiny_wan takes 16"):
        base.find(VARIANTS["tiny_wan"], None, parts).vae(CPU)
    vae = base.find(VARIANTS["wan22_ti2v_5b"], None, parts).vae(CPU)
    assert_same(vae, tiny.module(tiny.PARTS["vae 2.2"]))


def test_the_image_encoder_of_the_official_file(tmp_path, monkeypatch):
    monkeypatch.setattr(base.sizes, "CLIP_VIT_H", tiny.CLIP)
    file = tiny.pickle_file(tmp_path, tiny.weights(tiny.PARTS["clip"]))
    found = base.find(VARIANTS["tiny_wan_i2v"], "embedded", {"image_encoder": str(file)})
    assert_same(found.image_encoder(torch.float32, CPU), tiny.module(tiny.PARTS["clip"]))


def test_a_model_id_in_the_cache_is_a_base(tmp_path, monkeypatch):
    """The embedded base laid out as the hub's cache has it, and no network."""
    commit = "0" * 40
    snapshot = tmp_path / "models--some--wan" / "snapshots" / commit
    shutil.copytree(base.EMBEDDED, snapshot)
    (tmp_path / "models--some--wan" / "refs").mkdir()
    (tmp_path / "models--some--wan" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = base.find(VARIANTS["tiny_wan"], "some/wan", {"vae": "some/wan/vae"})
    assert found.parts["transformer"] == snapshot / "transformer"
    assert found.parts["vae"] == snapshot / "vae"
    shutil.rmtree(snapshot / "vae")
    with pytest.raises(UserError, match=r"model\.path: some/wan is no local path, and the cache .* does not hold it"):
        base.find(VARIANTS["tiny_wan"], "some/wan", {})
