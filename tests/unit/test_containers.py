"""Every container gives the weights that it stands for, to the bit; every damaged one is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import struct
from collections.abc import Callable, Collection
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import tiny_models as tiny
from tests import weight_table
from wantrain.models import names, weight_files
from wantrain.models.containers import (
    ContainerError,
    expand_scale,
    find_parts,
    open_container,
)
from wantrain.models.loading import load_into

Weights = tiny.Tensors
KEEP = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
LATER = ("fun_v11_camera", "fun_a14b_control", "fun_a14b_camera", "vace_a14b", "fun_5b_inp", "fun_5b_control",
         "fun_5b_camera", "s2v")
"""Kinds that are in the long tier: their modules are those of others, at other sizes."""
CELLS = [*(pytest.param(*cell, marks=[pytest.mark.slow, pytest.mark.long] if cell[0] in LATER else [])
           for cell in itertools.product(tiny.TRANSFORMERS, tiny.CONTAINERS)),
         *itertools.product(weight_table.OTHERS, tiny.OTHER_CONTAINERS)]
STORAGE_COSTS = {"e5m2": 0.06, "fp8": 0.03, "int8": 6e-3, "q8_0": 6e-3, "bf16": 2e-3, "fp16": 3e-4, "f16": 3e-4}
"""By a word of the container's name: the largest relative error of the Linear weights (docs/facts.md, "Containers")."""


def loaded(path: Path, kind: str, dtype: torch.dtype = torch.float32, **more: Collection[str]) -> torch.nn.Module:
    return weight_table.loaded(tiny.PARTS[kind], path, dtype, **more)


@pytest.mark.parametrize(("part", "container"), CELLS)
def test_every_part_from_every_container(part: str, container: str) -> None:
    """To the bit what the file stands for, and no further from the twin than such storage must be."""
    allowed = next((cost for word, cost in STORAGE_COSTS.items() if word in container.lower()), 0.0)
    assert (weight_table.error(part, container) or 0.0) <= allowed


def test_loading_keeps_what_must_stay_float32_and_all_buffers(tmp_path: Path) -> None:
    twin = tiny.transformer("t2v")
    module = loaded(tiny.bare_file(tmp_path, tiny.official_transformer(twin)), "t2v", torch.bfloat16, keep_float32=KEEP)
    for name, parameter in module.named_parameters():
        kept = any(part in KEEP for part in name.split("."))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert not parameter.requires_grad
        assert torch.equal(parameter, twin.state_dict()[name].to(parameter.dtype)), name
    buffers = dict(twin.named_buffers())
    assert buffers
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_module_built_plainly_on_meta_is_refused(tmp_path: Path) -> None:
    container = open_container(tiny.bare_file(tmp_path, tiny.official_transformer(tiny.transformer("t2v"))))
    with torch.device("meta"):
        module = tiny.PARTS["t2v"].build()
    with pytest.raises(ContainerError, match=r"no file holds .*rope"):
        load_into(module, container, names.transformer_rename(container.names()), dtype=torch.float32)


def _made(part: str, container: str, folder: Path) -> tiny.File:
    return tiny.containers_of(part)[container](tiny.PARTS[part], folder)[0]


@pytest.mark.parametrize(("container", "spiece"), [
    ("official pth, bf16", None),
    ("safetensors fp32, transformers names, tied copy", None),
    ("ComfyUI fp8 with `scale_weight`, `spiece_model`", tiny.SPIECE),
])
def test_text_encoders_are_tied_and_keep_their_tokenizer(container: str, spiece: bytes | None, tmp_path: Path) -> None:
    file = _made("umt5", container, tmp_path)
    module = weight_table.loaded(file.part, file.path)
    assert module.shared.weight is module.encoder.embed_tokens.weight
    assert open_container(file.path).spiece_model() == spiece


def test_image_encoders_keep_their_buffers(tmp_path: Path) -> None:
    file = _made("clip", "official pth, fp16, with the text tower", tmp_path)
    wanted = tiny.module(file.part).embeddings.position_ids
    assert torch.equal(weight_table.loaded(file.part, file.path).embeddings.position_ids, wanted)


