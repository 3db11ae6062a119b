"""Tiny random Wan models with the real tensor names, and every container that such weights are published in.

`python -m tests.tiny_models FOLDER` writes all of them. The writers use no code of wantrain.models.containers.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from gguf import GGMLQuantizationType as Ggml
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wantrain.models import fun, names

Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2, "text_dim": 32, "freq_dim": 32,
    "rope_max_seq_len": 64,
}
_CLIP: dict[str, Any] = {"image_dim": 64, "added_kv_proj_dim": 32}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "t2v_a14b": {},  # the tensors of t2v, twice
    "ti2v": {"in_channels": 48, "out_channels": 48},
    "i2v": {"in_channels": 36, **_CLIP},  # and Fun InP, which has the same tensors
    "i2v_a14b": {"in_channels": 36},  # and Fun A14B InP
    "flf2v": {"in_channels": 36, "pos_embed_seq_len": 10, **_CLIP},
    "vace": {"vace_layers": [0, 1], "vace_in_channels": 96},
    "fun_control": {"in_channels": 48, **_CLIP},
    "fun_v11_control": {"in_channels": 48, **_CLIP},
    "fun_v11_camera": {"in_channels": 32, **_CLIP},
    "fun_a14b_control": {"in_channels": 52},
    "fun_a14b_camera": {"in_channels": 36},
    "vace_a14b": {"vace_layers": [0, 1], "vace_in_channels": 96},
    "fun_5b_inp": {"in_channels": 100, "out_channels": 48},
    "fun_5b_control": {"in_channels": 148, "out_channels": 48},
    "fun_5b_camera": {"in_channels": 100, "out_channels": 48},
    "s2v": {"audio_dim": 16, "audio_states": 3, "audio_tokens": 2, "audio_layers": [0, 1]},
}
OWN_CLASSES: dict[str, type[torch.nn.Module]] = {
    **dict.fromkeys(("vace", "vace_a14b"), WanVACETransformer3DModel),
    **dict.fromkeys(("fun_v11_control", "fun_a14b_control", "fun_5b_control"), fun.WanFunControlTransformer3DModel),
    **dict.fromkeys(("fun_v11_camera", "fun_a14b_camera", "fun_5b_camera"), fun.WanFunCameraTransformer3DModel),
    "s2v": fun.WanSpeechTransformer3DModel}
EXPERTS = tuple(kind for kind in TRANSFORMERS if "a14b" in kind)
"""The kinds of which a checkpoint has two, for high and low noise."""
WIDE: dict[str, Any] = {"attention_head_dim": 128, "ffn_dim": 256, "text_dim": 256, "freq_dim": 256, "image_dim": 256,
                        "added_kv_proj_dim": 256, "num_layers": 1, "vace_layers": [0]}
"""Sizes for K-quants, whose rows are multiples of 256."""
VAES: dict[names.VaeVersion, dict[str, Any]] = {
    "2.1": {"base_dim": 2, "dim_mult": [1, 2, 2, 2]},
    "2.2": {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 2, 4, 4], "z_dim": 48, "in_channels": 12,
            "out_channels": 12, "is_residual": True, "patch_size": 2, "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48, "scale_factor_spatial": 16},
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "relative_attention_num_buckets": 8}
CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "intermediate_size": 64,
        "patch_size": 4}
SPIECE = bytes(range(256))
"""What stands for the tokenizer inside ComfyUI's text encoder files."""


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """One model of a checkpoint: its module, that module's state dict under official names, how files are renamed."""

    name: str
    build: Callable[[], torch.nn.Module]
    official: Callable[[Tensors], Tensors]
    rename: Callable[[Collection[str]], names.Rename]


def _official_transformer(state: Tensors) -> Tensors:
    return {names.transformer_to_official(name): tensor for name, tensor in state.items()}


def _official_vae(version: names.VaeVersion, state: Tensors) -> Tensors:
    return {names.vae_to_official(name, version): tensor for name, tensor in state.items()}


def _official_t5(state: Tensors) -> Tensors:
    return {names.t5_to_official(name): tensor for name, tensor in state.items()}


def _official_clip(state: Tensors) -> Tensors:
    """With q, k and v stacked, and the embeddings' leading axes."""
    official: Tensors = {}
    for name, tensor in state.items():
        whole, third = names.clip_to_official(name)
        if third is not None:
            rows = tensor.shape[0]
            official.setdefault(whole, tensor.new_empty(3 * rows, *tensor.shape[1:]))
            official[whole][third * rows : (third + 1) * rows] = tensor
        else:
            embedding = whole in ("visual.cls_embedding", "visual.pos_embedding")
            official[whole] = tensor.reshape(1, -1, tensor.shape[-1]) if embedding else tensor
    return official


