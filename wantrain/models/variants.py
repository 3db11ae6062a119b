"""The variants table: every Wan checkpoint family that wantrain knows, and how to tell which one a file holds.

Sources: docs/facts.md, "Variants" (inventories, proven against the public files) and docs/facts.md, "Schedules" (where
one number, the boundary of Fun-A14B, is not verified).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wantrain.models.names import VaeVersion, transformer_to_diffusers
from wantrain.terms import NUM_TIMESTEPS, Bucket, UserError

Task = Literal["t2v", "i2v", "flf2v", "vace", "control", "camera", "ti2v", "animate"]
"""How a variant conditions; Fun-InP conditions as i2v does."""

Expert = Literal["high", "low"]
Layout = Literal["official", "diffusers"]
Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128
PATCH = (1, 2, 2)
CLIP_DIM = 1280
FLF_TOKENS = 514
NATIVE_PX: dict[VaeVersion, tuple[int, int]] = {"2.1": (480, 832), "2.2": (704, 1280)}


@dataclass(frozen=True, slots=True)
class AnimateSizes:
    """Sizes of Wan-Animate's motion encoder, face encoder and face adapter, under diffusers' names; `channels` are
    (side in pixels, channels) of the motion encoder, None for the published ones. `motion_encoder_size` is the side of
    a face in pixels.
    """

    motion_encoder_size: int = 512
    motion_style_dim: int = 512
    motion_dim: int = 20
    motion_encoder_dim: int = 512
    face_encoder_hidden_dim: int = 1024
    face_encoder_num_heads: int = 4
    inject_face_latents_blocks: int = 5
    channels: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of one transformer. `image_dim` None: no CLIP image tokens; `vace_layers` empty: not VACE.

    `image_tokens`, `ref_conv`, `control_adapter` and `animate` are the extra tensors of FLF2V, Fun-Control, Fun-Camera
    and Animate.
    """

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    freq_dim: int = 256
    image_dim: int | None = None
    image_tokens: int | None = None
    vace_layers: tuple[int, ...] = ()
    vace_in_channels: int = 96
    ref_conv: bool = False
    control_adapter: bool = False
    animate: AnimateSizes | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One checkpoint family.

    `num_tensors` and `num_parameters` count one transformer, None where the checkpoint is ours; `shift` and
    `num_steps` are the official sampler's; `guidance` is (low expert, high expert), equal where there is one
    transformer; `boundary` is the sigma from which the high expert works, None for one transformer; `num_frames` are
    pixel frames of the native length; `multiple_px` divides height and width.
    """

    name: str
    task: Task
    architecture: Architecture
    num_tensors: int | None
    num_parameters: int | None
    shift: float
    num_steps: int
    guidance: tuple[float, float] = (5.0, 5.0)
    boundary: float | None = None
    fps: int = 16
    num_frames: int = 81
    vae: VaeVersion = "2.1"
    multiple_px: int = 16

    def latent_THW(self, bucket: Bucket) -> tuple[int, int, int]:
        """The shape of a bucket's latents without the channels."""
        px = self.multiple_px // 2
        return 1 + (bucket.num_frames - 1) // 4, bucket.height // px, bucket.width // px

    @property
    def face_px(self) -> int:
        """The side of a face's square in pixels; 1 where the variant takes none."""
        sizes = self.architecture.animate
        return sizes.motion_encoder_size if sizes else 1

    @property
    def native_tokens(self) -> int:
        """Transformer tokens of a clip of the native length and size (480 x 832 px; 704 x 1280 for TI2V-5B)."""
        height, width = NATIVE_PX[self.vae]
        return (1 + (self.num_frames - 1) // 4) * (height // self.multiple_px) * (width // self.multiple_px)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Names of the transformers where there are two, else empty."""
        return ("high", "low") if self.boundary is not None else ()

    def is_high(self, timestep: float) -> bool:
        """Whether the high noise expert works at this timestep; where there is one transformer, always."""
        return self.boundary is None or timestep >= self.boundary * NUM_TIMESTEPS

    def sigmas_of(self, expert: Expert | None) -> tuple[float, float]:
        """[low, high) of the sigmas at which an expert works; everything where there is one transformer."""
        if self.boundary is None or expert is None:
            return 0.0, 1.0
        return (self.boundary, 1.0) if expert == "high" else (0.0, self.boundary)

    @property
    def transformer_class(self) -> str:
        """The diffusers class that holds this transformer."""
        if self.architecture.animate:
            return "WanAnimateTransformer3DModel"
        return "WanVACETransformer3DModel" if self.architecture.vace_layers else "WanTransformer3DModel"


_1B3 = Architecture(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, in_channels=16, out_channels=16)
_14B = Architecture(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824, in_channels=16, out_channels=16)
_5B = Architecture(dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
_TINY = Architecture(dim=192, num_heads=6, num_layers=6, ffn_dim=768, in_channels=16, out_channels=16, text_dim=128,
                     freq_dim=64)
_TINIER = replace(_TINY, dim=96, num_heads=3, num_layers=2, ffn_dim=192)
_TINIER_CLIP = replace(_TINIER, image_dim=32)
_1B3_CLIP = replace(_1B3, image_dim=CLIP_DIM)
_14B_CLIP = replace(_14B, image_dim=CLIP_DIM)
_14B_I2V = replace(_14B_CLIP, in_channels=36)
_FUN = (6.0, 6.0)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (
    Variant("wan21_t2v_1b3", "t2v", _1B3, 825, 1_418_996_800, 5.0, 50),
    Variant("wan21_t2v_14b", "t2v", _14B, 1095, 14_288_491_584, 5.0, 50),
    Variant("wan21_i2v_14b_480p", "i2v", _14B_I2V, 1303, 16_394_878_784, 3.0, 40),
    Variant("wan21_i2v_14b_720p", "i2v", _14B_I2V, 1303, 16_394_878_784, 5.0, 40),
    Variant("wan21_flf2v_14b", "flf2v", replace(_14B_I2V, image_tokens=FLF_TOKENS), 1304, 16_395_536_704, 16.0, 50),
    Variant("wan21_vace_1b3", "vace", replace(_1B3, vace_layers=tuple(range(0, 30, 2))), 1264, 2_153_972_032, 16.0, 50),
    Variant("wan21_vace_14b", "vace", replace(_14B, vace_layers=tuple(range(0, 40, 5))),
            1331, 17_337_592_896, 16.0, 50),
    Variant("wan21_fun_1b3_inp", "i2v", replace(_1B3_CLIP, in_channels=36), 983, 1_564_428_608, 3.0, 50, _FUN),
    Variant("wan21_fun_14b_inp", "i2v", _14B_I2V, 1303, 16_394_878_784, 3.0, 50, _FUN),
    Variant("wan21_fun_1b3_control", "control", replace(_1B3_CLIP, in_channels=48), 983, 1_564_502_336, 3.0, 50, _FUN),
    Variant("wan21_fun_14b_control", "control", replace(_14B_CLIP, in_channels=48),
            1303, 16_395_124_544, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_1b3_control", "control", replace(_1B3_CLIP, in_channels=48, ref_conv=True),
            985, 1_564_602_176, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_14b_control", "control", replace(_14B_CLIP, in_channels=48, ref_conv=True),
            1305, 16_395_457_344, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_1b3_camera", "camera", replace(_1B3_CLIP, in_channels=32, control_adapter=True),
            989, 1_616_313_152, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_14b_camera", "camera", replace(_14B_CLIP, in_channels=32, control_adapter=True),
            1309, 16_898_128_704, 3.0, 50, _FUN),
    Variant("wan22_t2v_a14b", "t2v", _14B, 1095, 14_288_491_584, 12.0, 40, (3.0, 4.0), 0.875),
    Variant("wan22_i2v_a14b", "i2v", replace(_14B, in_channels=36), 1095, 14_288_901_184, 5.0, 40, (3.5, 3.5), 0.9),
    Variant("wan22_fun_a14b_inp", "i2v", replace(_14B, in_channels=36), 1095, 14_288_901_184, 5.0, 50, _FUN, 0.9),
    Variant("wan22_fun_a14b_control", "control", replace(_14B, in_channels=52, ref_conv=True),
            1097, 14_289_561_664, 5.0, 50, _FUN, 0.9),
    Variant("wan22_fun_a14b_camera", "camera", replace(_14B, in_channels=36, control_adapter=True),
            1101, 14_792_233_024, 5.0, 50, _FUN, 0.9),
    Variant("wan22_ti2v_5b", "ti2v", _5B, 825, 4_999_787_712, 5.0, 50, fps=24, num_frames=121, vae="2.2",
            multiple_px=32),
    # Its tensors have no official names here: a diffusers folder is what loads.
    Variant("wan22_animate_14b", "animate", replace(_14B_I2V, animate=AnimateSizes()), None, None, 5.0, 20, (1.0, 1.0),
            fps=30, num_frames=77),
    Variant("tiny_wan", "t2v", _TINY, None, None, 3.0, 50, num_frames=9),
    # For the tests of every task; their weights are random.
    Variant("tiny_wan_a14b", "t2v", _TINIER, None, None, 12.0, 40, (3.0, 4.0), 0.875, num_frames=9),
    Variant("tiny_wan_i2v", "i2v", replace(_TINIER_CLIP, in_channels=36), None, None, 3.0, 40, num_frames=9),
    Variant("tiny_wan_i2v_a14b", "i2v", replace(_TINIER, in_channels=36), None, None, 5.0, 40, (3.5, 3.5), 0.9,
            num_frames=9),
    Variant("tiny_wan_flf2v", "flf2v", replace(_TINIER_CLIP, in_channels=36, image_tokens=10), None, None, 16.0, 50,
            num_frames=9),
    Variant("tiny_wan_ti2v", "ti2v", replace(_TINIER, in_channels=48, out_channels=48), None, None, 5.0, 50, fps=24,
            num_frames=9, vae="2.2", multiple_px=32),
    Variant("tiny_wan_vace", "vace", replace(_TINIER, vace_layers=(0, 1)), None, None, 16.0, 50, num_frames=9),
    Variant("tiny_wan_animate", "animate", replace(_TINIER_CLIP, in_channels=36, animate=AnimateSizes(
        16, 8, 4, 16, 16, 2, 2, (("4", 16), ("8", 16), ("16", 16)))), None, None, 5.0, 20, (1.0, 1.0), fps=30,
            num_frames=9),
    Variant("tiny_wan_control", "control", replace(_TINIER_CLIP, in_channels=48), None, None, 3.0, 50, _FUN,
            num_frames=9),
)}


def is_trainable(variant: Variant) -> bool:
    """Whether diffusers has a class with all its tensors (docs/facts.md, "Variants")."""
    return not (variant.architecture.ref_conv or variant.architecture.control_adapter)


def diffusers_config(variant: Variant) -> dict[str, Any]:
    """Keyword arguments of the variant's diffusers class (`variant.transformer_class`).

    Raises UserError for the variants whose extra tensors (ref_conv, control_adapter) diffusers has no class for.
    """
    a = variant.architecture
    if a.ref_conv or a.control_adapter:
        extra = "ref_conv" if a.ref_conv else "control_adapter"
        raise UserError(f"{variant.name}: diffusers has no transformer class with {extra}, so wantrain can inspect "
                        "and convert its files, but not train it", "use the variant's InP or Control (V1.0) checkpoint")
    config: dict[str, Any] = {
        "patch_size": PATCH,
        "num_attention_heads": a.num_heads,
        "attention_head_dim": a.dim // a.num_heads,
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "text_dim": a.text_dim,
        "freq_dim": a.freq_dim,
        "ffn_dim": a.ffn_dim,
        "num_layers": a.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": a.image_dim,
        "added_kv_proj_dim": a.dim if a.image_dim else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": a.image_tokens,
    }
    if a.animate:
        config |= {**asdict(a.animate), "latent_channels": a.out_channels}
        channels = config.pop("channels")
        config["motion_encoder_channel_sizes"] = dict(channels) if channels else None
    if a.vace_layers:
        config |= {"vace_layers": list(a.vace_layers), "vace_in_channels": a.vace_in_channels}
    return config


def is_diffusers_config(config: Mapping[str, Any]) -> bool:
    """Whether a transformer folder's config.json has diffusers' keys; the official one has `dim` and `num_heads`."""
    return "attention_head_dim" in config


ANIMATE = "Wan2.2-Animate (under official names)"

# Tensors that only a family we do not support has, in ComfyUI's order of detection (docs/facts.md, "Detection").
_UNSUPPORTED: dict[str, str] = {
    "casual_audio_encoder.": "Wan2.2-S2V",
    "audio_proj.audio_proj_glob_1.": "HuMo",
    "face_adapter.": ANIMATE,
    "motion_encoder.": ANIMATE,
    "patch_embedding_mask.": "SCAIL-2",
    "patch_embedding_pose.": "SCAIL",
    "patch_embedding_global.": "WanDancer",
}


@dataclass(frozen=True, slots=True)
class Detection:
    """What a transformer file holds.

    `layout` is the naming; `fitting` are the variants that the tensors fit, `candidates` those of them that the file
    name leaves, `certain` says that exactly one is left and nothing contradicts it; `expert` is high or low where
    the file name says so; `message` says what was decided from what, or what the config must state.
    """

    layout: Layout
    fitting: tuple[str, ...]
    candidates: tuple[str, ...]
    certain: bool
    expert: Expert | None
    message: str

    def resolve(self, stated: str | None = None) -> Variant:
        """The variant; `stated` is what the config says, goes before the file name, and must fit the tensors.

        Raises UserError where a choice is left, where `stated` does not fit, and for unsupported families.
        """
        if not self.fitting:
            raise UserError(self.message, f"use one of the supported checkpoints: {', '.join(VARIANTS)}")
        if stated is not None and stated not in self.fitting:
            raise UserError(f"model.variant is {stated}, but the tensors fit only {' or '.join(self.fitting)}",
                            f"set model.variant={self.fitting[0]}, or point at the files of {stated}")
        if stated is None and not self.certain:
            raise UserError(self.message, f"set model.variant to {' or '.join(self.candidates)}")
        return VARIANTS[stated or self.candidates[0]]


def detect(shapes: Shapes, file_name: str | None, config: Mapping[str, Any] | None = None) -> Detection:
    """Tell the variant from a transformer's tensor names and shapes (official or diffusers names, bare).

    Tensors cannot tell T2V-14B from T2V-A14B, I2V 480p from 720p from Fun-InP, or high from low: those come from
    `file_name` (a name or a whole path) where it is unambiguous; else the candidates are listed and the message says
    what the config must state. `config`: the folder's config.json, which says where VACE's blocks attach. Raises
    UserError when the tensors are no Wan transformer at all.
    """
    layout: Layout = "official" if "head.modulation" in shapes else "diffusers"
    for mark, family in _UNSUPPORTED.items():
        if not (family == ANIMATE and layout == "diffusers") and any(name.startswith(mark) for name in shapes):
            return Detection(layout, (), (), False, None, f"this is a {family} transformer (it has {mark}*), which "
                             "wantrain recognises but does not support")
    architecture = read_architecture(shapes, layout)
    stated = stated_vace_layers(config or {})
    if stated and len(stated) != len(architecture.vace_layers):
        raise UserError(f"config.json states {len(stated)} vace_layers, and the transformer has "
                        f"{len(architecture.vace_layers)} VACE blocks", "take both from one model")
    # The number of heads is a size that shapes do not show; those of Animate's encoders are taken on trust, and so is
    # where VACE's blocks attach, if the config states it.
    fitting = tuple(name for name, variant in VARIANTS.items()
                    if variant.architecture == replace(
                        architecture, num_heads=variant.architecture.num_heads,
                        vace_layers=variant.architecture.vace_layers if stated else architecture.vace_layers,
                        animate=variant.architecture.animate if architecture.animate else None))
    if not fitting:
        return Detection(layout, (), (), False, None, f"a Wan transformer of no known variant's sizes: {architecture}")
    return _narrow(layout, fitting, file_name)


def read_architecture(shapes: Shapes, layout: Layout) -> Architecture:
    """Sizes from names and shapes. `num_heads` assumes Wan's head size of 128, which shapes do not show.

    Raises UserError where a tensor that every Wan transformer has is missing or has another rank.
    """
    def shape(official: str, rank: int) -> tuple[int, ...]:
        name = official if layout == "official" else transformer_to_diffusers(official)
        if name not in shapes or len(shapes[name]) != rank:
            has = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(f"not a Wan transformer: {name} {has} (it has {len(shapes)} tensors: "
                            f"{', '.join(sorted(shapes)[:3])}, ...)",
                            "point the transformer path at the diffusion model, not at a VAE, text encoder or LoRA")
        return shapes[name]

    def has(official: str) -> bool:
        return (official if layout == "official" else transformer_to_diffusers(official)) in shapes

    dim, in_channels, *_ = shape("patch_embedding.weight", 5)
    vace = _count_blocks(shapes, "vace_blocks")
    num_layers = _count_blocks(shapes, "blocks")
    return Architecture(
        dim=dim,
        num_heads=max(1, dim // HEAD_DIM),
        num_layers=num_layers,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        in_channels=in_channels,
        out_channels=shape("head.head.weight", 2)[0] // 4,
        text_dim=shape("text_embedding.0.weight", 2)[1],
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        image_dim=shape("img_emb.proj.0.bias", 1)[0] if has("img_emb.proj.0.bias") else None,
        image_tokens=shape("img_emb.emb_pos", 3)[1] if has("img_emb.emb_pos") else None,
        # The published VACE spread their blocks evenly over the main ones; the weights do not say where they attach.
        vace_layers=tuple(block * num_layers // vace for block in range(vace)),
        vace_in_channels=shape("vace_patch_embedding.weight", 5)[1] if vace else 96,
        ref_conv="ref_conv.weight" in shapes,
        control_adapter="control_adapter.conv.weight" in shapes,
        animate=AnimateSizes() if any(name.startswith("face_adapter.") for name in shapes) else None,
    )


def stated_vace_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Where a transformer folder's config.json (diffusers' or the official one) says that VACE's blocks attach; empty
    where it does not say so.
    """
    stated = config.get("vace_layers") or ()
    if not isinstance(stated, list | tuple) or not all(isinstance(layer, int) for layer in stated) \
            or list(stated) != sorted(set(stated)) or (stated and stated[0] != 0):
        raise UserError(f"config.json: vace_layers = {stated} is not allowed: rising block numbers from 0 on",
                        "take the config.json that came with the weights")
    return tuple(stated)


def fitting_lora(sizes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The variants that have Linears of these names and sizes [out, in] (official module paths)."""
    return tuple(name for name, variant in VARIANTS.items()
                 if all(_has_linear(variant.architecture, module, size) for module, size in sizes.items()))


def _has_linear(a: Architecture, module: str, size: tuple[int, int]) -> bool:
    place = re.fullmatch(r"(vace_)?blocks\.(\d+)\.(.+)", module)
    if place is None:
        text, time, out = (a.dim, a.text_dim), (a.dim, a.freq_dim), (a.out_channels * 4, a.dim)
        known = {"text_embedding.0": text, "text_embedding.2": (a.dim, a.dim), "time_embedding.0": time,
                 "time_embedding.2": (a.dim, a.dim), "time_projection.1": (6 * a.dim, a.dim), "head.head": out}
        image = {"img_emb.proj.1": (a.image_dim, a.image_dim), "img_emb.proj.3": (a.dim, a.image_dim)}
        return size == (known | (image if a.image_dim else {})).get(module)
    is_vace, block, leaf = place[1] is not None, int(place[2]), place[3]
    wanted = {"ffn.0": (a.ffn_dim, a.dim), "ffn.2": (a.dim, a.ffn_dim)}.get(leaf, (a.dim, a.dim))
    if leaf in ("cross_attn.k_img", "cross_attn.v_img") and not a.image_dim:
        return False
    if leaf in ("before_proj", "after_proj") and not is_vace:
        return False
    return size == wanted and block < (len(a.vace_layers) if is_vace else a.num_layers)


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    numbers = {int(found[1]) for name in shapes if (found := re.match(rf"{prefix}\.([0-9]{{1,9}})\.", name))}
    if numbers and len(numbers) != max(numbers) + 1:
        absent = [number for number in range(min(max(numbers), len(numbers) + 5)) if number not in numbers]
        raise UserError(f"{prefix} {absent[:5]} of {max(numbers) + 1} are missing from this transformer",
                        "get the file again; if it is sharded, point at the folder with all the shards")
    return len(numbers)


# What a file name can say: each mark's pattern has the value as its group.
_GENERATION = re.compile(r"(?<![a-z0-9])wan[-_ ]?2[._]?([12])(?![0-9])")
_RESOLUTION = re.compile(r"(?<![0-9])(480p|720p)(?![a-z0-9])")
_KIND = re.compile(r"(?<![a-z0-9])(t2v|i2v|flf2v|ti2v|vace|inp|control|camera)(?:aint)?(?![a-z0-9])")
_NOISE = re.compile(r"(?<![a-z])(high|low)[-_. ]?noise")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])")
_LAST_EXPERT = re.compile(r"(?<![a-z])(high|low)(?=(?:[-_. ](?:v?\d\w*|[a-z]{1,5}\d+\w*|noise|model|expert|lora|"
                          r"comfy|ema|final|safetensors|pth|pt|ckpt|bin|gguf))*$)")
