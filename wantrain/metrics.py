"""Named numbers: a line on the console, a line of JSON always, and the trackers through the function given."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from wantrain.files import write_text
from wantrain.jobs import progress


class Metrics:
    """Progress bar, `metrics.jsonl` and trackers of one run. Silent on all but the main process."""

    def __init__(self, path: Path, log: Callable[[Mapping[str, float], int], None], start: int, stop: int,
                 main: bool) -> None:
        self._log, self._main = log, main
        self._bar = progress(stop, start, "step", main=main)
        if main:
            write_text(path, "".join(line for line in _lines(path) if json.loads(line)["step"] <= start))
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of numbers for `step`; units are in the names."""
        if self._main:
            self._file.write(json.dumps({"step": step, **{k: v if math.isfinite(v) else None
                                                          for k, v in values.items()}}) + "\n")
            self._file.flush()
            self._log(values, step)

    def advance(self, shown: Mapping[str, str]) -> None:
        """One step further on the bar, with what is to be shown beside it."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._main:
            self._bar.write(text)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._bar.close()
        if self._main:
            self._file.close()


def _lines(path: Path) -> list[str]:
    """Whole lines of an earlier part of the run (a line cut off by a crash is left out)."""
    if not path.exists():
        return []
    return [f"{line}\n" for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]


def read(path: Path) -> list[dict[str, float]]:
    """All lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in _lines(path)]


def commit() -> str:
    """The checkout's commit, or 'installed' outside one."""
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True,
                          text=True, check=False)
    return done.stdout.strip() or "installed"
