"""The schema of a recipe. Hydra and OmegaConf end in this module and in `cli`.

Every field is followed by one sentence with its unit; `wantrain VERB --help` prints them.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wantrain.files import digest_text
from wantrain.flow import Density
from wantrain.terms import UserError


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class DataMode(Enum):
    cache = "cache"
    stream = "stream"


class Extract(Enum):
    head = "head"
    middle = "middle"
    uniform = "uniform"
    sliding = "sliding"
    random = "random"


class Optimizer(Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    prodigy = "prodigy"
    schedule_free = "schedule_free"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Experts(Enum):
    both = "both"
    high = "high"
    low = "low"


class Distribution(Enum):
    uniform = "uniform"
    logit_normal = "logit_normal"
    mode = "mode"
    beta = "beta"


class LossKind(Enum):
    mse = "mse"
    huber = "huber"
    pseudo_huber = "pseudo_huber"


class Weighting(Enum):
    none = "none"
    sigma_sqrt = "sigma_sqrt"
    cosmap = "cosmap"
    min_snr = "min_snr"


class LoraKind(Enum):
    lora = "lora"
    rslora = "rslora"
    dora = "dora"
    loha = "loha"
    lokr = "lokr"


class LoraFormat(Enum):
    universal = "universal"
    comfy_updown = "comfy_updown"
    kohya = "kohya"
    diffusers = "diffusers"
    diffsynth = "diffsynth"
    peft = "peft"
    lycoris = "lycoris"


class Resume(Enum):
    auto = "auto"
    never = "never"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


@dataclass(slots=True)
class Run:
    name: str = MISSING
    """Name of the run and of the exported LoRA file."""
    dir: str = "runs/${run.name}"
    """Folder of the run: config, metrics, checkpoints, exports, samples, report."""


@dataclass(slots=True)
class Model:
    variant: str = MISSING
    """Entry of the variants table (wantrain/models/variants.py): architecture, fps, shift, guidance, steps."""
    path: str | None = None
    """Folder or model id of a whole checkpoint, diffusers or official layout, or `embedded` for the tiny base."""
    parts: dict[str, str] = field(default_factory=dict)
    """Files, folders or model ids in place of the folder's own: transformer (or high, low), vae, text_encoder, ..."""
    merge: list[str] = field(default_factory=list)
    """LoRA files folded into the base before training and sampling, FILE or FILE=STRENGTH; {expert}: high or low."""
    experts: Experts = Experts.both
    """Which of the two transformers of Wan2.2 A14B to train and export, one after the other."""
    dtype: Dtype = Dtype.bfloat16
    """Storage of the frozen transformer and text encoder; bfloat16 also computes under autocast."""


@dataclass(slots=True)
class ExpertOwn:
    rank: int | None = None
    """This expert's lora.rank, where it differs."""
    alpha: float | None = None
    """This expert's lora.alpha, where it differs."""
    lr: float | None = None
    """This expert's optim.lr, where it differs."""
    num_steps: int | None = None
    """This expert's train.num_steps, where it differs."""


@dataclass(slots=True)
class Lora:
    targets: list[str] = field(default_factory=lambda: ["attn_ffn"])
    """Presets (attn, attn_ffn, all_linear) or regular expressions over diffusers module names."""
    kind: LoraKind = LoraKind.lora
    """lora, rslora (scaled by alpha / sqrt(rank)), dora, loha or lokr; the last three load in fewer tools."""
    rank: int = 32
    """Inner width of each adapter."""
    alpha: float = 32.0
    """The adapter is scaled by alpha / rank."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for the modules that a preset or regular expression matches; the last that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for the modules that a preset or regular expression matches; the last that matches counts."""
    start_from: str | None = None
    """A LoRA file of any known format, or model id, to go on from: of this kind, at most this rank, no more modules."""


