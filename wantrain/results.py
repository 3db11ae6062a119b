"""Sampled videos with what was measured of them, as a folder: what verbs write and pages show."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wantrain.files import write_json
from wantrain.terms import UserError

NAME = "results.json"

KINDS = ("like the training", "combined", "unrelated")
"""Of prompts: what the clips show, their subject with other things, and nothing of theirs."""


@dataclass(frozen=True, slots=True)
class Column:
    """What the videos of a column were sampled with.

    `lora` names the file or checkpoint, '' for the base; `step` is the training step, where it is one.
    """

    id: str
    label: str
    lora: str = ""
    step: int | None = None
    strength: float = 0.0
    trigger: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt without the trigger, and which of KINDS it is ('' where nobody said)."""

    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Video:
    """A video: `file` is relative to the folder, `column` an id, `prompt` a place in the prompts, `caption` the text
    that it was sampled with. `metrics` are its own numbers by name; `command` makes it again.
    """

    file: str
    column: str
    prompt: int
    seed: int
    caption: str
    metrics: dict[str, float] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of columns: `tells` says in one sentence what it can and cannot tell; `better` is 'lower', 'higher' or
    ''. `columns` has by column id the mean and how far its interval of 95 % goes on both sides (None: unknown).
    `reference` is what the held-out clips themselves have, to compare with (None: unknown, or no such thing).
    """

    name: str
    label: str
    tells: str
    better: str = ""
    columns: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    reference: float | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """All of a folder. `settings` is the flat config; `provenance` holds whatever else says where it came from, by
    heading.
    """

    name: str
    trigger: str
    fps: float
    columns: list[Column]
    prompts: list[Prompt]
    videos: list[Video]
    metrics: list[Metric] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, results: Results) -> None:
    """Write FOLDER/results.json."""
    write_json(folder / NAME, asdict(results))


def read(folder: Path) -> Results:
    """Read FOLDER/results.json. Raises UserError where there is none, or not of this version."""
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lists = {"columns": Column, "prompts": Prompt, "videos": Video, "metrics": Metric}
        return Results(**found | {name: [kind(**one) for one in found[name]] for name, kind in lists.items()})
    except FileNotFoundError:
        raise UserError(f"{folder} has no {NAME}", "wantrain evaluate recipe=NAME") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read as results of this version ({error})",
                        "wantrain evaluate recipe=NAME") from error
