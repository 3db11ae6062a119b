"""Long work: a progress bar, and a pool of worker processes in which no item can stop the others."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from wantrain import logs

Item = TypeVar("Item")
Result = TypeVar("Result")

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""`MICROSECONDS PERIOD` that a container may compute, or `max PERIOD`."""

TIME_LIMIT = "not finished after"
"""Begins the reason of an item that ran into the time limit."""


def cores() -> int:
    """How many cores this process may use: by its affinity, which batch systems set, and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a quota
        quota, period = QUOTA.read_text().split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def progress(total: int, start: int, unit: str, what: str = "", main: bool = True, *, delay_s: float = 0
             ) -> tqdm[NoReturn]:
    """A progress bar: live on a terminal, a line every ten seconds in a log, silent on all but the main process and in
    the first `delay_s` seconds.
    """
    live = sys.stderr.isatty()
    return tqdm(total=total, initial=start, desc=what or None, unit=unit, disable=not main, dynamic_ncols=live,
                ascii=not live, mininterval=0.5 if live else 10, delay=delay_s, file=logs.console())


class _Worker:
    """A process that answers one item at a time, and is replaced where it must be killed."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.item: tuple[int, Any] | None = None
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # never a fork of a process that holds threads or readers
        context.set_forkserver_preload([self.function.__module__])
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.function, there), daemon=True)
        self.process.start()
        there.close()
        self.is_fresh = True

    def give(self, item: tuple[int, Any], timeout_s: float) -> None:
        """Send item[1] to the process; item[0] is its number."""
        if self.is_fresh:
            self.pipe.recv()  # its imports do not count against its first file
        try:
            self.pipe.send(item[1])
        except OSError:  # it died while it had nothing to do
            self.end()
            self.start()
            self.pipe.recv()
            self.pipe.send(item[1])
        self.item, self.until, self.is_fresh = item, time.monotonic() + timeout_s, False

    def take(self, too_long: str) -> tuple[Any, str]:
        """(its result, '') or (None, why there is none)."""
        why, self.item = too_long, None
        if self.pipe.poll():
            try:
                return self.pipe.recv(), ""
            except (EOFError, OSError):
                self.process.join()
                why = f"its reader crashed (exit code {self.process.exitcode})"
        self.end()
        self.start()
        return None, why

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def in_workers(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int, timeout_s: float, limit: str = "--timeout-s",
    *, ordered: bool = False,
) -> Iterator[tuple[Item, Result | None, str]]:
    """(item, function(item), '') as they finish, from `jobs` processes; (item, None, why) for one that died.

    `function` is importable by name and its results can be pickled. A worker past `timeout_s` seconds (set by `limit`)
    is killed and replaced, and so is one that crashes: no file can stop the others. While a result is looked at, every
    worker is busy with its next item. With `ordered` results come in the order of the items, which may be endless: at
    most two for each worker are ahead.
    """
    too_long = f"{TIME_LIMIT} {timeout_s:g} s; allow more with {limit}"
    numbered = enumerate(items)
    first = list(itertools.islice(numbered, jobs))
    todo = itertools.chain(first, numbered)
    workers = [_Worker(function) for _ in first]
    done: dict[int, tuple[Item, Result | None, str]] = {}
    num_given = num_yielded = 0
    try:
        while True:
            for worker in workers:
                may = worker.item is None and not (ordered and num_given - num_yielded >= 2 * len(workers))
                if may and (following := next(todo, None)):
                    worker.give(following, timeout_s)
                    num_given += 1
            if done and (not ordered or num_yielded in done):
                result = done.pop(num_yielded if ordered else next(iter(done)))
                num_yielded += 1
                yield result
                continue
            busy = [w for w in workers if w.item is not None]
            if not busy:
                return
            wait([w.pipe for w in busy], max(0.0, min(w.until for w in busy) - time.monotonic()))
            for worker in busy:
                if worker.pipe.poll() or time.monotonic() >= worker.until:
                    assert worker.item is not None
                    number, item = worker.item
                    done[number] = (item, *worker.take(too_long))
    finally:
        for worker in workers:
            worker.end()


def _serve(function: Callable[[Item], Result], pipe: Connection) -> None:
    """A worker's life: results for items until the pipe closes. The parent alone answers to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send("ready")
        while True:
            pipe.send(function(pipe.recv()))


def _die_with_parent() -> None:
    """A worker inside an item that hangs would outlive a job that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
