"""A folder of results: what is written is what is read, and a damaged one is a message."""

import pytest

from wantrain import results
from wantrain.terms import UserError

ONE = results.Results(
    name="run", trigger="mystyl", fps=16.0,
    columns=[results.Column("base", "base"), results.Column("s4", "step 4", "x.safetensors", 4, 1.0, trigger=True)],
    prompts=[results.Prompt("a <b>house</b>", "unrelated")],
    videos=[results.Video("a.mp4", "s4", 0, 7, "mystyl, a house", {"motion": 0.5})],
    metrics=[results.Metric("style", "style", "how near", "lower", {"s4": (0.5, None), "base": (1.0, 0.25)})],
    settings={"a.b": 1}, provenance={"run": {}})


def test_what_is_written_is_what_is_read(tmp_path):
    results.write(tmp_path, ONE)
    found = results.read(tmp_path)
    assert (found.videos, found.columns, found.prompts) == (ONE.videos, ONE.columns, ONE.prompts)
    assert {k: tuple(v) for k, v in found.metrics[0].columns.items()} == ONE.metrics[0].columns
    assert (found.name, found.trigger, found.fps, found.settings) == ("run", "mystyl", 16.0, {"a.b": 1})


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": "x"}'])
def test_no_results_and_damaged_ones_are_a_message(tmp_path, text):
    if text is not None:
        (tmp_path / results.NAME).write_text(text)
    with pytest.raises(UserError, match="results"):
        results.read(tmp_path)