@dataclass(slots=True)
class Source:
    path: str = MISSING
    """Folder of media with sidecar .txt, .jsonl, .csv, .parquet, .tar shards ('*.tar'), hf://datasets/OWNER/NAME."""
    repeats: float = 1.0
    """How often an epoch shows each clip of this source; 0.5 shows one half of them in turn with the other."""
    weight: float | None = None
    """Share of the samples relative to the weights of other sources, whatever their sizes; in place of repeats."""
    speed: float = 1.0
    """2 shows two seconds of the source in one; 1 leaves motion as it was."""
    preserve: bool = False
    """Learn what the frozen base predicts of these clips and not their pixels: prior preservation by a plain set."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to the source's own where they differ, e.g. {video: mp4, caption: text}."""


@dataclass(slots=True)
class Data:
    sources: dict[str, Source] = MISSING
    """The training sets by name; a regularisation set is one more source without the trigger in its captions."""
    heldout: str | None = None
    """Clips never trained on, for validation and evaluation; same forms as a source's path."""
    trigger: str = ""
    """The words in the captions that call the style; written into the exported file, used by evaluate."""
    mode: DataMode = DataMode.cache
    """cache: read latents made by `wantrain cache`; stream: decode and encode at every step."""
    cache_dir: str = "cache"
    """Folder of the content-addressed cache; may be shared by any number of recipes."""
    extract: Extract = Extract.head
    """Which windows of a clip: the head, the middle, uniform (fewest that miss nothing), sliding, random (stream)."""
    limits: dict[str, Any] = field(default_factory=dict)
    """[low, high] by column of measurements (wantrain-filter), null for no bound; clips outside are dropped."""
    allow_drops: bool = False
    """Go on without clips that cannot be used, e.g. unreadable or too short; they are listed with their reasons."""
    max_tokens_per_clip: int | None = None
    """Where a length at a resolution has more transformer tokens than this, its picture shrinks until it fits."""
    max_tokens_per_batch: int | None = None
    """A step takes as many times batch_size samples of a bucket as fit into these tokens; null: always once."""
    tag_orders: int = 0
    """Other orders of a caption's comma-separated tags, encoded once and drawn anew for each sample."""
    num_workers: int | None = None
    """Processes that look into files and decode; null takes all cores, shared by the processes of a machine."""
    timeout_s: float = 300.0
    """A file that takes longer than this to look into, or a clip to decode, is a fault and does not stop the others."""
    num_frames: list[int] = MISSING
    """Clip lengths in frames at the model's fps, each 4n+1; a clip goes to the longest that it fills."""
    resolutions: list[list[int]] = MISSING
    """Sizes as [height, width] in pixels; a clip goes to the one nearest in aspect."""
    batch_size: int = 1
    """Samples in an optimizer step over all processes; accumulation follows from train.micro_batch_size."""
    caption_dropout: float = 0.0
    """Share of samples trained with the empty caption; above 0 the style also enters what guidance moves away from."""
    first_frame_share: float = 0.5
    """Share of samples given their first frame where the model works with and without (TI2V-5B, Fun-Control)."""


@dataclass(slots=True)
class Optim:
    name: Optimizer = Optimizer.adamw
    """adamw; adamw_8bit, prodigy (finds its learning rate) and schedule_free need a package: docs/optimizers.md."""
    lr: float = 1e-4
    """Peak learning rate; with prodigy the factor on the one that it finds: 1.0."""
    lora_plus: float = 1.0
    """LoRA+: the learning rate of the B matrices is lr times this; its authors recommend 16, with a smaller lr."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Factors on lr for the modules that a preset or regular expression matches; the last that matches counts."""
    ema_decay: float | None = None
    """Also keep and export an average of the adapter with this decay a step, e.g. 0.99 to 0.9999; null keeps none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of the mean gradient and of the mean square (schedule_free: the first is its interpolation)."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.01
    """Decoupled weight decay, times the learning rate."""
    schedule: Schedule = Schedule.constant
    """Shape of the learning rate after warm-up; cosine and linear end at zero at train.num_steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global L2 norm."""


@dataclass(slots=True)
class Train:
    num_steps: int = MISSING
    """Optimizer steps."""
    micro_batch_size: int = 1
    """Samples that one process computes at once."""
    seed: int = 0
    """Seed of the adapter's start, the order of clips, sigma, noise and caption dropout."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: int | None = None
    """Checkpoints of every so many steps stay as well; null keeps only the newest."""
    mirror: str | None = None
    """Folder or fsspec URL (s3://...) to copy checkpoints to; a run whose folder has none goes on from it."""
    log_every: int = 1
    """Steps between metrics lines."""
    resume: Resume = Resume.auto
    """auto: go on from the newest checkpoint of the run folder; never: refuse a folder, or mirror, that has one."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """When a loss or gradient is not finite: stop before the update, or skip it; both note clips and sigmas."""
    max_skips: int = 10
    """With on_nonfinite=skip: the run stops when it has left out more updates than this."""
    stall_timeout_s: float = 600.0
    """How long processes wait for one that is gone or stands still before the run ends and names it."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time, same numbers."""
    sequence_parallel: int = 1
    """Processes that compute a sample together, each a part of its tokens: for clips too long for one."""