"""high or low as the last word of a name but for versions, steps, ranks and the suffix; `low_poly` is none."""
_BARE_EXPERT = re.compile(r"(?<![a-z])(high|low)(?![a-z])")
_A14B = re.compile(r"(?<![a-z0-9])a14b(?![a-z0-9])")
_IMPLIED_KINDS = {"inp": {"i2v"}, "camera": {"control"}}
_PATH_PARTS = 5
"""Parts of a path that may describe a file: NAME/snapshots/HASH/high_noise_model/FILE in the hub's cache."""


@dataclass(slots=True)
class _Said:
    """What a file name says; more than one value of a kind is a contradiction in itself."""

    generation: set[str]
    resolution: set[str]
    kind: set[str]
    expert: set[str]


def _said_by(part: str) -> _Said:
    text = part.lower()
    generation = {f"wan2{digit}" for digit in _GENERATION.findall(text)} | ({"wan22"} if _A14B.search(text) else set())
    expert = set(_NOISE.findall(_CAMEL.sub("_", part).lower()))
    if "wan22" in generation and not expert:
        expert = set(_BARE_EXPERT.findall(text))
    kind = set(_KIND.findall(text))
    for strong, weak in _IMPLIED_KINDS.items():
        kind -= weak if strong in kind else set()
    return _Said(generation | ({"wan22"} if expert else set()), set(_RESOLUTION.findall(text)), kind, expert)


