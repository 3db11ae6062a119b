"""One training a run folder, by a lock that ends with its process, also over a network file system."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from wantrain.terms import Stalled, unwritable

NAME = ".training.lock"
"""The locked file in the run folder; it says who holds it, or held it last, and stays."""
PATIENCE_S = 5.0
"""A process that was killed keeps its files until its memory is freed."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""


@contextlib.contextmanager
def held(folder: Path, command: Sequence[str]) -> Iterator[None]:
    """In the block, no other process can hold the folder. Raises Stalled where one does, UserError where the folder
    cannot be written.

    It is a POSIX record lock: NFS carries it to other machines, and no child inherits it. The process must not open the
    file again, since to close any handle of it gives the lock up.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        _lock(file, folder)
        try:
            file.truncate(0)
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                       "command": list(command)}, file)
            file.flush()
        except OSError as error:
            raise unwritable(path, error) from error
        yield


def holder(folder: Path) -> str:
    """Who is training in the folder; empty where nobody is. The lock is not taken, only asked for."""
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            try:
                take(file, shared=True)
            except OSError as error:
                return _said_holder(file)[0] if error.errno in (errno.EACCES, errno.EAGAIN) else ""
    except OSError:
        return ""
    return ""


def last_command(folder: Path) -> list[str]:
    """The command line of the folder's last training; empty where it is not known."""
    try:
        said = json.loads((folder / NAME).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(word) for word in said] if isinstance(said, list) else []


def last_words(folders: Iterable[Path]) -> list[str]:
    """What stood behind the verb at the last training of the first of these folders that knows it; recipe=NAME where
    none does.
    """
    return next((words for folder in folders if (words := last_command(folder)[2:])), ["recipe=NAME"])


def take(file: TextIO, *, shared: bool = False) -> None:
    """Take the lock without waiting. Raises OSError where another process has it, or where there are no locks."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise OSError(errno.ENOSYS, "none on this system") from error
    fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _lock(file: TextIO, folder: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            take(file)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"{folder}: this file system has no locks ({error.strerror}): a second training there would not "
                      "be noticed", file=sys.stderr)
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise unwritable(folder / NAME, error) from error
            if time.monotonic() >= until:
                raise _taken(file, folder) from error
            time.sleep(0.1)
        else:
            return


def _said_holder(file: TextIO) -> tuple[str, str]:
    """Who holds the lock, and how its training may be ended."""
    file.seek(0)
    try:
        said = json.loads(file.read())
        return (f"process {said['pid']} on {said['host']}, since {said['since']}",
                f"kill -INT {said['pid']}    on {said['host']} lets it save and end")
    except (ValueError, KeyError, TypeError):
        return "another process", "wait until it has ended"


def _taken(file: TextIO, folder: Path) -> Stalled:
    who, end = _said_holder(file)
    return Stalled(f"run folder {folder} is in use: {who} is training in it",
                   f"{end}; or train into another folder: run.name=ANOTHER")
