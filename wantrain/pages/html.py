"""The page of the data: one HTML file with everything inside, that opens from disk without a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def data_page(page: Mapping[str, Any]) -> str:
    """The page of the data: what `wantrain report` found, with its clips inside."""
    return _template("data.html.j2").render(page)


def _template(name: str) -> Template:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name)


def data_url(path: Path) -> str:
    """A video or picture as a URL that holds it."""
    kind = {".mp4": "video/mp4", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
