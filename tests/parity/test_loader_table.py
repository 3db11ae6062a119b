"""docs/lora-files.md is what the tools' rules give today, and the code's table says the same."""

from __future__ import annotations

import pytest

from tests.parity.loader_table import BASES, DOC, LOADERS, MODELS_LACKED, SOURCES, document, rows
from wantrain.models.lora_loaders import loading


@pytest.mark.slow
@pytest.mark.long
def test_the_document_is_not_stale() -> None:
    assert DOC.read_text() == document(), "python -m tests.parity.loader_table"


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_every_file_of_ours_loads_where_the_table_says(base: str) -> None:
    lacking = {tool for tool, tasks in MODELS_LACKED.items() if base in tasks}
    for row, file, cells in rows((base,)):
        if file:
            assert set(loading(file, base)) == {
                tool for tool in LOADERS if cells[tool] == "right" and tool not in lacking}, row


def test_the_document_names_every_tool_and_family() -> None:
    text = DOC.read_text()
    assert all(f"\n## {what}\n" in text for what in BASES.values())
    assert all(f"| {tool} | {source.where} | " in text and source.files in text for tool, source in SOURCES.items())
