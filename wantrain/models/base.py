"""The frozen base: find its folder, load its parts, digest its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from wantrain.files import digest_folder
from wantrain.terms import UserError

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny_wan"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def find(path: str) -> Path:
    """The diffusers directory of a base: `embedded`, or a folder with `model_index.json` and the five parts."""
    folder = EMBEDDED if path == "embedded" else Path(path).expanduser()
    absent = [part for part in PARTS if not (folder / part).is_dir()]
    if absent:
        raise UserError(
            f"model.path = {path!r} is not a diffusers directory of Wan: no folder {', '.join(absent)} in {folder}",
            "download one, e.g. `hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir "
            "models/Wan2.1-T2V-1.3B-Diffusers`, and set model.path to it (or model.path=embedded)",
        )
    return folder


def digest(folder: Path, part: str, memo: Path) -> str:
    """A digest of one part's files (config and weights)."""
    return digest_folder(folder / part, memo)


def _check(part: str, module: torch.nn.Module, info: dict[str, Any]) -> None:
    """Refuse a load that left anything out: diffusers and transformers only warn."""
    faults = {kind: sorted(str(name) for name in info[kind])[:3] for kind in ("missing_keys", "unexpected_keys")
              if info[kind]}
    if faults:
        raise UserError(f"{part}: the weights do not fit its config.json: {faults}",
                        "download the part again, or use the config.json that belongs to these weights")
    left = [name for name, p in module.named_parameters() if p.is_meta]
    if left:
        raise UserError(f"{part}: no weights for {left[:3]}", "download the part again: a shard is missing")


def load_transformer(folder: Path, dtype: torch.dtype, device: torch.device) -> WanTransformer3DModel:
    """The transformer in `dtype` (its time embedding, norms and modulation tables stay float32), frozen, eval mode."""
    module, info = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype, output_loading_info=True)
    _check("transformer", module, info)
    return module.requires_grad_(False).eval().to(device)


def meta_transformer(folder: Path) -> WanTransformer3DModel:
    """The transformer's architecture on the meta device, from its config.json alone."""
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / "transformer"))


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The VAE in float32, as the official code runs it, frozen."""
    module, info = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32, output_loading_info=True)
    _check("vae", module, info)
    return module.requires_grad_(False).eval().to(device)


def load_text(folder: Path, dtype: torch.dtype, device: torch.device) -> WanPipeline:
    """Tokenizer and umT5 encoder, frozen, as a pipeline without the other parts: its prompt code is the reference."""
    module, info = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, output_loading_info=True)
    _check("text_encoder", module, {"missing_keys": info["missing_keys"], "unexpected_keys": info["unexpected_keys"]})
    module = module.requires_grad_(False).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return WanPipeline(tokenizer=tokenizer, text_encoder=module, transformer=None, vae=None, scheduler=None)


def scheduler(folder: Path, shift: float) -> UniPCMultistepScheduler:
    """The base's own UniPC scheduler with the given timestep shift."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return UniPCMultistepScheduler.from_config(config, flow_shift=shift)
