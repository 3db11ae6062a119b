"""Mutated LoRA files and bases, given to every verb and key that takes one: nothing but a UserError leaves them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random

import gguf
import torch
from safetensors.torch import load_file, save

from tests import tiny_models as tiny
from wantrain import cli
from wantrain.models import base
from wantrain.models.fit import AdapterFile, fit
from wantrain.models.variants import VARIANTS
from wantrain.terms import UserError

Tensors = dict[str, torch.Tensor]
TRANSFORMER = base.EMBEDDED / "transformer"
WORDS = ("lora_A", "lora_B", "lora_down", "lora_up", "alpha", "diff", "diff_b", "weight", "bias", "default",
         "dora_scale", "lokr_w1", "hada_w1_a", "blocks", "transformer_2", "head", "modulation", "img_emb", "9" * 30)
DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.int8, torch.int64,
          torch.uint8, torch.bool)
JSON = ("[]", "{}", "1", '"x"', "[" * 5000, '{"transformer.lora_alpha": "x"}', '{"transformer.alpha_pattern": [1]}',
        '{"transformer.alpha_pattern": {"(": 1}}', '{"transformer.alpha_pattern": {"(q|k)*(.*)+$": 2}}',
        '{"transformer.lora_alpha": 1e400}', '{"transformer.use_rslora": "yes"}', '{"layers": 3}', "\\ud800")


@cache
def _frozen() -> torch.nn.Module:
    return base.find(VARIANTS["tiny_wan"], "embedded", {}).transformer(torch.float32, torch.device("cpu"))


@cache
def _seeds() -> Mapping[str, Tensors]:
    """A LoRA of every kind for the tiny base, and small bases of every kind, by name."""
    def normal(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    a, b = normal(4, 192), normal(192, 4)
    kron = {"lokr_w1": normal(12, 12), "lokr_w2_a": normal(16, 4), "lokr_w2_b": normal(4, 16),
            "alpha": torch.tensor(4.0)}
    hada = {f"hada_w{i}_{half}": t for i in (1, 2) for half, t in (("a", b), ("b", a))}
    official, flat = "diffusion_model.blocks.{}.self_attn.q.", "lora_unet_blocks_{}_self_attn_q."
    twins = "transformer.blocks.{}.attn1.to_q."

    def module(stem: str, **leaves: torch.Tensor) -> Tensors:
        return {stem.format(i) + leaf.replace("__", "."): t.clone() for i in (0, 1) for leaf, t in leaves.items()}

    weights = tiny.official_transformer(tiny.transformer("t2v"))
    return {
        "universal": module(official, lora_A__weight=a, lora_B__weight=b),
        "kohya": module(flat, lora_down__weight=a, lora_up__weight=b, alpha=torch.tensor(2.0)),
        "diffusers": module(twins, lora_A__weight=a, lora_B__weight=b, lora_B__bias=normal(192)),
        "dora": module(official, lora_A__weight=a, lora_B__weight=b, dora_scale=normal(192, 1)),
        "loha": module(flat, **hada, alpha=torch.tensor(2.0)), "lokr": module(flat, **kron),
        "distill": module(official, lora_down__weight=a, lora_up__weight=b, diff_b=normal(192), diff=normal(192, 192)),
        "experts": module("diffusion_model.transformer_1.blocks.{}.self_attn.q.", lora_A__weight=a, lora_B__weight=b)
        | module("diffusion_model.transformer_2.blocks.{}.self_attn.q.", lora_A__weight=a, lora_B__weight=b),
        "base": weights, "vace": tiny.official_transformer(tiny.transformer("vace")),
        "prefixed": {f"model.diffusion_model.{name}": t for name, t in weights.items()},
        "scaled": dict(tiny.fp8_comfy_quant(weights)[0]),
        "tiny_wan": {name: t for file in TRANSFORMER.glob("*.safetensors") for name, t in load_file(file).items()},
    }


def _rename(random: Random, tensors: Tensors) -> None:
    name = random.choice(list(tensors))
    parts = name.split(".")
    parts[random.randrange(len(parts))] = random.choice((*WORDS, "", random.choice(parts), str(random.randrange(12))))
    tensors[".".join(parts)] = tensors.pop(name)


def _reshape(random: Random, tensors: Tensors) -> None:
    name = random.choice(list(tensors))
    tensor, flat = tensors[name], tensors[name].reshape(-1)
    tensors[name] = random.choice((
        tensor.T if tensor.ndim == 2 else tensor[None], tensor.reshape(1, *tensor.shape, 1), flat, flat[:0], flat[:1],
        flat[0], torch.ones(1, 10**5), torch.ones(10**5, 1),
    )) if tensor.numel() else torch.ones(2)


def _retype(random: Random, tensors: Tensors) -> None:
    for name in random.sample(list(tensors), k=random.choice((1, len(tensors)))):
        tensors[name] = tensors[name].float().to(random.choice(DTYPES))


def _spoil(random: Random, tensors: Tensors) -> None:
    name, value = random.choice(list(tensors)), random.choice((0.0, float("nan"), float("inf"), 1e38, -1e30))
    tensors[name] = torch.full_like(tensors[name].float(), value)


def _drop(random: Random, tensors: Tensors) -> None:
    if len(tensors) > 1:
        del tensors[random.choice(list(tensors))]


def _add(random: Random, tensors: Tensors) -> None:
    other = _seeds()[random.choice(list(_seeds()))]
    name = random.choice(list(other))
    new = random.choice((name, "lokr_factor", "scaled_fp8", f"{name}.scale_weight", f"{name}.comfy_quant"))
    tensors[new] = other[name]


CHANGES: tuple[Callable[[Random, Tensors], None], ...] = (_rename, _reshape, _retype, _spoil, _drop, _add)


def _mutated(random: Random, content: bytes) -> bytes:
    """The bytes with a few of them changed, most in the header, or cut off."""
    data = bytearray(content)
    size = struct.unpack("<Q", content[:8])[0] if content[8:9] == b"{" else min(len(data), 4096)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(min(len(data), 8 + size)) if random.random() < 0.8 else random.randrange(len(data))
        if random.random() < 0.3 and (digits := [i for i in range(8, min(len(data), 8 + size)) if 48 <= data[i] < 58]):
            data[random.choice(digits)] = random.choice(b"0123456789-")
        elif random.random() < 0.1:
            data[place : place + 8] = struct.pack("<Q", random.choice((0, 1, 2**31, 2**60, 2**64 - 1)))
        else:
            data[place] = random.randrange(256)
    return bytes(data[: random.randrange(len(data))] if random.random() < 0.15 else data)


def _written(random: Random, folder: Path, tensors: Tensors) -> Path:
    """The tensors in a container of some kind, its bytes perhaps mutated, under some name."""
    stem = random.choice(("x", "x=1", "style_high_noise", "low", "epoch=1-step=2"))
    kind = random.choice(("safetensors", "safetensors", "safetensors", "pth", "old.pt", "gguf"))
    path = folder / f"{stem}.{kind}"
    if kind == "gguf":
        weights = {name[:60]: t.float() for name, t in tensors.items() if 0 < t.ndim <= 4 and t.numel()}
        path = tiny.write_gguf(folder, tiny.quantised(gguf.GGMLQuantizationType.F16, weights)) if weights else path
        path.exists() or path.write_bytes(b"GGUF")
    elif kind == "safetensors":
        key = random.choice(("lora_adapter_metadata", "wantrain.expert", "ss_output_name", "_quantization_metadata"))
        metadata = {key: random.choice((*JSON, "high", "low"))} if random.random() < 0.3 else None
        path.write_bytes(save({name: t.contiguous().clone() for name, t in tensors.items()}, metadata))
    else:
        torch.save(random.choice((tensors, {"state_dict": tensors}, list(tensors.values()))), path,
                   _use_new_zipfile_serialization=kind == "pth")
    if random.random() < 0.6:
        path.write_bytes(_mutated(random, path.read_bytes()))
    return path


def one(random: Random, folder: Path) -> None:
    """Mutate one file and give it to every verb and key; anything but a UserError is let through."""
    tensors = dict(_seeds()[random.choice(list(_seeds()))])
    for _ in range(random.choice((0, 0, 1, 1, 2))):
        random.choice(CHANGES)(random, tensors)
    path = _written(random, folder, tensors)
    if random.random() < 0.2:
        (folder / "config.json").write_text(random.choice((*JSON, json.dumps({"vace_layers": random.choice(
            ([0], [0, 1], [1], 3, "x", [0, 0], [0, None], {"a": 1}))}))))
        path = folder
    out = folder / f"out{random.randrange(2)}.safetensors"
    verbs = (["inspect", path], ["inspect", path, "expert=low"], ["convert", path, out, "format=comfy_updown"],
             ["convert", path, out, "dtype=float16", "expert=high"], ["convert", path, folder / "peft", "format=peft"],
             ["merge", TRANSFORMER, f"{path}=0.5", out], ["merge", path, path, out], ["extract", path, path, out],
             ["extract", path, TRANSFORMER, out, "rank=1"], ["merge", path, out, folder / "m", "layout=diffusers"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for words in random.sample(verbs, k=3):
            assert cli.main([str(word) for word in words]) in (0, 2)
        with contextlib.suppress(UserError):
            random.choice((_sampled, _merged, _part))(path)


def _sampled(path: Path) -> None:
    """As sampler.loras and lora.start_from take it."""
    fit(copy.deepcopy(_frozen()), torch.device("cpu"), [AdapterFile(path)])


def _merged(path: Path) -> None:
    """As model.merge takes it."""
    base.find(VARIANTS["tiny_wan"], "embedded", {}, [str(path)]).transformer(torch.float32, torch.device("cpu"))


def _part(path: Path) -> None:
    """As model.parts takes it."""
    variant = VARIANTS["tiny_wan"]
    base.find(variant, "embedded", {"transformer": str(path)}).transformer(torch.float32, torch.device("cpu"))
