"""benchmarks/recipes.py from an empty folder, on a few clips and steps: what it patches, what it remembers, and what it
changes nothing of.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipes
from tools.tiny_world import worlds
from wantrain import config as schema
from wantrain.stages import train

pytestmark = [pytest.mark.slow, pytest.mark.long]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_trainings_are_those_of_wantrain_and_are_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUM_PLAIN", "NUM_HELDOUT", "NUM_HELDOUT_PLAIN"):
        monkeypatch.setattr(worlds, name, 2)
    monkeypatch.setitem(worlds.WORLDS, "subject", replace(worlds.WORLDS["subject"], num_clips=3))
    own = tmp_path / "subject"
    given = ["--out", str(tmp_path), "--worlds", "subject", "--steps", "2", "--seeds", "1", "--arms", "moving"]
    recipes.main(given)
    before, moved = lines(own / "trainings.jsonl"), lines(own / "moving" / "trainings.jsonl")
    known = json.loads((tmp_path / "recipes.json").read_text())["worlds"]["subject"]
    assert len(before) == len(known["rates"]["default"]) + 1 >= 5
    assert known["losses"]["default"]["0"] != known["losses"]["moving"]["0"]
    assert known["base"] == pytest.approx(moved[0]["base"], abs=1e-6)

    recipes.main([*given, "thinned"])
    assert lines(own / "trainings.jsonl") == before
    assert lines(own / "moving" / "trainings.jsonl") == moved
    known = json.loads((tmp_path / "recipes.json").read_text())["worlds"]["subject"]
    assert list(known["losses"]) == ["default", "moving", "thinned"]
    assert len({loss for arm in known["losses"].values() for loss in arm["0"].values()}) == 3 * 4

    found = next(path for path in own.glob("trainings/*/config.yaml") if "\n  lr: 0.001\n" in path.read_text())
    config = schema.load_yaml(found.read_text())
    train.run(replace(config, run=replace(config.run, dir=str(tmp_path / "alone"))), [])
    losses = [json.loads((folder / "validation.json").read_text())["steps"]["2"]["heldout"]
              for folder in (found.parent, tmp_path / "alone")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4 * 9