def test_the_containers_are_what_their_names_say(tmp_path: Path) -> None:
    def storages(part: str, container: str) -> set[str]:
        opened = open_container(_made(part, container, tmp_path / container).path)
        return {opened.dtype_of(name) for name in opened.names()}

    assert storages("t2v", "GGUF K-quants") == {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F32"}
    assert storages("t2v", "GGUF Q8_0") == {"Q8_0", "F32"}
    assert storages("t2v", "safetensors bf16, the rest fp32") == {"bfloat16", "float32"}
    assert storages("t2v", "int8, a scale a row") == {"int8 + scale", "bfloat16"}
    for part, container in (("t2v", "diffusers folder, sharded"), ("umt5", "transformers folder, sharded")):
        folder = _made(part, container, tmp_path / part).path
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert open_container(folder).config["num_layers"] == 2


def test_scales_of_every_shape() -> None:
    weight = torch.ones(4, 6)
    blocks = torch.arange(4.0).reshape(2, 2)
    for scale, wanted in (
        (torch.tensor([3.0]), torch.full((4, 6), 3.0)),
        (torch.arange(4.0), torch.arange(4.0)[:, None].expand(4, 6)),
        (torch.arange(4.0)[:, None], torch.arange(4.0)[:, None].expand(4, 6)),
        (torch.arange(8.0).reshape(4, 2, 1), torch.arange(8.0).reshape(4, 2).repeat_interleave(3, 1)),
        (blocks, torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [2.0, 3.0]]).repeat_interleave(3, 1)),
    ):
        assert torch.equal(weight * expand_scale(scale, (4, 6)), wanted)
    assert expand_scale(torch.arange(4.0), (4, 6, 1, 2, 2)).shape == (4, 1, 1, 1, 1)
    for bad in ((5,), (4, 4), (6, 1), (4, 6, 2)):
        with pytest.raises(ValueError, match="does not fit"):
            expand_scale(torch.ones(bad), (4, 6))


def test_dtype_device_and_what_is_shown(tmp_path: Path) -> None:
    weights = tiny.official_transformer(tiny.transformer("t2v"))
    container = open_container(tiny.prefixed_file(tmp_path, tiny.fp8_comfy_quant(weights)[0]))
    name = "blocks.1.cross_attn.v.weight"
    assert container.prefix == "model.diffusion_model."
    assert container.dtype_of(name) == "float8_e4m3fn + scale"
    assert container.dtype_of("blocks.1.modulation") == "float16"
    assert sorted(container.names()) == sorted(weights)
    assert container.shapes()[name] == (32, 32)
    assert container.read(name).dtype == torch.float32
    assert container.read(name, torch.bfloat16).dtype == torch.bfloat16
    first = container.read("blocks.1.modulation")
    first.zero_()
    assert container.read("blocks.1.modulation").abs().sum() > 0


def test_find_parts(tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model", "google/umt5-xxl"):
        (tmp_path / "a14b" / name).mkdir(parents=True)
    (tmp_path / "a14b" / "Wan2.1_VAE.pth").touch()
    assert {part: path.name for part, path in find_parts(tmp_path / "a14b").items()} == {
        "high": "high_noise_model", "low": "low_noise_model", "vae": "Wan2.1_VAE.pth", "tokenizer": "umt5-xxl"}
    for name in ("transformer", "transformer_2", "vae"):
        (tmp_path / "diffusers" / name).mkdir(parents=True)
    assert set(find_parts(tmp_path / "diffusers")) == {"high", "low", "vae"}
    (tmp_path / "diffusers" / "transformer_2").rmdir()
    assert set(find_parts(tmp_path / "diffusers")) == {"transformer", "vae"}
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "diffusion_pytorch_model.safetensors").touch()
    assert find_parts(tmp_path / "official") == {"transformer": tmp_path / "official"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContainerError, match="holds no Wan transformer"):
        find_parts(tmp_path / "empty")


# Faults that are seen when a file is opened.

class Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _malicious(folder: Path) -> Path:
    (folder / "model.pth").write_bytes(pickle.dumps({"w": Payload(str(folder / "was_run"))}))
    return folder / "model.pth"