@functools.cache
def _transformer(kind: str, wide: bool = False) -> Part:
    config = SIZES | TRANSFORMERS[kind]
    config |= {key: size for key, size in WIDE.items() if wide and key in config}
    return Part(kind, partial(OWN_CLASSES.get(kind, WanTransformer3DModel), **config), _official_transformer,
                names.transformer_rename)


PARTS: dict[str, Part] = {part.name: part for part in (
    *map(_transformer, TRANSFORMERS),
    *(Part(f"vae {version}", partial(AutoencoderKLWan, **config), partial(_official_vae, version), names.vae_rename)
      for version, config in VAES.items()),
    Part("umt5", lambda: UMT5EncoderModel(UMT5Config(**T5)), _official_t5, names.t5_rename),
    Part("clip", lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP)), _official_clip, names.clip_rename),
)}


@functools.cache
def module(part: Part, seed: int = 0) -> torch.nn.Module:
    """Every parameter from a normal distribution: zero-initialised ones would hide a mix-up. Not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    made = part.build()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return made.eval().requires_grad_(False)


@functools.cache
def weights(part: Part, seed: int = 0) -> Tensors:
    """A part's weights under the official names. Not to be changed."""
    return part.official(module(part, seed).state_dict())


def transformer(kind: str, seed: int = 0) -> torch.nn.Module:
    """A tiny diffusers transformer of one of TRANSFORMERS; one object for all callers, so not to be changed."""
    return module(PARTS[kind], seed)


def official_transformer(module: torch.nn.Module) -> Tensors:
    """The module's weights under the official names."""
    return _official_transformer(module.state_dict())


# Storage: weights -> (the file's tensors, the float32 weights that they stand for).

Storage = Callable[[Tensors], tuple[Tensors, Tensors]]
_NOT_LINEAR = ("shared.", "token_embedding.", "relative_attention_bias.", "pos_embedding.")


def matrices(weights: Tensors) -> list[str]:
    """The Linear weights, which quantisers take."""
    return [name for name, tensor in weights.items() if tensor.ndim == 2 and name.endswith(".weight")
            and not any(mark in name for mark in _NOT_LINEAR)]


def as_is(weights: Tensors) -> tuple[Tensors, Tensors]:
    return weights, weights


def cast(dtype: torch.dtype, rest: torch.dtype | None = None) -> Storage:
    """Plain storage in another dtype, of the matrices only where there is one for the rest."""
    def to(weights: Tensors) -> tuple[Tensors, Tensors]:
        stored = {name: tensor.to(dtype if rest is None or name in matrices(weights) else rest)
                  for name, tensor in weights.items()}
        return stored, {name: tensor.float() for name, tensor in stored.items()}

    return to


def _scaled(weights: Tensors, suffix: str, rest: torch.dtype, amax: Callable[[torch.Tensor], torch.Tensor],
            dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensors, Tensors]:
    """Matrices as fp8 or int8 with a scale each, of the shape that `amax` has; a block is of 16 columns."""
    stored, meant = cast(rest)(weights)
    for name in matrices(weights):
        scale = amax(weights[name].abs()) / (448 if dtype.is_floating_point else 127)
        each = scale.expand(-1, -1, 16).reshape(weights[name].shape) if scale.ndim == 3 else scale
        quotient = weights[name] / each
        stored[name] = (quotient if dtype.is_floating_point else quotient.round()).to(dtype)
        stored[name.removesuffix(".weight") + suffix] = scale
        meant[name] = stored[name].float() * each
    return stored, meant


