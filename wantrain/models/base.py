"""The frozen base: where its parts are, in whatever published layout, and each of them loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from wantrain.files import digest_file, digest_folder
from wantrain.models import names
from wantrain.models.containers import Container, empty_weights, find_parts, load_into, open_container
from wantrain.models.short_text import shorten_text
from wantrain.models.variants import Variant, detect, diffusers_config
from wantrain.terms import UserError

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny_wan"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")

UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}
"""facts/wan-formats.md 1.4; a folder with its own config.json goes before it."""
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Base:
    """One checkpoint: the path of each part (file or folder) and its row of the variants table."""

    variant: Variant
    parts: Mapping[str, Path]

    def digest(self, part: str, memo: Path) -> str:
        """A digest of one part's files."""
        path = self.parts[part]
        return digest_folder(path, memo) if path.is_dir() else digest_file(path, memo)

    def _transformer_config(self) -> dict[str, Any]:
        path = self.parts["transformer"] / "config.json"
        if path.is_file():
            config: dict[str, Any] = WanTransformer3DModel.load_config(path.parent)
            return config
        return diffusers_config(self.variant)

    def meta_transformer(self) -> WanTransformer3DModel:
        """The transformer's architecture on the meta device, without reading weights."""
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(self._transformer_config())

    def detected(self) -> str:
        """What the transformer's tensors say it is; raises UserError when that is not `variant`."""
        return self._detected(open_container(self.parts["transformer"]))

    def _detected(self, container: Container) -> str:
        detection = detect(container.shapes(), str(self.parts["transformer"]))
        detection.resolve(self.variant.name)
        kinds = sorted({container.dtype_of(name) for name in container.names()})
        return f"{detection.message}; {container.kind}, {detection.layout} names, {', '.join(kinds)}"

    def transformer(self, dtype: torch.dtype, device: torch.device) -> WanTransformer3DModel:
        """The transformer in `dtype` (time embedding, norms and modulation tables in float32), frozen, eval mode."""
        container = open_container(self.parts["transformer"])
        self._detected(container)
        with empty_weights():
            module = WanTransformer3DModel.from_config(self._transformer_config())
        load_into(module, container, names.transformer_rename(container.names()), dtype=dtype, device=device,
                  keep_float32=WanTransformer3DModel._keep_in_fp32_modules)
        if device.type == "cpu":
            shorten_text(module)
        return module.requires_grad_(False).eval().to(device)

    def vae(self, device: torch.device) -> AutoencoderKLWan:
        """The VAE in float32, as the official code runs it, frozen."""
        container = open_container(self.parts["vae"])
        with empty_weights():
            module = AutoencoderKLWan.from_config(container.config or {})
        load_into(module, container, names.vae_rename(container.names()), dtype=torch.float32, device=device)
        return module.requires_grad_(False).eval().to(device)

    def text(self, dtype: torch.dtype, device: torch.device) -> WanPipeline:
        """Tokenizer and umT5 encoder, frozen, as a pipeline without the other parts: its prompt code is the reference.
        """
        container = open_container(self.parts["text_encoder"])
        with empty_weights():
            module = UMT5EncoderModel(UMT5Config(**(container.config or UMT5_XXL)))
        load_into(module, container, names.t5_rename(container.names()), dtype=dtype, device=device)
        module = module.requires_grad_(False).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(self.parts["tokenizer"])
        return WanPipeline(tokenizer=tokenizer, text_encoder=module, transformer=None, vae=None, scheduler=None)

    def scheduler(self, shift: float) -> UniPCMultistepScheduler:
        """UniPC, the official sampler, with the given timestep shift."""
        return UniPCMultistepScheduler.from_config(UNIPC, flow_shift=shift)


def find(variant: Variant, path: str | None, parts: Mapping[str, str]) -> Base:
    """Where everything is: the parts of the folder `path` (`embedded` for the tiny base; diffusers or official
    layout), with single files or folders in their place where `parts` names them.
    """
    folder = EMBEDDED if path == "embedded" else Path(path).expanduser() if path else None
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"model.parts.{unknown[0]} is not allowed: {', '.join(PARTS)}", "rename the key")
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"model.path = {path!r} is not a folder",
            "download a checkpoint, e.g. `hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir "
            "models/Wan2.1-T2V-1.3B-Diffusers`, and set model.path to its folder (or model=tiny_wan)")
    found = find_parts(folder) if folder else {}
    found |= {part: Path(file).expanduser() for part, file in parts.items()}
    for part in PARTS:
        if part not in found or not found[part].exists():
            where = found.get(part, f"{folder or 'model.path'} (nor as model.parts.{part})")
            raise UserError(f"no {part} at {where}",
                            f"set model.parts.{part} to its file or folder, or model.path to a whole checkpoint, e.g. "
                            "`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir "
                            "models/Wan2.1-T2V-1.3B-Diffusers`")
    return Base(variant, {part: found[part] for part in PARTS})
