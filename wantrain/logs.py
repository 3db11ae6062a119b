"""What a run prints: each process's in a file of the run folder, the first one's on the console as well."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from wantrain.terms import Interrupted, UserError, unwritable


class _Lasting:
    """A console's stream; once its reader is gone (a terminal that closes, a `tee` that Ctrl-C ends too), what is
    printed goes nowhere, rather than ending a training before it saves.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with Path(os.devnull).open("wb") as nowhere:  # also for what is buffered, and for C++
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_console() -> Iterator[None]:
    """In the block, printing does not fail when the reader of a pipe is gone."""
    out, err = (cast(TextIO, _Lasting(stream)) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


class _Both:
    """A console's stream that also writes to a file; everything else of it is the console's."""

    def __init__(self, console: TextIO, file: TextIO) -> None:
        self.console, self._file = console, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self.console.write(text)

    def flush(self) -> None:
        self._file.flush()
        self.console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


def console() -> TextIO:
    """The stream for progress bars: standard error itself, never the log file."""
    return sys.stderr.console if isinstance(sys.stderr, _Both) else sys.stderr


def name_of(process: int) -> str:
    """The name of a process's log file in the run folder."""
    return f"logs/process_{process}.log"


@contextlib.contextmanager
def kept(run_dir: Path, process: int, command: Sequence[str]) -> Iterator[None]:
    """In the block, what is printed goes to the process's log; only the first process still prints on the console.

    What ends the block with an error is in the log as well.
    """
    path = run_dir / name_of(process)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        fault = unwritable(path, error)
        raise UserError(f"run.dir = {run_dir}: {fault.message}", fault.next_step) from error
    with log as file:
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        print(f"--- {when} {socket.gethostname()} pid {os.getpid()}: {' '.join(command)}", file=file)
        with _shown(file) if process == 0 else _hidden(file):
            try:
                yield
            except BaseException as error:
                if isinstance(error, UserError | Interrupted):
                    print(f"{type(error).__name__}: {error}", file=file)
                else:
                    traceback.print_exception(error, file=file)
                raise


@contextlib.contextmanager
def _shown(file: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(_Both(sys.stdout, file)), contextlib.redirect_stderr(_Both(sys.stderr, file)):
        yield


@contextlib.contextmanager
def _hidden(file: TextIO) -> Iterator[None]:
    """Also what C++ prints: the descriptors themselves lead to the file."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
