"""The training: optimizer, steps, checkpoints, and the memory that they may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from wantrain.config.sections.parts import (
    MISSING,
    FloatAbove0,
    FloatFrom0,
    IntFrom0,
    IntFrom1,
    Rule,
    Seconds,
    Section,
    Seed,
)
from wantrain.models.variants import VARIANTS

if TYPE_CHECKING:
    from wantrain.config.schema import Config



class Optimizer(Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    prodigy = "prodigy"
    schedule_free = "schedule_free"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


@dataclass(slots=True)
class Optim(Section):
    entangled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    name: Optimizer = Optimizer.adamw
    """adamw; adamw_8bit, prodigy (finds its learning rate) and schedule_free need a package: docs/optimizers.md."""
    lr: FloatAbove0 = 1e-4
    """Peak learning rate; with prodigy the factor on the one that it finds: 1.0."""
    lora_plus: FloatAbove0 = 1.0
    """LoRA+: the learning rate of the B matrices is lr times this; its authors recommend 16, with a smaller lr."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Factors on lr for the modules that a preset or regular expression matches; the last that matches counts."""
    ema: float | None = 0.15
    """What is validated, sampled and exported is an average of the adapter over the steps so far, whose mean age is
    this share of them; null: its last values. schedule_free has an average of its own instead."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of the mean gradient and of the mean square (schedule_free: the first is its interpolation)."""
    eps: FloatAbove0 = 1e-8
    """Added to the root of the mean square."""
    weight_decay: FloatFrom0 = 0.01
    """Decoupled weight decay, times the learning rate."""
    schedule: Schedule = Schedule.constant
    """Shape of the learning rate after warm-up; cosine and linear end at zero at train.num_steps."""
    warmup_steps: IntFrom0 = 0
    """Steps of linear warm-up."""
    max_grad_norm: FloatAbove0 = 1.0
    """Gradients are clipped to this global L2 norm."""

    @property
    def keeps_average(self) -> bool:
        """Whether an average is kept beside the adapter."""
        return self.ema is not None and self.name is not Optimizer.schedule_free

    def rules(self, config: Config) -> Iterator[Rule]:
        yield all(f > 0 for f in self.lr_factors.values()), "optim.lr_factors", self.lr_factors, "positive numbers"
        yield len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, \
            "two numbers in [0, 1)"
        yield self.ema is None or 0 < self.ema <= 0.5, "optim.ema", self.ema, \
            "a share of the steps so far, above 0 and at most 0.5 (all of them alike), or null"
        yield self.lr * self.weight_decay < 1, "optim.weight_decay", self.weight_decay, \
            f"below 1 / optim.lr ({self.lr:g}): each step takes their product off every weight"
        kind = config.lora.kind.name
        yield self.lora_plus == 1 or kind in ("lora", "rslora", "dora"), "optim.lora_plus", self.lora_plus, \
            f"1 with lora.kind={kind}, which has no B matrices"
        if self.name is Optimizer.prodigy:
            yield from self._prodigy_rules()
        if self.name is Optimizer.schedule_free:
            yield from self._schedule_free_rules()

    def _prodigy_rules(self) -> Iterator[Rule]:
        yield 0.1 <= self.lr <= 10, "optim.lr", self.lr, \
            "optim.name=prodigy multiplies it with the learning rate that it finds: take 1.0, or from 0.1 to 10"
        for key, value, alone in (("optim.lora_plus", self.lora_plus, 1), ("optim.lr_factors", self.lr_factors, {})):
            yield value == alone, key, value, f"{alone} with optim.name=prodigy, which finds one learning rate for all"

    def _schedule_free_rules(self) -> Iterator[Rule]:
        yield self.schedule is Schedule.constant, "optim.schedule", self.schedule.name, \
            "constant with optim.name=schedule_free, whose average takes the schedule's place; warmup_steps is allowed"
        yield self.betas[0] > 0, "optim.betas", self.betas, "a first number above 0 with optim.name=schedule_free"

    def remedies(self, config: Config) -> dict[str, object]:
        return {**({"optim.lr": 1.0} if self.name is Optimizer.prodigy else {}),
                **({"optim.weight_decay": 0.0} if self.lr >= 1 else {})}