@dataclass(slots=True)
class Sigma:
    distribution: Distribution = Distribution.uniform
    """How sigma is drawn before the shift: uniform, logit_normal, mode or beta; docs/losses.md says when which."""
    shape: list[float] = field(default_factory=list)
    """logit_normal: [mean, std]; mode: [scale]; beta: [alpha, beta]; empty takes [0, 1], [1.29], [2, 2]."""
    shift: float | None = None
    """Timestep shift of the draw; null takes the variant's inference shift."""
    by_resolution: bool = False
    """Multiply the shift by sqrt(tokens of the bucket / tokens of the model's native size)."""
    range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """[low, high) of the sigmas that are drawn; an expert's own range narrows it."""


@dataclass(slots=True)
class Loss:
    kind: LossKind = LossKind.mse
    """mse, huber or pseudo_huber; the last two count far outliers less."""
    delta: float = 0.1
    """Error from which huber and pseudo_huber grow linearly."""
    weighting: Weighting = Weighting.none
    """Weight by sigma: none, sigma_sqrt, cosmap or min_snr."""
    min_snr_gamma: float = 5.0
    """Where min_snr cuts the signal-to-noise ratio."""
    mask_background: float = 0.0
    """Weight of the loss outside a clip's mask, 1 inside; clips without a mask count everywhere."""
    mask_preserve: float = 0.0
    """Weight of what is outside a clip's mask to be as the frozen base predicts it; 0 leaves it free to change."""
    class_words: str | None = None
    """What the trigger is one of (`cartoon`): captions with these instead of it must give what the base gives."""
    class_weight: float = 1.0
    """Weight of that loss (differential output preservation) beside the clip's own."""


@dataclass(slots=True)
class Validation:
    every_steps: int = 0
    """Steps between validation losses on data.heldout; 0 turns them off."""
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """The fixed noise levels; each held-out clip is measured once at each."""


@dataclass(slots=True)
class Sampler:
    prompts: list[str] = field(default_factory=list)
    """What to sample."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One video for each prompt, seed and strength."""
    strengths: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """LoRA strengths; 0 is the base."""
    num_steps: int | None = None
    """Denoising steps; null takes the variant's."""
    guidance: float | None = None
    """Classifier-free guidance scale; null takes the variant's (of each expert)."""
    shift: float | None = None
    """Timestep shift of the sampler; null takes the variant's."""
    num_frames: int | None = None
    """Frames of a sample; null takes the largest of data.num_frames."""
    resolution: list[int] | None = None
    """[height, width] in pixels; null takes the first of data.resolutions."""
    inputs: list[dict[str, str]] = field(default_factory=list)
    """Files each prompt works from: first, last, control, control_mask, reference, face, video; one serves all."""
    strength: float = 0.7
    """Share of the schedule that a `video` of sampler.inputs goes through; 1 keeps nothing of it."""
    lora: str | None = None
    """LoRA file or model id to sample with ({expert}: high or low); null takes the run's own export."""


@dataclass(slots=True)
class Evaluate:
    prompts: list[str] = field(default_factory=list)
    """Prompts without the trigger; each is sampled from the base, and from the LoRA with and without it."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One trio of videos for each prompt and seed."""


@dataclass(slots=True)
class Report:
    num_windows: int = 60
    """Windows that the data report shows as clips, spread evenly over the set; its tables count all."""


