"""The names map: official Wan names <-> diffusers and transformers names. One table, exact and invertible.

A row is (official stem, other stem, leaves). `{}` stands for a block number and is the first number of a stem.
Leaves are the tensors under a stem; a row without leaves is itself a tensor. Stems with leaves are module paths.
Source: the inventories of the public files (docs/facts.md, "Names"); tests/parity/test_official_names.py
proves the tables against diffusers, transformers and the md5 of the public files' key lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Literal

Row = tuple[str, str, tuple[str, ...]]
Rename = Callable[[str], tuple[str, ...]]
"""A file's tensor name -> the module's tensor names it fills: one; several (rows split evenly); none (not needed)."""

VaeVersion = Literal["2.1", "2.2"]


class UnknownName(ValueError):
    """The table does not have the name `name`."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name


class NameMap:
    """Two dictionaries of templates built from rows, and the lookup in either direction."""

    def __init__(self, official: str, other: str, rows: Iterable[Row]) -> None:
        self.official, self.other = official, other
        self.forward: dict[str, str] = {}
        self.backward: dict[str, str] = {}
        self.modules: set[str] = set()
        self.flat: dict[str, str] = {}
        self.flat_other: dict[str, str] = {}
        for stem, twin, leaves in rows:
            if leaves:
                self.modules.add(stem)
                self.flat[stem.replace(".", "_")] = stem
                self.flat_other[twin.replace(".", "_")] = stem
            for end in ("", *(f".{leaf}" for leaf in leaves)):
                assert stem + end not in self.forward, f"{stem + end} stands twice in the table"
                assert twin + end not in self.backward, f"{twin + end} stands twice in the table"
                self.forward[stem + end] = twin + end
                self.backward[twin + end] = stem + end

    def to_other(self, name: str) -> str:
        """Official -> other. Raises UnknownName."""
        return _look_up(self.forward, name, self.official)

    def is_module(self, path: str) -> bool:
        """Whether an official path is a module with weights."""
        return "{" not in path and (path in self.modules or _template(path) in self.modules)

    def from_flat(self, name: str, other: bool) -> str:
        """A module path with underscores for dots, official or `other`, -> the official path. Raises UnknownName."""
        table, what = (self.flat_other, self.other) if other else (self.flat, self.official)
        return _look_up(table, name, f"{what} with underscores for dots")

    def to_official(self, name: str) -> str:
        """Other -> official. Raises UnknownName."""
        return _look_up(self.backward, name, self.other)


_NUMBER = re.compile(r"(?<=[._])(0|[1-9]\d*)(?=[._]|$)")


def _template(name: str) -> str:
    """The name with `{}` for its first number."""
    return _NUMBER.sub("{}", name, count=1)


def _look_up(table: dict[str, str], name: str, what: str) -> str:
    if "{" not in name:
        if name in table:
            return table[name]
        number = _NUMBER.search(name)
        if number and (found := table.get(_template(name))):
            return found.format(number[0])
    raise UnknownName(name, f"not a name of {what}")


def _under(prefixes: Iterable[tuple[str, str]], rows: Iterable[Row]) -> list[Row]:
    return [(a + official, b + other, leaves)
            for (a, b), (official, other, leaves) in product(prefixes, list(rows))]


LINEAR = ("weight", "bias")
SCALE = ("weight",)

_BLOCK: list[Row] = [
    ("modulation", "scale_shift_table", ()),
    ("self_attn.q", "attn1.to_q", LINEAR),
    ("self_attn.k", "attn1.to_k", LINEAR),
    ("self_attn.v", "attn1.to_v", LINEAR),
    ("self_attn.o", "attn1.to_out.0", LINEAR),
    ("self_attn.norm_q", "attn1.norm_q", SCALE),
    ("self_attn.norm_k", "attn1.norm_k", SCALE),
    ("cross_attn.q", "attn2.to_q", LINEAR),
    ("cross_attn.k", "attn2.to_k", LINEAR),
    ("cross_attn.v", "attn2.to_v", LINEAR),
    ("cross_attn.o", "attn2.to_out.0", LINEAR),
    ("cross_attn.norm_q", "attn2.norm_q", SCALE),
    ("cross_attn.norm_k", "attn2.norm_k", SCALE),
    ("cross_attn.k_img", "attn2.add_k_proj", LINEAR),
    ("cross_attn.v_img", "attn2.add_v_proj", LINEAR),
    ("cross_attn.norm_k_img", "attn2.norm_added_k", SCALE),
    ("norm3", "norm2", LINEAR),
    ("ffn.0", "ffn.net.0.proj", LINEAR),
    ("ffn.2", "ffn.net.2", LINEAR),
]

