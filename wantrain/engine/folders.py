"""The folders of runs: which of them hold a training, and what config it keeps. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from wantrain import lock
from wantrain.terms import UserError

MARKS = ("config.yaml", lock.NAME, "checkpoints")
"""What the folder of a training has, from its first second on."""

EXPERTS = ("high", "low")


def named(word: str) -> Path:
    """The folder of a run: itself, or a name in `runs`. Raises UserError where there is none."""
    with contextlib.suppress(RuntimeError):  # a ~user that this machine does not know
        for folder in (Path(word).expanduser(), Path("runs") / word):
            if folder.is_dir():
                return folder
    raise UserError(f"there is no run {word}", "wantrain runs    lists those of the folder runs")


def trainings(folder: Path) -> Iterator[Path]:
    """The folders of trainings: this one or those in it, and of a run with two experts those of both."""
    for one in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        parts = trainings_of(one)
        yield from parts
        if one == folder and parts:
            return


def trainings_of(run_dir: Path) -> list[Path]:
    """The folders of the trainings of one run; none where it has not begun."""
    return [part for name in EXPERTS if _is_training(part := run_dir / name)] or [run_dir] * _is_training(run_dir)


def run_of(training: Path) -> Path:
    """The run folder of a training."""
    return training.parent if training.name in EXPERTS else training


def _is_training(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def kept_config(training: Path) -> dict[str, Any]:
    """The config that the folder keeps; empty where there is none yet, or a kill cut it off."""
    try:
        read = yaml.load((training / "config.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader",
                                                                                         yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}
