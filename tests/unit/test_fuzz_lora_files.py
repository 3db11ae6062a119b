"""A short run of the fuzzer of LoRA files and bases, with fixed seeds."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz import lora_files


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, 100))
def test_nothing_but_a_user_error_leaves_a_verb(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 100):
        (tmp_path / str(seed)).mkdir()
        lora_files.one(Random(seed), tmp_path / str(seed))
