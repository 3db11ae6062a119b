"""A base that is stored in a byte a weight, under engines that let each process hold it whole, and that divide it."""

import pytest

from tests.conftest import arguments_for
from tests.runs import assert_same_training

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_two_processes_train_on_it_as_one_does(forker, clips, cache_dir, cached, tmp_path):
    def run(name, engine, num_processes):
        folder = tmp_path / name / "run"
        forker.run(["train", *arguments_for(clips, cache_dir, folder), "train.micro_batch_size=2", "memory.base=fp8"],
                   tmp_path / f"{name}.log", num_processes, engine)
        return folder

    alone = run("alone", None, 1)
    for engine in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2"):
        assert_same_training(alone, run(engine, engine, 2), rtol=2e-5)
