"""Where processes wait for each other: waiting is measured, and who does not come has a name."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from wantrain.terms import Stalled

OF_GLOO = re.compile(r"gloo|monitoredBarrier")
"""In what gloo raises, as a plain RuntimeError, when a process is gone or does not come."""

NAMED = re.compile(r"Ranks? ([\d, ]+) failed to pass")
CALL = timedelta(seconds=10)
"""How long those that are left wait to find out who is missing."""


LONGEST_S = 7 * 24 * 3600.0
"""What processes wait for one that has long work to do, such as encoding; one that dies is noticed at once.

The launch itself keeps train.stall_timeout_s: `wantrain run` trains in the same processes afterwards.
"""


class Rendezvous:
    """Small exchanges of all processes, over a group of their own on the CPU (gloo) that no GPU's queue holds up.

    Every process must make each of these calls, in the same order. They raise Stalled where a process does not come
    within `timeout_s`, or is gone.
    """

    def __init__(self, timeout_s: float) -> None:
        self.waited_s = 0.0
        self._timeout = timedelta(seconds=timeout_s)
        self._group = None
        self.processes = [f"process {index}" for index in range(dist.get_world_size() if dist.is_initialized() else 1)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        self.processes = [f"process {index} on {host} (pid {pid})" for index, (host, pid) in enumerate(
            self.all((socket.gethostname(), os.getpid())))]

    def all(self, own: Any) -> list[Any]:
        """Exchange a value: the values of all processes, by process index."""
        if self._group is None:
            return [own]
        found: list[Any] = [None] * dist.get_world_size()
        with self._waiting():
            dist.all_gather_object(found, own, group=self._group)
        return found

    def first(self, own: Any) -> Any:
        """The value of the first process, in every process."""
        if self._group is None:
            return own
        given = [own]
        with self._waiting():
            dist.broadcast_object_list(given, src=0, group=self._group)
        return given[0]

    def gather(self, values_N: torch.Tensor) -> torch.Tensor:
        """Values [N] of each process -> [number of processes, N], on the CPU."""
        own_N = values_N.detach().cpu()  # so that waiting for its own device does not count as waiting for others
        if self._group is None:
            return own_N[None]
        found = [torch.empty_like(own_N) for _ in self.processes]
        with self._waiting():
            dist.all_gather(found, own_N, group=self._group)
        return torch.stack(found)

    def flags(self, own: int) -> list[int]:
        """Each process's flag."""
        return self.gather(torch.tensor([own]))[:, 0].tolist()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does the block, then the others do."""
        is_first = self._group is None or dist.get_rank() == 0
        if not is_first:
            self.flags(0)
        yield
        if is_first:
            self.flags(0)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.guarded():
            dist.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)  # it alone says who is missing
            yield
        self.waited_s += time.perf_counter() - began

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """In the block, errors that torch raises because a process is gone or does not come become Stalled."""
        try:
            yield
        except RuntimeError as error:
            if self._group is None or not (isinstance(error, dist.DistError) or OF_GLOO.search(str(error))):
                raise
            raise self._stalled(str(error)) from error

    def _who(self) -> str:
        """What a short barrier says of who is missing: of a collective that fails gloo tells no more than that."""
        try:
            dist.monitored_barrier(self._group, min(self._timeout, CALL), wait_all_ranks=True)
        except RuntimeError as error:
            return str(error)
        return ""

    def _stalled(self, message: str) -> Stalled:
        late = NAMED.search(message) or NAMED.search(self._who())
        names = [self.processes[int(index)] for index in late[1].split(",")] if late else []
        what = " and ".join(names) or ("another process" if "rank 0" not in message else self.processes[0])
        limit = f"{self._timeout.total_seconds():g} s (train.stall_timeout_s)"
        first_line = message.strip().splitlines()[0].partition(" This is typically")[0]
        return Stalled(f"{what} is gone, or did not come within {limit}: {first_line}",
                       "look at its log in the run folder's logs/; the same command goes on from the newest checkpoint")
