"""The cache job killed at any moment and started again ends in the cache of a job that no one disturbed.

Two processes with their decode workers, over gloo, forked (see `forked`).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import odd_files
from tests.conftest import opened
from tests.distributed.forked import LONGEST_RUN_S, ROOT, Forker, in_sessions, kill_session, left_over
from wantrain import cli
from wantrain.data.cache import LATENTS, describe
from wantrain.terms import UserError

pytestmark = [pytest.mark.slow, pytest.mark.long]

NUM_CLIPS, NUM_KILLS, SEED = 12, 50, 20
NUM_PROCESSES = 2


# The program that is killed


@dataclass(frozen=True)
class Kill:
    """What one kill hit: entries and temporary files before the start and after it, and which processes stayed."""

    how: str
    after_s: float
    entries_before: int
    entries: int
    temporary: int
    left_over: list[int]


def signal_all(how: str, pids: Sequence[int], chance: random.Random) -> None:
    """Kill as told; where one process survives, it is stopped a moment later, as launchers do."""
    hit = list(pids) if how == "both" else [chance.choice(pids)]
    for pid in hit:
        if how == "without its workers":
            os.kill(pid, signal.SIGKILL)
        else:
            kill_session(pid)
    if how != "both":
        time.sleep(chance.uniform(0, 0.3))
        for pid in set(pids) - set(hit):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a cache but what was found out about the sources, which is noted in any order."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "sources.jsonl"}


def entries(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith(".safetensors")}


def kill_again_and_again(forker: Forker, root: Path, arguments: Sequence[str], num_kills: int, seed: int
                         ) -> dict[str, Any]:
    """Kill jobs over one folder until one gets through, compare, begin anew with none; until there were enough kills.
    """
    chance, log, folder = random.Random(seed), root / "log.txt", root / "cache"
    own = ["cache", *arguments, f"data.cache_dir={folder}"]
    forker.run(own, log)
    shutil.move(folder, root / "undisturbed")
    expected = content(root / "undisturbed")
    whole_s = forker.run(own, log)  # the first of all has more to warm up
    shutil.rmtree(folder)
    kills: list[Kill] = []
    num_compared, unlike = 0, []
    began = time.monotonic()
    while len(kills) < num_kills:
        before, pids = len(entries(folder)), forker.start(own, log)
        how, after_s = chance.choice(["both", "one", "without its workers"]), chance.uniform(0, whole_s)
        codes = forker.wait(pids, after_s)
        if not codes:
            signal_all(how, pids, chance)
            forker.wait(pids)
            rest = left_over(pids)
            num_temporary = len(list(folder.rglob(".*")))
            kills.append(Kill(how, round(after_s, 3), before, len(entries(folder)), num_temporary, rest))
            if len(kills) < num_kills:
                continue
            forker.run(own, log)
        else:
            codes |= forker.wait([pid for pid in pids if pid not in codes])
            if list(codes.values()) != [0] * NUM_PROCESSES:
                raise RuntimeError(f"exit codes {codes}\n{log.read_text()[-3000:]}")
        num_compared += 1
        now = content(folder)
        unlike += [name for name in sorted(now.keys() | expected.keys()) if now.get(name) != expected.get(name)]
        shutil.rmtree(folder)
    return {"num_entries": len(entries(root / "undisturbed")), "whole_s": whole_s,
            "kills": [asdict(kill) for kill in kills], "num_compared": num_compared, "unlike": unlike,
            "seconds": time.monotonic() - began}


# The tests


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(its folder, its overrides): 12 clips of several windows, each with a mask and two captions."""
    root = tmp_path_factory.mktemp("killed")
    (root / "clips" / "mask").mkdir(parents=True)
    for i in range(NUM_CLIPS):
        name = root / "clips" / f"clip_{i}.mp4"
        odd_files.write_film(name, odd_files.frames(i, 11 + i % 3), 16)
        odd_files.write_film(name.parent / "mask" / name.name, odd_files.frames(50 + i, 14), 16)
        name.with_suffix(".txt").write_text(f"square number {i % 4}")
        name.with_suffix(".b.txt").write_text("another caption")
    return root, ["recipe=demo_anime", f"run.dir={root / 'run'}", f"data.sources.style.path={root / 'clips'}",
                  "~data.sources.regularisation", "data.heldout=null", "validation.every_steps=0",
                  "data.extract=sliding", "data.num_frames=[5]", "data.resolutions=[[32,48]]", "data.num_workers=1"]


