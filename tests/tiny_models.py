"""Tiny random Wan models with the real tensor names, and every container that such weights are published in.

`python -m tests.tiny_models FOLDER` writes all of them. The writers use no code of wantrain.models.containers.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wantrain.models import names

Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2, "text_dim": 32, "freq_dim": 32,
    "rope_max_seq_len": 64,
}
_CLIP: dict[str, Any] = {"image_dim": 64, "added_kv_proj_dim": 32}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": {"in_channels": 36, **_CLIP},
    "flf2v": {"in_channels": 36, "pos_embed_seq_len": 10, **_CLIP},
    "fun_control": {"in_channels": 48, **_CLIP},
    "i2v_a14b": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
    "vace": {"vace_layers": [0, 1], "vace_in_channels": 96},
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter from a normal distribution: zero-initialised ones would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return module.eval().requires_grad_(False)


@functools.cache
def transformer(kind: str, seed: int = 0) -> torch.nn.Module:
    """A tiny diffusers transformer of one of TRANSFORMERS; one object for all callers, so not to be changed."""
    which = WanVACETransformer3DModel if kind == "vace" else WanTransformer3DModel
    return randomise(which(**SIZES, **TRANSFORMERS[kind]), seed)


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


def vae(version: names.VaeVersion, seed: int = 0) -> torch.nn.Module:
    """A tiny VAE with the real numbers of blocks."""
    return randomise(AutoencoderKLWan(**VAES[version]), seed)


def text_encoder(seed: int = 0) -> torch.nn.Module:
    return randomise(UMT5EncoderModel(UMT5Config(**T5)), seed)


def image_encoder(seed: int = 0) -> torch.nn.Module:
    return randomise(CLIPVisionModel(CLIPVisionConfig(**CLIP)), seed)


def official_transformer(module: torch.nn.Module) -> Tensors:
    """The module's weights under the official names."""
    return {names.transformer_to_official(name): tensor for name, tensor in module.state_dict().items()}


def official_vae(module: torch.nn.Module, version: names.VaeVersion) -> Tensors:
    return {names.vae_to_official(name, version): tensor for name, tensor in module.state_dict().items()}


def official_t5(module: torch.nn.Module) -> Tensors:
    return {names.t5_to_official(name): tensor for name, tensor in module.state_dict().items()}


def official_clip(module: torch.nn.Module) -> Tensors:
    """With q, k and v stacked, the embeddings' leading axes, and what the file holds besides the vision tower."""
    weights: Tensors = {}
    for name, tensor in module.state_dict().items():
        official, part = names.clip_to_official(name)
        if part is not None:
            rows = tensor.shape[0]
            whole = weights.setdefault(official, torch.empty(3 * rows, *tensor.shape[1:]))
            whole[part * rows : (part + 1) * rows] = tensor
        elif official in ("visual.cls_embedding", "visual.pos_embedding"):
            weights[official] = tensor.reshape(1, -1, tensor.shape[-1])
        else:
            weights[official] = tensor
    return {**weights, "visual.head": torch.ones(32, 16), "textual.norm.weight": torch.ones(8),
            "log_scale": torch.ones(())}


def matrices(weights: Tensors) -> list[str]:
    """The Linear weights, which quantisers take."""
    return [name for name, tensor in weights.items() if tensor.ndim == 2 and name.endswith(".weight")]


