"""The pages: one HTML file each with everything inside, that opens from disk without a network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

CONDITION_NAMES = {"base": "base", "lora_with_trigger": "LoRA with trigger", "lora_without_trigger": "LoRA, no trigger"}
CURVE_PX = (640, 200)


def evaluation_page(name: str, trigger: str, numbers: Mapping[str, Any],
                    lines: Mapping[str, Sequence[Mapping[str, float]]],
                    trios: Sequence[tuple[str, int, Mapping[str, Path]]]) -> str:
    """The page: numbers, videos side by side, a loss curve for each training (by expert), settings, provenance."""
    rows = [{"prompt": prompt, "seed": seed, "videos": {c: data_url(p) for c, p in files.items()}}
            for prompt, seed, files in trios]
    tables = [("settings", numbers["settings"]), *((f"run {expert}", run) for expert, run in numbers["run"].items()),
              *((f"LoRA file {lora['path']}", lora["metadata"]) for lora in numbers["loras"])]
    return _template("report.html.j2").render(
        name=name, trigger=trigger, numbers=numbers, rows=rows, tables=tables, conditions=CONDITION_NAMES,
        curves={expert: curve(found) for expert, found in lines.items()}, size=CURVE_PX)


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


def curve(lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Loss over steps as SVG point lists: every step, a running mean, and the validation loss; a line of text for each
    piece between values that are not finite. Empty where less than two values are.
    """
    trained = [(line["step"], line.get("loss", math.nan)) for line in lines]
    validated = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    shown = [value for _, value in trained + validated if math.isfinite(value)]
    if len(trained) < 2 or len(shown) < 2:
        return {}
    window = max(1, len(trained) // 20)
    smooth = [(step, _mean([v for _, v in trained[max(0, i - window + 1): i + 1]])) for i, (step, _) in
              enumerate(trained)]
    low, high = min(shown), max(shown)
    first, last = trained[0][0], trained[-1][0]

    def points(series: Sequence[tuple[float, float]]) -> str:
        pieces = [list(piece) for finite, piece in groupby(series, lambda one: math.isfinite(one[1])) if finite]
        return "\n".join(" ".join(f"{(s - first) / (last - first) * CURVE_PX[0]:.1f},"
                                  f"{(1 - (v - low) / ((high - low) or 1)) * CURVE_PX[1]:.1f}" for s, v in piece)
                         for piece in pieces)

    return {"loss": points(trained), "smooth": points(smooth), "validation": points(validated),
            "low": low, "high": high, "first": first, "last": last}


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are finite, nan where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
