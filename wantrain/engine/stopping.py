"""Signals that ask a training to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from wantrain.terms import EXIT_INTERRUPTED

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
"""Windows has the first two."""

ONE_PRESS_S = 2.0
"""Launchers pass on what the terminal has sent to all processes already: signals this close are one."""


@dataclass(slots=True)
class Stopper:
    """Within the block Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP (a terminal that closes, unless under
    nohup) ask for a stop after the step at hand; one more ends the process at once, whatever it is doing.
    """

    asked: bool = False
    _asked_at: float = 0.0
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._ask) for number in STOPPING
                        if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._asked_at > ONE_PRESS_S:
            os._exit(EXIT_INTERRUPTED)  # a thread may be writing, a collective may never end
        if not self.asked:
            self.asked, self._asked_at = True, now
            with contextlib.suppress(OSError):  # the terminal may be gone; print may be what was interrupted
                os.write(2, b"\nstopping after this step; once more stops at once\n")
