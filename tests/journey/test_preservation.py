"""What masks, prior preservation and class words keep: benchmarks/preservation.py on pictures, with thresholds."""

import pytest

from benchmarks import preservation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = preservation.Bench(tmp_path_factory.mktemp("preservation"), steps=120, num_frames=1, num_scenes=8)
    preservation.write_sets(made)
    return made


def test_a_mask_changes_the_object_and_leaves_what_is_around_it(bench):
    table = preservation.measure_masks(bench, ["masked", "no_masks"])
    preservation.show(table, 2)


def test_the_look_without_the_trigger_is_kept(bench):
    table = preservation.measure_kept(bench, ["style_alone", "class_words", "blueprint_preserved", "blueprint_trained"])
    preservation.show(table, 3)