def expert_named(path: Path) -> Expert | None:
    """Which expert a file is, or is for, by the innermost of its own name and two folders' that says high or low.

    In diffusers' folders `transformer` is the high noise expert where `transformer_2`, the low one, stands beside it.
    """
    for part in (path.absolute(), *path.absolute().parents[:2]):
        text = _CAMEL.sub("_", part.name).lower()
        said = set(_NOISE.findall(text)) or set(_LAST_EXPERT.findall(text))
        if part.name == "transformer_2":
            return "low"
        if part.name == "transformer" and part.with_name("transformer_2").is_dir():
            return "high"
        if said:
            return "high" if said == {"high"} else "low" if said == {"low"} else None
    return None


def _said(file_name: str | None) -> _Said:
    """Per kind of mark, what the innermost part of the path that has such a mark says."""
    parts = [_said_by(part) for part in reversed(re.split(r"[/\\]", file_name or "")[-_PATH_PARTS:])]

    def nearest(values: Iterator[set[str]]) -> set[str]:
        return next((value for value in values if value), set())

    return _Said(nearest(p.generation for p in parts), nearest(p.resolution for p in parts),
                 nearest(p.kind for p in parts), nearest(p.expert for p in parts))


def _agrees(variant: Variant, said: _Said) -> bool:
    """Whether nothing that the file name says is untrue of the variant; what a variant lacks cannot be untrue."""
    words = variant.name.split("_")
    generation = {word for word in words if word in ("wan21", "wan22")}
    resolution = {word for word in words if word in ("480p", "720p")}
    kind = {"inp" if "inp" in words else variant.task}
    return all(not own or values <= own for own, values in
               ((generation, said.generation), (resolution, said.resolution), (kind, said.kind)))


