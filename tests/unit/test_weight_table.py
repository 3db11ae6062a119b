"""docs/weight-files.md says what loading says, of every variant."""

from __future__ import annotations

import pytest

from tests import tiny_models as tiny
from tests import weight_table
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.terms import UserError


def test_the_page_is_up_to_date() -> None:
    assert weight_table.PAGE.read_text() == weight_table.page(), f"{weight_table.COMMAND} writes it anew"


def test_every_variant_has_one_column() -> None:
    """But Animate, which loads from diffusers folders alone, and the random twins of the tests."""
    published = sorted(name for name, v in VARIANTS.items() if not (v.architecture.animate or "tiny_wan_" in name))
    assert sorted(name for kind in tiny.TRANSFORMERS for name in weight_table.variants_of(kind)) == published


def test_the_columns_without_a_class_are_those_that_cannot_be_built() -> None:
    for kind in tiny.TRANSFORMERS:
        for name in weight_table.variants_of(kind):
            if tiny.PARTS[kind].extra:
                with pytest.raises(UserError, match="diffusers has no transformer class"):
                    diffusers_config(VARIANTS[name])
            else:
                assert diffusers_config(VARIANTS[name])
