"""One file a verb, readable from top to bottom. Here: what several verbs open first."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from wantrain.config import Config, Dtype, Experts, LoraFormat
from wantrain.data import batches, decode, manifest, media, plan
from wantrain.data.cache import LATENTS, MASK, TEXT, Cache, Entry, describe
from wantrain.data.plan import Plan
from wantrain.files import digest_text
from wantrain.jobs import in_workers
from wantrain.lora import Spec
from wantrain.models import encode, hub, sampling
from wantrain.models.base import Base, find, for_expert
from wantrain.models.sampling import WanPipeline
from wantrain.models.variants import VARIANTS, Expert, Variant
from wantrain.terms import Bucket, Clip, Dropped, PlannedClip, UserError

TORCH_DTYPE = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Opened:
    """A recipe with its base's files, its clips placed in buckets and its cache; nothing heavy is loaded yet."""

    config: Config
    base: Base
    """Of the checkpoint, or of one expert."""
    buckets: list[Bucket]
    plan: Plan
    heldout: list[PlannedClip]
    cache: Cache

    @property
    def planned(self) -> list[PlannedClip]:
        """The windows to train on."""
        return self.plan.used

    @property
    def factors(self) -> dict[Bucket, int]:
        """How many times data.batch_size samples a step takes of each bucket."""
        data = self.config.data
        return batches.batch_factors({p.bucket for p in self.planned}, data.batch_size, data.max_tokens_per_batch,
                                     self.variant.multiple_px)

    @property
    def captions(self) -> list[str]:
        """Every text that training may draw, the empty one first."""
        return ["", *(text for p in self.planned + self.heldout
                      for text in batches.captions_of(p.clip, self.config.data.tag_orders))]

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
        return self._export_path("")

    @property
    def ema_export_path(self) -> Path:
        """Where `export` writes the adapter's average."""
        return self._export_path("_ema")

    def _export_path(self, what: str) -> Path:
        noise = f"_{self.base.expert}_noise" if self.base.expert else ""
        suffix = "_peft" if self.config.export.format is LoraFormat.peft else ".safetensors"
        return Path(self.config.run.dir) / "export" / f"{self.config.run.name}{what}{noise}{suffix}"

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
    fetched = Path(config.data.cache_dir) / "fetched"
    training = [clip for name, source in config.data.sources.items() for clip in manifest.read(manifest.Source(
        name, source.path, source.repeats, source.speed, source.columns, fetched))]
    if not config.data.heldout:
        return training, []
    return training, manifest.read(manifest.Source("heldout", config.data.heldout, fetched=fetched))


def opened(config: Config, recipe_arguments: Sequence[str], refuse: bool = True) -> Opened:
    """Check everything that can be checked without loading weights. `recipe_arguments` are the user's overrides.

    Without `refuse`, clips that cannot be used are only told in the plan.
    """
    variant, data = variant_of(config), config.data
    base = find(variant, config.model.path, config.model.parts, config.model.merge)
    cache_dir = Path(data.cache_dir)
    memo = cache_dir / "digests"
    text_parts = [base.digest(part, memo) for part in ("text_encoder", "tokenizer")]
    cache = Cache(cache_dir, base.digest("vae", memo), " ".join([*text_parts, config.model.dtype.name]),
                  shlex.join(["wantrain", "cache", *recipe_arguments]))
    training, heldout = clips_of(config)
    found = media.look_all(plan.media_of(training + heldout), cache_dir, num_workers(config), data.timeout_s)
    rules = plan.Rules(plan.buckets(data.num_frames, data.resolutions, variant.multiple_px, data.max_tokens_per_clip),
                       variant.fps, data.extract.name, data.limits)
    placed = _without_faults(plan.place(training, found, rules), cache)
    apart = _without_faults(plan.place(heldout, found, replace(rules, extract="head", limits={})), cache)
    if refuse:
        refuse_drops([*placed.dropped, *apart.dropped], data.allow_drops)
    if not placed.used:
        raise UserError(f"none of {placed.num_found} clips can be used", "wantrain check says why; look at data.limits")
    return Opened(config, base, list(rules.buckets), Plan(_weighted(placed.used, config), placed.dropped), apart.used,
                  cache)


