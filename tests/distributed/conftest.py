"""Real processes: the one that forks jobs, for each process of pytest that asks for it, and the launch files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import arguments_for
from tests.distributed.forked import Forker, forking
from tests.runs import LAUNCH


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    with forking() as one:
        yield one


@pytest.fixture(scope="module")
def launched(clips, cache_dir, cached, tmp_path_factory):
    """launched("ddp", overrides...) -> run folder after a training started with launch/ddp.yaml (None: no launcher)."""
    root = tmp_path_factory.mktemp("launched")

    def call(file, *overrides, run=None, verb="train"):
        run_dir = root / (run or f"{file}_{len(list(root.iterdir()))}")
        launcher = [] if file is None else ["-m", "accelerate.commands.launch", "--config_file",
                                            str(LAUNCH / f"{file}.yaml")]
        command = [sys.executable, *launcher, "-m", "wantrain", verb, *arguments_for(clips, cache_dir, run_dir),
                   "train.micro_batch_size=2", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return run_dir

    return call
