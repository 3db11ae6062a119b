"""The variants table's numbers, and what detection decides, leaves open and refuses."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.tiny_models import official_transformer, transformer
from wantrain.config import Config, load
from wantrain.models.base import Base
from wantrain.models.detection import Shapes, detect, read_architecture
from wantrain.models.names import VaeVersion, transformer_to_diffusers
from wantrain.models.sizes import VAES
from wantrain.models.variants import NATIVE_PX, VARIANTS, Architecture
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import sampler_settings
from wantrain.terms import UserError

# Shift, boundary, guidance (low, high), steps, fps, frames, from the sources in docs/facts.md, "Schedules".
FUN_21 = (3, None, (6, 6), 50, 16, 81)
FUN_22 = (5, 0.9, (6, 6), 50, 16, 81)
FUN_5B = (5, None, (6, 6), 50, 24, 121)
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
    "wan21_fun_1b3_inp": FUN_21,
    "wan21_fun_14b_inp": FUN_21,
    "wan21_fun_1b3_control": FUN_21,
    "wan21_fun_14b_control": FUN_21,
    "wan21_fun_v11_1b3_control": FUN_21,
    "wan21_fun_v11_14b_control": FUN_21,
    "wan21_fun_v11_1b3_camera": FUN_21,
    "wan21_fun_v11_14b_camera": FUN_21,
    "wan22_fun_a14b_inp": FUN_22,
    "wan22_fun_a14b_control": FUN_22,
    "wan22_fun_a14b_camera": FUN_22,
    "wan22_vace_fun_a14b": (12, 0.875, (5, 5), 50, 16, 81),
    "wan22_fun_5b_inp": FUN_5B,
    "wan22_fun_5b_control": FUN_5B,
    "wan22_fun_5b_camera": FUN_5B,
    "wan22_animate_14b": (5, None, (1, 1), 20, 30, 77),
    "wan22_animate2_14b": (5, None, (3, 3), 40, 24, 81),
    "wan22_s2v_14b": (3, None, (4.5, 4.5), 40, 16, 81),
    "tiny_wan": (3, None, (5, 5), 50, 16, 9),
}
# The tests' twins have the schedule of what they stand for, and short clips.
TWINS = {
    "tiny_wan_a14b": "wan22_t2v_a14b", "tiny_wan_i2v": "wan21_i2v_14b_480p", "tiny_wan_i2v_a14b": "wan22_i2v_a14b",
    "tiny_wan_flf2v": "wan21_flf2v_14b", "tiny_wan_ti2v": "wan22_ti2v_5b", "tiny_wan_vace": "wan21_vace_1b3",
    "tiny_wan_control": "wan21_fun_1b3_control", "tiny_wan_animate": "wan22_animate_14b",
    "tiny_wan_animate2": "wan22_animate2_14b",
    "tiny_wan_control_v11": "wan21_fun_v11_1b3_control", "tiny_wan_control_a14b": "wan22_fun_a14b_control",
    "tiny_wan_control_5b": "wan22_fun_5b_control", "tiny_wan_camera": "wan21_fun_v11_1b3_camera",
    "tiny_wan_camera_5b": "wan22_fun_5b_camera", "tiny_wan_vace_a14b": "wan22_vace_fun_a14b",
    "tiny_wan_inp_5b": "wan22_fun_5b_inp", "tiny_wan_s2v": "wan22_s2v_14b",
}


def test_every_row_has_its_schedule_here() -> None:
    assert {*SCHEDULES, *TWINS} == set(VARIANTS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_the_official_ones(name: str) -> None:
    v = VARIANTS[name]
    assert (v.shift, v.boundary, v.guidance, v.num_steps, v.fps, v.num_frames) == SCHEDULES[name]
    assert v.experts == (("high", "low") if "a14b" in name else ())
    assert (v.vae, v.multiple_px) == (("2.2", 32) if "5b" in name else ("2.1", 16))


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_schedule_of_what_they_stand_for(name: str) -> None:
    v = VARIANTS[name]
    assert (v.shift, v.boundary, v.guidance, v.num_steps, v.fps) == SCHEDULES[TWINS[name]][:5]
    assert (v.task, v.vae, v.multiple_px) == tuple(getattr(VARIANTS[TWINS[name]], k) for k in ("task", "vae",
                                                                                            "multiple_px"))


@functools.cache
def config() -> Config:
    return load(["recipe=demo_anime", "sampler.guidance=null", "sampler.num_steps=null"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_takes_the_rows_numbers_unless_told(name: str) -> None:
    shift, _, guidance, num_steps, *_ = SCHEDULES[name]
    recipe = Recipe(config(), Base(VARIANTS[name], {}))
    settings = sampler_settings(recipe)
    assert (settings.shift, settings.guidance, settings.num_steps) == (shift, guidance, num_steps)
    base = torch.linspace(0.999, 0, num_steps + 1, dtype=torch.float64)[:-1]  # the official grid
    wanted = shift * base / (1 + (shift - 1) * base)
    torch.testing.assert_close(torch.from_numpy(settings.sigmas[:-1]), wanted, rtol=0, atol=1e-6)


def test_native_sizes_are_those_of_the_official_scripts() -> None:
    """480 x 832 px and 81 frames are the 32,760 tokens of the official VACE; TI2V-5B is made for 704 x 1280, 121."""
    assert NATIVE_PX == {"2.1": (480, 832), "2.2": (704, 1280)}
    assert VARIANTS["wan21_vace_14b"].native_tokens == 32760
    assert VARIANTS["wan22_ti2v_5b"].native_tokens == 31 * 22 * 40


# docs/facts.md, "VAE"
STATISTICS: dict[VaeVersion, tuple[str, str]] = {
    "2.1": ("-0.7571,-0.7089,-0.9113,0.1075,-0.1745,0.9653,-0.1517,1.5508,0.4134,-0.0715,0.5517,-0.3632,-0.1922,"
            "-0.9497,0.2503,-0.2921",
            "2.8184,1.4541,2.3275,2.6558,1.2196,1.7708,2.6052,2.0743,3.2687,2.1526,2.8652,1.5579,1.6382,1.1253,"
            "2.8251,1.9160"),
    "2.2": ("-0.2289,-0.0052,-0.1323,-0.2339,-0.2799,0.0174,0.1838,0.1557,-0.1382,0.0542,0.2813,0.0891,0.1570,"
            "-0.0098,0.0375,-0.1825,-0.2246,-0.1207,-0.0698,0.5109,0.2665,-0.2108,-0.2158,0.2502,-0.2055,-0.0322,"
            "0.1109,0.1567,-0.0729,0.0899,-0.2799,-0.1230,-0.0313,-0.1649,0.0117,0.0723,-0.2839,-0.2083,-0.0520,"
            "0.3748,0.0152,0.1957,0.1433,-0.2944,0.3573,-0.0548,-0.1681,-0.0667",
            "0.4765,1.0364,0.4514,1.1677,0.5313,0.4990,0.4818,0.5013,0.8158,1.0344,0.5894,1.0901,0.6885,0.6165,"
            "0.8454,0.4978,0.5759,0.3523,0.7135,0.6804,0.5833,1.4146,0.8986,0.5659,0.7069,0.5338,0.4889,0.4917,"
            "0.4069,0.4999,0.6866,0.4093,0.5709,0.6065,0.6415,0.4944,0.5726,1.2042,0.5458,1.6887,0.3971,1.0600,"
            "0.3943,0.5537,0.5444,0.4089,0.7468,0.7744"),
}


@pytest.mark.parametrize("version", STATISTICS)
def test_latents_are_normalised_with_the_published_statistics(version: VaeVersion) -> None:
    with torch.device("meta"):
        own = AutoencoderKLWan.from_config(VAES[version]).config
    for values, text in zip((own.latents_mean, own.latents_std), STATISTICS[version], strict=True):
        assert values == [float(number) for number in text.split(",")]


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

# Public names of files and folders (docs/facts.md, "Detection") and what they settle.
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
    (VACE_14B, "wan2.1_vace_14B_fp16.safetensors", "wan21_vace_14b", None),
    (VACE_14B, "wan2.2_fun_vace_high_noise_14B.safetensors", "wan22_vace_fun_a14b", "high"),
    (VACE_14B, "Wan2.2-VACE-Fun-A14B/low_noise_model", "wan22_vace_fun_a14b", "low"),
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
    (VACE_14B, "model.safetensors", {"wan21_vace_14b", "wan22_vace_fun_a14b"}),
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
    ("patch_embedding_global.weight", "WanDancer"),
    ("patch_embedding_pose.weight", "SCAIL"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
    ("fps_embedding.weight", "SkyReels-V2"),
    ("blocks.0.to_gate_compress.weight", "FastWan"),
])
def test_unsupported_families_are_recognised(mark: str, family: str) -> None:
    found = detect({**T2V_14B, mark: (1,)}, None)
    assert family in found.message
    with pytest.raises(UserError, match="recognises but does not support") as caught:
        found.resolve("wan21_t2v_14b")
    assert "wan22_ti2v_5b" in caught.value.next_step


@pytest.mark.parametrize("name", [
    "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill/distill_model.safetensors", "FastWan2.1-T2V-14B-Diffusers",
    "models/Wan2.1-T2V-14B-CausVid/model.safetensors", "wan2.1_t2v_14B_4steps_fp8.safetensors",
    "Wan2.1-T2V-14B-AnyFlow/transformer"])
def test_a_distilled_base_is_refused_with_what_to_train_on(name: str) -> None:
    with pytest.raises(UserError, match=r"train on wan21_t2v_14b( or wan22_t2v_a14b)?, and sample with the few-step"):
        detect(T2V_14B, name).resolve("wan21_t2v_14b")


def test_skyreels_is_refused_with_what_to_train_on() -> None:
    with pytest.raises(UserError, match=r"SkyReels-V2, of 24 frames a second .*: train on wan21_t2v_14b or wan22_"):
        detect(T2V_14B, "SkyReels-V2-T2V-14B-540P").resolve("wan21_t2v_14b")


@pytest.mark.parametrize("name", ["lightning_tests/Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors",
                                  "lightx2v/Wan2.1-T2V-14B", "wan2.1_t2v_14B_1000_steps.safetensors"])
def test_what_is_no_distilled_base_is_none(name: str) -> None:
    assert detect(T2V_14B, name).resolve().name == "wan21_t2v_14b"


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
