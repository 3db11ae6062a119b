"""A training killed at any moment, writes of checkpoints included, ends after restarts in the weights of one that no
one disturbed. Two processes over gloo, forked (see `forked`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.engine_table import OPTIMIZERS, Bench
from tests.distributed.forked import Forker, kill_session, left_over
from wantrain.engine import checkpoint
from wantrain.engine.saved import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.long]

NUM_KILLS, SEED, STEPS = int(os.environ.get("WANTRAIN_KILLS", "10")), 20, 6
"""Kills under each engine; 50 take three to four minutes (docs/LOG.md)."""
STALL_TIMEOUT_S = 20


@dataclass(frozen=True)
class Kill:
    """What one kill hit: the steps of the newest checkpoint before the start and after it, what was being written, and
    how the processes ended that were not hit.
    """

    how: str
    when: str
    after_s: float
    step_before: int
    step: int
    unfinished: list[str]
    others: list[int]
    left_over: list[int]


class Killer:
    """Kills trainings over one run folder."""

    def __init__(self, bench: Bench, engine: str) -> None:
        self.forker, self.engine, self.chance = bench.forker, engine, random.Random(SEED)
        self.run = bench.root / f"killed_{engine}"
        self.log = self.run.with_suffix(".log")
        self.command = ["train", *bench.arguments(self.run, OPTIMIZERS["adamw"], 2), f"train.num_steps={STEPS}",
                        "train.keep_checkpoints=2", f"train.stall_timeout_s={STALL_TIMEOUT_S}"]
        self.place = CheckpointStore(self.run / "high" / "checkpoints")

    def undisturbed(self) -> tuple[dict[str, torch.Tensor], list[float], float]:
        """(final tensors, losses, seconds) of a run of which nothing is left."""
        took_s = self.forker.run(self.command, self.log, engine=self.engine)
        found = *self.outcome(), took_s
        shutil.rmtree(self.run)
        return found

    def outcome(self) -> tuple[dict[str, torch.Tensor], list[float]]:
        """(tensors of the last checkpoint, losses of all steps)."""
        assert not self.unfinished()
        progress, tensors = checkpoint.load(self.place.on_disk()[-1], None)
        lines = [json.loads(line) for line in (self.run / "high" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert progress.step == STEPS
        return tensors, [line["loss"] for line in lines]

    def newest(self) -> int:
        """The step that a restart would go on from."""
        found = checkpoint.newest_whole(self.place, None)
        assert found is None or not found.passed, "a kill leaves a temporary folder, never a checkpoint in parts"
        return found.progress.step if found else 0

    def unfinished(self, since_ns: int = 0) -> set[str]:
        """Temporary folders of checkpoints that were begun since then."""
        found = set()
        for path in self.place.folder.glob(".*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ctime_ns >= since_ns:
                    found.add(path.name)
        return found

    def wait_for_write(self, pids: Sequence[int], number: int, since_ns: int) -> dict[int, int]:
        """Until so many writes have begun; exit codes where processes ended before."""
        codes, begun = {}, set()
        while not codes and len(begun) < number:
            time.sleep(0.002)
            begun |= self.unfinished(since_ns)
            codes = self.forker.wait(pids, 0)
        time.sleep(self.chance.uniform(0, 0.01))
        return codes

    def start_and_kill(self, longest_s: float) -> Kill | None:
        """Start, and kill at some moment or in some write; None where the training got through before."""
        chance, before, began, began_ns = self.chance, self.newest(), time.monotonic(), time.time_ns()
        pids = self.forker.start(self.command, self.log, engine=self.engine)
        when = chance.choice(["any moment", "a write"])
        codes = (self.forker.wait(pids, chance.uniform(0, longest_s)) if when == "any moment"
                 else self.wait_for_write(pids, chance.randint(1, max(1, STEPS - before)), began_ns))
        if codes:
            codes |= self.forker.wait([pid for pid in pids if pid not in codes])
            assert list(codes.values()) == [0, 0], self.log.read_text()[-3000:]
            return None
        how = chance.choice(["all", "the first", "the second"])
        hit = {"all": pids, "the first": pids[:1], "the second": pids[1:]}[how]
        for pid in hit:
            kill_session(pid)
        others = [code for pid, code in self.forker.end(pids).items() if pid not in hit]
        return Kill(how, when, round(time.monotonic() - began, 3), before, self.newest(),
                    sorted(self.unfinished(began_ns)), others,
                    left_over(pids))


@pytest.mark.parametrize("engine", ["DDP", pytest.param("ZeRO-2", marks=pytest.mark.long)])
def test_kills_at_any_moment_end_in_the_weights_of_an_undisturbed_run(forker: Forker, tmp_path: Path, engine: str):
    killer = Killer(Bench(forker, tmp_path), engine)
    killer.undisturbed()  # the first of all has more to warm up
    *expected, whole_s = killer.undisturbed()
    began, kills, num_compared = time.monotonic(), [], 0
    while len(kills) < NUM_KILLS:
        if kill := killer.start_and_kill(whole_s):
            kills.append(kill)
            if len(kills) < NUM_KILLS:
                continue
            forker.run(killer.command, killer.log, engine=engine)
        tensors, losses = killer.outcome()
        assert losses == expected[1]
        assert tensors.keys() == expected[0].keys()
        assert all(torch.equal(tensors[name], expected[0][name]) for name in tensors)
        num_compared += 1
        shutil.rmtree(killer.run)
    print(f"{engine}: {whole_s:.1f} s undisturbed, {num_compared} compared, {time.monotonic() - began:.0f} s",
          f"{sum(bool(kill.unfinished) for kill in kills)} kills in a write", *kills, sep="\n")
    assert [kill for kill in kills if kill.left_over] == []
    assert [kill for kill in kills if kill.step < kill.step_before] == []  # nothing older is lost
    assert num_compared >= max(1, NUM_KILLS // 16)
    assert sum(bool(kill.unfinished) for kill in kills) >= NUM_KILLS // 10
    assert sum(kill.step > kill.step_before for kill in kills) >= NUM_KILLS // 10
    if NUM_KILLS >= 50:
        assert Counter(kill.how for kill in kills).keys() == {"all", "the first", "the second"}
        assert any(kill.step == kill.step_before == 0 for kill in kills)