_VACE_BLOCK: list[Row] = [
    *_BLOCK,
    ("before_proj", "proj_in", LINEAR),
    ("after_proj", "proj_out", LINEAR),
]

_TRANSFORMER: list[Row] = [
    ("patch_embedding", "patch_embedding", LINEAR),
    ("vace_patch_embedding", "vace_patch_embedding", LINEAR),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1", LINEAR),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", LINEAR),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1", LINEAR),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2", LINEAR),
    ("time_projection.1", "condition_embedder.time_proj", LINEAR),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed", ()),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1", LINEAR),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", LINEAR),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", LINEAR),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2", LINEAR),
    ("head.head", "proj_out", LINEAR),
    ("head.modulation", "scale_shift_table", ()),
    *_under([("blocks.{}.", "blocks.{}.")], _BLOCK),
    *_under([("vace_blocks.{}.", "vace_blocks.{}.")], _VACE_BLOCK),
    *((stem, stem, LINEAR) for stem in (
        "ref_conv", "control_adapter.conv", *(f"control_adapter.residual_blocks.{{}}.conv{i}" for i in (1, 2)),
        "cond_encoder", *(f"frame_packer.proj{size}" for size in ("", "_2x", "_4x")),
        *(f"casual_audio_encoder.encoder.{layer}" for layer in (
            "conv1_local.conv", "conv1_global.conv", "conv2.conv", "conv3.conv", "final_linear")),
        *(f"audio_injector.injector.{{}}.{x}" for x in "qkvo"), "audio_injector.injector_adain_layers.{}.linear")),
    *((stem, stem, SCALE) for stem in (
        "trainable_cond_mask", *(f"audio_injector.injector.{{}}.norm_{x}" for x in "qk"))),
    *((name, name, ()) for name in ("casual_audio_encoder.weights", "casual_audio_encoder.encoder.padding_tokens")),
]

_ANIMATE: list[Row] = [(stem, stem, LINEAR) for stem in (
    "face_encoder.out_proj", *(f"face_adapter.{{}}.to_{x}" for x in ("q", "k", "v", "out")))]

_RESIDUAL: list[Row] = [
    ("residual.0", "norm1", ("gamma",)),
    ("residual.2", "conv1", LINEAR),
    ("residual.3", "norm2", ("gamma",)),
    ("residual.6", "conv2", LINEAR),
    ("shortcut", "conv_shortcut", LINEAR),
]
_RESAMPLE: list[Row] = [("resample.1", "resample.1", LINEAR), ("time_conv", "time_conv", LINEAR)]
_MIDDLE: list[Row] = [
    *_under([("0.", "resnets.0."), ("2.", "resnets.1.")], _RESIDUAL),
    ("1.norm", "attentions.0.norm", ("gamma",)),
    ("1.to_qkv", "attentions.0.to_qkv", LINEAR),
    ("1.proj", "attentions.0.proj", LINEAR),
]
_VAE_COMMON: list[Row] = [
    ("conv1", "quant_conv", LINEAR),
    ("conv2", "post_quant_conv", LINEAR),
    *_under(
        [("encoder.", "encoder."), ("decoder.", "decoder.")],
        [("conv1", "conv_in", LINEAR), ("head.0", "norm_out", ("gamma",)), ("head.2", "conv_out", LINEAR),
         *_under([("middle.", "mid_block.")], _MIDDLE)],
    ),
]
# 2.1 lists residual and resampling layers flat. The decoder has 3 residual layers and a resampling one in each of
# its 4 groups (the last group without), so official layer i is group i // 4, layer i % 4.
_VAE_21: list[Row] = [
    *_VAE_COMMON,
    *_under([("encoder.downsamples.{}.", "encoder.down_blocks.{}.")], [*_RESIDUAL, *_RESAMPLE]),
    *_under([(f"decoder.upsamples.{4 * g + j}.", f"decoder.up_blocks.{g}.resnets.{j}.")
             for g in range(4) for j in range(3)], _RESIDUAL),
    *_under([(f"decoder.upsamples.{4 * g + 3}.", f"decoder.up_blocks.{g}.upsamplers.0.") for g in range(3)], _RESAMPLE),
]
_VAE_22: list[Row] = [
    *_VAE_COMMON,
    *_under([(f"encoder.downsamples.{{}}.downsamples.{j}.", f"encoder.down_blocks.{{}}.resnets.{j}.")
             for j in range(2)], _RESIDUAL),
    *_under([("encoder.downsamples.{}.downsamples.2.", "encoder.down_blocks.{}.downsampler.")], _RESAMPLE),
    *_under([(f"decoder.upsamples.{{}}.upsamples.{j}.", f"decoder.up_blocks.{{}}.resnets.{j}.")
             for j in range(3)], _RESIDUAL),
    *_under([("decoder.upsamples.{}.upsamples.3.", "decoder.up_blocks.{}.upsampler.")], _RESAMPLE),
]

