"""`wantrain ask`: a sample, a checkpoint or an end, of a run that trains now."""

from __future__ import annotations

import argparse

from wantrain import asking
from wantrain.engine.folders import named

GIVES = {"sample": "samples of this step, in {}/live", "save": "a checkpoint of this step, in {}/checkpoints",
         "stop": "a checkpoint of this step in {}/checkpoints, and the end of the training"}


def run(given: argparse.Namespace) -> None:
    """Ask what is given of the run, a folder or a name in `runs`."""
    for training in asking.ask(named(given.RUN), given.WHAT):
        print(f"{training}: after the step at hand comes {GIVES[given.WHAT].format(training)}")
