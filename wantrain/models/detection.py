"""Which variant a transformer file or a LoRA holds, told by names and shapes of tensors, and by file names.

Sources: docs/facts.md, "Detection"; the order of questions is ComfyUI's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wantrain.models.names import driven_to_official, transformer_to_diffusers
from wantrain.models.variants import HEAD_DIM, VARIANTS, AnimateSizes, Architecture, Expert, SpeechSizes, Variant
from wantrain.terms import UserError

Layout = Literal["official", "diffusers"]
Shapes = Mapping[str, tuple[int, ...]]

_DERIVED = (
    (re.compile(r"distill|fastwan|causvid|anyflow|self[-_ ]?forcing|lightning|(?<![0-9])[1248][-_ ]?steps?(?![a-z])"),
     "a distilled base, and training would undo what lets it sample in few steps: train on {}, and sample with the "
     "few-step LoRA beside yours (sampler.loras)"),
    (re.compile(r"sky[-_ ]?reels"),
     "SkyReels-V2, of 24 frames a second and a schedule of its own: train on {}, whose tensors have the same names"))
"""Bases made of another one whose tensors they have: what their names say, and what to do instead, on which."""

# Tensors that only a family we do not support has, in ComfyUI's order of detection (docs/facts.md, "Detection").
_UNSUPPORTED: dict[str, str] = {
    "fps_embedding.": "SkyReels-V2 (diffusion forcing)",
    "blocks.0.to_gate_compress.": "FastWan (distilled)",
    "audio_proj.audio_proj_glob_1.": "HuMo",
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


PART_MARKS = {
    "VAE": ("encoder.conv1.weight", "encoder.conv_in.weight"),
    "umT5 text encoder": ("token_embedding.weight", "shared.weight"),
    "CLIP image encoder": ("visual.cls_embedding", "embeddings.class_embedding",
                           "vision_model.embeddings.class_embedding"),
}


def part_held(names: Collection[str]) -> str | None:
    """Which part of a checkpoint tensors of these names are, in words; None for a transformer and all else."""
    return next((part for part, marks in PART_MARKS.items() if any(mark in names for mark in marks)), None)


def detect(shapes: Shapes, file_name: str | None, config: Mapping[str, Any] | None = None) -> Detection:
    """Tell the variant from a transformer's tensor names and shapes (official or diffusers names, bare).

    Tensors cannot tell T2V-14B from T2V-A14B, I2V 480p from 720p from Fun-InP, or high from low: those come from
    `file_name` (a name or a whole path) where it is unambiguous; else the candidates are listed and the message says
    what the config must state. `config`: the folder's config.json, which says where VACE's blocks attach. Raises
    UserError when the tensors are no Wan transformer at all.
    """
    layout: Layout = "official" if "head.modulation" in shapes else "diffusers"
    given, shapes = shapes, {driven_to_official(name): shape for name, shape in shapes.items()}
    is_driven = shapes.keys() != given.keys()
    for mark, family in _UNSUPPORTED.items():
        if any(name.startswith(mark) for name in shapes):
            return Detection(layout, (), (), False, None, f"this is a {family} transformer (it has {mark}*), which "
                             "wantrain recognises but does not support")
    architecture = read_architecture(shapes, layout)
    stated = stated_vace_layers(config or {})
    if stated and len(stated) != len(architecture.vace_layers):
        raise UserError(f"config.json states {len(stated)} vace_layers, and the transformer has "
                        f"{len(architecture.vace_layers)} VACE blocks", "take both from one model")
    # The number of heads is a size that shapes do not show; those of Animate's and S2V's own modules are taken on
    # trust, and so is where VACE's blocks attach, if the config states it. Names may show a driving video; its shapes
    # are I2V's.
    fitting = tuple(name for name, own in ((name, variant.architecture) for name, variant in VARIANTS.items())
                    if is_driven <= own.driven
                    and (bool(own.animate), bool(own.speech)) == (bool(architecture.animate), bool(architecture.speech))
                    and own == replace(architecture, num_heads=own.num_heads, animate=own.animate, speech=own.speech,
                                       vace_layers=own.vace_layers if stated else architecture.vace_layers,
                                       driven=own.driven))
    part, advice = _derived(file_name)
    if part and fitting:
        agreeing = _left(fitting, _said(file_name)) or fitting
        return Detection(layout, (), (), False, None, f"{part!r} names {advice.format(' or '.join(agreeing))}. If it "
                         "is none, give it another name")
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
        speech=SpeechSizes() if "casual_audio_encoder.weights" in shapes else None,
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
        if a.speech and (own := _SOUND_LINEAR.fullmatch(module)):
            return size == ((2 if own[1] else 1) * a.dim, a.dim)
        return size == (known | (image if a.image_dim else {})).get(module)
    is_vace, block, leaf = place[1] is not None, int(place[2]), place[3]
    wanted = {"ffn.0": (a.ffn_dim, a.dim), "ffn.2": (a.dim, a.ffn_dim)}.get(leaf, (a.dim, a.dim))
    if leaf in ("cross_attn.k_img", "cross_attn.v_img") and not a.image_dim:
        return False
    if leaf in ("before_proj", "after_proj") and not is_vace:
        return False
    return size == wanted and block < (len(a.vace_layers) if is_vace else a.num_layers)


_SOUND_LINEAR = re.compile(r"casual_audio_encoder\.encoder\.final_linear|audio_injector\.(?:injector\.\d+\.[qkvo]|"
                           r"(injector_adain_layers)\.\d+\.linear)")


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
_KIND = re.compile(r"(?<![a-z0-9])(t2v|i2v|flf2v|ti2v|s2v|vace|inp|control|camera|animate[-_ ]?2)(?:aint)?(?![a-z0-9])")
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
    kind = {re.sub("[-_ ]", "", word) for word in _KIND.findall(text)}
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


def _derived(file_name: str | None) -> tuple[str, str]:
    """(part, advice) of the innermost part of the path that says which model it is, where that is one of _DERIVED;
    else ('', '').
    """
    for part in reversed(re.split(r"[/\\]", file_name or "")[-_PATH_PARTS:]):
        if advice := next((advice for name, advice in _DERIVED if name.search(part.lower())), ""):
            return part, advice
        said = _said_by(part)
        if said.generation or said.kind:
            break
    return "", ""


def _agrees(variant: Variant, said: _Said) -> bool:
    """Whether nothing that the file name says is untrue of the variant; what a variant lacks cannot be untrue."""
    words = variant.name.split("_")
    generation = {word for word in words if word in ("wan21", "wan22")}
    resolution = {word for word in words if word in ("480p", "720p")}
    kind = {"inp" if "inp" in words else variant.task.partition("_")[0]}
    return all(not own or values <= own for own, values in
               ((generation, said.generation), (resolution, said.resolution), (kind, said.kind)))


def _left(fitting: tuple[str, ...], said: _Said) -> tuple[str, ...]:
    """Those that the file name leaves. Animate-2 has to be named where the tensors could be image-to-video's."""
    return tuple(name for name in fitting if _agrees(VARIANTS[name], said)
                 and (said.kind or len(fitting) == 1 or not VARIANTS[name].architecture.driven))


def _narrow(layout: Layout, fitting: tuple[str, ...], file_name: str | None) -> Detection:
    said = _said(file_name)
    agreeing = _left(fitting, said)
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
