"""The run, and the trackers that follow it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from wantrain.config.sections.parts import MISSING, Folder, Rule, Section
from wantrain.config.values import nearest

if TYPE_CHECKING:
    from wantrain.config.schema import Config

_NAME_BYTES = 200

TRACKERS = ("tensorboard", "wandb")

_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun")


@dataclass(slots=True)
class Run(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    name: str = MISSING
    """Name of the run and of the exported LoRA file."""
    dir: Folder = "runs/${run.name}"
    """Folder of the run: config, metrics, checkpoints, exports, samples, report."""

    def rules(self, config: Config) -> Iterator[Rule]:
        yield bool(self.name.strip()), "run.name", self.name, "a name is needed; the exported file has it too"
        yield self.name not in (".", "..") and not set(self.name) & set("/\\"), "run.name", self.name, \
            "a name, not a path; run.dir is the folder"
        yield len(self.name.encode()) <= _NAME_BYTES, "run.name", self.name, f"at most {_NAME_BYTES} bytes"


@dataclass(slots=True)
class Tracker(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    names: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers beside the JSONL that is always written: tensorboard, wandb (offline unless you are logged in)."""
    project: str = "wantrain"
    """Project name shown in the tracker."""

    def rules(self, config: Config) -> Iterator[Rule]:
        for name in self.names:
            yield name in TRACKERS, "tracker.names", name, \
                " or ".join(dict.fromkeys([*nearest(name, TRACKERS), *TRACKERS]))
        mode = os.environ.get("WANDB_MODE")
        yield "wandb" not in self.names or mode is None or mode in _WANDB_MODES, "WANDB_MODE", mode, \
            "online, offline or disabled"

    def remedies(self, config: Config) -> dict[str, object]:
        return {"tracker.names": f"[{(nearest(' '.join(self.names), TRACKERS) or TRACKERS)[0]}]"}
