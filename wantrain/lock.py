"""One training a run folder, by a lock that ends with its process, also over a network file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
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


def _lock(file: TextIO, folder: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _taken(file: TextIO, folder: Path) -> Stalled:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        end = f"kill -INT {holder['pid']}    on {holder['host']} lets it save and end"
    except (ValueError, KeyError, TypeError):
        who, end = "another process", "wait until it has ended"
    return Stalled(f"run folder {folder} is in use: {who} is training in it",
                   f"{end}; or train into another folder: run.name=ANOTHER")
