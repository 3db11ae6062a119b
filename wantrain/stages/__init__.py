"""One file a verb, readable from top to bottom. Here: what several verbs open first."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from wantrain.config import Config, Dtype, Experts, LoraFormat
from wantrain.data import decode, manifest, plan
from wantrain.data.cache import Cache
from wantrain.files import digest_text
from wantrain.lora import Spec
from wantrain.models import encode, hub, sampling
from wantrain.models.base import Base, find, for_expert
from wantrain.models.sampling import WanPipeline
from wantrain.models.variants import VARIANTS, Expert, Variant
from wantrain.terms import Bucket, Clip, PlannedClip, UserError

TORCH_DTYPE = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Opened:
    """A recipe with its base's files, its clips placed in buckets and its cache; nothing heavy is loaded yet."""

    config: Config
    base: Base
    """Of the checkpoint, or of one expert."""
    buckets: list[Bucket]
    planned: list[PlannedClip]
    heldout: list[PlannedClip]
    cache: Cache

    @property
    def variant(self) -> Variant:
        return self.base.variant

    def trainings(self) -> list[Opened]:
        """This recipe, or one for each expert that is asked for: two trainings over one cache, high noise first."""
        asked = self.config.model.experts.name
        return [replace(self, base=base) for base in self.base.each() if asked in ("both", base.expert)]

    @property
    def run_dir(self) -> Path:
        """The run's folder; an expert's training has its own inside."""
        return Path(self.config.run.dir) / (self.base.expert or "")

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the frozen transformer and text encoder."""
        return TORCH_DTYPE[self.config.model.dtype]

    @property
    def export_path(self) -> Path:
        """Where `export` writes and where `sample` and `evaluate` look first; a PEFT adapter is a folder."""
        noise = f"_{self.base.expert}_noise" if self.base.expert else ""
        suffix = "_peft" if self.config.export.format is LoraFormat.peft else ".safetensors"
        return Path(self.config.run.dir) / "export" / f"{self.config.run.name}{noise}{suffix}"

    @property
    def sigmas(self) -> tuple[float, float]:
        """[low, high) of the sigmas to train at."""
        return self.variant.sigmas_of(self.base.expert)


def spec_of(config: Config) -> Spec:
    """How the config wants its adapter."""
    own = config.lora
    return Spec(own.rank, own.alpha, own.kind.name, own.rank_pattern, own.alpha_pattern)


def variant_of(config: Config) -> Variant:
    """The config's row of the variants table; only plain text-to-video trains today."""
    trainable = [v.name for v in VARIANTS.values() if v.task == "t2v"]
    if config.model.variant not in trainable:
        raise UserError(f"model.variant = {config.model.variant!r} is not allowed: {', '.join(trainable)}",
                        "choose one of these, e.g. model=tiny_wan")
    variant = VARIANTS[config.model.variant]
    if config.model.experts is not Experts.both and not variant.experts:
        raise UserError(f"model.experts = {config.model.experts.name}, but {variant.name} has one transformer",
                        "take model.experts out")
    return variant


def clips_of(config: Config) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out clips of the manifests."""
    training = [clip for name, source in config.data.sources.items()
                for clip in manifest.read(source.path, name, source.repeats)]
    return training, manifest.read(config.data.heldout, "heldout") if config.data.heldout else []


def opened(config: Config, recipe_arguments: Sequence[str]) -> Opened:
    """Check everything that can be checked without loading weights. `recipe_arguments` are the user's overrides."""
    variant = variant_of(config)
    base = find(variant, config.model.path, config.model.parts, config.model.merge)
    buckets = plan.buckets(config.data.num_frames, config.data.resolutions, variant.multiple_px)
    cache_dir = Path(config.data.cache_dir)
    memo = cache_dir / "digests"
    training, heldout = clips_of(config)
    text_parts = [base.digest(part, memo) for part in ("text_encoder", "tokenizer")]
    cache = Cache(cache_dir, base.digest("vae", memo), " ".join([*text_parts, config.model.dtype.name]),
                  variant.fps, shlex.join(["wantrain", "cache", *recipe_arguments]))
    return Opened(config, base, buckets, plan.place(training, buckets, variant.fps, memo),
                  plan.place(heldout, buckets, variant.fps, memo), cache)


