"""The process that forks jobs, one for each process of pytest that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.forked import Forker, forking


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    with forking() as one:
        yield one
