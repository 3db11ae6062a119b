"""The variants table: every Wan checkpoint family that wantrain trains.

Sources: docs/facts.md, "Variants" (inventories, proven against the public files) and docs/facts.md, "Schedules" (where
one number, the boundary of Fun-A14B, is not verified).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict

from wantrain.models.names import VaeVersion
from wantrain.terms import NUM_TIMESTEPS, Bucket

Task = Literal["t2v", "i2v", "flf2v", "vace", "control", "control_reference", "control_inpaint", "camera",
               "camera_inpaint", "ti2v", "animate", "animate2"]
"""How a variant conditions; Fun-InP conditions as i2v does."""

Expert = Literal["high", "low"]

HEAD_DIM = 128
PATCH = (1, 2, 2)
CLIP_DIM = 1280
FLF_TOKENS = 514
DRIVING_PROMPT = "人物动作的参考视频"
"""Animate-2's own text of its driving video: a reference video of a person's motion."""

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

    `image_tokens`, `ref_conv`, `control_adapter` and `animate` are the extra tensors of FLF2V, Fun-Control (from V1.1
    on), Fun-Camera and Animate. `driven`: a driving video's tokens go through every block beside the clip's own, as
    Animate-2 has them; its tensors are those of image-to-video.
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
    driven: bool = False


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
    def second_prompt(self) -> str:
        """The text that goes with every driving video; empty where the variant takes none."""
        return DRIVING_PROMPT if self.architecture.driven else ""

    @property
    def native_tokens(self) -> int:
        """Transformer tokens of a clip of the native length and size (480 x 832 px; 704 x 1280 for TI2V-5B)."""
        height, width = NATIVE_PX[self.vae]
        return (1 + (self.num_frames - 1) // 4) * (height // self.multiple_px) * (width // self.multiple_px)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Names of the transformers where there are two, else empty."""
        return ("high", "low") if self.boundary is not None else ()

    @property
    def leaves_first_open(self) -> bool:
        """Whether a sample may be given its first frame, or not."""
        return self.task == "ti2v" or self.task.startswith("control")

    @property
    def has_plain_blocks(self) -> bool:
        """Whether nothing is added to what passes from block to block, as VACE and Animate do, or goes beside it, as
        Animate-2 has it.
        """
        own = self.architecture
        return not (own.vace_layers or own.animate or own.driven)

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
        """The class that holds this transformer: diffusers', or of wantrain.models.fun or driven."""
        own = self.architecture
        special = {"WanAnimateTransformer3DModel": own.animate, "WanVACETransformer3DModel": own.vace_layers,
                   "WanFunControlTransformer3DModel": own.ref_conv,
                   "WanFunCameraTransformer3DModel": own.control_adapter,
                   "WanDrivenTransformer3DModel": own.driven}
        return next((name for name, has in special.items() if has), "WanTransformer3DModel")


