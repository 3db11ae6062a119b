"""The real Wan2.1-T2V-1.3B on the meta device, from a diffusers directory without weights."""

import json
import re
import struct

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.conftest import write_clips
from wantrain import cli, lora
from wantrain.models import base
from wantrain.models.variants import VARIANTS

# transformer/config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers (dim 1536, 12 heads, 30 layers)
CONFIG = {
    "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
    "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "image_dim": None, "in_channels": 16,
    "num_attention_heads": 12, "num_layers": 30, "out_channels": 16, "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}
PARAMETERS = 1_418_996_800
# rank 32 on 30 blocks: 8 attention projections of 1536 x 1536, and 1536 x 8960 twice
TRAINABLE = 30 * 32 * (8 * (1536 + 1536) + 2 * (1536 + 8960))


@pytest.fixture
def folder(tmp_path):
    """The directory as downloaded, with a transformer file of the real header and 2.8 GB of nothing (sparse)."""
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in WanTransformer3DModel.from_config(CONFIG).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    packed = json.dumps(header).encode()
    with (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.truncate(8 + len(packed) + end)
    return tmp_path


def test_architecture_targets_and_counts(folder):
    transformer = base.find(VARIANTS["wan21_t2v_1b3"], str(folder), {}).meta_transformer()
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS
    assert all(p.is_meta for p in transformer.parameters())
    names = lora.inject(transformer, ["attn_ffn"], lora.Spec(32, 32), seed=0)
    expected = [f"blocks.{i}.{m}" for i in range(30)
                for m in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k",
                          "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")]
    assert names == expected
    assert sum(p.numel() for p in lora.trainable_parameters(transformer).values()) == TRAINABLE == 43_745_280
    assert all(p.dtype == torch.float32 for p in lora.trainable_parameters(transformer).values())


@pytest.mark.parametrize("recipe", ["anime_1b3", "architecture_1b3"])
def test_check_tells_what_the_recipe_would_do(folder, tmp_path, capsys, recipe):
    sets = {name: write_clips(tmp_path / name, 2, "x", seed) for seed, name in
            ((0, "style"), (10, "plain"), (20, "heldout"))}
    code = cli.main(["check", f"recipe={recipe}", f"model.path={folder}", f"data.cache_dir={tmp_path / 'cache'}",
                     f"data.sources.style.path={sets['style']}", f"data.sources.regularisation.path={sets['plain']}",
                     f"data.heldout={sets['heldout']}", "data.num_frames=[1,9,81]"])
    shown = capsys.readouterr().out
    assert code == 0
    assert f"{PARAMETERS:,} parameters" in shown
    assert f"{TRAINABLE:,} trainable parameters" in shown
    assert "wan21_t2v_1b3: from the tensors; safetensors, diffusers names, bfloat16" in shown
    assert re.search(r"bucket +9f 480x832: 4 clips, 4680 tokens", shown)
    assert "6 clips and 8 captions still to encode" in shown  # with two prompts, and four of drift