def num_workers(config: Config) -> int:
    """Processes that look into files and decode: this process's share of the cores unless told."""
    shares = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.data.num_workers or max(1, (os.cpu_count() or 1) // shares)


def _without_faults(placed: Plan, cache: Cache) -> Plan:
    """The plan without the windows that an earlier run could not decode."""
    faults = cache.faults()
    bad = {p.clip.id: Dropped(p.clip, "unreadable", faults[path.name])
           for p in placed.used for path in cache.entries([p], []) if path.name in faults}
    return Plan([p for p in placed.used if p.clip.id not in bad], [*placed.dropped, *bad.values()])


def refuse_drops(dropped: Sequence[Dropped], allowed: bool) -> None:
    """Say all clips that cannot be used, unless the user goes on without them; limits are the user's own wish."""
    faults = [f"{one.clip.id}: {one.reason}" for one in dropped if one.kind != "outside limits"]
    if faults and not allowed:
        raise UserError(f"{len(faults)} clip(s) cannot be used:\n  " + "\n  ".join(faults),
                        "replace them, take them out of the manifest, add a smaller length to data.num_frames, or go "
                        "on without them: data.allow_drops=true")


def _weighted(planned: list[PlannedClip], config: Config) -> list[PlannedClip]:
    """The windows with their sources' weights turned into repeats; an epoch keeps its number of samples."""
    weights = {name: source.weight for name, source in config.data.sources.items() if source.weight is not None}
    if not weights:
        return planned
    counts = Counter(p.clip.source for p in planned)
    unit = len(planned) / sum(weights[name] for name in counts)
    return [replace(p, clip=replace(p.clip, repeats=weights[p.clip.source] * unit / counts[p.clip.source]))
            for p in planned]


def manifest_digest(recipe: Opened) -> str:
    """A digest of which clips, captions, spans and repeats were trained on."""
    return digest_text(*(" ".join(map(str, (
        p.found.digest, p.clip.caption, *p.clip.more_captions, p.start_s, p.latest_s, p.fps, p.clip.repeats, p.bucket,
        *(f"{name} {other.found.digest}" for name, other in p.partners.items())))) for p in recipe.planned))


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
    def mask(self, planned: PlannedClip) -> torch.Tensor: ...
    def text(self, caption: str) -> torch.Tensor: ...


class Encoder:
    """Decode and encode on the spot with the base's VAE and text encoder, on `device`."""

    def __init__(self, recipe: Opened, device: torch.device) -> None:
        self._vae = recipe.base.vae(device)
        self._text = recipe.base.text(recipe.dtype, device)
        self._latent_px = recipe.variant.multiple_px // 2

    def encode(self, frames_FCHW: torch.Tensor) -> torch.Tensor:
        """latents_CTHW float32 on the CPU."""
        return encode.encode_frames(self._vae, frames_FCHW)

    def pool(self, frames_FCHW: torch.Tensor, planned: PlannedClip) -> torch.Tensor:
        """mask_1THW of a mask's frames."""
        return encode.pool_mask(frames_FCHW, planned.bucket, self._latent_px)

    def latents(self, planned: PlannedClip) -> torch.Tensor:
        """latents_CTHW float32 on the CPU, decoded in this process."""
        return self.encode(decode.read_window(planned))

    def mask(self, planned: PlannedClip) -> torch.Tensor:
        """mask_1THW float32 on the CPU, decoded in this process."""
        return self.pool(decode.read_window(planned), planned)

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return encode.encode_text(self._text, caption)


class Streamed:
    """What training asks for, decoded ahead of it in worker processes and encoded here.

    `coming` are the windows in the order in which they will be asked for, each followed by its mask's.
    """

    def __init__(self, encoder: Encoder, coming: Iterable[PlannedClip], jobs: int, timeout_s: float) -> None:
        self._encoder = encoder
        self._decoded = in_workers(decode.frames_in_worker, coming, jobs, timeout_s, "data.timeout_s", ordered=True)

    def latents(self, planned: PlannedClip) -> torch.Tensor:
        """latents_CTHW float32 on the CPU."""
        return self._encoder.encode(self._next(planned))

    def mask(self, planned: PlannedClip) -> torch.Tensor:
        """mask_1THW float32 on the CPU."""
        return self._encoder.pool(self._next(planned), planned)

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._encoder.text(caption)

    def _next(self, planned: PlannedClip) -> torch.Tensor:
        given, result, why = next(self._decoded)
        assert given == planned, f"{given.name} was decoded where {planned.name} is asked for"
        frames_FCHW, fault = result or (None, f"clip {planned.clip.id}: {why}")
        if frames_FCHW is None:
            raise UserError(fault, "replace the file or take it out of the manifest; the last checkpoint is untouched")
        return torch.from_numpy(frames_FCHW)


class Cached:
    """The same tensors read from the cache, which must be complete."""

    def __init__(self, recipe: Opened) -> None:
        self._cache = recipe.cache
        if missing := self._cache.missing(recipe.planned + recipe.heldout, recipe.captions):
            raise UserError(f"the cache lacks {counted(missing)} for this base and these settings; the first is "
                            f"{describe(next(iter(missing.values())))}", self._cache.build_command)

    def latents(self, planned: PlannedClip) -> torch.Tensor:
        """latents_CTHW float32 on the CPU."""
        return self._cache.read((LATENTS, planned))

    def mask(self, planned: PlannedClip) -> torch.Tensor:
        """mask_1THW float32 on the CPU."""
        return self._cache.read((MASK, planned))

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._cache.read((TEXT, caption))


def counted(entries: Mapping[Path, Entry]) -> str:
    """`3 clips, 0 masks and 2 captions`."""
    kinds = Counter(kind for kind, _ in entries.values())
    masks = f", {kinds[MASK]} masks" if kinds[MASK] else ""
    return f"{kinds[LATENTS]} clips{masks} and {kinds[TEXT]} captions"


def tensors_of(source: Encode, planned: PlannedClip, caption: str
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(latents_CTHW, text_LD padded to TEXT_LEN, mask_1THW or None)."""
    mask = planned.partners.get("mask")
    return source.latents(planned), encode.pad_text(source.text(caption)), source.mask(mask) if mask else None