class Resume(Enum):
    auto = "auto"
    any_base = "any_base"
    never = "never"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


@dataclass(slots=True)
class Train(Section):
    may_change: ClassVar[tuple[str, ...]] = ("num_steps", "micro_batch_size", "save_every", "keep_checkpoints",
                                             "keep_every", "mirror", "log_every", "resume", "on_nonfinite",
                                             "max_skips", "stall_timeout_s", "sequence_parallel")
    num_steps: IntFrom1 = MISSING
    """Optimizer steps."""
    micro_batch_size: IntFrom1 = 1
    """Samples that one process computes at once."""
    seed: Seed = 0
    """Seed of the adapter's start, the order of clips, sigma, noise and caption dropout."""
    save_every: IntFrom1 = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: IntFrom1 = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: IntFrom1 | None = None
    """Checkpoints of every so many steps stay as well; null keeps only the newest."""
    mirror: str | None = None
    """Folder or fsspec URL (s3://...) to copy checkpoints to; a run whose folder has none goes on from it."""
    log_every: IntFrom1 = 1
    """Steps between metrics lines."""
    resume: Resume = Resume.auto
    """auto: go on from the newest checkpoint of the run folder; any_base: even where its base was stored or multiplied
    in another form (memory.base), which changes numbers; never: refuse a folder that has one."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """When a loss or gradient is not finite: stop before the update, or skip it; both note clips and sigmas."""
    max_skips: IntFrom0 = 10
    """With on_nonfinite=skip: the run stops when it has left out more updates than this."""
    stall_timeout_s: Seconds = 600.0
    """How long processes wait for one that is gone or stands still before the run ends and names it."""
    sequence_parallel: IntFrom1 = 1
    """Processes that compute a sample together, each a part of its tokens: for clips too long for one."""


class BaseForm(Enum):
    auto = "auto"
    dtype = "dtype"
    int8 = "int8"
    fp8 = "fp8"
    nf4 = "nf4"


class EncoderForm(Enum):
    dtype = "dtype"
    int8 = "int8"
    fp8 = "fp8"


class VaeDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Keep(Enum):
    auto = "auto"
    all = "all"
    attention = "attention"
    inputs = "inputs"


@dataclass(slots=True)
class Memory(Section):
    may_change: ClassVar[tuple[str, ...]] = ("base", "keep", "swap", "offload", "gib")
    base: BaseForm = BaseForm.dtype
    """How the Linears of the frozen transformer are stored: dtype (model.dtype), int8 or fp8 (a byte a weight), nf4
    (four bits; bitsandbytes), or auto: the file's own bytes where it has such, else the most exact that fits gib."""
    keep: Keep = Keep.auto
    """What each block keeps for the backward pass: all, attention (its answer, and the block's input) or inputs; what
    is not kept is computed again, with equal numbers. auto: with swap and offload the fastest that fits gib."""
    swap: IntFrom0 | None = None
    """How many blocks wait in host memory and come to the device one ahead of their turn: equal numbers; null: auto."""
    offload: bool | None = None
    """Whether what blocks keep waits in host memory until their backward pass: equal numbers; null: auto."""
    encoders: EncoderForm = EncoderForm.dtype
    """How the Linears of umT5 and CLIP are stored, which encode texts and images: as memory.base says."""
    vae: VaeDtype = VaeDtype.float32
    """Storage and arithmetic of the VAE: float32 as the official code, bfloat16, or float16 (nearer, may overflow)."""
    gib: FloatAbove0 | None = None
    """Memory of the device to stay within, in GiB; null: what the card has free, and no limit on a CPU."""

    def rules(self, config: Config) -> Iterator[Rule]:
        own = VARIANTS[config.model.variant].architecture
        most = own.num_layers + len(own.vace_layers)
        yield self.swap is None or self.swap <= most, "memory.swap", self.swap, \
            f"at most {most}, the blocks of {config.model.variant}"
        yield not self.swap or config.lora.kind.name in ("lora", "rslora"), "memory.swap", self.swap, \
            f"0 with lora.kind={config.lora.kind.name}, which is trained through diffusers' blocks"
        yield not (self.swap and own.driven), "memory.swap", self.swap, \
            f"0 with {config.model.variant}, which is trained through diffusers' blocks"
