"""The parts of the tiny base, and how they are written to disk in the diffusers directory layout."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from tools.tiny_world.world import caption, draw_scene
from wantrain.terms import TEXT_LEN

VOCAB_SIZE = 512
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
Z_DIM = 16

Model = TypeVar("Model", bound=torch.nn.Module)


def new_vae() -> AutoencoderKLWan:
    """8x in space (2x of it a patchify), 4x in time, 16 channels: the ratios of the Wan 2.1 VAE."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


def new_transformer() -> WanTransformer3DModel:
    """A transformer of about 4 M parameters with a zero output layer: the first prediction is 0."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=128,
        freq_dim=64,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def new_text_encoder() -> UMT5EncoderModel:
    """A umT5 encoder of two layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=VOCAB_SIZE,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
        )
    )


def new_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer: every word of the world is one token, anything else falls apart into pairs and letters."""
    words = {word for seed in range(4000) for word in caption(draw_scene(seed), seed % 4).replace(",", "").split()}
    pairs = {f"{a}{b}" for a in "bcdfghjklmnpqrstvwxyz" for b in "aeiou"}
    pairs |= {f"{a}{b}" for a in "aeiou" for b in "nrlstm"}
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), (WORD_START, -11.0)]
    vocab += [(WORD_START + word, -5.0) for word in sorted(words - {"a"})] + [(WORD_START + "style", -5.0)]
    vocab += [(WORD_START + letter, -10.5) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab += [(pair, -9.0) for pair in sorted(pairs)] + [(character, -11.0) for character in characters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=TEXT_LEN)


def nonsense_word(rng: np.random.Generator) -> str:
    """A pronounceable word that means nothing, or a consonant heap such as a LoRA trigger."""
    onsets = ["b", "br", "c", "cl", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "pr", "qu", "r", "s", "st"]
    onsets += ["t", "tr", "v", "w", "x", "y", "z", "sk", "zh", "ch"]
    vowels = ["a", "e", "i", "o", "u", "ai", "ee", "oo", ""]
    codas = ["", "", "n", "r", "l", "t", "s", "x", "nt", "k", "m", "p"]
    return "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.integers(2, 4)))


def token_ids(tokenizer: T5TokenizerFast, captions: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, L), padded to the longest caption only."""
    batch = tokenizer(list(captions), padding=True, truncation=True, max_length=TEXT_LEN, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def save_base(
    directory: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    tokenizer: T5TokenizerFast,
) -> None:
    """Writes the base as bf16 safetensors (the transformer's float32 modules stay float32), whole or not at all."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    building, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    shutil.rmtree(building, ignore_errors=True)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_bf16(UMT5EncoderModel, text_encoder),
        vae=_bf16(AutoencoderKLWan, vae),
        scheduler=scheduler,
        transformer=_bf16(WanTransformer3DModel, transformer),
    ).save_pretrained(building)
    for path in building.rglob("*.safetensors"):
        path.chmod(0o644)
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    building.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _bf16(kind: type[Model], model: Model) -> Model:
    """A copy of `model` in bf16, with its `_keep_in_fp32_modules` left in float32."""
    copy = kind(model.config) if kind is UMT5EncoderModel else kind.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    keep = WanTransformer3DModel._keep_in_fp32_modules if kind is WanTransformer3DModel else []
    for name, parameter in copy.named_parameters():
        if not any(part in name.split(".") for part in keep):
            parameter.data = parameter.data.bfloat16()
    return copy