_T5: list[Row] = [
    ("token_embedding", "shared", SCALE),
    ("norm", "encoder.final_layer_norm", SCALE),
    *_under([("blocks.{}.", "encoder.block.{}.layer.")], [
        ("norm1", "0.layer_norm", SCALE),
        ("norm2", "1.layer_norm", SCALE),
        ("attn.q", "0.SelfAttention.q", SCALE),
        ("attn.k", "0.SelfAttention.k", SCALE),
        ("attn.v", "0.SelfAttention.v", SCALE),
        ("attn.o", "0.SelfAttention.o", SCALE),
        ("pos_embedding.embedding", "0.SelfAttention.relative_attention_bias", SCALE),
        ("ffn.gate.0", "1.DenseReluDense.wi_0", SCALE),
        ("ffn.fc1", "1.DenseReluDense.wi_1", SCALE),
        ("ffn.fc2", "1.DenseReluDense.wo", SCALE),
    ]),
]

_CLIP: list[Row] = _under([("visual.", "")], [
    ("cls_embedding", "embeddings.class_embedding", ()),
    ("pos_embedding", "embeddings.position_embedding.weight", ()),
    ("patch_embedding", "embeddings.patch_embedding", SCALE),
    ("pre_norm", "pre_layrnorm", LINEAR),
    ("post_norm", "post_layernorm", LINEAR),
    *_under([("transformer.{}.", "encoder.layers.{}.")], [
        ("norm1", "layer_norm1", LINEAR),
        ("norm2", "layer_norm2", LINEAR),
        ("attn.proj", "self_attn.out_proj", LINEAR),
        ("mlp.0", "mlp.fc1", LINEAR),
        ("mlp.2", "mlp.fc2", LINEAR),
    ]),
])
_CLIP_QKV = re.compile(r"visual\.transformer\.(\d+)\.attn\.to_qkv((?:\.(?:weight|bias))?)")
_CLIP_Q_K_V = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj((?:\.(?:weight|bias))?)")
_CLIP_NOT_VISION = ("textual.", "log_scale", "visual.head")
"""The official CLIP file holds the text tower and the projection too; the video models use neither."""

TRANSFORMER = NameMap("the official Wan transformer", "the diffusers Wan transformer", _TRANSFORMER)
VAE: dict[VaeVersion, NameMap] = {
    "2.1": NameMap("the official Wan 2.1 VAE", "the diffusers Wan 2.1 VAE", _VAE_21),
    "2.2": NameMap("the official Wan 2.2 VAE", "the diffusers Wan 2.2 VAE", _VAE_22),
}
ANIMATE = NameMap("the diffusers Wan-Animate transformer", "the diffusers Wan-Animate transformer", _ANIMATE)
"""Those Linears of Wan-Animate whose names are diffusers' everywhere here: the official ones are cut otherwise."""
T5 = NameMap("the official umT5 encoder", "transformers' UMT5EncoderModel", _T5)
CLIP = NameMap("the official CLIP", "transformers' CLIPVisionModel", _CLIP)


def transformer_to_diffusers(name: str) -> str:
    """Official tensor name or module path -> diffusers. Raises UnknownName."""
    return TRANSFORMER.to_other(name)


def transformer_to_official(name: str) -> str:
    """Diffusers tensor name or module path -> official. Raises UnknownName."""
    return TRANSFORMER.to_official(name)


def module_to_diffusers(module: str) -> str:
    """Official module path, or one of Wan-Animate's own -> diffusers. Raises UnknownName."""
    return module if ANIMATE.is_module(module) else transformer_to_diffusers(module)


def module_to_official(module: str) -> str:
    """Diffusers module path -> official, or that of Wan-Animate's own. Raises UnknownName."""
    return module if ANIMATE.is_module(module) else transformer_to_official(module)


def vae_to_diffusers(name: str, version: VaeVersion) -> str:
    """Official VAE name -> diffusers. Raises UnknownName."""
    return VAE[version].to_other(name)


def vae_to_official(name: str, version: VaeVersion) -> str:
    """Diffusers VAE name -> official. Raises UnknownName."""
    return VAE[version].to_official(name)


