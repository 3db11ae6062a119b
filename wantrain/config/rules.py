"""All rules of a config: what every value may be, what each field says of its own, and the rules of the sections."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from wantrain.config.keys import example_of, pasted
from wantrain.config.known import sections
from wantrain.config.schema import Config
from wantrain.config.sections.data import Source
from wantrain.config.sections.parts import Allowed, Rule, Section
from wantrain.terms import UserError


def refuse_typed(values: Sequence[tuple[str, Any]]) -> None:
    """Raise UserError for a value of the command line that is wrong whatever else is set: before anything is composed.
    """
    for key, value in values:
        room, _, name = key.rpartition(".")
        schema = Source if room.startswith("data.sources.") and room.count(".") == 2 else sections().get(room)
        if schema is None or "${" in str(value) or name in getattr(schema, "entangled", ()):
            continue
        own = tuple(_allowed(typing.get_type_hints(schema, include_extras=True)[name]))
        for ok, _, wrong, allowed in _value_rules(value, key, own):
            if not ok:
                raise UserError(f"{key} = {wrong!r} is not allowed: {allowed}", _typed(key, example_of(key)))


def refuse_faults(config: Config) -> None:
    """Raise UserError for the first rule that does not hold."""
    for ok, key, value, allowed in _rules(config):
        if not ok:
            raise UserError(f"{key} = {value!r} is not allowed: {allowed}", _remedy(config, key))


def _remedy(config: Config, key: str) -> str:
    """A value that would do: the key's default, where what else is set allows it."""
    if key == "WANDB_MODE":
        return "export WANDB_MODE=offline"
    section: Section = getattr(config, key.partition(".")[0])
    value = section.remedies(config).get(key, example_of(key))
    return _typed(key, value)


def _typed(key: str, value: object) -> str:
    return f"{pasted(key, value)}    for one, on the command line; in a recipe it is written in YAML"


def _rules(config: Config) -> Iterator[Rule]:
    """The rules of single values come first, so that those of sections can count with them; then the cheap ones."""
    yield from _value_rules(config, "", ())
    sections: list[Section] = [getattr(config, entry.name) for entry in fields(config)]
    for section in sorted(sections, key=lambda section: section is config.sigma):  # sigma's may import torch
        yield from section.rules(config)


def _value_rules(value: Any, key: str, own: tuple[Allowed, ...]) -> Iterator[Rule]:
    """The rules of every value, those inside lists and dictionaries as well; `own` are those of its field."""
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value), include_extras=True)
        for entry in fields(value):
            yield from _value_rules(getattr(value, entry.name), f"{key}.{entry.name}".lstrip("."),
                                    tuple(_allowed(hints[entry.name])))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _value_rules(inner, f"{key}.{name}", own)
    elif isinstance(value, list):
        for inner in value:
            yield from _value_rules(inner, key, own)
    elif value is not None:
        yield from _rules_of_type(key, value)
        yield from ((one.holds(value), key, value, one.words) for one in own)


def _allowed(annotation: Any) -> Iterator[Allowed]:
    """What an annotation allows, also where it stands inside `X | None` or a list."""
    if isinstance(annotation, Allowed):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _allowed(part)


def _rules_of_type(key: str, value: object) -> Iterator[Rule]:
    """What holds for every number and every text, wherever it stands."""
    if isinstance(value, float):
        yield math.isfinite(value), key, value, "a finite number"
    elif isinstance(value, int) and not key.endswith(("seed", "seeds")):
        yield abs(value) < 2**31, key, value, f"between {1 - 2**31} and {2**31 - 1}"
    elif isinstance(value, str):
        yield "\0" not in value, key, value, "text without a NUL byte"
        yield value.encode("utf-8", "replace").decode() == value, key, value, "text that is UTF-8"
