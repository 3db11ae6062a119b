"""What goes wrong slowly in a training, said once and by name: slow steps, growing memory, a loader that lags."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Iterator

import torch

WARM_STEPS, LAST_STEPS = 10, 200
"""Steps of a size that come before the next ones are compared with them, and how many of the last ones they are."""
SLOW, SLOW_STEPS = 2.0, 3
"""Alarm at so many steps in a row of at least so many times the median."""
LAG, LAG_STEPS = 0.2, 20
"""Alarm where the loader takes more than this share of so many steps."""
WINDOW_STEPS, GROWING_WINDOWS, GROWTH_BYTES = 20, 5, 4 * 2**20
"""Alarm where the most memory held rises from window to window by at least so much, so many times in a row."""


def held_bytes(device: torch.device) -> int:
    """Device memory that tensors hold now; 0 on a CPU, where nothing is told apart."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Watch:
    """Looks at every step of one process. Each alarm is given once."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=LAST_STEPS))
        self._num_slow = 0
        self._waits: deque[tuple[float, float]] = deque(maxlen=LAG_STEPS)
        self._window: list[int] = []
        self._peaks: deque[int] = deque(maxlen=GROWING_WINDOWS + 1)
        self._told: set[str] = set()

    def alarms(self, tokens: int, step_s: float, wait_s: float, held: int) -> list[str]:
        """What is new after a step of so many tokens, which took `step_s`, of it `wait_s` for its batches, and leaves
        `held` bytes in tensors.
        """
        found = {**dict(self._slow(tokens, step_s - wait_s)), **dict(self._lagging(step_s, wait_s)),
                 **dict(self._growing(held))}
        new = [text for name, text in found.items() if name not in self._told]
        self._told |= found.keys()
        return new

    def _slow(self, tokens: int, seconds: float) -> Iterator[tuple[str, str]]:
        own = self._seconds[tokens]
        median = statistics.median(own) if len(own) >= WARM_STEPS else None
        if median is None or seconds < SLOW * median:
            own.append(seconds)  # slow ones stay out: they would become the measure
            self._num_slow = 0
            return
        self._num_slow += 1
        if self._num_slow == SLOW_STEPS:
            yield "slow", (f"WARNING: {SLOW_STEPS} steps in a row took {seconds:.3g} s, where such steps of this run "
                           f"take {median:.3g} s: another process on the device, heat, or device memory that spills "
                           "into the host's. nvidia-smi shows the first two; memory.gib leaves room against the third")

    def _lagging(self, step_s: float, wait_s: float) -> Iterator[tuple[str, str]]:
        self._waits.append((step_s, wait_s))
        whole, waited = (sum(values) for values in zip(*self._waits, strict=True))
        if len(self._waits) == LAG_STEPS and waited > LAG * whole:
            yield "lagging", (f"WARNING: of the last {LAG_STEPS} steps {waited / whole:.0%} went into waiting for "
                              "batches: the loader is the limit. data.mode=cache reads what was encoded before; a "
                              "cache on a faster disk, or data.num_workers, helps as well")

    def _growing(self, held: int) -> Iterator[tuple[str, str]]:
        self._window.append(held)
        if len(self._window) < WINDOW_STEPS:
            return
        self._peaks.append(max(self._window))
        self._window = []
        steps = [after - before for before, after in zip(self._peaks, list(self._peaks)[1:], strict=False)]
        if len(steps) == GROWING_WINDOWS and min(steps) >= GROWTH_BYTES:
            yield "growing", (f"WARNING: device memory in tensors grows from step to step, by {sum(steps) / 2**20:.0f} "
                              f"MiB over {GROWING_WINDOWS * WINDOW_STEPS} steps: that is a fault of wantrain's; please "
                              "report it with what wantrain doctor says")