@pytest.fixture(scope="module")
def outcome(forker, job):
    found = kill_again_and_again(forker, *job, NUM_KILLS, SEED)
    print({key: value for key, value in found.items() if key != "kills"}, *found["kills"], sep="\n")
    return found


@pytest.mark.long
def test_kills_at_fifty_moments_end_in_the_undisturbed_cache(outcome):
    """One test, so that no two workers of pytest do the fifty kills each."""
    assert outcome["num_entries"] > 100
    assert outcome["num_compared"] >= 5
    assert outcome["unlike"] == []  # neither other entries nor temporary files
    kills, whole = outcome["kills"], outcome["num_entries"]
    assert len(kills) == NUM_KILLS
    assert Counter(kill["how"] for kill in kills).keys() == {"both", "one", "without its workers"}
    assert sum(0 < kill["entries"] < whole for kill in kills) >= 10
    assert sum(kill["entries_before"] < kill["entries"] < whole for kill in kills) >= 5
    assert any(kill["entries"] == 0 for kill in kills)
    assert [kill for kill in kills if kill["left_over"]] == []


def test_a_killed_job_leaves_no_worker_that_hangs():
    code = "import time; from wantrain.jobs import in_workers; list(in_workers(time.sleep, [600], 1, 600))"
    job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    until = time.monotonic() + LONGEST_RUN_S
    while len(in_sessions([job.pid])) < 4 and time.monotonic() < until:  # with its fork server, tracker and worker
        time.sleep(0.05)
    time.sleep(1)  # now the worker sleeps
    job.kill()
    job.wait()
    assert left_over([job.pid]) == []


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """(the opened recipe, its overrides) with a whole cache."""
    _, arguments = job
    own = [*arguments, f"data.cache_dir={tmp_path_factory.mktemp('whole') / 'cache'}"]
    assert cli.main(["cache", *own]) == 0
    return opened(own)[1], own


def flips(content: bytes, places: Sequence[int]) -> Iterator[bytes]:
    """The bytes with one bit flipped at each of the places, a different one from place to place."""
    for place in places:
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:]


def test_a_flipped_bit_in_any_byte_of_an_entry_is_noticed_and_the_clip_named(whole):
    recipe, _ = whole
    entry = (LATENTS, recipe.planned[1])
    path = recipe.cache.path_of(entry)
    content = path.read_bytes()
    assert len(content) > 3000
    for damaged in flips(content, range(len(content))):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"of {re.escape(describe(entry))} is damaged: {path}"):
            recipe.cache.read(entry)
    path.write_bytes(content)


def test_a_damaged_entry_stops_training_and_is_found_taken_away_and_made_again(whole, capsys):
    recipe, own = whole
    before = entries(recipe.cache.folder)
    planned = recipe.planned[-1]
    path = recipe.cache.path_of((LATENTS, planned))
    good = path.read_bytes()
    for damaged in flips(good, (3, 40, len(good) // 2, len(good) - 1)):  # length, header, tensor, its end
        path.write_bytes(damaged)
        assert cli.main(["train", *own, "tracker=none", "data.batch_size=60", "train.micro_batch_size=60",
                         "train.num_steps=1"]) == 2
        assert f"the cache entry of clip {planned.name} is damaged: {path}" in capsys.readouterr().err
        assert cli.main(["prune", str(recipe.cache.folder), "verify=yes", "delete=yes"]) == 0
        assert f"damaged    {path}\n" in capsys.readouterr().out
        assert before.keys() - entries(recipe.cache.folder).keys() == {str(path.relative_to(recipe.cache.folder))}
        assert cli.main(["cache", *own]) == 0
        assert "(1 clips and 0 captions made now)" in capsys.readouterr().out
        assert entries(recipe.cache.folder) == before
