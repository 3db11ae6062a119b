"""The maps and the variants table against diffusers, transformers and the public files, at full size on meta.

The md5 values are those by which DiffSynth-Studio recognises the *public* files: of the sorted list of "name:shape"
and "name", joined by commas (diffsynth/configs/model_configs.py, commit 6d1be405, model_hash).
"""

from __future__ import annotations

import functools
import hashlib
import math

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wantrain.models import names, sizes
from wantrain.models.detection import Shapes, detect, fitting_lora
from wantrain.models.driven import WanDrivenTransformer3DModel
from wantrain.models.fun import OWN, class_of
from wantrain.models.variants import VARIANTS, Variant, diffusers_config

PUBLIC_MD5 = {
    "wan21_t2v_1b3": "9269f8db9040a9d860eaca435be61814",
    "wan21_t2v_14b": "aafcfd9672c3a2456dc46e1cb6e52c70",
    "wan21_i2v_14b_480p": "6bfcfb3b342cb286ce886889d519a77e",
    "wan21_i2v_14b_720p": "6bfcfb3b342cb286ce886889d519a77e",
    "wan21_flf2v_14b": "3ef3b1f8e1dab83d5b71fd7b617f859f",
    "wan21_vace_1b3": "a61453409b67cd3246cf0c3bebad47ba",
    "wan21_vace_14b": "7a513e1f257a861512b1afd387a8ecd9",
    "wan21_fun_1b3_inp": "6d6ccde6845b95ad9114ab993d917893",
    "wan21_fun_14b_inp": "6bfcfb3b342cb286ce886889d519a77e",
    "wan21_fun_1b3_control": "349723183fc063b2bfc10bb2835cf677",
    "wan21_fun_14b_control": "efa44cddf936c70abd0ea28b6cbe946c",
    "wan21_fun_v11_1b3_control": "70ddad9d3a133785da5ea371aae09504",
    "wan21_fun_v11_14b_control": "26bde73488a92e64cc20b0a7485b9e5b",
    "wan21_fun_v11_1b3_camera": "ac6a5aa74f4a0aab6f64eb9a72f19901",
    "wan21_fun_v11_14b_camera": "b61c605c2adbd23124d152ed28e049ae",
    "wan22_t2v_a14b": "aafcfd9672c3a2456dc46e1cb6e52c70",
    "wan22_i2v_a14b": "5b013604280dd715f8457c6ed6d6a626",
    "wan22_fun_a14b_inp": "5b013604280dd715f8457c6ed6d6a626",
    "wan22_fun_a14b_control": "2267d489f0ceb9f21836532952852ee5",
    "wan22_fun_a14b_camera": "47dbeab5e560db3180adf51dc0232fb1",
    "wan22_ti2v_5b": "1f5ab7703c6fc803fdded85ff040c316",
}
# Tensors and parameters in billions, counted on the official code's own classes: docs/facts.md, "Variants".
OFFICIAL_COUNTS = {
    "wan21_t2v_1b3": (825, 1.419), "wan21_t2v_14b": (1095, 14.288), "wan21_i2v_14b_480p": (1303, 16.395),
    "wan21_i2v_14b_720p": (1303, 16.395), "wan21_flf2v_14b": (1304, 16.396), "wan21_vace_1b3": (1264, 2.154),
    "wan21_vace_14b": (1331, 17.338), "wan21_fun_1b3_inp": (983, 1.564), "wan21_fun_14b_inp": (1303, 16.395),
    "wan21_fun_14b_control": (1303, 16.395),
    "wan21_fun_v11_14b_control": (1305, 16.395), "wan21_fun_v11_1b3_camera": (989, 1.616),
    "wan21_fun_v11_14b_camera": (1309, 16.898), "wan22_t2v_a14b": (1095, 14.288), "wan22_i2v_a14b": (1095, 14.289),
    "wan22_fun_a14b_control": (1097, 14.290), "wan22_fun_a14b_camera": (1101, 14.792), "wan22_ti2v_5b": (825, 5.000),
}
TABLE = [variant for variant in VARIANTS.values() if variant.num_tensors is not None]