class _Newer(TypedDict):
    """What the checkpoints with the 2.2 VAE have in common."""

    fps: int
    num_frames: int
    vae: VaeVersion
    multiple_px: int


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
_2_2: _Newer = {"fps": 24, "num_frames": 121, "vae": "2.2", "multiple_px": 32}

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
    Variant("wan21_fun_v11_1b3_control", "control_reference", replace(_1B3_CLIP, in_channels=48, ref_conv=True),
            985, 1_564_602_176, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_14b_control", "control_reference", replace(_14B_CLIP, in_channels=48, ref_conv=True),
            1305, 16_395_457_344, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_1b3_camera", "camera", replace(_1B3_CLIP, in_channels=32, control_adapter=True),
            989, 1_616_313_152, 3.0, 50, _FUN),
    Variant("wan21_fun_v11_14b_camera", "camera", replace(_14B_CLIP, in_channels=32, control_adapter=True),
            1309, 16_898_128_704, 3.0, 50, _FUN),
    Variant("wan22_t2v_a14b", "t2v", _14B, 1095, 14_288_491_584, 12.0, 40, (3.0, 4.0), 0.875),
    Variant("wan22_i2v_a14b", "i2v", replace(_14B, in_channels=36), 1095, 14_288_901_184, 5.0, 40, (3.5, 3.5), 0.9),
    Variant("wan22_fun_a14b_inp", "i2v", replace(_14B, in_channels=36), 1095, 14_288_901_184, 5.0, 50, _FUN, 0.9),
    Variant("wan22_fun_a14b_control", "control_inpaint", replace(_14B, in_channels=52, ref_conv=True),
            1097, 14_289_561_664, 5.0, 50, _FUN, 0.9),
    Variant("wan22_fun_a14b_camera", "camera_inpaint", replace(_14B, in_channels=36, control_adapter=True),
            1101, 14_792_233_024, 5.0, 50, _FUN, 0.9),
    Variant("wan22_ti2v_5b", "ti2v", _5B, 825, 4_999_787_712, 5.0, 50, **_2_2),
    # Of these no digest of the public files is at hand: their sizes are those that VideoX-Fun's pipelines ask for.
    Variant("wan22_vace_fun_a14b", "vace", replace(_14B, vace_layers=tuple(range(0, 40, 5))), None, None,
            12.0, 50, (5.0, 5.0), 0.875),
    Variant("wan22_fun_5b_inp", "i2v", replace(_5B, in_channels=100), None, None, 5.0, 50, _FUN, **_2_2),
    Variant("wan22_fun_5b_control", "control_inpaint", replace(_5B, in_channels=148, ref_conv=True),
            None, None, 5.0, 50, _FUN, **_2_2),
    Variant("wan22_fun_5b_camera", "camera_inpaint", replace(_5B, in_channels=100, control_adapter=True),
            None, None, 5.0, 50, _FUN, **_2_2),
    Variant("wan22_animate_14b", "animate", replace(_14B_I2V, animate=AnimateSizes()), None, None, 5.0, 20, (1.0, 1.0),
            fps=30, num_frames=77),
    Variant("wan22_animate2_14b", "animate2", replace(_14B_I2V, driven=True), None, None, 5.0, 40, (3.0, 3.0), fps=24),
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
    Variant("tiny_wan_vace_a14b", "vace", replace(_TINIER, vace_layers=(0, 1)), None, None, 12.0, 50, (5.0, 5.0), 0.875,
            num_frames=9),
    Variant("tiny_wan_inp_5b", "i2v", replace(_TINIER, in_channels=100, out_channels=48), None, None, 5.0, 50, _FUN,
            fps=24, num_frames=9, vae="2.2", multiple_px=32),
    Variant("tiny_wan_animate", "animate", replace(_TINIER_CLIP, in_channels=36, animate=AnimateSizes(
        16, 8, 4, 16, 16, 2, 2, (("4", 16), ("8", 16), ("16", 16)))), None, None, 5.0, 20, (1.0, 1.0), fps=30,
            num_frames=9),
    Variant("tiny_wan_animate2", "animate2", replace(_TINIER_CLIP, in_channels=36, driven=True), None, None, 5.0, 40,
            (3.0, 3.0), fps=24, num_frames=9),
    Variant("tiny_wan_control", "control", replace(_TINIER_CLIP, in_channels=48), None, None, 3.0, 50, _FUN,
            num_frames=9),
    Variant("tiny_wan_control_v11", "control_reference", replace(_TINIER_CLIP, in_channels=48, ref_conv=True),
            None, None, 3.0, 50, _FUN, num_frames=9),
    Variant("tiny_wan_control_a14b", "control_inpaint", replace(_TINIER, in_channels=52, ref_conv=True),
            None, None, 5.0, 50, _FUN, 0.9, num_frames=9),
    Variant("tiny_wan_control_5b", "control_inpaint", replace(_TINIER, in_channels=148, out_channels=48, ref_conv=True),
            None, None, 5.0, 50, _FUN, fps=24, num_frames=9, vae="2.2", multiple_px=32),
    Variant("tiny_wan_camera", "camera", replace(_TINIER_CLIP, in_channels=32, control_adapter=True),
            None, None, 3.0, 50, _FUN, num_frames=9),
    Variant("tiny_wan_camera_5b", "camera_inpaint", replace(_TINIER, in_channels=100, out_channels=48,
                                                            control_adapter=True),
            None, None, 5.0, 50, _FUN, fps=24, num_frames=9, vae="2.2", multiple_px=32),
)}


def diffusers_config(variant: Variant) -> dict[str, Any]:
    """Keyword arguments of the variant's class (`variant.transformer_class`)."""
    a = variant.architecture
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
