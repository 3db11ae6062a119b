"""The names map is exact, invertible and refuses what it does not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wantrain.models import names
from wantrain.models.names import NameMap, UnknownName

MAPS = {"transformer": names.TRANSFORMER, "vae 2.1": names.VAE["2.1"], "vae 2.2": names.VAE["2.2"], "t5": names.T5,
        "clip": names.CLIP}

# Written by hand from the official and diffusers' code (docs/facts.md, "Names"), not derived from the table.
TRANSFORMER_PAIRS = [
    ("patch_embedding.weight", "patch_embedding.weight"),
    ("text_embedding.0.weight", "condition_embedder.text_embedder.linear_1.weight"),
    ("time_embedding.2.bias", "condition_embedder.time_embedder.linear_2.bias"),
    ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
    ("head.head.bias", "proj_out.bias"),
    ("head.modulation", "scale_shift_table"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight"),
    ("img_emb.proj.4.bias", "condition_embedder.image_embedder.norm2.bias"),
    ("blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
    ("blocks.39.self_attn.o.weight", "blocks.39.attn1.to_out.0.weight"),
    ("blocks.7.cross_attn.k_img.weight", "blocks.7.attn2.add_k_proj.weight"),
    ("blocks.7.cross_attn.norm_k_img.weight", "blocks.7.attn2.norm_added_k.weight"),
    ("blocks.10.norm3.weight", "blocks.10.norm2.weight"),
    ("blocks.10.ffn.0.bias", "blocks.10.ffn.net.0.proj.bias"),
    ("blocks.10.ffn.2", "blocks.10.ffn.net.2"),
    ("blocks.10.modulation", "blocks.10.scale_shift_table"),
    ("vace_blocks.3.before_proj.weight", "vace_blocks.3.proj_in.weight"),
    ("vace_blocks.3.after_proj.bias", "vace_blocks.3.proj_out.bias"),
    ("vace_blocks.3.cross_attn.v", "vace_blocks.3.attn2.to_v"),
]
VAE_PAIRS = [
    ("2.1", "conv1.weight", "quant_conv.weight"),
    ("2.1", "encoder.conv1.weight", "encoder.conv_in.weight"),
    ("2.1", "decoder.head.0.gamma", "decoder.norm_out.gamma"),
    ("2.1", "encoder.middle.2.residual.6.bias", "encoder.mid_block.resnets.1.conv2.bias"),
    ("2.1", "encoder.downsamples.10.residual.3.gamma", "encoder.down_blocks.10.norm2.gamma"),
    ("2.1", "encoder.downsamples.5.time_conv.weight", "encoder.down_blocks.5.time_conv.weight"),
    ("2.1", "decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
    ("2.1", "decoder.upsamples.7.resample.1.weight", "decoder.up_blocks.1.upsamplers.0.resample.1.weight"),
    ("2.1", "decoder.upsamples.14.residual.0.gamma", "decoder.up_blocks.3.resnets.2.norm1.gamma"),
    ("2.2", "encoder.downsamples.3.downsamples.1.shortcut.bias", "encoder.down_blocks.3.resnets.1.conv_shortcut.bias"),
    ("2.2", "encoder.downsamples.1.downsamples.2.time_conv.bias", "encoder.down_blocks.1.downsampler.time_conv.bias"),
    ("2.2", "decoder.upsamples.0.upsamples.2.residual.2.weight", "decoder.up_blocks.0.resnets.2.conv1.weight"),
    ("2.2", "decoder.upsamples.0.upsamples.3.resample.1.bias", "decoder.up_blocks.0.upsampler.resample.1.bias"),
]


@pytest.mark.parametrize(("official", "diffusers"), TRANSFORMER_PAIRS)
def test_transformer_pairs(official: str, diffusers: str) -> None:
    assert names.transformer_to_diffusers(official) == diffusers
    assert names.transformer_to_official(diffusers) == official


@pytest.mark.parametrize(("version", "official", "diffusers"), VAE_PAIRS)
def test_vae_pairs(version: names.VaeVersion, official: str, diffusers: str) -> None:
    assert names.vae_to_diffusers(official, version) == diffusers
    assert names.vae_to_official(diffusers, version) == official


def test_t5_and_clip_pairs() -> None:
    assert names.t5_to_hf("token_embedding.weight") == "shared.weight"
    assert names.t5_to_official("encoder.embed_tokens.weight") == "token_embedding.weight"
    bias = "encoder.block.5.layer.0.SelfAttention.relative_attention_bias.weight"
    assert names.t5_to_hf("blocks.5.pos_embedding.embedding.weight") == bias
    assert names.t5_to_hf("blocks.5.ffn.gate.0.weight") == "encoder.block.5.layer.1.DenseReluDense.wi_0.weight"
    assert names.clip_to_hf("visual.transformer.31.attn.to_qkv.bias") == (
        "encoder.layers.31.self_attn.q_proj.bias", "encoder.layers.31.self_attn.k_proj.bias",
        "encoder.layers.31.self_attn.v_proj.bias")
    assert names.clip_to_official("encoder.layers.2.self_attn.v_proj.weight") == (
        "visual.transformer.2.attn.to_qkv.weight", 2)
    assert names.clip_to_hf("textual.blocks.0.norm1.weight") == ()


@pytest.mark.parametrize("which", MAPS)
def test_the_tables_are_bijections(which: str) -> None:
    table = MAPS[which]
    assert {other: official for official, other in table.forward.items()} == table.backward
    assert len(table.forward) > 20


@given(st.sampled_from(sorted(MAPS)), st.data(), st.integers(0, 60))
def test_every_name_comes_back(which: str, data: st.DataObject, number: int) -> None:
    table: NameMap = MAPS[which]
    official = data.draw(st.sampled_from(sorted(table.forward))).format(number)
    other = table.to_other(official)
    assert "{" not in other
    assert table.to_official(other) == official


@pytest.mark.parametrize("name", [
    "", "blocks.0", "blocks.0.self_attn", "blocks.x.self_attn.q", "blocks.00.self_attn.q", "blocks.{}.self_attn.q",
    "blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.norm_q.bias", "blocks.0.modulation.weight",
    "model.diffusion_model.blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q", "blocks.0.self_attn.q.weight.",
    "xblocks.0.self_attn.q", "audio_proj.audio_proj_glob_1.layer.weight",
])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(UnknownName, match="not a name of the official Wan transformer"):
        names.transformer_to_diffusers(name)


@pytest.mark.parametrize("name", ["ref_conv.weight", "control_adapter.conv.bias",
                                  "control_adapter.residual_blocks.0.conv2.weight"])
def test_what_fun_adds_has_one_name(name: str) -> None:
    assert names.transformer_to_diffusers(name) == names.transformer_to_official(name) == name


@pytest.mark.parametrize("official", [official for official, _ in TRANSFORMER_PAIRS
                                      if not official.endswith((".weight", ".bias", "modulation", "emb_pos"))])
def test_flattened_module_paths(official: str) -> None:
    table = names.TRANSFORMER
    assert table.is_module(official)
    assert table.from_flat(official.replace(".", "_"), other=False) == official
    assert table.from_flat(table.to_other(official).replace(".", "_"), other=True) == official


def test_flat_names_keep_literal_numbers() -> None:
    assert names.TRANSFORMER.from_flat("text_embedding_2", other=False) == "text_embedding.2"
    assert names.TRANSFORMER.from_flat("vace_blocks_12_ffn_2", other=False) == "vace_blocks.12.ffn.2"
    assert not names.TRANSFORMER.is_module("blocks.0.modulation")
    assert not names.TRANSFORMER.is_module("blocks.{}.self_attn.q")
