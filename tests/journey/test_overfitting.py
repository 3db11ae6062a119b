"""Overfitting is made to happen: four clips, many passes over them, on the embedded base."""

from __future__ import annotations

import json

import pytest

from benchmarks.memorising import trained


@pytest.mark.slow
@pytest.mark.long
def test_four_clips_show_overfitting_in_the_gap_and_end_the_range(tmp_path, capsys):
    found = json.loads((trained(tmp_path, 4, 25) / "judgement.json").read_text())
    mean, half = found["gap"][-1]
    assert mean - half > 0
    verdict = found["verdict"]
    assert verdict["to"] is not None
    assert verdict["best"] <= verdict["to"] < found["steps"][-1]
    assert any(text.startswith("Overfitting shows") for text in verdict["sentences"])
    assert verdict["memorised_from"] == 20
    assert found["trained"]["loss"][-1] < 0.5 * found["heldout"]["loss"][-1]
    assert found["heldout"]["loss"][-1] > min(found["heldout"]["loss"])
    assert verdict["sentences"][0] in capsys.readouterr().out
