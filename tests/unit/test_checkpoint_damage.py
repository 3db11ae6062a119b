"""A checkpoint that is not what was written is noticed, whatever happened to it, and the one before is used."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wantrain.engine import checkpoint
from wantrain.engine.saved import CHECKSUMS, STATE, TENSORS, CheckpointStore, Damaged, Progress, Record
from wantrain.terms import UserError

FINGERPRINT = {"train.seed": 0, "optim.lr": 1e-3, "data.trigger": "sqstyle", "(base weights)": "0f3a"}
FILES = (TENSORS, STATE, CHECKSUMS)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"blocks.{block}.attn.{key}": torch.randn(4, 12, generator=generator)
            for block in range(3) for key in ("lora_A|value", "lora_A|exp_avg", "lora_A|exp_avg_sq")}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> CheckpointStore:
    """Steps 1 to 3."""
    place = CheckpointStore(tmp_path_factory.mktemp("run") / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoint.save(place, Progress(step), tensors_of(step), Record(FINGERPRINT))
    return place


@pytest.fixture
def place(written: CheckpointStore, tmp_path: Path) -> CheckpointStore:
    return written._replace(folder=Path(shutil.copytree(written.folder, tmp_path / "checkpoints")))


def assert_passed_over(place: CheckpointStore, what: object) -> None:
    """The newest is named with what is wrong with it, and the one before is what was written."""
    newest = place.on_disk()[-1]
    found = checkpoint.newest_whole(place, FINGERPRINT)
    assert found is not None
    assert found.progress.step == 2, what
    assert found.path == newest.with_name("step_000002")
    assert len(found.passed) == 1
    assert found.passed[0].startswith((f"checkpoint {newest} is damaged: ", f"checkpoint {newest} is incomplete: "))
    assert found.tensors.keys() == tensors_of(2).keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors_of(2).items())


def flips(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number of a bit, the bytes with it flipped): every bit of the first hundred bytes, one bit of every byte."""
    for bit in range(8 * len(content)):
        place = bit // 8
        if place < 100 or bit % 8 == place % 8:
            yield bit, content[:place] + bytes([content[place] ^ 1 << bit % 8]) + content[place + 1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(place: CheckpointStore, name: str) -> None:
    path = place.folder / "step_000003" / name
    content = path.read_bytes()
    for bit, damaged in flips(content):
        path.write_bytes(damaged)
        assert_passed_over(place, (name, bit))
    path.write_bytes(content)
    assert_whole(place, 1, 2, 3)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_or_longer_or_gone_is_noticed(place: CheckpointStore, name: str) -> None:
    path = place.folder / "step_000003" / name
    content = path.read_bytes()
    for length in sorted({*range(min(len(content), 300)), *range(0, len(content), 97), len(content) - 1}):
        path.write_bytes(content[:length])
        assert_passed_over(place, (name, length))
    for more in (b"\0", b"\n", b"}", content):
        path.write_bytes(content + more)
        assert_passed_over(place, (name, more))
    path.write_bytes(b"\0" * len(content))  # what a file system leaves of a file that was not synced
    assert_passed_over(place, (name, "zeros"))
    path.unlink()
    assert_passed_over(place, (name, "gone"))
    path.mkdir()
    assert_passed_over(place, (name, "a folder"))


def test_files_of_another_checkpoint_are_noticed(place: CheckpointStore) -> None:
    for name in FILES:
        path = place.folder / "step_000003" / name
        content = path.read_bytes()
        shutil.copy(place.folder / "step_000001" / name, path)
        assert_passed_over(place, name)
        path.write_bytes(content)
    shutil.rmtree(place.folder / "step_000003")
    (place.folder / "step_000003").mkdir()
    assert_passed_over(place, "empty")


def test_where_none_is_whole_it_says_so_of_the_oldest_and_begins_nothing_anew(place: CheckpointStore) -> None:
    for path in place.on_disk():
        (path / TENSORS).unlink()
    with pytest.raises(Damaged, match="step_000001 is incomplete"):
        checkpoint.newest_whole(place, FINGERPRINT)


def assert_whole(place: CheckpointStore, *steps: int) -> None:
    """These are there, as they were written, and nothing else."""
    assert [path.name for path in sorted(place.folder.iterdir())] == [f"step_{step:06d}" for step in steps]
    for step in steps:
        progress, tensors = checkpoint.load(place.folder / f"step_{step:06d}", FINGERPRINT)
        assert progress.step == step
        assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(step).items())


@pytest.mark.parametrize("room", [0, 1, 500, 2000])
def test_a_write_that_fails_loses_nothing_older_and_leaves_nothing(place: CheckpointStore, room: int) -> None:
    """A limit on the size of files is what a full disk is to a write: it fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=r"could not write .*step_000004") as raised:
            checkpoint.save(place, Progress(4), tensors_of(4), Record(FINGERPRINT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free some disk space" in raised.value.next_step
    assert_whole(place, 1, 2, 3)
    checkpoint.save(place, Progress(4), tensors_of(4), Record(FINGERPRINT))
    assert_whole(place, 2, 3, 4)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_takes_no_place_of_those_that_stay(place: CheckpointStore, keep: int) -> None:
    """A run that went on from step 1 and saves step 2 again does not count the damaged step 3 as the newest."""
    shutil.rmtree(place.folder / "step_000002")
    (place.folder / "step_000003" / TENSORS).unlink()
    checkpoint.save(place._replace(keep=keep), Progress(2), tensors_of(2), Record(FINGERPRINT))
    found = checkpoint.newest_whole(place, FINGERPRINT)
    assert found is not None
    assert found.progress.step == 2
