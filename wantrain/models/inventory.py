"""What there is of a variant, by arithmetic from its row of the variants table: no torch, no file.

Names and shapes of tensors are diffusers'. Sources: docs/facts.md, "Variants"; tests hold them against its own classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from wantrain.models import sizes
from wantrain.models.variants import PATCH, Architecture, Variant
from wantrain.terms import Bucket

_FLOAT32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
"""Parts of names that diffusers keeps in float32 whatever the dtype (`_keep_in_fp32_modules`)."""

TOKENS_OF_AN_IMAGE = 257
"""Of the published CLIP tower: 224 px in patches of 14, and one for all."""

AUDIO_ENCODER_PARAMETERS = 315_437_696
"""Of the published wav2vec2 without its head."""

_CONDITION = {"i2v": (1, 4), "flf2v": (1, 4), "control": (1, 0), "control_reference": (1, 0), "control_inpaint": (2, 4),
              "camera_inpaint": (1, 4), "vace": (2, 64), "animate": (2, 4), "animate2": (2, 4)}
"""What the cache keeps of a window for its task (wantrain.models.conditioning.encode): how many times the channels of
its latents, and how many more.
"""


def is_float32(name: str) -> bool:
    """Whether a tensor stays in float32."""
    return not _FLOAT32.isdisjoint(name.split("."))


def in_block(name: str) -> bool:
    """Whether a tensor is one of a block's."""
    return name.startswith(("blocks.", "vace_blocks."))


def image_tokens(variant: Variant) -> int:
    """Tokens of CLIP that cross-attention sees beside the text."""
    return variant.architecture.image_tokens or (TOKENS_OF_AN_IMAGE if variant.architecture.image_dim else 0)


def condition_bytes(variant: Variant, bucket: Bucket, has_reference: bool = False) -> int:
    """About what the cache keeps of a window for its task."""
    shape_THW, a = variant.latent_THW(bucket), variant.architecture
    videos, masks = _CONDITION.get(variant.task, (0, 0))
    size, channels = math.prod(shape_THW), videos * a.out_channels + masks
    images = image_tokens(variant) * (a.image_dim or 0) * (2 if a.driven else 1)
    face = 3 * bucket.num_frames * a.animate.motion_encoder_size ** 2 if a.animate else 0
    more = (channels + a.out_channels) * size // shape_THW[0] if has_reference else 0
    sound = a.speech.audio_states * a.speech.audio_dim * (bucket.num_frames - 1) if a.speech else 0
    return 4 * (channels * size + images + more + sound) + face


def tensors(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, but for the motion encoder of Animate (a thousandth of it)."""
    found = dict(_outside(a))
    for number in range(a.num_layers):
        found |= _block(f"blocks.{number}", a)
    for number in range(len(a.vace_layers)):
        found |= _block(f"vace_blocks.{number}", a)
        found |= _linear(f"vace_blocks.{number}.proj_out", a.dim, a.dim)
    if a.vace_layers:
        found |= _linear("vace_blocks.0.proj_in", a.dim, a.dim)
    return found


def linears(a: Architecture) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every Linear by module name, as lora.targets matches them."""
    return {name.removesuffix(".weight"): (shape[1], shape[0]) for name, shape in tensors(a).items()
            if name.endswith(".weight") and len(shape) == 2 and name != "trainable_cond_mask.weight"}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _patches(name: str, channels: int, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim, channels, *PATCH), f"{name}.bias": (dim,)}


def _square(name: str, channels: int, dim: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim, channels, side, side), f"{name}.bias": (dim,)}


def _block(name: str, a: Architecture) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.scale_shift_table": (1, 6, a.dim)}
    for attention in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= _linear(f"{name}.{attention}.{part}", a.dim, a.dim)
        found |= {f"{name}.{attention}.norm_{part}.weight": (a.dim,) for part in ("q", "k")}
    if a.image_dim:
        for part in ("add_k_proj", "add_v_proj"):
            found |= _linear(f"{name}.attn2.{part}", a.dim, a.dim)
        found[f"{name}.attn2.norm_added_k.weight"] = (a.dim,)
    return {**found, **_norm(f"{name}.norm2", a.dim), **_linear(f"{name}.ffn.net.0.proj", a.dim, a.ffn_dim),
            **_linear(f"{name}.ffn.net.2", a.ffn_dim, a.dim)}


