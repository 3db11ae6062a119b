"""What a search has found, as a table, a page and a recipe."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from wantrain import config as schema
from wantrain.config import Config
from wantrain.tuner import search
from wantrain.tuner.trainings import Outcome
from wantrain.validation import Interval

COLUMNS = ("held-out loss", "against the default", "against the base", "plain clips, against the base", "s a step",
           "GiB")


@dataclass(frozen=True, slots=True)
class Row:
    """An arm: the means over its seeds and intervals of 95 % over seeds and clips. `change` is against the default,
    `gain` and `plain` against the frozen base, on the clips to learn and on plain ones. `fault` says why it has none.
    """

    name: str
    seeds: list[int]
    loss: float = math.inf
    change: Interval | None = None
    gain: Interval | None = None
    plain: Interval | None = None
    step_s: float = 0.0
    memory_gib: float | None = None
    fault: str = ""

    @property
    def cells(self) -> list[str]:
        """Its numbers as text, in the order of COLUMNS."""
        if self.fault:
            return [self.fault]
        return [f"{self.loss:.4f}", *map(told, (self.change, self.gain, self.plain)), f"{self.step_s:.2f}",
                "" if self.memory_gib is None else f"{self.memory_gib:.1f}"]


def told(found: Interval | None) -> str:
    """An interval as text."""
    return "" if found is None else f"{found.mean:+.4f} +-{found.half:.4f}"


def row_of(name: str, found: Mapping[int, Outcome], default: Mapping[int, Outcome] | None,
           clips: tuple[Sequence[str], Sequence[str]]) -> Row:
    """An arm's row, from the trainings of its seeds; `default` are those to compare with."""
    learnt, plain = clips
    whole = {seed: one for seed, one in found.items() if not one.fault}
    if not whole:
        return Row(name, [], fault=next((one.fault for one in found.values()), "not trained"))
    losses, bases = ({seed: getattr(one, what) for seed, one in whole.items()} for what in ("losses", "base"))
    own = None if default is None else {seed: one.losses for seed, one in default.items() if not one.fault}
    return Row(
        name, sorted(whole), sum(search.mean(one, learnt) for one in losses.values()) / len(losses),
        search.change(losses, own, learnt) if own and own.keys() & losses.keys() else None,
        search.change(losses, bases, learnt), search.change(losses, bases, plain) if plain else None,
        sum(one.step_s for one in whole.values()) / len(whole),
        max((one.memory_gib for one in whole.values() if one.memory_gib is not None), default=None))


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, the best first."""
    shown = [("", *COLUMNS), *((row.name, *row.cells) for row in sorted(rows, key=lambda row: row.loss))]
    widths = [max(len(cells[i]) for cells in shown if len(cells) == len(shown[0])) for i in range(len(shown[0]))]
    widths[0] = max(len(cells[0]) for cells in shown)
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                               enumerate(zip(cells, widths, strict=False))).rstrip() for cells in shown)


def page(title: str, rows: Sequence[Row], sentences: Sequence[str], command: str) -> str:
    """The same as an HTML page that stands alone."""
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line((row.name, *row.cells), "td") for row in sorted(rows, key=lambda row: row.loss))
    notes = "\n".join(f"<li>{html.escape(text)}</li>" for text in sentences)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            "<style>body{font:16px/1.5 system-ui;margin:2em auto;max-width:70em;padding:0 1em}"
            "table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid #8884;text-align:right}"
            "td:first-child,th:first-child{text-align:left}:root{color-scheme:light dark}</style>\n"
            f"<h1>{html.escape(title)}</h1>\n<table>{line(('', *COLUMNS), 'th')}\n{body}</table>\n<ul>{notes}</ul>\n"
            f"<p>Again, or on where it stopped: <code>{html.escape(command)}</code></p>\n</html>\n")


def recipe_text(name: str, parent: str, configs: tuple[Config, Config], words: Sequence[str], notes: Sequence[str]
                ) -> str:
    """A recipe that is the second config: the recipe `parent`, which alone is the first, with what differs. `words` are
    those of the command line, of which a file cannot say what was taken out.
    """
    plain, config = configs
    before, own = schema.flat(plain), schema.flat(config)
    nested: dict[str, Any] = {}
    for key, value in own.items():
        if key.startswith(("run.", "tracker.")) or (key in before and before[key] == value):
            continue
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    taken_out = [word for word in words if word.startswith("~")]
    body = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=110) if nested else ""
    return "\n".join(["# @package _global_", f"# {shlex.join(['wantrain', 'run', name, *taken_out])}",
                      *(f"# {text}" for text in notes), "defaults:", f"  - {parent}", "  - _self_",
                      f"run: {{name: {name}}}", body])