def manifest_digest(recipe: Opened) -> str:
    """A digest of which clips, captions, spans and repeats were trained on."""
    return digest_text(*(" ".join(map(str, (p.source_digest, p.clip.caption, p.clip.start_s, p.clip.end_s,
                                            p.clip.repeats, p.bucket))) for p in recipe.planned))


def sampler_settings(recipe: Opened) -> sampling.Settings:
    """The config's sampler with the variant's numbers where the config has none."""
    own, data, variant = recipe.config.sampler, recipe.config.data, recipe.variant
    height, width = own.resolution or data.resolutions[0]
    bucket, = plan.buckets([own.num_frames or max(data.num_frames)], [[height, width]], variant.multiple_px)
    return sampling.Settings(
        num_steps=own.num_steps or variant.num_steps,
        guidance=variant.guidance if own.guidance is None else (own.guidance, own.guidance),
        shift=variant.shift if own.shift is None else own.shift,
        bucket=bucket, negative_prompt=own.negative_prompt,
    )


Loras = Mapping[Expert | None, Path]
"""The LoRA file of each adapted transformer: by expert, or of the one under None."""


def pipeline_of(recipe: Opened, loras: Loras) -> WanPipeline:
    """The base's diffusers pipeline on the best device, with LoRA files of any format in its transformers, or none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers = []
    for base in recipe.base.each():
        transformers.append(base.transformer(recipe.dtype, device))
        if base.expert in loras:
            sampling.load_lora(transformers[-1], loras[base.expert])
    return sampling.build(transformers, recipe.base.vae(device), recipe.base.text(recipe.dtype, device),
                          recipe.base.scheduler(sampler_settings(recipe).shift), recipe.variant.boundary)


def lora_files(recipe: Opened, arguments: Sequence[str]) -> Loras:
    """The LoRA files that the config names, or the run's own exports, of the experts that are asked for."""
    own, trainings = recipe.config.sampler.lora, {one.base.expert: one for one in recipe.trainings()}
    if own:
        return {expert: hub.local(for_expert(own, expert)) for expert in trainings}
    paths = {expert: one.export_path for expert, one in trainings.items()}
    if absent := [path for path in paths.values() if not path.exists()]:
        raise UserError(f"no LoRA file {absent[0]}", shlex.join(["wantrain", "export", *arguments]))
    return paths


class Encode(Protocol):
    """What `cache` and streaming share: a clip or a caption to its tensors."""

    def latents(self, planned: PlannedClip) -> torch.Tensor: ...
    def text(self, caption: str) -> torch.Tensor: ...


class Encoder:
    """Decode and encode on the spot with the base's VAE and text encoder, on `device`."""

    def __init__(self, recipe: Opened, device: torch.device) -> None:
        self._fps = recipe.variant.fps
        self._vae = recipe.base.vae(device)
        self._text = recipe.base.text(recipe.dtype, device)

    def latents(self, planned: PlannedClip) -> torch.Tensor:
        """latents_CTHW float32 on the CPU."""
        clip = planned.clip
        frames_FCHW = decode.read_clip(clip.path, clip.start_s, clip.end_s, self._fps, planned.bucket)
        return encode.encode_frames(self._vae, frames_FCHW)

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return encode.encode_text(self._text, caption)


class Cached:
    """The same tensors read from the cache, which must be complete."""

    def __init__(self, recipe: Opened) -> None:
        self._cache = recipe.cache
        everything = recipe.planned + recipe.heldout
        clips, texts = self._cache.missing(everything, ["", *(p.clip.caption for p in everything)])
        if clips or texts:
            first = f"clip {clips[0].clip.id}" if clips else f"caption {texts[0]!r}"
            raise UserError(f"the cache has no entry for {len(clips)} of {len(everything)} clips and {len(texts)} "
                            f"captions with this base and these settings; the first is {first}",
                            self._cache.build_command)

    def latents(self, planned: PlannedClip) -> torch.Tensor:
        """latents_CTHW float32 on the CPU."""
        return self._cache.read(self._cache.latents_path(planned), f"clip {planned.clip.id}")

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._cache.read(self._cache.text_path(caption), f"caption {caption!r}")


def tensors_of(source: Encode, planned: PlannedClip, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents_CTHW, text_LD padded to TEXT_LEN)."""
    return source.latents(planned), encode.pad_text(source.text(caption))