def t5_to_hf(name: str) -> str:
    """Official umT5 name -> transformers. Raises UnknownName."""
    return T5.to_other(name)


def t5_to_official(name: str) -> str:
    """Transformers umT5 name -> official; `encoder.embed_tokens`, tied to `shared`, too. Raises UnknownName."""
    return T5.to_official(name.replace("encoder.embed_tokens", "shared"))


def clip_to_hf(name: str) -> tuple[str, ...]:
    """Official CLIP name -> transformers' CLIPVisionModel names.

    `attn.to_qkv` gives three names (its rows split evenly, in this order); the text tower, the projection head and
    the temperature give none. Raises UnknownName.
    """
    if name.startswith(_CLIP_NOT_VISION):
        return ()
    if found := _CLIP_QKV.fullmatch(name):
        return tuple(f"encoder.layers.{found[1]}.self_attn.{x}_proj{found[2]}" for x in "qkv")
    return (CLIP.to_other(name),)


def clip_to_official(name: str) -> tuple[str, int | None]:
    """CLIPVisionModel name -> (official name, which third of its rows; None for all). Raises UnknownName."""
    if found := _CLIP_Q_K_V.fullmatch(name):
        return f"visual.transformer.{found[1]}.attn.to_qkv{found[3]}", "qkv".index(found[2])
    return CLIP.to_official(name), None


def transformer_rename(names: Collection[str]) -> Rename:
    """From a transformer file's names (official or diffusers, bare) to the diffusers module's."""
    if "head.modulation" in names:
        return lambda name: animate_to_diffusers(name) if name.startswith(ANIMATE_ONLY) else (
            transformer_to_diffusers(driven_to_official(name)),)
    return lambda name: (name if name.startswith(ANIMATE_ONLY) else transformer_to_diffusers(
        transformer_to_official(name)),)


def driven_to_official(name: str) -> str:
    """The official name in image-to-video of a tensor of Animate-2, whose official file wraps each block once more, and
    of which diffusers has the Linears of attention renamed; any other name stays.
    """
    if found := _DRIVEN.fullmatch(name):
        block, attention, leaf, rest = found.groups()
        return f"{block}{attention or ''}{_DRIVEN_LEAVES.get(leaf, leaf) if attention else leaf}{rest}"
    return name


_DRIVEN = re.compile(r"(blocks\.\d+\.)(?:block\.)?((?:self|cross)_attn\.)?(to_out\.0|\w+)(.*)")
_DRIVEN_LEAVES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img",
                  "norm_added_k": "norm_k_img"}


def animate_to_diffusers(name: str) -> tuple[str, ...]:
    """Official name of one of Wan-Animate's own tensors -> those that it fills: two where its rows are k and v; none
    for a kernel of blur, which diffusers' class makes itself. Raises UnknownName.
    """
    for pattern, twins in _ANIMATE_OFFICIAL:
        if found := re.fullmatch(pattern, name):
            first, second = (*found.groups(), "", "")[:2]
            return tuple(twin.format(first, second, int(first) - 1 if first.isdigit() else 0) for twin in twins)
    raise UnknownName(name, "not a name of the official Wan-Animate transformer")


