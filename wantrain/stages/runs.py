"""`wantrain runs`: how far each run of a folder is, what it takes on the disk, and how to go on. No torch."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wantrain import lock, logs
from wantrain.engine.folders import kept_config, run_of, trainings
from wantrain.engine.saved import step_of, steps_on_disk
from wantrain.terms import UserError


@dataclass(frozen=True, slots=True)
class Run:
    """One training: of a run's folder, or of one expert in it."""

    name: str
    recipe: str
    steps: str
    state: str
    heldout_loss: float | None
    num_bytes: int
    next_command: str
    verdict: str = ""


def run(given: argparse.Namespace) -> None:
    """Print the runs of these folders, or of `runs`."""
    folders = [Path(name).expanduser() for name in given.FOLDER or ["runs"]]
    if absent := [folder for folder in folders if given.FOLDER and not folder.is_dir()]:
        raise UserError(f"{absent[0]} is no folder", "wantrain runs FOLDER    of a run, or the one above runs")
    found = [told(training, folder) for folder in folders if folder.is_dir() for training in trainings(folder)]
    if not found:
        print(f"no run in {', '.join(map(str, folders))}\n  next: wantrain run demo_anime    begins one")
        return
    widths = [max(len(getattr(one, column)) for one in found) for column in ("name", "recipe", "steps", "state")]
    for one in found:
        cells = zip((one.name, one.recipe, one.steps, one.state), widths, strict=True)
        loss = "" if one.heldout_loss is None else f"  held-out loss {one.heldout_loss:.4f}{one.verdict}"
        print(f"{'  '.join(f'{text:{width}}' for text, width in cells)}  {_size(one.num_bytes)}{loss}\n"
              f"    next: {one.next_command}")


def told(training: Path, above: Path) -> Run:
    """What is known of one training, from its files alone."""
    config = kept_config(training)
    words = lock.last_command(training)[2:]
    run_dir = run_of(training)
    arguments = words or ["recipe=NAME", f"run.dir={run_dir}"]
    checkpoints, wanted = steps_on_disk(training / "checkpoints"), (config.get("train") or {}).get("num_steps", "?")
    step = step_of(checkpoints[-1].name) if checkpoints else 0
    state, verb = _state(training, run_dir, checkpoints, step, wanted)
    page = run_dir / "report" / "report.html"
    next_command = shlex.join(["wantrain", verb, *arguments]) if verb else f"tail -f {training / logs.name_of(0)}"
    if verb == "evaluate" and page.is_file():
        next_command = f"look at {page}, or into more samples: {shlex.join(['wantrain', 'sample', *arguments])}"
    name = str(training.relative_to(above)) if training != above else training.name
    return Run(name, _recipe(words), f"{step} of {wanted} steps", state, _heldout_loss(training / "metrics.jsonl"),
               sum(path.stat().st_size for path in training.rglob("*") if path.is_file()), next_command,
               _verdict(training / "judgement.json"))


def _state(training: Path, run_dir: Path, checkpoints: Sequence[Path], step: int, wanted: Any) -> tuple[str, str]:
    """(the state, the verb that goes on; empty where it is at work)"""
    if who := lock.holder(training):
        return f"training now: {who}", ""
    if not checkpoints:
        return "no checkpoint yet", "train"
    if isinstance(wanted, int) and step < wanted:
        return "stopped", "train"
    saved_at = checkpoints[-1].stat().st_mtime
    expert = f"*{training.name}_noise*" if training != run_dir else "*"
    exports = [path for path in (run_dir / "export").glob(expert) if path.stat().st_mtime >= saved_at]
    return ("exported", "evaluate") if exports else ("finished", "export")


def _recipe(words: Sequence[str]) -> str:
    """recipe=NAME as it was typed; a bare name stands for it too."""
    named = next((word for word in words if word.startswith("recipe=")), "")
    bare = next((f"recipe={word}" for word in words if "=" not in word and not word.startswith("-")), "recipe=?")
    return named or bare


def _heldout_loss(path: Path) -> float | None:
    """The last held-out loss among a run's numbers."""
    if not path.is_file():
        return None
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        if '"validation_loss"' in line:
            try:
                return float(json.loads(line)["validation_loss"])
            except (ValueError, TypeError):
                continue  # a line that a kill cut off
    return None


def _verdict(path: Path) -> str:
    """The range of usable steps that validation found; empty where it has not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["verdict"]
        return f", usable from step {found['from']} to {found['to'] or 'now'}, best {found['best']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