def _narrow(layout: Layout, fitting: tuple[str, ...], file_name: str | None) -> Detection:
    said = _said(file_name)
    agreeing = tuple(name for name in fitting if _agrees(VARIANTS[name], said))
    if said.resolution:
        agreeing = tuple(n for n in agreeing if n.endswith(tuple(said.resolution))) or agreeing
    fit = f"the tensors fit {' or '.join(fitting)}"
    if not agreeing:
        message = f"{fit}, but the file name {file_name!r} says otherwise"
        return Detection(layout, fitting, fitting, False, None, message)
    if len(agreeing) > 1:
        named = f"the file name {file_name!r} leaves" if file_name else "tensors alone leave"
        return Detection(layout, fitting, agreeing, False, None, f"{named} {' or '.join(agreeing)}")
    variant = VARIANTS[agreeing[0]]
    message = f"{variant.name}: " + ("from the tensors" if len(fitting) == 1 else f"{fit}, the file name decides")
    if not variant.experts:
        return Detection(layout, fitting, agreeing, True, None, message)
    expert: Expert | None = "high" if said.expert == {"high"} else "low" if said.expert == {"low"} else None
    return Detection(layout, fitting, agreeing, True, expert, f"{message}, {expert} noise" if expert else
                     f"{message}; neither tensors nor file name say whether it is the high or the low noise expert")
