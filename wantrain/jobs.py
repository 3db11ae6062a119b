"""Long work: a progress bar, and a pool of worker processes in which no item can stop the others."""

from __future__ import annotations

import contextlib
import enum
import importlib
import itertools
import math
import multiprocessing
import operator
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from wantrain import logs
from wantrain.terms import UserError

if TYPE_CHECKING:  # a command's help needs no progress bar
    from multiprocessing.context import ForkServerContext, SpawnContext

    from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

CGROUP = Path("/sys/fs/cgroup")
QUOTAS = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
"""Where cgroup 2 and cgroup 1 say `MICROSECONDS PERIOD` that a container may compute; `max` and -1 are no limit."""

LEAVING_S = 5.0
"""What a worker without an item may take to end, before it is killed."""


class Ending(enum.Enum):
    """How the work on an item came out: with a result, with a result that tells what is wrong with the item, or with
    none, because its process took too long or died.
    """

    DONE = enum.auto()
    FAULT = enum.auto()
    TIMED_OUT = enum.auto()
    CRASHED = enum.auto()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no result: `ending` for programs (TIMED_OUT or CRASHED), `text` for people."""

    ending: Ending
    text: str

    def __str__(self) -> str:
        return self.text


def cores() -> int:
    """How many cores this process may use: by its affinity, which batch systems set, and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a quota
            quota, period = (int(word) for name in names for word in (CGROUP / name).read_text("utf-8").split())
            allowed = min(allowed, math.ceil(quota / period)) if quota > 0 else allowed
    return max(1, allowed)


def progress(total: int, start: int, unit: str, what: str = "", main: bool = True, *, delay_s: float = 0
             ) -> tqdm[NoReturn]:
    """A progress bar: live on a terminal, a line every ten seconds in a log, silent on all but the main process and in
    the first `delay_s` seconds.
    """
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(total=total, initial=start, desc=what or None, unit=unit, disable=not main, dynamic_ncols=live,
                ascii=not live, mininterval=0.5 if live else 10, delay=delay_s, file=logs.console())


class _Worker:
    """A process that answers one item at a time, and is replaced where it must be killed."""

    def __init__(self, function: Callable[[Any], Any], number: int) -> None:
        self.function, self.number = function, number
        self.item: tuple[int, Any] | None = None
        self.start()

    def start(self) -> None:
        # Never a fork of a process that holds threads or readers; Windows has no forks at all.
        context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self.function.__module__])
        self.pipe, there = context.Pipe()
        self.written = Path(tempfile.mkstemp(prefix="wantrain-worker-")[1])
        named = self.function.__module__, self.function.__qualname__
        self.process = context.Process(target=_serve, args=(*named, there, self.written), daemon=True)
        try:
            self.process.start()
        except (EOFError, OSError):  # the server died of what it loads before it forks: the worker shall tell of it
            context.set_forkserver_preload([])
            self.process.start()
        there.close()
        self.is_fresh = True

    def give(self, item: tuple[int, Any], timeout_s: float) -> None:
        """Send item[1] to the process; item[0] is its number."""
        if self.is_fresh:
            self._wait()
        try:
            self.pipe.send(item[1])
        except OSError:  # it died while it had nothing to do
            self.end()
            self.start()
            self._wait()
            self.pipe.send(item[1])
        self.item, self.until, self.is_fresh = item, time.monotonic() + timeout_s, False

    def _wait(self) -> None:
        """Until its imports are done, which do not count against its first file. UserError where it died of them."""
        try:
            self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            code, module = self.process.exitcode, self.function.__module__
            said = self.written.read_text(errors="replace").strip().split("\n")[-1] or "it said nothing"
            raise UserError(
                f"worker {self.number} died while it imported {module} (exit code {code}): {said}",
                "allow fewer processes or more memory: the system ends what takes too much" if code == -9
                else f"{shlex.join([sys.executable, '-c', f'import {module}'])}    shows what is wrong") from error

    def take(self, too_long: Failure) -> tuple[Any, Failure | None]:
        """Wait for the process: (its result, None), or (None, why there is no result)."""
        failure, self.item = too_long, None
        if self.pipe.poll():
            try:
                return self.pipe.recv(), None
            except (EOFError, OSError):
                self.process.join()
                failure = Failure(Ending.CRASHED, f"its reader crashed (exit code {self.process.exitcode})")
        self.process.kill()
        self.end()
        self.start()
        return None, failure

    def end(self) -> None:
        self.pipe.close()
        if self.item is None:  # it leaves by itself, and gives back what it holds of the system
            self.process.join(LEAVING_S)
        self.process.kill()
        self.process.join()
        self.written.unlink(missing_ok=True)


def in_workers(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int, timeout_s: float, limit: str = "--timeout-s",
    *, ordered: bool = False,
) -> Generator[tuple[Item, Result | None, Failure | None]]:
    """(item, function(item), None) as they finish, from `jobs` processes; (item, None, why) for one that died.

    `function` is importable by name and its results can be pickled. A worker past `timeout_s` seconds (set by `limit`)
    is killed and replaced, and so is one that crashes: no file can stop the others. While a result is looked at, every
    worker is busy with its next item. With `ordered` results come in the order of the items, which may be endless: at
    most two for each worker are ahead.
    """
    too_long = Failure(Ending.TIMED_OUT, f"not finished after {timeout_s:g} s; allow more with {limit}")
    numbered = enumerate(items)
    first = list(itertools.islice(numbered, jobs))
    todo = itertools.chain(first, numbered)
    workers = [_Worker(function, number) for number, _ in enumerate(first, 1)]
    done: dict[int, tuple[Item, Result | None, Failure | None]] = {}
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


def _serve(module: str, name: str, pipe: Connection, written: Path) -> None:
    """A worker's life: results for items until the pipe closes. The parent alone answers to Ctrl-C.

    While it imports its function, what it says on stderr goes into the file `written`, for the parent to tell.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        with _stderr_into(written):
            function = operator.attrgetter(name)(importlib.import_module(module))
        pipe.send("ready")
        while True:
            pipe.send(function(pipe.recv()))


@contextlib.contextmanager
def _stderr_into(path: Path) -> Iterator[None]:
    """Descriptor 2 is the file until the block ends well; then what is in it goes where it would have gone."""
    stderr = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    yield
    sys.stderr.flush()
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(OSError):
        os.write(2, path.read_bytes())


def _die_with_parent() -> None:
    """A worker inside an item that hangs would outlive a job that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
