"""The variants table's numbers, and what detection decides, leaves open and refuses."""

from __future__ import annotations

import pytest

from tests.tiny_models import official_transformer, transformer
from wantrain.models.names import transformer_to_diffusers
from wantrain.models.variants import VARIANTS, Architecture, Shapes, detect, read_architecture
from wantrain.terms import UserError

# facts/wan-formats.md 1.7: shift, boundary, guidance (low, high), steps, fps, frames.
SCHEDULES = {
    "wan21_t2v_1b3": (5, None, (5, 5), 50, 16, 81),
    "wan21_t2v_14b": (5, None, (5, 5), 50, 16, 81),
    "wan21_i2v_14b_480p": (3, None, (5, 5), 40, 16, 81),
    "wan21_i2v_14b_720p": (5, None, (5, 5), 40, 16, 81),
    "wan21_flf2v_14b": (16, None, (5, 5), 50, 16, 81),
    "wan21_vace_1b3": (16, None, (5, 5), 50, 16, 81),
    "wan21_vace_14b": (16, None, (5, 5), 50, 16, 81),
    "wan22_t2v_a14b": (12, 0.875, (3.0, 4.0), 40, 16, 81),
    "wan22_i2v_a14b": (5, 0.9, (3.5, 3.5), 40, 16, 81),
    "wan22_ti2v_5b": (5, None, (5, 5), 50, 24, 121),
    "tiny_wan": (3, None, (5, 5), 50, 16, 9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_the_facts(name: str) -> None:
    v = VARIANTS[name]
    assert (v.shift, v.boundary, v.guidance, v.num_steps, v.fps, v.num_frames) == SCHEDULES[name]
    assert v.experts == (("high", "low") if "a14b" in name else ())
    assert (v.vae, v.multiple_px) == (("2.2", 32) if name == "wan22_ti2v_5b" else ("2.1", 16))


def test_every_row_is_sound() -> None:
    for name, v in VARIANTS.items():
        assert v.name == name
        assert v.num_frames % 4 == 1
        assert v.architecture.dim % v.architecture.num_heads == 0
        assert v.boundary is None or 0 < v.boundary < 1


def shapes_of(a: Architecture) -> Shapes:
    """The tensors that detection looks at, for an architecture, official names."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (a.dim, a.in_channels, 1, 2, 2), "head.modulation": (1, 2, a.dim),
        "head.head.weight": (a.out_channels * 4, a.dim), "text_embedding.0.weight": (a.dim, a.text_dim),
        "time_embedding.0.weight": (a.dim, a.freq_dim)}
    shapes |= {f"blocks.{i}.ffn.0.weight": (a.ffn_dim, a.dim) for i in range(a.num_layers)}
    shapes |= {f"vace_blocks.{i}.ffn.0.weight": (a.ffn_dim, a.dim) for i in range(len(a.vace_layers))}
    if a.vace_layers:
        shapes["vace_patch_embedding.weight"] = (a.dim, a.vace_in_channels, 1, 2, 2)
    if a.image_dim:
        shapes["img_emb.proj.0.bias"] = (a.image_dim,)
    if a.image_tokens:
        shapes["img_emb.emb_pos"] = (1, a.image_tokens, a.image_dim or 0)
    if a.control_adapter:
        shapes["control_adapter.conv.weight"] = (a.dim, 1536, 2, 2)
    return shapes


T2V_14B = shapes_of(VARIANTS["wan21_t2v_14b"].architecture)
I2V_14B = shapes_of(VARIANTS["wan21_i2v_14b_480p"].architecture)
I2V_A14B = shapes_of(VARIANTS["wan22_i2v_a14b"].architecture)
VACE_14B = shapes_of(VARIANTS["wan21_vace_14b"].architecture)
CAMERA_14B = shapes_of(VARIANTS["wan21_fun_v11_14b_camera"].architecture)

# Public names of files and folders (facts 1.5, the hubs' layouts) and what they settle.
FILE_NAMES = [
    (T2V_14B, "Wan2.1-T2V-14B", "wan21_t2v_14b", None),
    (T2V_14B, "wan2.1_t2v_14B_fp16.safetensors", "wan21_t2v_14b", None),
    (T2V_14B, "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan22_t2v_a14b", "high"),
    (T2V_14B, "wan2.2_t2v_low_noise_14B_fp16.safetensors", "wan22_t2v_a14b", "low"),
    (T2V_14B, "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "wan22_t2v_a14b", "low"),
    (T2V_14B, "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "wan22_t2v_a14b", "high"),
    (T2V_14B, "/models/Wan2.2-T2V-A14B/high_noise_model", "wan22_t2v_a14b", "high"),
    (T2V_14B, "hub/models--Wan-AI--Wan2.2-T2V-A14B/snapshots/c8c2/low_noise_model/x.safetensors", "wan22_t2v_a14b",
     "low"),
    (T2V_14B, "/home/me/wan2.2-tests/Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors", "wan21_t2v_14b", None),
    (I2V_14B, "wan2.1_i2v_480p_14B_fp8_scaled.safetensors", "wan21_i2v_14b_480p", None),
    (I2V_14B, "Wan2.1-I2V-14B-720P", "wan21_i2v_14b_720p", None),
    (I2V_14B, "Wan2.1-Fun-14B-InP", "wan21_fun_14b_inp", None),
    (I2V_A14B, "wan2.2_i2v_high_noise_14B_fp16.safetensors", "wan22_i2v_a14b", "high"),
    (I2V_A14B, "wan2.2_fun_inpaint_low_noise_14B_bf16.safetensors", "wan22_fun_a14b_inp", "low"),
    (VACE_14B, "model.safetensors", "wan21_vace_14b", None),
    (I2V_14B, "14B_480p_fp8.safetensors", "wan21_i2v_14b_480p", None),
    (I2V_14B, "Wan2.1-Fun-14B-InP_i2v.safetensors", "wan21_fun_14b_inp", None),
    (CAMERA_14B, "Wan2.1-Fun-V1.1-14B-Control-Camera", "wan21_fun_v11_14b_camera", None),
]


@pytest.mark.parametrize(("shapes", "file_name", "variant", "expert"), FILE_NAMES, ids=[row[1] for row in FILE_NAMES])
def test_the_file_name_settles_what_tensors_cannot(shapes: Shapes, file_name: str, variant: str, expert: str | None
                                                   ) -> None:
    found = detect(shapes, file_name)
    assert (found.candidates, found.certain, found.expert) == ((variant,), True, expert)
    assert found.resolve().name == variant


@pytest.mark.parametrize(("shapes", "file_name", "left"), [
    (T2V_14B, None, {"wan21_t2v_14b", "wan22_t2v_a14b"}),
    (T2V_14B, "my_finetune_14b.safetensors", {"wan21_t2v_14b", "wan22_t2v_a14b"}),
    (T2V_14B, "t2v_low_res_14b.safetensors", {"wan21_t2v_14b", "wan22_t2v_a14b"}),
    (T2V_14B, "wan2.1_and_wan2.2_merge.safetensors", {"wan21_t2v_14b", "wan22_t2v_a14b"}),
    (T2V_14B, "wan2.1_t2v_14b_high_noise.safetensors", {"wan21_t2v_14b", "wan22_t2v_a14b"}),
    (T2V_14B, "wan2.1_i2v_14b.safetensors", {"wan21_t2v_14b", "wan22_t2v_a14b"}),
    (I2V_14B, "wan2.1_i2v_14B_fp16.safetensors", {"wan21_i2v_14b_480p", "wan21_i2v_14b_720p"}),
    (VACE_14B, "wan2.2_fun_vace_high_noise_14B.safetensors", {"wan21_vace_14b"}),
])
def test_an_ambiguous_file_name_is_never_a_guess(shapes: Shapes, file_name: str | None, left: set[str]) -> None:
    found = detect(shapes, file_name)
    assert (set(found.candidates), found.certain, found.expert) == (left, False, None)
    with pytest.raises(UserError, match=r"set model\.variant"):
        found.resolve()
    for stated in left:
        assert found.resolve(stated).name == stated


def test_both_experts_in_one_name_is_neither() -> None:
    found = detect(T2V_14B, "Wan2.2-T2V-A14B-high_noise-low_noise-merge")
    assert (found.certain, found.expert) == (True, None)
    assert "neither tensors nor file name" in found.message


def test_what_the_config_states_must_fit_the_tensors() -> None:
    with pytest.raises(UserError, match="the tensors fit only wan21_t2v_14b or wan22_t2v_a14b"):
        detect(T2V_14B, None).resolve("wan21_i2v_14b_480p")
    assert detect(T2V_14B, "Wan2.1-T2V-14B").resolve("wan22_t2v_a14b").name == "wan22_t2v_a14b"


@pytest.mark.parametrize(("mark", "family"), [
    ("casual_audio_encoder.encoder.final_linear.weight", "Wan2.2-S2V"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan2.2-Animate"),
    ("motion_encoder.enc.fc.0.weight", "Wan2.2-Animate"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
])
def test_unsupported_families_are_recognised(mark: str, family: str) -> None:
    found = detect({**T2V_14B, mark: (1,)}, None)
    assert family in found.message
    with pytest.raises(UserError, match="recognises but does not support") as caught:
        found.resolve("wan21_t2v_14b")
    assert "wan22_ti2v_5b" in caught.value.next_step


def test_sizes_of_no_variant() -> None:
    found = detect({**T2V_14B, "patch_embedding.weight": (5120, 99, 1, 2, 2)}, None)
    with pytest.raises(UserError, match="no known variant's sizes"):
        found.resolve()


@pytest.mark.parametrize("shapes", [{}, {"decoder.conv1.weight": (1, 1, 3, 3, 3)}, {"patch_embedding.weight": (8, 16)}])
def test_another_model_is_refused(shapes: Shapes) -> None:
    with pytest.raises(UserError, match="not a Wan transformer"):
        detect(shapes, None)


def test_a_missing_block_is_named() -> None:
    with pytest.raises(UserError, match=r"blocks \[17\] of 40"):
        detect({name: shape for name, shape in T2V_14B.items() if not name.startswith("blocks.17.")}, None)


@pytest.mark.parametrize("kind", ["t2v", "flf2v", "vace", "i2v_a14b"])
def test_sizes_from_real_tensors_in_both_layouts(kind: str) -> None:
    official = {name: tuple(t.shape) for name, t in official_transformer(transformer(kind)).items()}
    a = read_architecture(official, "official")
    assert (a.dim, a.num_layers, a.ffn_dim, a.text_dim, a.freq_dim, a.out_channels) == (32, 2, 64, 32, 32, 16)
    assert a.in_channels == (36 if kind in ("flf2v", "i2v_a14b") else 16)
    assert a.image_tokens == (10 if kind == "flf2v" else None)
    assert a.image_dim == (64 if kind == "flf2v" else None)
    assert a.vace_layers == ((0, 1) if kind == "vace" else ())
    assert read_architecture({transformer_to_diffusers(n): s for n, s in official.items()}, "diffusers") == a
