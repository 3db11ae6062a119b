"""`wantrain view`: the page of runs, live while they train, from a server on this machine."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from wantrain.engine.folders import named, run_of, trainings
from wantrain.pages.live import View
from wantrain.terms import UserError


def run(given: argparse.Namespace) -> None:
    """Serve the page of these runs, or of those in `runs`, until Ctrl-C."""
    host = given.host or "127.0.0.1"
    if not listed(given.RUN):
        raise UserError(f"no run in {', '.join(given.RUN) or 'runs'}", "wantrain run demo_anime    begins one")
    try:
        server = View(lambda: listed(given.RUN), host, given.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {given.port} cannot be used: {error}",
                        "leave --port out: a free one is found") from error
    print(f"{server.address}\nopen it in a browser; who knows this address can read and write; Ctrl-C ends", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()


def listed(names: Sequence[str]) -> list[Path]:
    """The folders of these runs, a run's own, one above runs, or a name in `runs`; the newest first."""
    found: dict[Path, float] = {}
    for folder in map(named, names) if names else [Path("runs")] * Path("runs").is_dir():
        for training in trainings(folder):
            found[run_of(training)] = max(path.stat().st_mtime for path in training.iterdir())
    return sorted(found, key=lambda one: found[one], reverse=True)