@dataclass(slots=True)
class Export:
    format: LoraFormat = LoraFormat.universal
    """universal loads right in most tools; comfy_updown or kohya for loha and lokr; diffusers or peft for dora."""
    dtype: Dtype = Dtype.float32
    """Storage of the exported LoRA; bfloat16 only where folding alpha loses nothing."""


@dataclass(slots=True)
class Tracker:
    names: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers beside the JSONL that is always written: tensorboard, wandb (offline unless you are logged in)."""
    project: str = "wantrain"
    """Project name shown in the tracker."""


@dataclass(slots=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    high: ExpertOwn = field(default_factory=ExpertOwn)
    low: ExpertOwn = field(default_factory=ExpertOwn)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    sigma: Sigma = field(default_factory=Sigma)
    loss: Loss = field(default_factory=Loss)
    validation: Validation = field(default_factory=Validation)
    sampler: Sampler = field(default_factory=Sampler)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)
    export: Export = field(default_factory=Export)
    tracker: Tracker = field(default_factory=Tracker)

    def __post_init__(self) -> None:
        for ok, key, value, allowed in self._rules():
            if not ok:
                raise UserError(f"{key} = {value!r} is not allowed: {allowed}", f"set {key} on the command line "
                                f"or in the recipe, e.g. {key}=...")

    def _rules(self) -> Iterator[tuple[bool, str, object, str]]:
        data, train, optim = self.data, self.train, self.optim
        for frames in data.num_frames:
            yield frames >= 1 and frames % 4 == 1, "data.num_frames", frames, "each must be 4n+1: 1, 5, ..., 81"
        yield bool(data.num_frames), "data.num_frames", data.num_frames, "at least one length"
        yield bool(data.resolutions), "data.resolutions", data.resolutions, "at least one [height, width]"
        for size in [*data.resolutions, *([self.sampler.resolution] if self.sampler.resolution else [])]:
            yield len(size) == 2 and min(size) > 0, "resolution", size, "two positive numbers, [height, width]"
        yield 0 <= data.caption_dropout <= 1, "data.caption_dropout", data.caption_dropout, "a share in [0, 1]"
        yield bool(data.sources), "data.sources", data.sources, "at least one source"
        for name, source in data.sources.items():
            yield source.repeats > 0, f"data.sources.{name}.repeats", source.repeats, "above 0"
            yield source.weight is None or source.weight > 0, f"data.sources.{name}.weight", source.weight, "above 0"
            yield source.speed > 0, f"data.sources.{name}.speed", source.speed, "above 0"
        weighted = [name for name, source in data.sources.items() if source.weight is not None]
        yield len(weighted) in (0, len(data.sources)), "data.sources.*.weight", weighted, "all sources, or none"
        for column, limit in data.limits.items():
            yield _is_range(limit), f"data.limits.{column}", limit, "[low, high] with null for no bound"
        yield data.extract is not Extract.random or data.mode is DataMode.stream, "data.extract", "random", \
            "only with data.mode=stream; uniform or sliding give more than the head from a cache"
        yield data.tag_orders >= 0, "data.tag_orders", data.tag_orders, "0 or more"
        yield data.timeout_s > 0, "data.timeout_s", data.timeout_s, "above 0"
        yield from self._rules_of_loss()
        yield train.max_skips >= 0, "train.max_skips", train.max_skips, "0 or more"
        yield train.stall_timeout_s > 0, "train.stall_timeout_s", train.stall_timeout_s, "above 0"
        for key, most in {"data.max_tokens_per_clip": data.max_tokens_per_clip, "data.num_workers": data.num_workers,
                          "data.max_tokens_per_batch": data.max_tokens_per_batch,
                          "train.keep_every": train.keep_every}.items():
            yield most is None or most >= 1, key, most, "1 or more, or null"
        for key, number in {"lora.rank": self.lora.rank, "train.num_steps": train.num_steps,
                            "train.micro_batch_size": train.micro_batch_size, "data.batch_size": data.batch_size,
                            "train.save_every": train.save_every, "train.log_every": train.log_every,
                            "train.keep_checkpoints": train.keep_checkpoints,
                            "train.sequence_parallel": train.sequence_parallel,
                            "report.num_windows": self.report.num_windows}.items():
            yield number >= 1, key, number, "1 or more"
        yield data.batch_size % train.micro_batch_size == 0, "data.batch_size", data.batch_size, \
            f"a multiple of train.micro_batch_size ({train.micro_batch_size})"
        for key, values in {"lora.alpha": [self.lora.alpha], "lora.rank_pattern": self.lora.rank_pattern.values(),
                            "lora.alpha_pattern": self.lora.alpha_pattern.values()}.items():
            yield all(value > 0 for value in values), key, list(values), "positive numbers"
        yield bool(self.lora.targets), "lora.targets", self.lora.targets, "at least one preset or pattern"
        yield from _optim_rules(optim, self.lora.kind)
        yield all(0 < s <= 1 for s in self.validation.sigmas), "validation.sigmas", self.validation.sigmas, "in (0, 1]"
        yield self.validation.every_steps == 0 or data.heldout is not None, "validation.every_steps", \
            self.validation.every_steps, "0 when data.heldout is not set"
        for name in self.tracker.names:
            yield name in ("tensorboard", "wandb"), "tracker.names", name, "tensorboard, wandb"

    def _rules_of_loss(self) -> Iterator[tuple[bool, str, object, str]]:
        sigma, loss, sampler = self.sigma, self.loss, self.sampler
        yield len(sigma.range) == 2, "sigma.range", sigma.range, "[low, high] in [0, 1]"
        try:
            Density(sigma.distribution.name, tuple(sigma.shape), 1.0 if sigma.shift is None else sigma.shift,
                    (sigma.range[0], sigma.range[1]))
        except ValueError as error:
            yield False, "sigma", {"shape": sigma.shape, "shift": sigma.shift, "range": sigma.range}, str(error)
        yield loss.delta > 0, "loss.delta", loss.delta, "above 0"
        yield loss.min_snr_gamma > 0, "loss.min_snr_gamma", loss.min_snr_gamma, "above 0"
        yield 0 <= loss.mask_background <= 1, "loss.mask_background", loss.mask_background, "a weight in [0, 1]"
        yield loss.mask_preserve >= 0, "loss.mask_preserve", loss.mask_preserve, "0 or more"
        yield loss.class_weight > 0, "loss.class_weight", loss.class_weight, "above 0"
        yield not loss.class_words or bool(self.data.trigger), "loss.class_words", loss.class_words, \
            "only with data.trigger, in whose place they stand"
        yield 0 <= self.data.first_frame_share <= 1, "data.first_frame_share", self.data.first_frame_share, \
            "a share in [0, 1]"
        for given in sampler.inputs:
            yield set(given) <= set(SAMPLER_INPUTS), "sampler.inputs", given, ", ".join(SAMPLER_INPUTS)
        yield len(sampler.inputs) in (0, 1, len(sampler.prompts)), "sampler.inputs", len(sampler.inputs), \
            "one for all prompts, or one for each"
        yield 0 < sampler.strength <= 1, "sampler.strength", sampler.strength, "in (0, 1]"
        for name, own in {"high": self.high, "low": self.low}.items():
            for key in ("rank", "alpha", "lr", "num_steps"):
                value = getattr(own, key)
                yield value is None or value > 0, f"{name}.{key}", value, "above 0, or null"


SAMPLER_INPUTS = ("first", "last", "control", "control_mask", "reference", "face", "video")


def _optim_rules(optim: Optim, kind: LoraKind) -> Iterator[tuple[bool, str, object, str]]:
    positive = "a positive number"
    for key, number in {"optim.lr": optim.lr, "optim.max_grad_norm": optim.max_grad_norm,
                        "optim.lora_plus": optim.lora_plus}.items():
        yield number > 0, key, number, positive
    yield all(f > 0 for f in optim.lr_factors.values()), "optim.lr_factors", optim.lr_factors, "positive numbers"
    yield len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas), "optim.betas", optim.betas, \
        "two numbers in [0, 1)"
    yield optim.warmup_steps >= 0, "optim.warmup_steps", optim.warmup_steps, "0 or more"
    yield optim.ema_decay is None or 0 < optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, \
        "between 0 and 1, e.g. 0.999, or null"
    yield optim.lora_plus == 1 or kind in (LoraKind.lora, LoraKind.rslora, LoraKind.dora), "optim.lora_plus", \
        optim.lora_plus, f"1 with lora.kind={kind.name}, which has no B matrices"
    if optim.name is Optimizer.prodigy:
        yield 0.1 <= optim.lr <= 10, "optim.lr", optim.lr, \
            "optim.name=prodigy multiplies it with the learning rate that it finds: take 1.0, or from 0.1 to 10"
        for key, value, alone in (("optim.lora_plus", optim.lora_plus, 1), ("optim.lr_factors", optim.lr_factors, {})):
            yield value == alone, key, value, f"{alone} with optim.name=prodigy, which finds one learning rate for all"
    if optim.name is Optimizer.schedule_free:
        yield optim.schedule is Schedule.constant, "optim.schedule", optim.schedule.name, \
            "constant with optim.name=schedule_free, whose average takes the schedule's place; warmup_steps is allowed"
        yield optim.ema_decay is None, "optim.ema_decay", optim.ema_decay, \
            "null with optim.name=schedule_free, which exports an average already"
        yield optim.betas[0] > 0, "optim.betas", optim.betas, "a first number above 0 with optim.name=schedule_free"


def _is_range(limit: object) -> bool:
    """Whether this is [low, high] of numbers or null, and not both null."""
    if not (isinstance(limit, list) and len(limit) == 2):
        return False
    bounds = [bound for bound in limit if bound is not None]
    numbers = all(isinstance(bound, int | float) for bound in bounds)
    return numbers and bool(bounds) and bounds == sorted(bounds)


HARMLESS_TO_RESUME = ("run.", "sampler.", "evaluate.", "report.", "export.", "tracker.", "validation.", "data.mode",
                      "data.cache_dir", "data.heldout", "data.num_workers", "data.timeout_s",
                      "data.allow_drops", "train.num_steps", "train.micro_batch_size",
                      "train.save_every", "train.keep_checkpoints", "train.keep_every", "train.mirror",
                      "train.log_every", "train.resume", "train.on_nonfinite", "train.max_skips",
                      "train.stall_timeout_s", "train.activation_checkpointing", "train.sequence_parallel",
                      "model.path", "model.parts", "model.experts", "high.", "low.", "data.trigger")
"""Keys (prefixes) that may differ between a checkpoint and the config that goes on from it."""


OPEN = ("model.parts", "lora.rank_pattern", "lora.alpha_pattern", "data.limits", "optim.lr_factors")
"""Dictionaries whose keys are the user's; those of a source are too."""


