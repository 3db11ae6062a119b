"""What the data tools share: finding files, lines of JSON, arguments, and the way a tool answers."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import importlib
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from wantrain.jobs import cores
from wantrain.terms import EXIT_INTERRUPTED, EXIT_USER_ERROR, IMAGE_SUFFIXES, VIDEO_SUFFIXES, UserError

OTHER_VIDEO_SUFFIXES = frozenset({".wmv", ".asf", ".flv", ".3gp", ".m2ts", ".mts", ".ogv", ".vob", ".mxf", ".m2v"})
"""Films that the folder form of a manifest does not list, but a .jsonl or .csv may name."""

SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES | OTHER_VIDEO_SUFFIXES


class Parser(argparse.ArgumentParser):
    """Its faults are told as all others are: the message, and the next command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}\n  next: {self.prog} --help\n")


def find_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(files to probe, files ignored for their ending) below the paths, absolute and sorted.

    A file that is named itself is never ignored. A folder that cannot be read is a UserError.
    """
    wanted: set[Path] = set()
    ignored: set[Path] = set()
    for path in paths:
        if path.is_dir():
            for file in _walk(path):
                (wanted if is_medium(file) else ignored).add(absolute(file))
        elif os.path.lexists(path):
            wanted.add(absolute(path))
        else:
            raise UserError(f"{shown(path)} does not exist", "give files or folders of videos and images")
    return sorted(wanted), sorted(ignored - wanted)


def is_medium(file: Path) -> bool:
    """Whether a file in a folder is a video or image by its name. Hidden ones are not, such as macOS' `._a.mp4`."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def absolute(path: Path) -> Path:
    """The path from the root, its links kept by name."""
    return Path(os.path.normpath(Path.cwd() / path))


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below the folder; linked folders are followed, each once."""
    seen = {folder.resolve()}

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", "mend its permissions or leave it out")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = {name: (Path(root) / name).resolve() for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen.update(real[name] for name in folders)
        yield from (Path(root, name) for name in names)


def check_openable(path: Path) -> None:
    """Raises ValueError or OSError for what needs no decoder to be refused."""
    status = path.stat()
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8, so that no manifest can hold it: rename it") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if not status.st_size:
        raise ValueError("empty (0 bytes)")
    with path.open("rb") as file:
        head = file.read(4096)
    with contextlib.suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if all(c.isprintable() or c.isspace() for c in text):
            raise ValueError("a text file, neither a video nor an image")


def stamp(path: Path) -> tuple[int, int, int]:
    """(size in bytes, times of the last change and of the last change of status in ns). A file with the same three is
    taken as unchanged. The third one shows a file whose time of change was set by hand.
    """
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return 0, 0, 0


def relative(path: Path, folder: Path) -> str:
    """The path as a manifest in `folder` names it, with forward slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


def shown(path: Path) -> str:
    """The path as it is printed: bytes that are not UTF-8 become question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


FFMPEG = "imageio-ffmpeg>=0.6,<1"
"""What pip installs for imageio_ffmpeg."""

SCENEDETECT = "scenedetect-headless>=0.7.2,<0.8"
"""What pip installs for scenedetect and cv2."""


def needed(module: str, what: str, requirement: str, extra: str) -> Any:
    """Import an optional module. Raises UserError where it is not installed or does not import."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs the package {module}: {error}",
                        f'pip install "wantrain[{extra}]"    (or: pip install "{requirement}")') from error


OUTPUTS = ("out", "rejected", "train", "heldout")
"""Arguments of the tools that name files to be written."""


def _parsed(parser: Parser, given: Sequence[str]) -> argparse.Namespace:
    """The arguments. Exits with 2 for paths that cannot be, and for outputs that would overwrite media, inputs that are
    only read, or one another. Help that nobody reads to its end is no fault.
    """
    try:
        args = parser.parse_args(given)
    except SystemExit:
        _flush()
        raise
    if any("\0" in str(path) for value in vars(args).values() for path in _paths(value)):
        parser.error("a path cannot hold the character NUL")
    inputs = [path for name in ("paths", "probe") for path in _paths(getattr(args, name, None))]
    named = {name: out for name in OUTPUTS for out in _paths(getattr(args, name, None))}
    for name, out in named.items():
        if fault := _no_output(out, [*inputs, *(other for key, other in named.items() if key != name)]):
            parser.error(f"--{name} {shown(out)}: {fault}")
    return args


def _no_output(out: Path, others: Sequence[Path]) -> str:
    """Why a file must not be written, '' if it may."""
    try:
        if out.is_dir():
            return "this is a folder; give a file"
    except OSError as error:
        return str(error.strerror)
    if out.suffix.lower() in SUFFIXES:
        return "this is the name of a video or image; give a .jsonl"
    return ("this is another argument of the command, and would be overwritten"
            if os.path.realpath(out) in map(os.path.realpath, others) else "")


def _paths(value: Any) -> list[Path]:
    """The paths in an argument's value."""
    return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, Path)]


def _flush() -> None:
    """Write out what was printed; where nobody reads it any more, there is nothing to be said."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def answer(parser: Parser, work: Callable[[argparse.Namespace], str], arguments: Sequence[str] | None
           ) -> int:
    """Print what a tool's work says of its arguments (None: those of the process), and return the exit code; a fault
    that the user can mend, or Ctrl-C, is one message. `parser.prog` is the command.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parsed(parser, given)
    try:
        text = work(args)
        with contextlib.suppress(BrokenPipeError):
            print(text)
        _flush()
    except (OSError, UserError) as error:
        if isinstance(error, OSError):
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            error = UserError(f"{where}{error.strerror or error}", "give paths that can be read and written")
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        again = shlex.join([*parser.prog.split(), *given])
        print(f"\ninterrupted; what was finished is kept\n  next: {again}    goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def add_job_arguments(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    """--jobs and --timeout-s, alike in every tool that works file by file."""
    parser.add_argument("--jobs", type=positive(int), default=cores(), metavar="N",
                        help="files at the same time, a process each (default: the number of cores, %(default)s)")
    parser.add_argument("--timeout-s", type=positive(float), default=timeout_s, metavar="S",
                        help="a file that takes longer is a fault, and the job goes on (default: %(default)g)")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argument's type: a number above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
        return value

    return parse
