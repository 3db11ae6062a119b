"""What is outside a training (trackers, mirrors) and must not end it: an error or a call that hangs is a message."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from wantrain.terms import UserError

Result = TypeVar("Result")

MOST_WAITING = 1000
"""Calls that wait for one that hangs; later ones are left out."""


def remote_errors() -> tuple[type[Exception], ...]:
    """The exceptions of libraries that read from another machine. A function, because httpx2 is slow to import."""
    import httpx2

    return OSError, ImportError, ValueError, RuntimeError, httpx2.HTTPError


class Caught:
    """In the block, whatever foreign code raises ends the block and is kept in `fault`. Ctrl-C goes through."""

    fault: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
                 ) -> bool:
        self.fault = value
        return not isinstance(value, KeyboardInterrupt | GeneratorExit)


def described(fault: BaseException) -> str:
    """An error of foreign code in one line."""
    if isinstance(fault, UserError):
        return fault.message
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}{f': {text[:500]}' if text else ''}"


class Silent(TimeoutError):
    """Foreign code has not answered in time; it still runs in `thread` and may yet answer."""

    def __init__(self, limit_s: float, thread: threading.Thread) -> None:
        super().__init__(f"no answer within {limit_s:g} s")
        self.thread = thread


def awaited(function: Callable[[], Result], limit_s: float, progress: Callable[[], object] = bool) -> Result:
    """Call foreign code in a thread of its own and return its result. Raises what it raises, and Silent once `limit_s`
    seconds have passed in which `progress` did not change; the thread is left to itself then.
    """
    results: list[Result] = []
    caught = Caught()

    def work() -> None:
        with caught:
            results.append(function())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    before = None
    while thread.is_alive() and before != (now := (progress(),)):
        before = now
        thread.join(limit_s)
    if caught.fault is not None:
        raise caught.fault
    if not results:
        raise Silent(limit_s, thread)
    return results[0]


class Outside:
    """Calls of foreign code, in order, in a thread of their own: the training waits for them only in `wait`."""

    def __init__(self, name: str, advice: str) -> None:
        self._name, self._advice = name, advice
        self._calls: queue.Queue[Callable[[], object]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._news: list[str] = []
        self._told: set[str] = set()
        self.fault = ""
        """What the last call ended with; empty where it went well."""

    def call(self, function: Callable[[], object]) -> None:
        """Queue a call; it runs after the calls before it."""
        if self._calls.unfinished_tasks >= MOST_WAITING:
            self._fail("it does not answer any more")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(function)

    def _work(self) -> None:
        while True:
            function = self._calls.get()
            with Caught() as caught:
                function()
            if caught.fault is None:
                self.fault = ""
            else:
                self._fail(described(caught.fault))
            self._calls.task_done()

    def _fail(self, fault: str) -> None:
        self.fault = fault
        self.tell(f"{self._name}: {fault}\n  next: {self._advice}")

    def tell(self, text: str) -> None:
        """Add a problem to the news, unless it was told before."""
        if text not in self._told:
            self._told.add(text)
            self._news.append(text)

    @property
    def is_idle(self) -> bool:
        """Whether every call has ended."""
        return not self._calls.unfinished_tasks

    def wait(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds for every call to end. Returns whether they have ended."""
        with self._calls.all_tasks_done:
            return self._calls.all_tasks_done.wait_for(lambda: self.is_idle, limit_s)

    def news(self) -> str:
        """The problems since the last call of `news`; none is told twice."""
        told, self._news = self._news, []
        return "\n".join(told)