def _is_open(key: str) -> bool:
    return key in OPEN or key.startswith("data.sources.")


def configs_folder() -> Path:
    """`configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def asset(name: str) -> Path:
    """A file or folder that ships inside the package, e.g. `demo/anime`; `${assets:demo/anime}` in a config."""
    return Path(__file__).parent / "assets" / name


def recipes() -> list[str]:
    """Names of the recipes that ship with wantrain."""
    return sorted(p.stem for p in (configs_folder() / "recipe").glob("*.yaml"))


def load(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Compose `configs/wantrain.yaml` with the overrides into a checked Config. Every fault is a UserError.

    `config_dir` is a folder of the user's own groups (e.g. `recipe/mine.yaml`), searched before the shipped ones.
    """
    node = OmegaConf.structured(Config)
    for key in OPEN:
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name="schema", node=node)
    OmegaConf.register_new_resolver("assets", lambda name: str(asset(name)), replace=True)
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    help_command = "wantrain train --help    lists every key with its meaning"
    try:
        with initialize_config_dir(str(configs_folder()), version_base="1.3"):
            composed = compose("wantrain", overrides=[*overrides, *search])
        if strays := _unknown(composed, OmegaConf.structured(Config)):
            raise UserError(f"unknown config keys: {', '.join(strays)}", help_command)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise UserError(f"no value for {', '.join(missing)}", f"add {missing[0]}=... or choose a recipe: "
                            f"recipe={'|'.join(recipes())}")
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_readable(error), help_command) from error
    assert isinstance(config, Config)
    return config


