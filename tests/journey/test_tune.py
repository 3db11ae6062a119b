"""`wantrain tune` on the tiny base: two by two with two seeds, killed, and gone on with."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wantrain import config as schema

pytestmark = [pytest.mark.slow, pytest.mark.long]

COMMAND = "wantrain tune recipe=anime_1b3 --over optim.lr=1e-4,3e-4 --over lora.rank=16,32 --minutes 600"
OVER = [*shlex.split(COMMAND)[3:], "--steps", "6", "--seeds", "2"]


def lines(folder):
    path = folder / "trainings.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


def test_a_killed_search_goes_on_and_its_trainings_are_those_of_train(wantrain, arguments, tmp_path, monkeypatch):
    """With the command of docs/verbs.md, but for the recipe."""
    assert f"\n{COMMAND}\n" in (Path(__file__).parents[2] / "docs" / "verbs.md").read_text()
    monkeypatch.chdir(tmp_path)
    own = [*arguments, "data.num_workers=1", "optim.lr=1e-5"]
    folder = tmp_path / "run" / "tune"
    with subprocess.Popen([sys.executable, "-m", "wantrain", "tune", *own, *OVER], start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(lines(folder)) < 3 and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    before = lines(folder)
    assert 3 <= len(before) < 10

    assert wantrain("tune", *OVER, base=own) == 0
    after = lines(folder)
    assert after[:len(before)] == before
    assert len({line["key"] for line in after}) == len(after) == 11  # the opening, and five by two
    assert len({json.dumps(line["base"], sort_keys=True) for line in after}) == 1
    assert not list(folder.glob("trainings/*/checkpoints"))

    found = json.loads((folder / "tune.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"default", "optim.lr=1e-4 lora.rank=16", "optim.lr=1e-4 lora.rank=32",
                         "optim.lr=3e-4 lora.rank=16", "optim.lr=3e-4 lora.rank=32"}
    best = min(rows.values(), key=lambda row: row["loss"])
    assert all(row["change"] is None or row["change"]["mean"] == pytest.approx(row["loss"] - rows["default"]["loss"])
               for row in rows.values())
    assert best["name"] in (folder / "tune.html").read_text()

    one = ["optim.lr=3e-4", "lora.rank=16", "lora.alpha=16"]
    losses = []
    for seed in (0, 1):
        run_dir = tmp_path / f"alone_{seed}"
        assert wantrain("train", *one, "train.num_steps=6", f"train.seed={seed}", f"run.dir={run_dir}",
                        "validation.every_steps=6", "validation.budget_pct=155", "validation.unrelated=[]",
                        base=own) == 0
        losses.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"])
    assert rows["optim.lr=3e-4 lora.rank=16"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    tuned = schema.load(["recipe=demo_anime_tuned"])
    won = schema.load([*own, *best["name"].split()])
    assert (tuned.optim.lr, tuned.lora.rank, tuned.data.num_frames) == (won.optim.lr, won.lora.rank, [5])
    assert tuned.lora.alpha == tuned.lora.rank
