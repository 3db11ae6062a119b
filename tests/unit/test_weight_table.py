"""docs/weight-files.md says what loading says, of every variant."""

from __future__ import annotations

import pytest

from tests import tiny_models as tiny
from tests import weight_table
from wantrain.models.fun import OWN
from wantrain.models.variants import VARIANTS


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert weight_table.PAGE.read_text() == weight_table.page(), f"{weight_table.COMMAND} writes it anew"


def test_every_variant_has_one_column() -> None:
    """But Animate and Animate-2, whose names test_animate_names.py and test_driven.py have, and the tests' twins."""
    published = sorted(name for name, v in VARIANTS.items()
                       if not (v.architecture.animate or v.architecture.driven or "tiny_wan_" in name))
    assert sorted(name for kind in tiny.TRANSFORMERS for name in weight_table.variants_of(kind)) == published


def test_the_columns_without_a_class_of_diffusers_are_those_of_our_own() -> None:
    for kind in tiny.TRANSFORMERS:
        for name in weight_table.variants_of(kind):
            assert (VARIANTS[name].transformer_class in OWN) == (kind not in tiny._WITH_CLASS)
