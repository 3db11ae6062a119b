"""The schema of a recipe: every field is followed by one sentence with its unit; `wantrain VERB --help` prints them.

What values are allowed is in `rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from omegaconf import MISSING


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


class BaseForm(Enum):
    dtype = "dtype"
    int8 = "int8"
    fp8 = "fp8"


class VaeDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    name: str = MISSING
    """Name of the run and of the exported LoRA file."""
    dir: str = "runs/${run.name}"
    """Folder of the run: config, metrics, checkpoints, exports, samples, report."""


@dataclass(slots=True)
class Model:
    may_change: ClassVar[tuple[str, ...]] = ("path", "parts", "experts")
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
    may_change: ClassVar[tuple[str, ...]] = ("*",)
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
    """Teach the adapter to predict, for these clips, what the frozen base predicts (prior preservation)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to the source's own where they differ, e.g. {video: mp4, caption: text}."""


@dataclass(slots=True)
class Data:
    may_change: ClassVar[tuple[str, ...]] = ("mode", "cache_dir", "heldout", "num_workers", "timeout_s",
                                             "allow_drops", "trigger")
    sources: dict[str, Source] = MISSING
    """The training sets by name; a regularisation set is one more source without the trigger in its captions."""
    heldout: str | None = None
    """Clips never trained on, for validation and evaluation; same forms as a source's path."""
    trigger: str = ""
    """The words in the captions that call the style; written into the exported file, used by evaluate."""
    mode: DataMode = DataMode.cache
    """cache: read latents made by `wantrain cache`; stream: decode and encode at every step (texts once, before)."""
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
    may_change: ClassVar[tuple[str, ...]] = ("num_steps", "micro_batch_size", "save_every", "keep_checkpoints",
                                             "keep_every", "mirror", "log_every", "resume", "on_nonfinite",
                                             "max_skips", "stall_timeout_s", "activation_checkpointing",
                                             "sequence_parallel")
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
    """auto: go on from the newest checkpoint of the run folder; never: refuse a folder that has one."""
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
class Memory:
    may_change: ClassVar[tuple[str, ...]] = ("gib",)
    base: BaseForm = BaseForm.dtype
    """How the Linears of the frozen transformer are stored: dtype (model.dtype), int8 or fp8 (a byte a weight)."""
    encoders: BaseForm = BaseForm.dtype
    """How the Linears of umT5 and CLIP are stored, which encode texts and images: as memory.base says."""
    vae: VaeDtype = VaeDtype.float32
    """Storage and arithmetic of the VAE: float32 as the official code, bfloat16, or float16 (nearer, may overflow)."""
    gib: float | None = None
    """Memory of the device to stay within, in GiB, null for all of it; the VAE takes large pictures in tiles."""


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
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    every_steps: int = 0
    """Steps between validation losses on data.heldout; 0 turns them off."""
    sigmas: list[float] | None = None
    """The fixed noise levels; null: the nine deciles of the sigmas that the task samples at (of each expert)."""
    budget_pct: float = 5.0
    """Share of the run's forward passes to spend on it, in percent; the least is two clips and each sigma once."""


@dataclass(slots=True)
class Sampler:
    may_change: ClassVar[tuple[str, ...]] = ("*",)
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
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    prompts: list[str] = field(default_factory=list)
    """Prompts without the trigger; each is sampled from the base, and from the LoRA with and without it."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One trio of videos for each prompt and seed."""


@dataclass(slots=True)
class Report:
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    num_windows: int = 60
    """Windows that the data report shows as clips, spread evenly over the set; its tables count all."""


@dataclass(slots=True)
class Export:
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    format: LoraFormat = LoraFormat.universal
    """universal loads right in most tools; comfy_updown or kohya for loha and lokr; diffusers or peft for dora."""
    dtype: Dtype = Dtype.float32
    """Storage of the exported LoRA; bfloat16 only where folding alpha loses nothing."""


TRACKERS = ("tensorboard", "wandb")


@dataclass(slots=True)
class Tracker:
    may_change: ClassVar[tuple[str, ...]] = ("*",)
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
    memory: Memory = field(default_factory=Memory)
    sigma: Sigma = field(default_factory=Sigma)
    loss: Loss = field(default_factory=Loss)
    validation: Validation = field(default_factory=Validation)
    sampler: Sampler = field(default_factory=Sampler)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)
    export: Export = field(default_factory=Export)
    tracker: Tracker = field(default_factory=Tracker)

    def __post_init__(self) -> None:
        from wantrain.config.rules import refuse_faults  # it reads this module

        refuse_faults(self)