def fp8_tensor_scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's older style: a marker, `scale_weight` and `scale_input` scalars."""
    stored, meant = _scaled(weights, ".scale_weight", torch.float16, torch.max)
    extra = {name.replace(".scale_weight", ".scale_input"): torch.tensor(1.0) for name in stored
             if name.endswith(".scale_weight")}
    return {**stored, **extra, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, meant


def fp8_comfy_quant(weights: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's newer style: `weight_scale` and a JSON note in bytes for each layer."""
    stored, meant = _scaled(weights, ".weight_scale", torch.float16, torch.max)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return {**stored, **{f"{name.removesuffix('.weight')}.comfy_quant": note for name in matrices(weights)}}, meant


def row_scaled(dtype: torch.dtype) -> Storage:
    """LightX2V, and musubi under another suffix: [out, 1]."""
    return lambda weights: _scaled(weights, ".weight_scale", torch.bfloat16, lambda w: w.amax(1, keepdim=True), dtype)


def fp8_block_scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """musubi: [out, blocks, 1]."""
    return _scaled(weights, ".scale_weight", torch.bfloat16, lambda w: w.unflatten(1, (-1, 16)).amax(2, keepdim=True))


# Writers: what is stored -> the file, or the folder that holds it.

Write = Callable[[Path, Tensors], Path]


def _save(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned, as safetensors refuses tensors that share memory.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def bare_file(folder: Path, tensors: Tensors) -> Path:
    return _save(folder / "model.safetensors", tensors)


def prefixed(prefix: str, write: Write = bare_file) -> Write:
    return lambda folder, tensors: write(folder, {prefix + name: tensor for name, tensor in tensors.items()})


prefixed_file = prefixed("model.diffusion_model.")


def beside(extra: Tensors, write: Write) -> Write:
    """With tensors that are no weights of the part."""
    return lambda folder, tensors: write(folder, {**tensors, **extra})


def _pickle(path: Path, content: Mapping[str, Any], **options: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def pickle_file(folder: Path, tensors: Tensors) -> Path:
    return _pickle(folder / "model.pth", tensors)


def old_pickle_file(folder: Path, tensors: Tensors) -> Path:
    """The format before the zip one, under a trainer's outer key."""
    return _pickle(folder / "model.pth", {"model_state": tensors}, _use_new_zipfile_serialization=False)


def official_folder(suffix: str, num_shards: int = 1) -> Write:
    """The official folder: one file, or shards and, for safetensors, their index; and its config."""
    def write(folder: Path, tensors: Tensors) -> Path:
        put = _save if suffix == "safetensors" else _pickle
        stem, weight_map = "diffusion_pytorch_model", {}
        for i in range(num_shards):
            part = dict(list(tensors.items())[i::num_shards])
            shard = f"-{i + 1:05d}-of-{num_shards:05d}" if num_shards > 1 else ""
            weight_map |= dict.fromkeys(part, put(folder / f"{stem}{shard}.{suffix}", part).name)
        if num_shards > 1 and suffix == "safetensors":
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
        return folder

    return write


sharded_folder = official_folder("safetensors", 3)


# GGUF: blocks of bytes by tensor, and their type.

Blocks = dict[str, tuple[np.ndarray, Ggml]]
_K_FLOATS = {Ggml.Q2_K: (80, 82), Ggml.Q3_K: (108,), Ggml.Q4_K: (0, 2), Ggml.Q5_K: (0, 2), Ggml.Q6_K: (208,)}
"""Where a block of each K type has its float16 scales; any other byte may be anything."""


def quantised(kind: Ggml, weights: Tensors) -> Blocks:
    """Matrices in `kind`, the rest float32, as ComfyUI-GGUF's converter does."""
    taken = matrices(weights)
    return {name: (gguf.quantize(tensor.float().numpy(), kind if name in taken else Ggml.F32),
                   kind if name in taken else Ggml.F32) for name, tensor in weights.items()}


def random_k_blocks(weights: Tensors) -> Blocks:
    """Matrices as random blocks of K types, mixed as real files have them: gguf cannot quantise to K types."""
    random = np.random.default_rng(0)
    blocks = quantised(Ggml.F32, weights)
    for name, kind in zip(matrices(weights), itertools.cycle(_K_FLOATS), strict=False):
        rows, columns = weights[name].shape
        raw = random.integers(0, 256, (rows * columns // 256, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for start in _K_FLOATS[kind]:
            raw[:, start : start + 2] = random.uniform(1e-4, 1e-3, (len(raw), 1)).astype(np.float16).view(np.uint8)
        blocks[name] = (raw.reshape(rows, -1), kind)
    return blocks


def write_gguf(folder: Path, blocks: Blocks, flat: bool = False) -> Path:
    """A GGUF file; the patch embedding's five axes as they are, or `flat`, with a note of them."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "wan")
    for name, (array, kind) in blocks.items():
        if flat and array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
        writer.add_tensor(name, array.reshape(len(array), -1) if flat and array.ndim > 4 else array, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return folder / "model.gguf"


def _dequantised(blocks: Blocks) -> Tensors:
    return {name: torch.from_numpy(gguf.dequantize(array, kind)) for name, (array, kind) in blocks.items()}


# Containers: a part -> its files.

class File(NamedTuple):
    """What was written: of which part, where, the weights that it stands for, and the twin's, by official names.

    `found_as` is what the part is called in the checkpoint folder `path`; None where `path` is the container itself.
    """

    part: Part
    path: Path
    meant: Tensors
    twin: Tensors
    found_as: str | None = None


Make = Callable[[Part, Path], list[File]]
"""Writes a part in one container, two files for two experts, none where no such file is published."""


def of(parts: Collection[str], make: Make) -> Make:
    """Only for these parts."""
    return lambda part, folder: make(part, folder) if part.name in parts else []


def stored(write: Write, storage: Storage = as_is, found_as: str | None = None) -> Make:
    """Under the official names."""
    def make(part: Part, folder: Path) -> list[File]:
        tensors, meant = storage(weights(part))
        return [File(part, write(folder, tensors), meant, weights(part), found_as)]

    return make


def stored_own(write: Write, storage: Storage = as_is) -> Make:
    """Under the module's own names, tied weights once."""
    def make(part: Part, folder: Path) -> list[File]:
        own = {name: tensor for name, tensor in module(part).state_dict().items() if "embed_tokens" not in name}
        tensors, meant = storage(own)
        return [File(part, write(folder, tensors), part.official(meant), weights(part))]

    return make


def saved(max_shard_size: str = "1GB") -> Make:
    """The folder that diffusers or transformers writes."""
    def make(part: Part, folder: Path) -> list[File]:
        module(part).save_pretrained(folder, max_shard_size=max_shard_size)
        return [File(part, folder, weights(part), weights(part))]

    return make


def two_experts(folders: Sequence[str], write: Callable[[Path, Part, int], object]) -> Make:
    """A checkpoint folder with both experts, of different weights."""
    def make(part: Part, folder: Path) -> list[File]:
        for seed, name in enumerate(folders):
            write(folder / name, part, seed)
        return [File(part, folder, weights(part, seed), weights(part, seed), expert)
                for seed, expert in enumerate(("high", "low"))]

    return make


def gguf_file(kind: Ggml, flat: bool = False) -> Make:
    def make(part: Part, folder: Path) -> list[File]:
        blocks = quantised(kind, weights(part))
        return [File(part, write_gguf(folder, blocks, flat), _dequantised(blocks), weights(part))]

    return make


def k_quant_file(part: Part, folder: Path) -> list[File]:
    """The twin holds what the random blocks stand for."""
    wide = _transformer(part.name, wide=True)
    blocks = random_k_blocks(weights(wide))
    meant = _dequantised(blocks)
    return [File(wide, write_gguf(folder, blocks), meant, meant)]


_WITH_CLASS = tuple(kind for kind in TRANSFORMERS if OWN_CLASSES.get(kind) not in fun.OWN.values())
"""The kinds that diffusers has a class of, and so folders of its own layout."""
CONTAINERS: dict[str, Make] = {
    "diffusers folder": of(_WITH_CLASS, saved()),
    "diffusers folder, sharded": of(_WITH_CLASS, saved("40KB")),
    "diffusers folder, two experts": of(set(_WITH_CLASS) & set(EXPERTS), two_experts(
        ("transformer", "transformer_2"), lambda folder, part, seed: module(part, seed).save_pretrained(folder))),
    "official folder": stored(official_folder("safetensors"), found_as="transformer"),
    "official folder, sharded": stored(sharded_folder, found_as="transformer"),
    "official folder, pth": stored(official_folder("pth"), found_as="transformer"),
    "official folder, sharded pth": stored(official_folder("pth", 2), found_as="transformer"),
    "official folder, two experts, sharded": of(EXPERTS, two_experts(
        ("high_noise_model", "low_noise_model"),
        lambda folder, part, seed: sharded_folder(folder, weights(part, seed)))),
    "pth": stored(pickle_file),
    "pth, old format, outer key": stored(old_pickle_file),
    "safetensors fp32": stored(bare_file),
    "safetensors fp16": stored(bare_file, cast(torch.float16)),
    "safetensors bf16": stored(bare_file, cast(torch.bfloat16)),
    "safetensors bf16, the rest fp32": stored(bare_file, cast(torch.bfloat16, rest=torch.float32)),
    "safetensors fp8 e4m3": stored(bare_file, cast(torch.float8_e4m3fn)),
    "safetensors fp8 e5m2, the rest bf16": stored(bare_file, cast(torch.float8_e5m2, rest=torch.bfloat16)),
    "safetensors fp32 under `model.diffusion_model.`": stored(prefixed_file),
    "fp8 with `scale_weight`": stored(bare_file, fp8_tensor_scaled),
    "fp8 with `scale_weight` under `diffusion_model.`": stored(prefixed("diffusion_model."), fp8_tensor_scaled),
    "fp8 with `comfy_quant` under `model.diffusion_model.`": stored(prefixed_file, fp8_comfy_quant),
    "fp8, a scale a row": stored(bare_file, row_scaled(torch.float8_e4m3fn)),
    "fp8, a scale a block": stored(bare_file, fp8_block_scaled),
    "int8, a scale a row": stored(bare_file, row_scaled(torch.int8)),
    "GGUF F16": gguf_file(Ggml.F16),
    "GGUF F16, flattened patch embedding": gguf_file(Ggml.F16, flat=True),
    "GGUF BF16": gguf_file(Ggml.BF16),
    "GGUF Q8_0": gguf_file(Ggml.Q8_0),
    "GGUF K-quants": k_quant_file,
}
"""Of transformers."""

_SPIECE = {"spiece_model": torch.tensor(list(SPIECE), dtype=torch.uint8)}
_NOT_VISION = {"visual.head": torch.ones(32, 16), "textual.norm.weight": torch.ones(8), "log_scale": torch.ones(())}
_PROJECTION = {"visual_projection.weight": torch.ones(4, 4)}
_VAES = ("vae 2.1", "vae 2.2")


def _with_tied_copy(folder: Path, tensors: Tensors) -> Path:
    return bare_file(folder, {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]})


OTHER_CONTAINERS: dict[str, Make] = {
    "diffusers or transformers folder": saved(),
    "transformers folder, sharded": of(("umt5",), saved("20KB")),
    "official pth": of(_VAES, stored(pickle_file)),
    "official pth, old format, outer key": of(_VAES, stored(old_pickle_file)),
    "official pth, bf16": of(("umt5",), stored(pickle_file, cast(torch.bfloat16))),
    "official pth, fp16, with the text tower": of(("clip",), stored(beside(_NOT_VISION, pickle_file),
                                                                    cast(torch.float16))),
    "safetensors fp32, official names": of((*_VAES, "umt5"), stored(bare_file)),
    "safetensors fp16, official names": of((*_VAES, "clip"), stored(bare_file, cast(torch.float16))),
    "safetensors bf16, official names": of((*_VAES, "umt5"), stored(bare_file, cast(torch.bfloat16))),
    "safetensors fp8, the rest bf16, official names": of(("umt5",), stored(
        bare_file, cast(torch.float8_e4m3fn, rest=torch.bfloat16))),
    "safetensors fp32, diffusers names": of(_VAES, stored_own(bare_file)),
    "safetensors fp32, transformers names": of(("clip",), stored_own(bare_file)),
    "safetensors fp32, transformers names, tied copy": of(("umt5",), stored_own(_with_tied_copy)),
    "ComfyUI fp16, `spiece_model`": of(("umt5",), stored_own(beside(_SPIECE, bare_file), cast(torch.float16))),
    "ComfyUI fp8 with `scale_weight`, `spiece_model`": of(("umt5",), stored_own(beside(_SPIECE, bare_file),
                                                                              fp8_tensor_scaled)),
    "ComfyUI fp8 with `comfy_quant`, `spiece_model`": of(("umt5",), stored_own(beside(_SPIECE, bare_file),
                                                                             fp8_comfy_quant)),
    "ComfyUI fp16, under `vision_model.`": of(("clip",), stored_own(
        prefixed("vision_model.", beside(_PROJECTION, bare_file)), cast(torch.float16))),
}
"""Of the VAEs and encoders."""


def containers_of(part: str) -> dict[str, Make]:
    return CONTAINERS if part in TRANSFORMERS else OTHER_CONTAINERS


def write_all(folder: Path) -> None:
    """Every part in every container."""
    for part in PARTS.values():
        for name, make in containers_of(part.name).items():
            make(part, folder / part.name.replace(" ", "_") / re.sub(r"\W+", "_", name).strip("_"))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
