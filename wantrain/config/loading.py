"""What a command line asks for, and all that can be wrong with it before any file is composed (`composing`).

Values typed as `key=value` are read by the type of their key (`values`), so Hydra's own grammar, in which commas,
brackets and equal signs mean something, never sees them.
"""

from __future__ import annotations

import gc
import re
import shlex
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from wantrain.config.files import examine
from wantrain.config.keys import example_of, pasted
from wantrain.config.known import (
    HELP,
    annotation,
    choice,
    choices,
    fits,
    groups_of,
    known_key,
    nearest_keys,
    sections,
)
from wantrain.config.places import Place, configs_folder, own_places
from wantrain.config.rules import refuse_typed
from wantrain.config.schema import Config
from wantrain.config.sections.run import TRACKERS
from wantrain.config.values import Node, Unfit, convert, nearest, read_text
from wantrain.files import of_windows
from wantrain.terms import UserError


@dataclass(slots=True)
class CommandLine:
    """What a command line asks for: files of groups by group, values by key in order, and keys to take out."""

    groups: dict[str, str]
    values: list[tuple[str, Any]]
    without: list[str]


def load(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Compose `configs/wantrain.yaml` with the overrides into a checked Config. Every fault is a UserError.

    Recipes are looked for as `places` says; `config_dir` is a folder of the user's own groups.
    """
    given = {word: path for word in overrides if (path := _recipe_file(word))}
    own = own_places(config_dir, [*given.values()])
    places = [*own, Place(configs_folder())]
    asked = _asked([f"recipe={given[word].stem}" if word in given else word for word in overrides], places)
    refuse_typed(asked.values)
    if "recipe" not in asked.groups:
        raise UserError(f"no recipe is chosen; there are {', '.join(choices(places, 'recipe'))}", "recipe=demo_anime")
    seen: set[Path] = set()
    for group, name in asked.groups.items():
        examine(places, group, name, seen)
    is_collecting = gc.isenabled()
    gc.disable()  # composing makes a hundred thousand objects that stay, and would look through them again and again
    try:
        from wantrain.config.composing import compose  # Hydra, which faults and help come before

        return compose(asked, own, places)
    finally:
        if is_collecting:
            gc.enable()


def load_yaml(text: str) -> Config:
    """The Config of which `to_yaml` made this text."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    assert isinstance(config, Config)
    return config


def _recipe_file(word: str) -> Path | None:
    """The recipe that a word of the command line names as a file, if it does."""
    name = word.removeprefix("recipe=").strip()
    try:
        path = Path(of_windows(name)).expanduser()
        return path if path.suffix == ".yaml" and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # what cannot be a path is told as a recipe that is not there
        return None


# The command line


def _asked(arguments: Sequence[str], places: Sequence[Place]) -> CommandLine:
    """Sort the arguments. Raises UserError for those that are neither a group's file nor a known key's value."""
    asked, groups = CommandLine({}, [], []), groups_of(places)
    for place, argument in enumerate(arguments):
        if argument.startswith("~"):
            asked.without.append(known_key(argument[1:].partition("=")[0], groups))
            continue
        key, equals, text = argument.lstrip("+").partition("=")
        if argument.startswith("-") or not equals:
            key, text = "recipe", _bare_recipe(argument, arguments[place + 1 :], asked, places)
        key = key.strip()
        if key in groups and not (key in sections() and text.lstrip().startswith("{")):
            asked.groups[key] = choice(places, key, text)
        else:
            asked.values += _values_of(known_key(key, groups, text), text)
    return asked


def _bare_recipe(argument: str, following: Sequence[str], asked: CommandLine, places: Sequence[Place]) -> str:
    """The recipe that a word alone names. Raises UserError, with what is likely meant, for any other word."""
    known, groups = choices(places, "recipe"), groups_of(places)
    if argument in known:
        if chosen := asked.groups.get("recipe"):
            raise UserError(f"two recipes are named, {chosen} and {argument}", f"recipe={argument}    alone")
        return argument
    key, text = re.fullmatch(r"-*([^=:\s]*)[=:\s]?(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
    after = next((word.removeprefix("=") for word in following if word != "="), "")
    value = text or (after if after and "=" not in after else "...")
    close = [key] if annotation(key) is not None or key in groups else nearest_keys(key, groups)
    if argument.startswith("-"):
        if not close:
            raise UserError(f"unknown option {argument}: options are key=value", HELP)
        meant = f"{close[0]}={value}"
        raise UserError(f"unknown option {argument}: options are key=value; this one is {meant}", shlex.quote(meant))
    if key in close:
        meant = f"{key}={value}"
        raise UserError(f"{argument!r} is no key=value; {key} needs {key}={'NAME' if key in groups else 'VALUE'}, "
                        f"did you mean {meant}?", shlex.quote(meant))
    meant_names = [f"recipe={name}" for name in nearest(argument, known)] + [f"{one}=..." for one in close[:1]]
    raise UserError(f"{argument!r} is no key=value and no recipe"
                    + (f"; did you mean {' or '.join(meant_names)}?" if meant_names else ""),
                    meant_names[0] if meant_names else f"recipe={known[0]}    or {', '.join(known[1:])}")


def _values_of(key: str, text: str) -> list[tuple[str, Any]]:
    """A key's value as its type has it; a section's, or a source's, in parts."""
    wanted = annotation(key)
    try:
        node = Node(_plain_text(text), is_quoted=text.strip()[:1] in ("'", '"')) if _is_text(wanted) else \
            _node_of(text, wanted)
        if is_dataclass(wanted) and node.pairs is None and key.startswith("data.sources."):
            return [(f"{key}.path", convert(node, str))]
        if node.pairs is not None and (is_dataclass(wanted) or key == "data.sources"):
            return [part for name, inner in node.pairs for part in _of_node(f"{key}.{name}", inner)]
        value = convert(node, wanted)
    except Unfit as error:
        raise refused(key, text, error) from error
    if key.endswith(".prompts"):
        tell_split_prompts(key, node)
    return [(key, value)]


def _of_node(key: str, node: Node) -> list[tuple[str, Any]]:
    wanted = annotation(known_key(key, ()))
    if node.pairs is not None and is_dataclass(wanted):
        return [part for name, inner in node.pairs for part in _of_node(f"{key}.{name}", inner)]
    try:
        return [(key, convert(node, wanted))]
    except Unfit as error:
        raise refused(key, node.text, error) from error


def refused(key: str, text: str, error: Unfit) -> UserError:
    """The error for a value that its key cannot have."""
    wanted = annotation(key)
    is_list = typing.get_origin(wanted) is list
    values = text.strip("[] ").split(",")
    if values[1:] and wanted in (int, float) and "comma" not in error.allowed and all(fits(v, key) for v in values):
        return UserError(f"{key} = {text!r} is not allowed: {error.allowed}, one at a time",
                         f"{pasted(key, values[0].strip())}    or all, compared: wantrain tune NAME --over "
                         f"{pasted(key, ','.join(value.strip() for value in values))}")
    example = error.example if error.example and not (is_list and error.example[0] != "[") else example_of(key)
    form = f", in the form {example}" if is_list and "[" not in error.allowed else ""
    return UserError(f"{key} = {text!r} is not allowed: {error.allowed}{form}", pasted(key, example))


def _is_text(wanted: Any) -> bool:
    return wanted is str or set(typing.get_args(wanted)) == {str, type(None)}


def _plain_text(text: str) -> str:
    """Text as typed; one pair of quotes around all of it, as Hydra wants them elsewhere, is taken off."""
    return read_text(text).text if text.strip()[:1] in ("'", '"') else text


def _node_of(text: str, wanted: Any) -> Node:
    """The node of a list or dictionary; where a list of text is wanted, brackets may be a part of one name."""
    is_texts = typing.get_origin(wanted) is list and typing.get_args(wanted)[0] is str
    if is_texts and text.strip()[:1] not in ("[", "'", '"', ""):
        names = text.split(",") if set(map(str.strip, text.split(","))) <= set(TRACKERS) else [text]
        return Node("", items=[Node(name.strip() if names[1:] else name) for name in names])
    return read_text(text)


def tell_split_prompts(key: str, node: Node) -> None:
    """Print a note where a comma has split prompts that were not quoted."""
    plain = [item.text for item in node.items or [] if not item.is_quoted]
    if len(plain) > 1:
        whole = shlex.quote(f'{key}=["{", ".join(plain)}"]')
        print(f"note: {key} holds {len(node.items or [])} prompts, {' | '.join(plain)}: a comma splits prompts. "
              f"For one prompt: {whole}", file=sys.stderr)


def tell_untriggered(config: Config) -> None:
    """Print which prompts of the sampler lack the trigger where others have it: often a comma has split a prompt."""
    trigger, prompts = config.data.trigger, config.sampler.prompts
    without = [prompt for prompt in prompts if trigger not in prompt]
    if 0 < len(without) < len(prompts):
        print(f"note: {len(without)} of {len(prompts)} sampler.prompts do not hold the trigger {trigger!r}: "
              f"{' | '.join(without[:3])}{' | ...' if without[3:] else ''}; a comma splits prompts without quotes",
              file=sys.stderr)