def md5(shapes: Shapes) -> str:
    entries = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*entries, *shapes])).encode()).hexdigest()


@functools.cache
def _built(name: str, config: tuple[tuple[str, object], ...]) -> dict[str, tuple[int, ...]]:
    kwargs = {key: list(value) if key == "vace_layers" else value for key, value in config}
    with torch.device("meta"):
        module = class_of(VARIANTS[name])(**kwargs)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def diffusers_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    config = diffusers_config(variant)
    return _built(variant.name,
                  tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items()))


def official_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Through the map from the class."""
    return {names.transformer_to_official(name): shape for name, shape in diffusers_shapes(variant).items()}


def test_every_variant_is_covered() -> None:
    assert {v.name for v in TABLE} == set(PUBLIC_MD5)
    # Not counted apart: one number was noted for two checkpoints.
    shared = {"wan21_fun_1b3_control", "wan21_fun_v11_1b3_control", "wan22_fun_a14b_inp"}
    assert set(OFFICIAL_COUNTS) | shared == set(PUBLIC_MD5)


@pytest.mark.parametrize("name", PUBLIC_MD5)
def test_official_inventory_is_that_of_the_public_file(name: str) -> None:
    variant = VARIANTS[name]
    shapes = official_shapes(variant)
    assert md5(shapes) == PUBLIC_MD5[name]
    assert len(shapes) == variant.num_tensors
    assert sum(map(math.prod, shapes.values())) == variant.num_parameters
    if name in OFFICIAL_COUNTS:
        assert (variant.num_tensors, round(variant.num_parameters / 1e9, 3)) == OFFICIAL_COUNTS[name]


@pytest.mark.parametrize("name", PUBLIC_MD5)
def test_the_map_is_the_class_both_ways(name: str) -> None:
    own = diffusers_shapes(VARIANTS[name])
    official = official_shapes(VARIANTS[name])
    forward = {names.transformer_to_diffusers(name): shape for name, shape in official.items()}
    assert forward == own


def test_our_classes_add_to_diffusers_what_is_officially_added_under_its_name() -> None:
    for own in OWN.values():
        more = set(own(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8).state_dict()) - set(
            WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8).state_dict())
        assert bool(more) == (own is not WanDrivenTransformer3DModel)  # whose tensors are those of image-to-video
        assert all(name.startswith(("ref_conv.", "control_adapter.")) for name in more)
        assert {names.transformer_to_official(name) for name in more} == more


@pytest.mark.parametrize("name", PUBLIC_MD5)
def test_each_variant_is_detected(name: str) -> None:
    shapes = official_shapes(VARIANTS[name])
    twins = {n for n, digest in PUBLIC_MD5.items() if digest == PUBLIC_MD5[name]}
    # Of these there is no digest.
    twins |= {"wan22_vace_fun_a14b"} if name == "wan21_vace_14b" else set()
    twins |= {"wan22_animate2_14b"} if "wan21_i2v_14b_480p" in twins else set()
    found = detect(shapes, None)
    assert set(found.fitting) == twins
    assert found.layout == "official"
    assert found.certain == (len(twins) == 1)
    diffusers_found = detect(diffusers_shapes(VARIANTS[name]), None)
    assert (diffusers_found.fitting, diffusers_found.layout) == (found.fitting, "diffusers")


@pytest.mark.parametrize("name", [v.name for v in TABLE])
def test_the_variants_that_a_lora_fits(name: str) -> None:
    """One on every Linear fits what has them all; one on self-attention only, whatever has that width."""
    a = VARIANTS[name].architecture
    linears = {n.removesuffix(".weight"): (s[0], s[1]) for n, s in official_shapes(VARIANTS[name]).items()
               if len(s) == 2 and n.endswith(".weight")}
    in_blocks = {m: s for m, s in linears.items() if "blocks." in m}
    assert name in fitting_lora(linears)
    for other in (VARIANTS[n].architecture for n in fitting_lora(in_blocks)):
        assert (other.dim, other.ffn_dim, other.num_layers) == (a.dim, a.ffn_dim, a.num_layers)
        assert (other.image_dim is None) <= (a.image_dim is None)
        assert len(other.vace_layers) >= len(a.vace_layers)
    attention = {m: s for m, s in linears.items() if ".self_attn." in m and m.startswith("blocks.")}
    assert set(fitting_lora(attention)) == {v.name for v in VARIANTS.values() if v.architecture.dim == a.dim}
    assert not fitting_lora({**linears, "blocks.0.self_attn.q": (8, 8)})
    assert not fitting_lora({**linears, "blocks.40.ffn.0": linears["blocks.0.ffn.0"]})


def test_tiny_wan_is_detected() -> None:
    shapes = diffusers_shapes(VARIANTS["tiny_wan"])
    assert detect(shapes, None).resolve().name == "tiny_wan"


@pytest.mark.parametrize(("version", "config", "digest", "count", "parameters"), [
    ("2.1", sizes.VAES["2.1"], "ccc42284ea13e1ad04693284c7a09be6", 194, 126.9),
    ("2.2", sizes.VAES["2.2"], "e1de6c02cdac79f8b739f4d3698cd216", 196, 704.7),
])
def test_vae_is_that_of_the_public_file(version: names.VaeVersion, config: dict[str, object], digest: str, count: int,
                                        parameters: float) -> None:
    with torch.device("meta"):
        own = {n: tuple(t.shape) for n, t in AutoencoderKLWan(**config).state_dict().items()}
    official = {names.vae_to_official(name, version): shape for name, shape in own.items()}
    assert md5(official) == digest
    assert (len(official), round(sum(map(math.prod, official.values())) / 1e6, 1)) == (count, parameters)
    assert {names.vae_to_diffusers(name, version): shape for name, shape in official.items()} == own
    assert names.vae_version(official) == names.vae_version(own) == version


def test_text_encoder_is_that_of_the_public_file() -> None:
    config = UMT5Config(**sizes.UMT5_XXL)
    with torch.device("meta"):
        own = {n: tuple(t.shape) for n, t in UMT5EncoderModel(config).state_dict().items()}
    official = {names.t5_to_official(name): shape for name, shape in own.items()}
    assert md5(official) == "9c8818c2cbea55eca56c7b447df170da"
    assert (len(official), round(sum(map(math.prod, official.values())) / 1e9, 3)) == (242, 5.681)
    assert {names.t5_to_hf(name) for name in official} | {"encoder.embed_tokens.weight"} == set(own)


def _clip_text_tower() -> dict[str, tuple[int, ...]]:
    """The XLM-RoBERTa half of the public CLIP file, and the two tensors beside the towers."""
    def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    d = 1024
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (), "visual.head": (1280, d),
        "textual.token_embedding.weight": (250002, d), "textual.type_embedding.weight": (1, d),
        "textual.pos_embedding.weight": (514, d), **pair("textual.norm", d),
        "textual.head.0.weight": (d, d), "textual.head.2.weight": (d, d)}
    for n in range(24):
        for leaf in "qkvo":
            shapes |= pair(f"textual.blocks.{n}.attn.{leaf}", d, d)
        shapes |= pair(f"textual.blocks.{n}.norm1", d) | pair(f"textual.blocks.{n}.norm2", d)
        shapes |= pair(f"textual.blocks.{n}.ffn.0", 4 * d, d) | pair(f"textual.blocks.{n}.ffn.2", d, 4 * d)
    return shapes


def test_image_encoder_is_that_of_the_public_file() -> None:
    config = CLIPVisionConfig(**sizes.CLIP_VIT_H)
    with torch.device("meta"):
        own = {n: tuple(t.shape) for n, t in CLIPVisionModel(config).state_dict().items()}
    official = _clip_text_tower()
    for name, shape in own.items():
        target, part = names.clip_to_official(name)
        stacked = (3 * shape[0], *shape[1:]) if part is not None else shape
        official[target] = {"visual.cls_embedding": (1, 1, 1280),
                            "visual.pos_embedding": (1, 257, 1280)}.get(target, stacked)
    assert len(official) == 784
    assert md5(official) == "5941c53e207d62f20f9025686193c40b"
    assert {target for name in official for target in names.clip_to_hf(name)} == set(own)
