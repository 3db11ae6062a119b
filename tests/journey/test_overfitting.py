"""Overfitting is made to happen: four clips, many passes over them, on the embedded base."""

from __future__ import annotations

import json

import pytest

from benchmarks.memorising import arguments, trained
from wantrain import cli, results
from wantrain.verdict import DIVERSITY_BAND

pytestmark = [pytest.mark.slow, pytest.mark.long]
LEARNT = "'a red house at night, rising','a purple tower in the desert, not moving'"
"""Two of the four clips' captions."""


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """(what the run judged of itself, the metrics of its report: after 20 and after 240 steps)."""
    out = tmp_path_factory.mktemp("overfitted")
    learnt = LEARNT.replace("'a ", "'celanime style, a ")
    own = arguments(out, 4, 60, "train.save_every=20", "train.keep_every=20", "sampler.every_steps=20",
                    f"sampler.prompts=[{learnt}]", "sampler.seeds=[0,1,2]", "sampler.num_steps=8",
                    "sampler.strengths=[1]", "sampler.compare=[20]", f"evaluate.prompts=[{LEARNT}]",
                    "evaluate.combined=[]", "evaluate.unrelated=[]", "evaluate.seeds=[0,1,2]")
    trained(own)
    for verb in ("export", "evaluate"):
        assert cli.main([verb, *own]) == 0
    run = out / "4_clips"
    return json.loads((run / "judgement.json").read_text()), {
        metric.name: metric for metric in results.read(run / "report").metrics}


def test_four_clips_show_overfitting_in_the_gap_and_end_the_range(overfitted):
    found, _ = overfitted
    mean, half = found["gap"][-1]
    assert mean - half > 0
    verdict = found["verdict"]
    assert verdict["to"] is not None
    assert verdict["best"] <= verdict["to"] < found["steps"][-1]
    assert any(text.startswith("Overfitting shows") for text in verdict["sentences"])
    assert verdict["memorised_from"] == 21
    assert found["trained"]["loss"][-1] < 0.5 * found["heldout"]["loss"][-1]
    assert found["heldout"]["loss"][-1] > min(found["heldout"]["loss"])


def test_four_clips_learnt_by_heart_leave_the_seeds_no_difference(overfitted):
    found, metrics = overfitted
    assert found["diversity"][0] > DIVERSITY_BAND > found["diversity"][-1]
    assert any("seeds differ" in text for text in found["verdict"]["sentences"]), "and end the range"
    columns = metrics["diversity"].columns
    assert columns["strength_1"][0] < 0.5 * columns["base"][0]


def test_four_clips_learnt_by_heart_are_sampled_as_copies(overfitted):
    _, metrics = overfitted
    copied = {column: mean for column, (mean, _) in metrics["memorised"].columns.items()}
    assert copied["strength_1"] > max(copied["step_000020_strength_1"], copied["base"], metrics["memorised"].reference)
