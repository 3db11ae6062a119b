"""The base: which row of the variants table, from which files, and which of its experts are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from wantrain.config.sections.parts import MISSING, FloatAbove0, IntFrom1, Rule, Section
from wantrain.config.values import nearest
from wantrain.models.variants import VARIANTS

if TYPE_CHECKING:
    from wantrain.config.schema import Config


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Experts(Enum):
    both = "both"
    high = "high"
    low = "low"


@dataclass(slots=True)
class Model(Section):
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

    def rules(self, config: Config) -> Iterator[Rule]:
        names = list(VARIANTS)
        yield self.variant in names, "model.variant", self.variant, \
            ", ".join(dict.fromkeys([*nearest(self.variant, names), *names]))
        has_experts, one = bool(VARIANTS[self.variant].experts), f"{self.variant} has one transformer"
        yield has_experts or self.experts is Experts.both, "model.experts", self.experts.name, one
        for name, own in {"high": config.high, "low": config.low}.items():
            for key, value in asdict(own).items():
                yield has_experts or value is None, f"{name}.{key}", value, one


@dataclass(slots=True)
class ExpertOwn(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    rank: IntFrom1 | None = None
    """This expert's lora.rank, where it differs."""
    alpha: FloatAbove0 | None = None
    """This expert's lora.alpha, where it differs."""
    lr: FloatAbove0 | None = None
    """This expert's optim.lr, where it differs."""
    num_steps: IntFrom1 | None = None
    """This expert's train.num_steps, where it differs."""
