"""What the tests of a GPU measured is printed once more at the end, as one table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_TOLD: list[str] = []


@pytest.fixture
def tell() -> Callable[[str], None]:
    """tell(line) for the summary."""
    return _TOLD.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TOLD:
        terminalreporter.section("measured on this GPU")
        for line in _TOLD:
            terminalreporter.write_line(line)