def _as(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _truncated(folder: Path, write: Callable[[Path, Weights], Path], keep: float) -> Path:
    path = write(folder, {"patch_embedding.weight": torch.ones(64, 64), "head.modulation": torch.ones(1, 2, 64)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def _gguf_file(folder: Path, weights: Weights) -> Path:
    return tiny.write_gguf(folder, tiny.quantised(gguf.GGMLQuantizationType.F16, weights))


def _pickle_named_safetensors(folder: Path) -> Path:
    return tiny.pickle_file(folder, {"w": torch.ones(2)}).rename(folder / "model.safetensors")


def _old_pickle_named_safetensors(folder: Path) -> Path:
    return tiny.old_pickle_file(folder, {"w": torch.ones(2)}).rename(folder / "model.safetensors")


def _missing_shard(folder: Path) -> Path:
    tiny.sharded_folder(folder, tiny.official_transformer(tiny.transformer("t2v")))
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    return folder


def _missing_shard_no_index(folder: Path) -> Path:
    _missing_shard(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return folder


def _two_models(folder: Path) -> Path:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, folder / f"{name}.safetensors")
    return folder


def _two_indices(folder: Path) -> Path:
    tiny.sharded_folder(folder, {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)})
    (folder / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text("{}")
    return folder


def _saved(**tensors: torch.Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "m.safetensors")
        return folder / "m.safetensors"

    return write


def _noted(note: bytes, **more: torch.Tensor) -> Callable[[Path], Path]:
    return _saved(q__weight=torch.ones(2), q__comfy_quant=torch.tensor(list(note), dtype=torch.uint8), **more)


def _metadata_format(folder: Path) -> Path:
    note = {"_quantization_metadata": json.dumps({"layers": {"q": {"format": "mxfp8"}}})}
    save_file({"q.weight": torch.ones(2)}, folder / "m.safetensors", note)
    return folder / "m.safetensors"


def _no_state_dict(folder: Path) -> Path:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, folder / "m.pth")
    return folder / "m.pth"


OPENING_FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such file": (lambda folder: folder / "absent.safetensors", "does not exist"),
    "unknown suffix": (_as("model.txt", b"x"), "has the suffix '.txt'"),
    "empty file": (_as("model.safetensors", b""), "is empty .*interrupted download"),
    "empty folder": (lambda folder: folder, "holds no weights"),
    "web page": (_as("model.safetensors", b"<!DOCTYPE html><html>"), "is a web page"),
    "git-lfs pointer": (_as("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "header of 10 GB": (_as("model.safetensors", struct.pack("<Q", 10**10) + b'{"w":'), "header claims 10000000000"),
    "header of 200 MB, absurd": (_as("model.safetensors", struct.pack("<Q", 10**18) + b" " * 99), "header claims"),
    "garbage header": (_as("model.safetensors", struct.pack("<Q", 4) + b"{no}"), "not readable as safetensors"),
    "truncated safetensors": (lambda f: _truncated(f, tiny.bare_file, 0.7), "not readable as safetensors"),
    "truncated in the header": (lambda f: _truncated(f, tiny.bare_file, 0.005), "header claims|not readable"),
    "truncated pickle": (lambda f: _truncated(f, tiny.pickle_file, 0.7), "not readable as a torch file"),
    "truncated old pickle": (lambda f: _truncated(f, tiny.old_pickle_file, 0.7), "not readable as a torch file"),
    "truncated gguf": (lambda f: _truncated(f, _gguf_file, 0.7),
                       "not readable as GGUF"),
    "gguf header only": (_as("model.gguf", b"GGUF\x03\x00\x00\x00"), "not readable as GGUF"),
    "pickle named safetensors": (_pickle_named_safetensors, "is named .safetensors but is pth .*pickle renamed"),
    "old pickle named safetensors": (_old_pickle_named_safetensors, "is named .safetensors but is pth"),
    "malicious pickle": (_malicious, "does not unpickle"),
    "training checkpoint": (_no_state_dict, "not a state dict but a dict of epoch, optimizer"),
    "missing shard": (_missing_shard, "lacks 1 of 3 shards: diffusion_pytorch_model-00002-of-00003"),
    "missing shard, no index": (_missing_shard_no_index, r"lacks shards \[2\] of 3"),
    "several models": (_two_models, "holds several models: a.safetensors, b.safetensors"),
    "two indices": (_two_indices, "has 2 indices"),
    "all-in-one": (_saved(model__diffusion_model__w=torch.ones(1), vae__w=torch.ones(1)), "all-in-one checkpoint"),
    "nvfp4": (_saved(q__weight=torch.ones(2), q__weight_scale_2=torch.ones(1)), "quantisation format nvfp4"),
    "awq": (_saved(q__weight=torch.ones(2), q__pre_quant_scale=torch.ones(1)), "quantisation format awq_w4a16"),
    "nvfp4 with awq": (_saved(q__weight=torch.ones(2), q__weight_scale_2=torch.ones(1),
                              q__pre_quant_scale=torch.ones(1)), "quantisation format nvfp4"),
    "what a file says goes first": (_noted(b'{"format": "asym_w4a8_int8"}', a__pre_quant_scale=torch.ones(1)),
                                    "quantisation format asym_w4a8_int8"),
    "mxfp8": (_noted(b'{"format": "mxfp8"}'), "quantisation format mxfp8"),
    "unknown comfy format": (_noted(b'{"format": "convrot_w4a4"}'), "quantisation format convrot_w4a4"),
    "comfy note is no JSON": (_noted(b"{"), "q.comfy_quant is not JSON"),
    "metadata format": (_metadata_format, "quantisation format mxfp8"),
}


@pytest.mark.parametrize("fault", OPENING_FAULTS)
def test_damaged_containers_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    write, message = OPENING_FAULTS[fault]
    path = write(tmp_path)
    with pytest.raises(ContainerError, match=message) as caught:
        open_container(path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.cause
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(("tensors", "message"), [
    ({"q__weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "q__scale_weight": torch.tensor(float("nan"))},
     "scale of q.weight is not finite"),
    ({"q__weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "k__scale_weight": torch.tensor(1.0)},
     "q.weight is torch.float8_e4m3fn without a scale"),
    ({"q__weight": torch.ones(2, 2).to(torch.int8)}, "q.weight is torch.int8 without a scale"),
    ({"q__weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "q__scale_weight": torch.ones(3)},
     r"a scale of shape \[3\] does not fit a weight of shape \[2, 2\]"),
    ({"q__weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "q__weight_scale": torch.ones(2, dtype=torch.uint8)},
     "the scale of q.weight is stored as torch.uint8 .*mxfp8"),
])
def test_bad_scales_are_refused(tensors: Weights, message: str, tmp_path: Path) -> None:
    container = open_container(_saved(**tensors)(tmp_path))
    with pytest.raises(ContainerError, match=message):
        container.read("q.weight")


# Faults that are seen when a module is filled.

def _without(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: t for name, t in weights.items() if not name.startswith(prefix)}


def _lora_keys(weights: Weights) -> Weights:
    return {**weights, "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 32)}


def _transposed(weights: Weights) -> Weights:
    return {name: t.T.contiguous() if t.ndim == 2 and t.shape[0] != t.shape[1] else t for name, t in weights.items()}


def test_a_file_of_another_variant_is_named(tmp_path: Path) -> None:
    for file_kind, model_kind, cause in (
        ("t2v", "i2v", "the file is a T2V or A14B model"), ("i2v", "i2v_a14b", "the file is a 2.1 I2V model"),
        ("vace", "t2v", "the file is a VACE model"), ("t2v", "vace", "the variant is VACE"),
        ("t2v", "i2v_a14b", "a variant of other sizes"),
    ):
        weights = tiny.official_transformer(tiny.transformer(file_kind))
        path = tiny.bare_file(tmp_path / f"{file_kind}_{model_kind}", weights)
        with pytest.raises(ContainerError, match="does not fit the model") as caught:
            loaded(path, model_kind)
        assert cause in caught.value.cause


@pytest.mark.parametrize(("change", "message", "cause"), [
    (_without("blocks.1."), r"tensors missing: blocks\.1\.", "a shard is missing"),
    (_without("time_projection.1.bias"), "1 tensors missing: condition_embedder.time_proj.bias", "damaged file"),
    (_transposed, r"has shape \[32, 64\], the model's blocks.0.ffn.net.0.proj.weight \[64, 32\]", "transposed tensors"),
    (_lora_keys, "1 tensors unexpected: blocks.0.self_attn.q.lora_A.weight", "this is a LoRA"),
    (lambda w: {"decoder.conv1.weight": torch.ones(1)}, "tensors missing", "another part of the model"),
    (lambda w: {**w, "blocks.2.norm3.bias": torch.ones(32)}, "unexpected: blocks.2.norm3.bias", "larger or newer"),
])
def test_misfits_are_refused_before_anything_is_read(change: Callable[[Weights], Weights], message: str, cause: str,
                                                     tmp_path: Path) -> None:
    weights = change(tiny.official_transformer(tiny.transformer("t2v")))
    container = open_container(tiny.bare_file(tmp_path, weights))
    module = weight_table.empty(tiny.PARTS["t2v"])
    with pytest.raises(ContainerError, match=message) as caught:
        load_into(module, container, names.transformer_rename(container.names()), dtype=torch.float32)
    assert cause in caught.value.cause
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_tensor_given_twice_is_refused(tmp_path: Path) -> None:
    weights = tiny.official_transformer(tiny.transformer("t2v"))
    container = open_container(tiny.bare_file(tmp_path, {**weights, "again": weights["head.modulation"]}))
    rename = names.transformer_rename(container.names())
    with pytest.raises(ContainerError, match="are both scale_shift_table"):
        load_into(weight_table.empty(tiny.PARTS["t2v"]), container,
                  lambda name: ("scale_shift_table",) if name == "again" else rename(name), dtype=torch.float32)


def test_a_file_is_mapped_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read does not stay mapped, so that loading needs the memory of a tensor and not of the file."""
    opened: list[Path] = []

    def counting(path: Path, framework: str) -> object:
        opened.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr(weight_files, "_REMAP_BYTES", 1 << 20)
    monkeypatch.setattr(weight_files, "safe_open", counting)
    container = open_container(tiny.bare_file(tmp_path, {f"w{i}": torch.full((300, 1024), float(i)) for i in range(8)}))
    assert len(opened) == 1  # the header
    for i, name in enumerate(container.names()):
        assert container.read(name)[0, 0] == i
    assert len(opened) == 1 + 8  # each tensor is of 1.2 MB
