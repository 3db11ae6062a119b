"""Mutates real inputs and looks for anything but a UserError, for hangs, and for memory that no input explains.

A case is made from (kind, seed, number) alone: what was found is named by these three, and made again from them.
To add a kind, write one function in `tests.fuzz.kinds` and name it in KINDS.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from wantrain.terms import UserError

LONGEST_S = 20
LARGEST_BYTES = 256 << 20
"""What a case may add to the process's memory at its highest, besides 64 times its own size."""

ODD = (b"", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\x85",
       "\u2028".encode(), b"\\", b"NaN",
       b"1e999", b"-1", b"null", b"[]", b"{}", b'"', b",", b"[" * 3000, b"9" * 5000, b"../", b"://",
       b"A" * 70000)
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


@dataclass(frozen=True)
class Kind:
    """`inputs` are sound files by name, one of which is mutated; `attempt` is given it in a folder of its own.

    Where `make` is given, it makes and tries a case by itself, out of a source of chance and an empty folder.
    """

    inputs: dict[str, bytes]
    attempt: Callable[[Path], None]
    make: Callable[[random.Random, Path], None] | None = None


def made(make: Callable[[random.Random, Path], None]) -> Kind:
    """A kind whose cases are more than one mutated file."""
    return Kind({"(made)": b""}, lambda path: None, make)


@dataclass(frozen=True)
class Finding:
    """What a case did that no case may."""

    seed: int
    number: int
    what: str


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The data with one to six changes: bytes, runs of them, numbers, lengths, the end."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        at = chance.randrange(len(changed) + 1)
        length = chance.choice((1, 1, 2, 4, 8, 32, 512))
        piece = bytes(changed[at : at + length])
        match chance.randrange(7):
            case 0 if at < len(changed):
                changed[at] = chance.choice((changed[at] ^ 1 << chance.randrange(8), *INTERESTING))
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = chance.choice(ODD)
            case 3:
                changed[at:at] = piece * chance.choice((1, 2, 50))
            case 4:
                changed[at : at + length] = chance.randbytes(len(piece))
            case 5:
                del changed[at:]
            case _:
                other = chance.randrange(len(changed) + 1)
                changed[at : at + length] = changed[other : other + length]
    return bytes(changed)


def case(kind: Kind, name: str, seed: int, number: int) -> tuple[str, bytes]:
    """(the file's name, its bytes) of a case of the kind called `name`."""
    chance = random.Random(f"{name} {seed} {number}")
    file = chance.choice(sorted(kind.inputs))
    return file, mutated(kind.inputs[file], chance)


def try_case(kind: Kind, name: str, seed: int, number: int) -> Finding | None:
    """Run one case in this process."""
    file, data = case(kind, name, seed, number)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file)
        if not kind.make:
            path.write_bytes(data)
        caught, shown = _Caught(), io.StringIO()
        with caught, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            if kind.make:
                kind.make(random.Random(f"{name} {seed} {number}"), Path(folder))
            else:
                kind.attempt(path)
    if caught.what:
        return Finding(seed, number, f"{file}: {caught.what}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > LARGEST_BYTES + 64 * len(data):
        return Finding(seed, number, f"{file}: {grown >> 20} MiB for a file of {len(data)} bytes")
    return None


class _TooLong(BaseException):
    """Not an Exception, so that no reader takes it for a fault of its file."""


class _Caught:
    """A block that has LONGEST_S; `what` is how it ended, '' where well or by a UserError."""

    what = ""

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._stop)
        signal.alarm(LONGEST_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> bool:
        signal.alarm(0)
        if kind and not issubclass(kind, UserError):
            self.what = "".join(traceback.format_exception(kind, error, trace))
        return kind is not KeyboardInterrupt

    def _stop(self, *_: object) -> None:
        raise _TooLong(f"not finished after {LONGEST_S} s")


def hunt(kind: Kind, name: str, seed: int, seconds: float) -> tuple[int, list[Finding]]:
    """(cases run, what was found) in this time; what fails at the same line is told once."""
    found: dict[str, Finding] = {}
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        if finding := try_case(kind, name, seed, number):
            lines = finding.what.strip().split("\n")
            found.setdefault("".join([line for line in lines if line.startswith("  File")][-1:]) or lines[-1], finding)
        number += 1
    return number, list(found.values())