def _unknown(config: DictConfig, schema: DictConfig, prefix: str = "") -> list[str]:
    """Keys that a `+key=value` override smuggled past the schema (Hydra 1.3 lets it)."""
    found = []
    known = set(schema.keys())
    for key in map(str, config):
        node = None if OmegaConf.is_missing(config, key) else config[key]
        if key not in known:
            found.append(prefix + key)
        elif prefix + key == "data.sources" and isinstance(node, DictConfig):
            for name in map(str, node):
                found += _unknown(node[name], OmegaConf.structured(Source), f"{prefix}{key}.{name}.")
        elif isinstance(node, DictConfig) and isinstance(schema[key], DictConfig) and not _is_open(prefix + key):
            found += _unknown(node, schema[key], f"{prefix}{key}.")
    return found


def _readable(error: Exception) -> str:
    """Hydra's message with its cause, and the nearest known key when one was mistyped."""
    parts = [str(error).strip()]
    if error.__cause__ is not None and str(error.__cause__).strip() not in parts[0]:
        parts.append(str(error.__cause__).strip())
    text = "\n".join(parts)
    mistyped = re.search(r"Key '(\w+)' not in", text)
    close = difflib.get_close_matches(mistyped[1], [key.split(".")[-1] for key in described()]) if mistyped else []
    return text + (f"\ndid you mean {close[0]!r}?" if close else "")


