"""The page of runs while they train: the same page, from a server on this machine that reads their folders anew."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from wantrain import asking, lock, logs, serving
from wantrain.engine.folders import trainings_of
from wantrain.files import json_line
from wantrain.pages import run_page
from wantrain.terms import UserError

LOG_BYTES, LOG_LINES = 1 << 14, 40
"""The end of a log that is read, and shown of it."""

VOTE = {"set": str, "prompt": str, "seed": int, "left": str, "right": str, "choice": str, "at": str}
"""The fields of a vote."""


class View(serving.Server):
    """The server of the runs that `list_runs` gives, asked anew each time. OSError where the port is taken."""

    def __init__(self, list_runs: Callable[[], Sequence[Path]], host: str, port: int) -> None:
        self._list_runs, self._lock = list_runs, threading.Lock()
        self._known: dict[Path, tuple[Any, run_page.Gathered]] = {}
        self._copies = tempfile.TemporaryDirectory()
        super().__init__(_Handler, host, port)  # which calls server_close where the port is taken

    def runs(self) -> dict[str, Path]:
        """The folders of the runs, by what the page calls them."""
        return {str(folder.resolve()): folder for folder in self._list_runs()}

    def state(self) -> dict[str, Any]:
        """All that the page shows. A run is read again where one of its files has changed."""
        with self._lock:
            found = self.runs().values()
            for folder in found:
                stamp = _stamp(folder)
                if folder not in self._known or self._known[folder][0] != stamp:
                    self._known[folder] = stamp, run_page.gathered(folder)
            return {"is_live": True, "runs": [{**self._known[folder][1].shown, "status": status(folder)}
                                              for folder in found]}

    def file(self, key: str) -> Path:
        """The file of a key. UserError where it is not there any more."""
        with self._lock:
            media = next((known.media[key] for _, known in self._known.values() if key in known.media), None)
            path = run_page.file_of(media, key, Path(self._copies.name)) if media else None
        if path is None:
            raise UserError("its file cannot be read any more", "load the page again")
        return path

    def server_close(self) -> None:
        """Close the port, and delete the small copies of clips."""
        super().server_close()
        self._copies.cleanup()


def _stamp(run_dir: Path) -> list[tuple[str, int, int]]:
    """Sizes and times of the files that the page of a run is made of."""
    files = [run_dir / run_page.VOTES, run_dir / "report" / "results.json"]
    for folder in trainings_of(run_dir):
        files += [folder / name for name in ("live/results.json", "metrics.jsonl", "judgement.json", "config.yaml")]
    return [(str(path), status.st_size, status.st_mtime_ns) for path in files if path.is_file()
            for status in [path.stat()]]


def status(run_dir: Path) -> dict[str, Any]:
    """Who trains in the folder of a run, what was asked of it, and the end of its log."""
    folders = trainings_of(run_dir)
    holders = [who for folder in folders if (who := lock.holder(folder))]
    asked = sorted({what for folder in folders for what in asking.asked(folder)})
    told = (f"trains now: {holders[0]}" if holders else "does not train now") + \
        (f"; asked for: {', '.join(asked)}" if holders and asked else "")
    return {"is_training": bool(holders), "told": told, "log": _log_tail(run_dir / logs.name_of(0))}


def _log_tail(path: Path) -> list[str]:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    return []


def add_vote(run_dir: Path, vote: Mapping[str, Any]) -> None:
    """Write a vote at the end of RUN/votes.jsonl. ValueError for what is none."""
    sound = {name: type(value) for name, value in vote.items()} == VOTE
    if not sound or vote["choice"] not in ("left", "right", "neither"):
        raise ValueError("not a vote")
    with (run_dir / run_page.VOTES).open("a", encoding="utf-8") as file:
        file.write(json_line(dict(vote)))


class _Handler(serving.Handler):
    server: View
    printed_by = "wantrain view"

    def get(self, name: str) -> None:
        kind, _, key = name.partition("/")
        if name == "":
            self.send_page(run_page.filled("", self.server.state(), ""))
        elif name == "state":
            self.send(HTTPStatus.OK, run_page.json_text(self.server.state()).encode(), "application/json")
        elif kind == "media":
            path = self.server.file(key)
            self.send(HTTPStatus.OK, path.read_bytes(), run_page.MIME[path.suffix])
        else:
            self.fail(HTTPStatus.NOT_FOUND, "there is nothing here")

    def post(self, name: str, body: bytes) -> tuple[HTTPStatus, Any]:
        asked = json.loads(body)
        if not isinstance(asked, dict) or (folder := self.server.runs().get(str(asked.get("run")))) is None:
            raise ValueError("no run of this page")
        if name == "ask":
            asking.ask(folder, str(asked.get("what")))
        elif name == "votes" and isinstance(asked.get("vote"), dict):
            add_vote(folder, asked["vote"])
        else:
            raise ValueError(f"nothing is to be written to {name}")
        return HTTPStatus.OK, {}
