"""The adapter, and the file that it is exported to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from wantrain.config.sections.model import Dtype
from wantrain.config.sections.parts import FloatAbove0, IntFrom1, Rule, Section
from wantrain.config.sections.training import BaseForm
from wantrain.models.variants import VARIANTS

if TYPE_CHECKING:
    from wantrain.config.schema import Config



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


@dataclass(slots=True)
class Lora(Section):
    targets: list[str] = field(default_factory=lambda: ["attn_ffn"])
    """Presets (attn, attn_ffn, all_linear) or regular expressions over diffusers module names."""
    kind: LoraKind = LoraKind.lora
    """lora, rslora (scaled by alpha / sqrt(rank)), dora, loha or lokr; the last three load in fewer tools."""
    rank: IntFrom1 = 32
    """Inner width of each adapter."""
    alpha: FloatAbove0 = 32.0
    """The adapter is scaled by alpha / rank."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for the modules that a preset or regular expression matches; the last that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for the modules that a preset or regular expression matches; the last that matches counts."""
    start_from: str | None = None
    """A LoRA file of any known format, or model id, to go on from: of this kind, at most this rank, no more modules."""

    def rules(self, config: Config) -> Iterator[Rule]:
        yield bool(self.targets) and all(self.targets), "lora.targets", self.targets, "at least one preset or pattern"
        for key, patterns in (("lora.rank_pattern", self.rank_pattern), ("lora.alpha_pattern", self.alpha_pattern)):
            for value in patterns.values():
                yield value > 0, key, value, "positive numbers"
        yield not _is_of_a_run(self.start_from or ""), "lora.start_from", self.start_from, \
            "the .safetensors that `wantrain export` has written; a checkpoint or a run is none: export it first"
        yield self.kind is not LoraKind.dora or config.memory.base is BaseForm.dtype, "lora.kind", self.kind.name, \
            "another kind, or memory.base=dtype: dora learns lengths of the base's rows, which are stored rounded"
        variant = VARIANTS[config.model.variant]
        largest = max(variant.architecture.dim, variant.architecture.image_dim or 0)
        ranks = [("lora.rank", self.rank), ("high.rank", config.high.rank), ("low.rank", config.low.rank)]
        for key, rank in [*ranks, *(("lora.rank_pattern", rank) for rank in self.rank_pattern.values())]:
            yield rank is None or rank <= largest, key, rank, \
                f"it is above what any module of {variant.name} has: {largest}; 16 to 128 is usual"

    def remedies(self, config: Config) -> dict[str, object]:
        run = re.sub(r"/?checkpoints(/step_\d+)?/?$", "", self.start_from or "")
        return {"lora.start_from": f"{run or '.'}/export/NAME.safetensors"}


def _is_of_a_run(path: str) -> bool:
    """Whether this names a run's folder or its checkpoints."""
    is_checkpoint = re.search(r"(^|/)checkpoints(/step_\d+)?/?$", path) is not None
    return is_checkpoint or (Path(path).is_dir() and (Path(path) / "checkpoints").is_dir())


@dataclass(slots=True)
class Export(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    format: LoraFormat = LoraFormat.universal
    """universal loads right in most tools; comfy_updown or kohya for loha and lokr; diffusers or peft for dora."""
    dtype: Dtype = Dtype.float32
    """Storage of the exported LoRA; bfloat16 only where folding alpha loses nothing."""
