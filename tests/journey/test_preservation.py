"""What masks, prior preservation and class words keep: benchmarks/preservation.py on pictures, with thresholds."""

import pytest

from benchmarks import preservation

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = preservation.Bench(tmp_path_factory.mktemp("preservation"), steps=120, num_frames=1, num_scenes=8)
    preservation.write_sets(made)
    return made


def test_a_mask_changes_the_object_and_leaves_what_is_around_it(bench):
    table = preservation.measure_masks(bench, ["no_masks", "masked", "masked_and_preserved"])
    preservation.show(table)
    everywhere, masked, kept = table.values()
    assert masked["outside"] < 0.95 * everywhere["outside"]
    assert kept["outside"] < 0.5 * everywhere["outside"]
    assert kept["8 px off"] < 0.4 * everywhere["8 px off"]
    assert kept["inside"] > 2 * kept["outside"]
    assert kept["to anime"] < 0.97 * kept["base"]
    assert masked["to anime"] < 0.85 * masked["base"]


def test_the_look_without_the_trigger_is_kept(bench):
    """Clips in the base's look keep it; of others an ordinary source teaches the look, and a preserved one does not."""
    table = preservation.measure_kept(bench, ["style_alone", "natural_preserved", "blueprint_preserved",
                                              "blueprint_trained"])
    preservation.show(table)
    alone, natural, preserved, trained = table.values()
    assert alone["to set"] < 0.5 * alone["base to set"]
    assert natural["moved"] < 0.7 * alone["moved"]
    assert natural["to base"] < 0.6 * alone["to base"]
    assert natural["to set"] < 0.85 * natural["base to set"]
    assert preserved["to set"] < 0.6 * preserved["base to set"]
    assert preserved["moved"] < 0.6 * trained["moved"]
    assert preserved["to second"] > 1.5 * trained["to second"]
