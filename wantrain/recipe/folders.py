"""Where the things of a run lie: answers from the config alone, for verbs that open neither base nor clips."""

from __future__ import annotations

from pathlib import Path

from wantrain.config import Config, LoraFormat
from wantrain.engine.saved import CheckpointStore
from wantrain.models.variants import Expert


def run_dir(config: Config, expert: Expert | None) -> Path:
    """The run's folder; an expert's training has its own inside."""
    return Path(config.run.dir) / (expert or "")


def checkpoints_of(config: Config, expert: Expert | None) -> CheckpointStore:
    """Where a training's checkpoints are."""
    own = config.train
    mirror = own.mirror and f"{own.mirror.rstrip('/')}/{expert or ''}"
    return CheckpointStore(run_dir(config, expert) / "checkpoints", mirror, own.keep_checkpoints, own.keep_every)


def workflow_path(config: Config) -> Path:
    """Where `export` writes the ComfyUI workflow of the adapter, or of both experts'."""
    return Path(config.run.dir) / "export" / f"{config.run.name}.workflow.json"


def export_path(config: Config, expert: Expert | None, what: str = "") -> Path:
    """Where `export` writes the adapter, or `what` of it; a PEFT adapter is a folder."""
    noise = f"_{expert}_noise" if expert else ""
    suffix = "_peft" if config.export.format is LoraFormat.peft else ".safetensors"
    return Path(config.run.dir) / "export" / f"{config.run.name}{what}{noise}{suffix}"