def _scaled(weights: Tensors, suffix: str, scale_of: Callable[[torch.Tensor], torch.Tensor],
            expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[Tensors, Tensors]:
    """(the file's tensors, what they stand for): matrices as fp8 e4m3 with a scale each."""
    stored, meant = dict(weights), dict(weights)
    for name in matrices(weights):
        scale = scale_of(weights[name]) / 448
        stored[name] = (weights[name] / expand(scale, weights[name])).to(torch.float8_e4m3fn)
        stored[name.removesuffix(".weight") + suffix] = scale
        meant[name] = stored[name].float() * expand(scale, weights[name])
    return stored, meant


def fp8_tensor_scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's older style: a marker, `scale_weight` and `scale_input` scalars."""
    stored, meant = _scaled(weights, ".scale_weight", lambda w: w.abs().max(), lambda s, _: s)
    extra = {name.replace(".scale_weight", ".scale_input"): torch.tensor(1.0) for name in stored
             if name.endswith(".scale_weight")}
    return {**stored, **extra, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, meant


def fp8_comfy_quant(weights: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's newer style: `weight_scale` and a JSON note in bytes for each layer."""
    stored, meant = _scaled(weights, ".weight_scale", lambda w: w.abs().max(), lambda s, _: s)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    notes = {name.removesuffix(".weight") + ".comfy_quant": note.clone() for name in matrices(weights)}
    return {**stored, **notes}, meant


def fp8_row_scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """LightX2V and musubi: [out, 1]."""
    return _scaled(weights, ".weight_scale", lambda w: w.abs().amax(1, keepdim=True), lambda s, _: s)


def fp8_block_scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """musubi: [out, blocks, 1], here of 16 columns."""
    return _scaled(weights, ".scale_weight", lambda w: w.abs().unflatten(1, (-1, 16)).amax(2, keepdim=True),
                   lambda s, w: s.expand(-1, -1, 16).reshape(w.shape))


def cast(dtype: torch.dtype) -> Callable[[Tensors], tuple[Tensors, Tensors]]:
    """Plain storage in another dtype."""
    def to(weights: Tensors) -> tuple[Tensors, Tensors]:
        stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
        return stored, {name: tensor.float() for name, tensor in stored.items()}

    return to


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned, as safetensors refuses tied weights.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def bare_file(folder: Path, weights: Tensors) -> Path:
    return _save(folder / "model.safetensors", weights)


def prefixed_file(folder: Path, weights: Tensors) -> Path:
    return _save(folder / "model.safetensors", {f"model.diffusion_model.{n}": t for n, t in weights.items()})


def pickle_file(folder: Path, weights: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "model.pth")
    return folder / "model.pth"


def old_pickle_file(folder: Path, weights: Tensors) -> Path:
    """The format before the zip one, under a trainer's outer key."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state": weights}, folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def sharded_folder(folder: Path, weights: Tensors) -> Path:
    """The official folder: three shards and their index."""
    parts = [dict(list(weights.items())[i::3]) for i in range(3)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = _save(folder / f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors", part)
        weight_map |= dict.fromkeys(part, file.name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sharded_pickles(folder: Path, weights: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        torch.save(dict(list(weights.items())[i::2]), folder / f"model-{i + 1:05d}-of-00002.pth")
    return folder


GGUF_TYPES = {"gguf_f16": gguf.GGMLQuantizationType.F16, "gguf_q8_0": gguf.GGMLQuantizationType.Q8_0}


def gguf_file(kind: gguf.GGMLQuantizationType) -> Callable[[Path, Tensors], Path]:
    """Matrices in `kind`, the rest float32, as ComfyUI-GGUF's converter does."""
    def write(folder: Path, weights: Tensors) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(folder / "model.gguf", "wan")
        for name, tensor in weights.items():
            array, which = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
            if name in matrices(weights):
                which = kind
            if tensor.ndim > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
                array = array.reshape(array.shape[0], -1)
            writer.add_tensor(name, gguf.quants.quantize(array, which), raw_dtype=which)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "model.gguf"

    return write


def gguf_meant(kind: gguf.GGMLQuantizationType) -> Callable[[Tensors], tuple[Tensors, Tensors]]:
    def meant(weights: Tensors) -> tuple[Tensors, Tensors]:
        quants = gguf.quants
        return weights, {name: torch.from_numpy(quants.dequantize(quants.quantize(tensor.numpy(), kind), kind))
                         if name in matrices(weights) else tensor for name, tensor in weights.items()}

    return meant


def as_is(weights: Tensors) -> tuple[Tensors, Tensors]:
    return weights, weights


Storage = Callable[[Tensors], tuple[Tensors, Tensors]]
CONTAINERS: dict[str, tuple[Storage, Callable[[Path, Tensors], Path]]] = {
    "safetensors fp32": (as_is, bare_file),
    "safetensors fp16": (cast(torch.float16), bare_file),
    "safetensors bf16": (cast(torch.bfloat16), bare_file),
    "safetensors fp8": (cast(torch.float8_e4m3fn), bare_file),
    "safetensors prefixed": (as_is, prefixed_file),
    "fp8 scale_weight": (fp8_tensor_scaled, bare_file),
    "fp8 scale_weight prefixed": (fp8_tensor_scaled, prefixed_file),
    "fp8 comfy_quant": (fp8_comfy_quant, prefixed_file),
    "fp8 row scales": (fp8_row_scaled, bare_file),
    "fp8 block scales": (fp8_block_scaled, bare_file),
    "official folder, sharded": (as_is, sharded_folder),
    "pth": (as_is, pickle_file),
    "pth, old format, outer key": (as_is, old_pickle_file),
    "pth, sharded": (as_is, sharded_pickles),
    "gguf F16": (gguf_meant(GGUF_TYPES["gguf_f16"]), gguf_file(GGUF_TYPES["gguf_f16"])),
    "gguf Q8_0": (gguf_meant(GGUF_TYPES["gguf_q8_0"]), gguf_file(GGUF_TYPES["gguf_q8_0"])),
}
"""Name -> (how weights are stored and what that stands for, how they are written)."""


def write_all(folder: Path) -> None:
    """Every tiny transformer in every container, and each beside its diffusers folder."""
    for kind in TRANSFORMERS:
        module = transformer(kind)
        module.save_pretrained(folder / kind / "diffusers")
        for name, (store, write) in CONTAINERS.items():
            write(folder / kind / name.replace(",", "").replace(" ", "_"), store(official_transformer(module))[0])


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
