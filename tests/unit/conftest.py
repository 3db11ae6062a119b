"""The data tools without their workers; a training of another process."""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wantrain import journal, lock


@pytest.fixture
def here(monkeypatch):
    """Jobs of the data tools run in this process, pickled as if for another; the list of files that were looked at."""
    looked = []

    def in_workers(function, jobs, number, timeout_s, **_):
        for job in jobs:
            looked.append(Path(getattr(job, "path", job)).name)
            found = pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(job)))
            yield job, pickle.loads(pickle.dumps(found)), None

    monkeypatch.setattr(journal, "in_workers", in_workers)
    return looked


@pytest.fixture
def folder(tmp_path):
    """A folder with the two films of tests.foreign."""
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "clips" / name).write_bytes(name.encode())
    return tmp_path


@pytest.fixture
def holding() -> Iterator[Callable[[Path], int]]:
    """A process (a fork) that holds a run folder until it is killed: its id, once it does."""
    pids = []

    def start(folder: Path) -> int:
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            try:
                with lock.held(folder, ["wantrain", "train", "recipe=first"]):
                    os.write(writer, b"held")
                    signal.pause()
            finally:
                os._exit(1)
        pids.append(pid)
        assert os.read(reader, 4) == b"held"
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
