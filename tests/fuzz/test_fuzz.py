"""A short run of every fuzzer, with fixed seeds; `python -m tests.fuzz KIND` runs one for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import run

KINDS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if not path.stem.startswith("test_"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_a_user_error_leaves_a_verb(kind: str) -> None:
    assert run(kind, 20, 1000) == []