def described() -> dict[str, tuple[str, str]]:
    """Every config key -> (default as text, its sentence), read from the dataclasses above."""
    return dict(_described(Config, ""))


def _described(schema: type, prefix: str) -> Iterator[tuple[str, tuple[str, str]]]:
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    sentences = {}
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default = ast.unparse(statement.value) if statement.value else "MISSING"
            text = following.value.value if isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant) else ""
            sentences[statement.target.id] = (default, str(text))
    for entry in fields(schema):
        factory = entry.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from _described(factory, f"{prefix}{entry.name}.")
        else:
            default, text = sentences[entry.name]
            default = default.removeprefix("field(default_factory=lambda: ").removesuffix(")") if "lambda" in default \
                else default
            yield f"{prefix}{entry.name}", ({"MISSING": "required", "field(default_factory=list)": "[]"}.get(
                default, default), text)
        if prefix + entry.name == "data.sources":
            yield from _described(Source, "data.sources.NAME.")


def to_yaml(config: Config) -> str:
    """The whole resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value, for trackers, provenance and the fingerprint."""
    return _flat(config)


def defaults() -> dict[str, Any]:
    """The same of the keys that have a default."""
    return {key: value for key, value in _flat(Config).items() if value != MISSING}


def _flat(config: Config | type[Config]) -> dict[str, Any]:
    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, value.name if isinstance(value, Enum) else value
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return dict(walk(container, ""))


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys that fix the training's numbers; a resume refuses when one differs."""
    keys = {k: v for k, v in flat(config).items() if not k.startswith(HARMLESS_TO_RESUME)}
    if config.optim.schedule is not Schedule.constant:
        keys["train.num_steps"] = config.train.num_steps
    if config.loss.class_words:
        keys["data.trigger"] = config.data.trigger
    return keys


def for_expert(config: Config, expert: str | None) -> Config:
    """The config with what `high` or `low` says of this expert in its places; another rank alone keeps alpha / rank."""
    own = {"high": config.high, "low": config.low}.get(expert or "", ExpertOwn())
    lora, optim, train = config.lora, config.optim, config.train
    rank = own.rank or lora.rank
    return replace(config, lora=replace(lora, rank=rank, alpha=own.alpha or lora.alpha * rank / lora.rank),
                   optim=replace(optim, lr=own.lr or optim.lr),
                   train=replace(train, num_steps=own.num_steps or train.num_steps))


def digest(config: Config) -> str:
    """A digest of the whole config."""
    return digest_text(to_yaml(config))
