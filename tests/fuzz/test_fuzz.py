"""A short hunt of every kind, after the cases that once failed."""

import os

import pytest

from tests.fuzz.harness import hunt, try_case
from tests.fuzz.kinds import KEPT, KINDS

SECONDS = float(os.environ.get("WANTRAIN_FUZZ_SECONDS", "10"))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_a_user_error_leaves(name):
    kind = KINDS[name]()
    again = [try_case(kind, name, seed, number) for seed, number in KEPT.get(name, [])]
    assert [finding for finding in again if finding] == []
    number, found = hunt(kind, name, 1, SECONDS)
    assert number > 20
    assert found == []