_CONVS = r"motion_encoder\.enc\.net_app\.convs\."
_ANIMATE_OFFICIAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(pose_patch_embedding)\.(\w+)", ("{}.{}",)),
    (r"motion_encoder\.dec\.direction\.weight", ("motion_encoder.motion_synthesis_weight",)),
    (r"motion_encoder\.enc\.fc\.(\d+)\.(\w+)", ("motion_encoder.motion_network.{}.{}",)),
    (_CONVS + r"0\.0\.weight", ("motion_encoder.conv_in.weight",)),
    (_CONVS + r"0\.1\.bias", ("motion_encoder.conv_in.act_fn.bias",)),
    (_CONVS + r"\d+\.weight", ("motion_encoder.conv_out.weight",)),
    (_CONVS + r"\d+\.(?:conv2|skip)\.0\.kernel", ()),
    (_CONVS + r"(\d+)\.(conv1)\.0\.weight", ("motion_encoder.res_blocks.{2}.{1}.weight",)),
    (_CONVS + r"(\d+)\.(conv1)\.1\.bias", ("motion_encoder.res_blocks.{2}.{1}.act_fn.bias",)),
    (_CONVS + r"(\d+)\.(conv2)\.1\.weight", ("motion_encoder.res_blocks.{2}.{1}.weight",)),
    (_CONVS + r"(\d+)\.(conv2)\.2\.bias", ("motion_encoder.res_blocks.{2}.{1}.act_fn.bias",)),
    (_CONVS + r"(\d+)\.skip\.1\.weight", ("motion_encoder.res_blocks.{2}.conv_skip.weight",)),
    (r"face_encoder\.(conv\w+)\.conv\.(\w+)", ("face_encoder.{}.{}",)),
    (r"face_encoder\.(out_proj)\.(\w+)", ("face_encoder.{}.{}",)),
    (r"face_encoder\.padding_tokens", ("face_encoder.padding_tokens",)),
    (r"face_adapter\.fuser_blocks\.(\d+)\.linear1_kv\.(\w+)",
     ("face_adapter.{}.to_k.{}", "face_adapter.{}.to_v.{}")),
    (r"face_adapter\.fuser_blocks\.(\d+)\.linear1_q\.(\w+)", ("face_adapter.{}.to_q.{}",)),
    (r"face_adapter\.fuser_blocks\.(\d+)\.linear2\.(\w+)", ("face_adapter.{}.to_out.{}",)),
    (r"face_adapter\.fuser_blocks\.(\d+)\.q_norm\.(\w+)", ("face_adapter.{}.norm_q.{}",)),
    (r"face_adapter\.fuser_blocks\.(\d+)\.k_norm\.(\w+)", ("face_adapter.{}.norm_k.{}",)),
)
"""Official names -> diffusers': {} are the groups, {2} the first as a number less one."""

OWN_ONLY = ("ref_conv", "control_adapter.", "cond_encoder.", "frame_packer.", "casual_audio_encoder.",
            "audio_injector.", "trainable_cond_mask.")
"""Modules of Wan-Fun and S2V, which diffusers' classes do not have."""

ANIMATE_ONLY = ("pose_patch_embedding.", "motion_encoder.", "face_encoder.", "face_adapter.")
"""Wan-Animate's own modules under diffusers' names, which are theirs everywhere here."""


def official_names(names: Collection[str]) -> dict[str, str]:
    """A transformer file's names (official or diffusers, bare) -> the official ones. Raises UnknownName."""
    if "head.modulation" in names:
        return {name: driven_to_official(name) for name in names}
    return {name: name if name.startswith(ANIMATE_ONLY) else transformer_to_official(name) for name in names}


def vae_version(names: Collection[str]) -> VaeVersion:
    """Which VAE a file holds, by its names (official or diffusers)."""
    nested = ("encoder.downsamples.0.downsamples.", "encoder.down_blocks.0.resnets.")
    return "2.2" if any(name.startswith(nested) for name in names) else "2.1"


def vae_rename(names: Collection[str]) -> Rename:
    """From a VAE file's names (official or diffusers) to the diffusers module's."""
    table = VAE[vae_version(names)]
    if "encoder.conv1.weight" in names:
        return lambda name: (table.to_other(name),)
    return lambda name: (name,)


def t5_rename(names: Collection[str]) -> Rename:
    """From a umT5 file's names (official or transformers) to UMT5EncoderModel's; the tied copy is read once."""
    if "token_embedding.weight" in names:
        return lambda name: (t5_to_hf(name),)

    def rename(name: str) -> tuple[str, ...]:
        if name == "encoder.embed_tokens.weight" and "shared.weight" in names:
            return ()
        return (t5_to_hf(t5_to_official(name)),)

    return rename


def clip_rename(names: Collection[str]) -> Rename:
    """From a CLIP file's names (official; transformers with or without `vision_model.`) to CLIPVisionModel's."""
    if any(name.startswith("visual.") for name in names):
        return clip_to_hf

    def rename(name: str) -> tuple[str, ...]:
        if name == "visual_projection.weight" or name.endswith("embeddings.position_ids"):
            return ()
        bare = name.removeprefix("vision_model.")
        clip_to_official(bare)
        return (bare,)

    return rename


def wav2vec2_rename(_: Collection[str]) -> Rename:
    """From a wav2vec2 file's names (transformers', with or without `wav2vec2.`) to Wav2Vec2Model's. What recognises
    words (`lm_head`), and what stands for masked sound in its own training, are not needed.
    """
    halves = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

    def rename(name: str) -> tuple[str, ...]:
        bare = name.removeprefix("wav2vec2.")
        owner, _, leaf = bare.rpartition(".")
        if bare.startswith("lm_head.") or bare == "masked_spec_embed":
            return ()
        return (f"{owner}.{halves.get(leaf, leaf)}",)

    return rename
