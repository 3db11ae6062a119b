"""What people ask of a run while it trains: a sample, a checkpoint, an end. A file each, met at its next step."""

from __future__ import annotations

import shlex
from pathlib import Path

from wantrain import lock
from wantrain.files import write_json
from wantrain.terms import UserError

THINGS = ("sample", "save", "stop")
"""What a training can be asked for."""

FOLDER = "requests"
EXPERTS = ("", "high", "low")
"""Where trainings are in a run's folder: in itself, or in those of its experts."""


def ask(run_dir: Path, what: str) -> list[Path]:
    """Ask `what`, one of THINGS, of every training that runs in the folder of a run; their folders.

    Raises UserError where nothing trains there.
    """
    if what not in THINGS:
        raise UserError(f"{what} is nothing to ask for: {', '.join(THINGS)}", f"wantrain ask {run_dir} {THINGS[0]}")
    places = [run_dir / expert for expert in EXPERTS]
    at_work = [place for place in places if lock.holder(place)]
    if not at_work:
        command = ["wantrain", "sample" if what == "sample" else "train", *lock.last_words(places)]
        raise UserError(f"nothing trains in {run_dir}, so nobody would hear it",
                        f"{shlex.join(command)}    or wantrain runs, which lists what trains")
    for place in at_work:
        write_json(place / FOLDER / what, {})
    return at_work


def asked(training_dir: Path) -> set[str]:
    """What was asked of the training in this folder and is not answered."""
    try:
        return {path.name for path in (training_dir / FOLDER).iterdir()} & set(THINGS)
    except OSError:  # no folder yet, or one that nobody may read: a question must not end a training
        return set()


def answer(training_dir: Path, things: set[str]) -> None:
    """Take these requests away."""
    for what in things:
        (training_dir / FOLDER / what).unlink(missing_ok=True)