def _outside(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What is in no block."""
    yield "scale_shift_table", (1, 2, a.dim)
    yield from _patches("patch_embedding", a.in_channels, a.dim).items()
    if a.vace_layers:
        yield from _patches("vace_patch_embedding", a.vace_in_channels, a.dim).items()
    yield from _linear("proj_out", a.dim, a.out_channels * math.prod(PATCH)).items()
    own = "condition_embedder"
    yield from _linear(f"{own}.time_embedder.linear_1", a.freq_dim, a.dim).items()
    yield from _linear(f"{own}.time_embedder.linear_2", a.dim, a.dim).items()
    yield from _linear(f"{own}.time_proj", a.dim, 6 * a.dim).items()
    yield from _linear(f"{own}.text_embedder.linear_1", a.text_dim, a.dim).items()
    yield from _linear(f"{own}.text_embedder.linear_2", a.dim, a.dim).items()
    if a.image_dim:
        image = f"{own}.image_embedder"
        yield from _norm(f"{image}.norm1", a.image_dim).items()
        yield from _linear(f"{image}.ff.net.0.proj", a.image_dim, a.image_dim).items()
        yield from _linear(f"{image}.ff.net.2", a.image_dim, a.dim).items()
        yield from _norm(f"{image}.norm2", a.dim).items()
        if a.image_tokens:
            yield f"{image}.pos_embed", (1, a.image_tokens, a.image_dim)
    if a.animate:
        yield from _face(a)
    if a.speech:
        yield from _sound(a)
    if a.ref_conv:
        yield from _square("ref_conv", a.out_channels, a.dim, PATCH[1]).items()
    if a.control_adapter:
        pixels = 24 * (8 if a.out_channels == 16 else 16) ** 2
        yield from _square("control_adapter.conv", pixels, a.dim, PATCH[1]).items()
        for number in (1, 2):
            yield from _square(f"control_adapter.residual_blocks.0.conv{number}", a.dim, a.dim, 3).items()


def _face(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Animate's patches of the pose, face encoder and face adapter."""
    own = a.animate
    assert own is not None, "of Animate alone"
    yield from _patches("pose_patch_embedding", a.out_channels, a.dim).items()
    hidden, heads = own.face_encoder_hidden_dim, own.face_encoder_num_heads
    yield "face_encoder.padding_tokens", (1, 1, 1, a.dim)
    yield "face_encoder.conv1_local.weight", (hidden * heads, own.motion_encoder_dim, 3)
    yield "face_encoder.conv1_local.bias", (hidden * heads,)
    for name in ("conv2", "conv3"):
        yield f"face_encoder.{name}.weight", (hidden, hidden, 3)
        yield f"face_encoder.{name}.bias", (hidden,)
    yield from _linear("face_encoder.out_proj", hidden, a.dim).items()
    for number in range(a.num_layers // own.inject_face_latents_blocks):
        for part in ("to_q", "to_k", "to_v", "to_out"):
            yield from _linear(f"face_adapter.{number}.{part}", a.dim, a.dim).items()
        for part in ("q", "k"):
            yield f"face_adapter.{number}.norm_{part}.weight", (a.dim // a.num_heads,)


def _sound(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """S2V's own modules."""
    own = a.speech
    assert own is not None, "of S2V alone"
    yield from _patches("cond_encoder", a.out_channels, a.dim).items()
    yield "trainable_cond_mask.weight", (3, a.dim)
    for name, factor in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
        sides = [factor * side for side in PATCH]
        yield f"frame_packer.{name}.weight", (a.dim, a.out_channels, *sides)
        yield f"frame_packer.{name}.bias", (a.dim,)
    heard = "casual_audio_encoder"
    yield f"{heard}.weights", (1, own.audio_states, 1, 1)
    yield f"{heard}.encoder.padding_tokens", (1, 1, 1, a.dim)
    quarter, half = a.dim // 4, a.dim // 2
    for name, inputs, outputs in (("conv1_local", own.audio_dim, quarter * own.audio_tokens),
                                  ("conv1_global", own.audio_dim, quarter), ("conv2", quarter, half),
                                  ("conv3", half, a.dim)):
        yield f"{heard}.encoder.{name}.conv.weight", (outputs, inputs, 3)
        yield f"{heard}.encoder.{name}.conv.bias", (outputs,)
    yield from _linear(f"{heard}.encoder.final_linear", a.dim, a.dim).items()
    for number in range(len(own.audio_layers)):
        for part in "qkvo":
            yield from _linear(f"audio_injector.injector.{number}.{part}", a.dim, a.dim).items()
        for part in "qk":
            yield f"audio_injector.injector.{number}.norm_{part}.weight", (a.dim,)
        yield from _linear(f"audio_injector.injector_adain_layers.{number}.linear", a.dim, 2 * a.dim).items()


def published_gb(variant: Variant) -> float:
    """About what a whole checkpoint takes in bfloat16: its transformers, the text encoder and the image encoder."""
    transformer = variant.num_parameters or sum(map(math.prod, tensors(variant.architecture).values()))
    return 2 * (transformer * max(1, len(variant.experts)) + _text_encoder_parameters()
                + (_image_encoder_parameters() if variant.architecture.image_dim else 0)
                + (AUDIO_ENCODER_PARAMETERS if variant.architecture.speech else 0)) / 1e9


def _text_encoder_parameters() -> int:
    """Parameters of umT5-xxl's encoder: its embedding; in each layer attention, feed-forward, norms, position bias."""
    own = sizes.UMT5_XXL
    dim, inner = own["d_model"], own["num_heads"] * own["d_kv"]
    layer = 4 * dim * inner + 3 * dim * own["d_ff"] + 2 * dim
    bias = own["relative_attention_num_buckets"] * own["num_heads"]
    return int(own["vocab_size"] * dim + own["num_layers"] * (layer + bias) + dim)


def _image_encoder_parameters() -> int:
    """Parameters of CLIP's vision tower."""
    own = sizes.CLIP_VIT_H
    dim, ffn = own["hidden_size"], own["intermediate_size"]
    layer = 4 * (dim * dim + dim) + 2 * dim * ffn + dim + ffn + 4 * dim
    patches = 3 * own["patch_size"] ** 2 * dim
    return int(own["num_hidden_layers"] * layer + patches + dim * (1 + TOKENS_OF_AN_IMAGE) + 4 * dim)
