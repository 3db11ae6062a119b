"""`wantrain ask`: a sample, a checkpoint or an end, of a run that trains now."""

from __future__ import annotations

import argparse
from pathlib import Path

from wantrain import asking
from wantrain.terms import UserError

GIVES = {"sample": "samples of this step, in {}/live", "save": "a checkpoint of this step, in {}/checkpoints",
         "stop": "a checkpoint of this step in {}/checkpoints, and the end of the training"}


def run(given: argparse.Namespace) -> None:
    """Ask what is given of the run, a folder or a name in `runs`."""
    named = Path(given.RUN).expanduser()
    folder = next((one for one in (named, Path("runs") / named) if one.is_dir()), None)
    if folder is None:
        raise UserError(f"there is no run {given.RUN}", "wantrain runs    lists those of the folder runs")
    for training in asking.ask(folder, given.WHAT):
        print(f"{training}: after the step at hand comes {GIVES[given.WHAT].format(training)}")
