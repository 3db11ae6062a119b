"""A disk that is full at any moment of a training ends it with an error that says so; nothing older is lost, and the
same command goes on when there is room. Two processes over gloo, forked (see `forked`), on a real small file system.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.engine_table import OPTIMIZERS, ROWS, STEPS, Bench, are_same, checkpoints_of
from wantrain.engine import checkpoint

pytestmark = pytest.mark.slow

PAGE = 4096


def size_of(folder: Path) -> int:
    """Bytes that a file system in memory takes for it."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "none", str(folder)], capture_output=True,
                          text=True, check=False)
    if made.returncode:
        pytest.skip(f"a small file system needs root: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={max(num_bytes, PAGE)}", str(disk)], check=True)


@pytest.fixture(scope="module")
def whole(forker, tmp_path_factory) -> tuple[Bench, Path]:
    """A run that has all the room it wants."""
    bench = Bench(forker, tmp_path_factory.mktemp("bench"))
    return bench, bench.train(ROWS[0])


@pytest.mark.parametrize(("share_of_rest", "num_checkpoints"), [
    *(pytest.param(share, 0, marks=pytest.mark.long) for share in (0, 0.3, 0.7, 1)), (1, 1),
    pytest.param(1, 2.5, marks=pytest.mark.long)])
def test_a_disk_with_room_for_so_much(whole, disk, tmp_path, share_of_rest, num_checkpoints):
    """So many checkpoints, beside all of the run's other files or some of them."""
    bench, undisturbed = whole
    one = size_of(checkpoints_of(undisturbed)[-1])
    rest = size_of(undisturbed) - STEPS * one
    run = disk / "run"
    command = ["train", *bench.arguments(run, OPTIMIZERS["adamw"], 2)]
    resize(disk, int(share_of_rest * rest + num_checkpoints * one))
    log = tmp_path / "log.txt"
    codes = bench.forker.end(bench.forker.start(command, log))
    told = log.read_text()
    print(codes, told[-1500:])
    assert len(codes) == 2
    assert 2 in codes.values()
    assert "could not write" in told
    assert "free some disk space" in told
    assert "Traceback" not in told
    steps = checkpoints_of(run)
    assert int(num_checkpoints) <= len(steps) < STEPS
    assert [checkpoint.load(path, None)[0].step for path in steps] == list(range(1, len(steps) + 1))
    resize(disk, 1 << 30)
    bench.forker.run(command, log)
    assert are_same(undisturbed, run)
