"""A copy of the checkpoints behind an fsspec URL, so that a machine that is lost takes no run along."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from wantrain.files import temporary_for
from wantrain.outside import Caught, Silent, awaited, described
from wantrain.terms import Stalled, UserError

Result = TypeVar("Result")

ANSWER_S = 60.0
"""How long a start waits for an answer, or for the next bytes of a checkpoint."""
_owing: dict[str, Silent] = {}
"""Mirrors that have not answered, by URL: nothing more is asked of them until they do."""


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, str]]:
    """(filesystem, path) of the URL; whatever goes wrong in the block is a UserError, Stalled where it may pass."""
    with Caught() as caught:
        import fsspec  # only where a mirror is asked for

        filesystem, root = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()
        yield filesystem, root.rstrip("/")
    if caught.fault is not None:
        raise _refused(url, caught.fault) from caught.fault


def _refused(url: str, fault: BaseException) -> UserError:
    lasts = isinstance(fault, ValueError | ImportError | PermissionError)
    return (UserError if lasts else Stalled)(
        f"train.mirror = {url}: {described(fault)}", "give a folder or a URL that fsspec can write, e.g. "
        "s3://bucket/runs/NAME (pip install s3fs), and check your credentials; checkpoints in the run folder are "
        "whole, and train.mirror=null goes on from them alone")


def _answer(url: str, asked: Callable[[Any, str], Result], progress: Callable[[], object] = bool) -> Result:
    """asked(filesystem, path of the URL). UserError also where ANSWER_S pass and `progress` does not change; the next
    ones then do not wait.
    """
    def ask() -> Result:
        with _opened(url) as (filesystem, root):
            return asked(filesystem, root)

    if url in _owing and _owing[url].thread.is_alive():
        raise _refused(url, _owing[url])
    try:
        return awaited(ask, ANSWER_S, progress)
    except Silent as silent:
        _owing[url] = silent
        raise _refused(url, silent) from silent


def names(url: str) -> list[str]:
    """The names of what is there."""
    def listed(filesystem: Any, root: str) -> list[str]:
        return filesystem.ls(root, detail=False) if filesystem.exists(root) else []

    return [path.rstrip("/").rpartition("/")[2] for path in _answer(url, listed)]


def probe(url: str) -> None:
    """Raise UserError where nothing can be written there."""
    def write(filesystem: Any, root: str) -> None:
        filesystem.makedirs(root, exist_ok=True)
        name = f"{root}/.probe.{uuid.uuid4().hex}"
        filesystem.pipe_file(name, b"probe")
        filesystem.rm_file(name)

    _answer(url, write)


def put(url: str, path: Path, last: str) -> None:
    """Copy a checkpoint's folder there, the file `last` as the last: without it a checkpoint counts as incomplete."""
    with _opened(url) as (filesystem, root):
        target = f"{root}/{path.name}"
        if filesystem.exists(target):
            filesystem.rm(target, recursive=True)
        filesystem.makedirs(target, exist_ok=True)
        for file in sorted(path.iterdir(), key=lambda file: file.name == last):
            filesystem.put_file(str(file), f"{target}/{file.name}")


def fetch(url: str, path: Path) -> None:
    """Copy the checkpoint `path.name` from there into `path`, in place of what is there."""
    temporary = temporary_for(path)

    def get(filesystem: Any, root: str) -> None:
        for file in filesystem.ls(f"{root}/{path.name}", detail=False):
            filesystem.get_file(file, str(temporary / file.rpartition("/")[2]))

    try:
        temporary.mkdir(parents=True)
        _answer(url, get, lambda: sum(file.stat().st_size for file in temporary.iterdir()))
        shutil.rmtree(path, ignore_errors=True)  # here and not in `get`, which may end long after it was given up
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def drop(url: str, name: str) -> None:
    """Delete a checkpoint there."""
    with _opened(url) as (filesystem, root):
        filesystem.rm(f"{root}/{name}", recursive=True)
