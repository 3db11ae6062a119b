"""From a command line to a checked Config. Hydra and OmegaConf end in this package and in `cli`.

Hydra chooses the files of the groups and composes them; values typed as `key=value` are read by the type of their key
(`values`), so Hydra's own grammar, in which commas, brackets and equal signs mean something, never sees them.
"""

from __future__ import annotations

import re
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from wantrain.config.files import examine
from wantrain.config.known import (
    HELP,
    annotation,
    asset,
    choice,
    choices,
    configs_folder,
    groups_of,
    key_types,
    known_key,
    path_of,
    sections,
)
from wantrain.config.schema import Config, Source
from wantrain.config.values import Node, Unfit, convert, nearest, read_text
from wantrain.terms import UserError


@dataclass(slots=True)
class Asked:
    """What a command line asks for: files of groups by group, values by key in order, and keys to take out."""

    groups: dict[str, str]
    values: list[tuple[str, Any]]
    without: list[str]


def load(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Compose `configs/wantrain.yaml` with the overrides into a checked Config. Every fault is a UserError.

    `config_dir` is a folder of the user's own groups (e.g. `recipe/mine.yaml`), searched before the shipped ones.
    """
    folders = [*([config_dir] if config_dir else []), configs_folder()]
    asked = _asked(overrides, folders)
    if "recipe" not in asked.groups:
        raise UserError("no recipe is chosen", f"add one of: recipe={'|'.join(choices(folders, 'recipe'))}")
    seen: set[Path] = set()
    for group, name in asked.groups.items():
        examine(folders, group, name, seen)
    try:
        composed = _composed(asked.groups, config_dir)
        with open_dict(composed):
            for key in asked.without:
                _take_out(composed, key)
            for key, value in asked.values:
                _put(composed, key, value)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise UserError(f"no value for {', '.join(missing)}", f"add {missing[0]}=... or choose another recipe: "
                            f"recipe={'|'.join(choices(folders, 'recipe'))}")
        config = OmegaConf.to_object(composed)
    except RecursionError as error:
        raise UserError("a value in ${...} refers to itself", "write the value itself in one of the places") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_readable(error), HELP) from error
    assert isinstance(config, Config)
    return config


def _composed(groups: Mapping[str, str], config_dir: Path | None) -> DictConfig:
    node = OmegaConf.structured(Config)
    for key, wanted in key_types().items():
        if typing.get_origin(wanted) is dict and not key.startswith("data.sources"):
            OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name="schema", node=node)
    OmegaConf.register_new_resolver("assets", lambda name: str(asset(name)), replace=True)
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[{_quoted(f'file://{config_dir.resolve()}')}]"] if config_dir else []
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        return compose("wantrain", overrides=[*(f"{group}={_quoted(name)}" for group, name in groups.items()), *search])


def _quoted(text: str) -> str:
    """A text as Hydra's grammar takes it whole."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'" if not re.fullmatch(r"[\w/.-]+", text, re.ASCII) else text


# The command line


def _asked(arguments: Sequence[str], folders: Sequence[Path]) -> Asked:
    """Sort the arguments. Raises UserError for those that are neither a group's file nor a known key's value."""
    asked, groups = Asked({}, [], []), groups_of(folders)
    for place, argument in enumerate(arguments):
        if argument.startswith("~"):
            asked.without.append(known_key(argument[1:].partition("=")[0], groups))
            continue
        key, equals, text = argument.lstrip("+").partition("=")
        if argument.startswith("-") or not equals:
            key, text = "recipe", _bare_recipe(argument, arguments[place + 1 :], asked, folders)
        key = key.strip()
        if key in groups and not (key in sections() and text.lstrip().startswith("{")):
            asked.groups[key] = choice(folders, key, text)
        else:
            asked.values += _values_of(known_key(key, groups), text)
    return asked


def _bare_recipe(argument: str, following: Sequence[str], asked: Asked, folders: Sequence[Path]) -> str:
    """The recipe that a word alone names. Raises UserError, with what is likely meant, for any other word."""
    known = choices(folders, "recipe")
    if argument.startswith("-"):
        body = argument.lstrip("-")
        if "=" in body:
            raise UserError(f"{argument}: options are key=value; this one is {body}", shlex.quote(body))
        meant = f"{body}={following[0]}" if following and "=" not in following[0] else f"{body}=..."
        raise UserError(f"unknown option {argument}: options are key=value", f"perhaps {shlex.quote(meant)}; {HELP}")
    if argument in known and "recipe" not in asked.groups:
        return argument
    if argument in ("recipe", *groups_of(folders)) and following:
        raise UserError(f"{argument!r} needs {argument}=NAME", f"did you mean {argument}={following[0]}?")
    close = [f"recipe={name}" for name in nearest(argument, known)] + [
        f"{key}=..." for key in nearest(argument, key_types(), 1)]
    raise UserError(f"{argument!r} is no key=value and no recipe", f"did you mean {' or '.join(close)}?" if close else
                    f"recipe={'|'.join(known)}; {HELP}")


def _values_of(key: str, text: str) -> list[tuple[str, Any]]:
    """A key's value as its type has it; a section's, or a source's, in parts."""
    wanted = annotation(key)
    try:
        node = Node(_plain_text(text), is_quoted=text.strip()[:1] in ("'", '"')) if _is_text(wanted) else \
            _node_of(text, wanted)
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
    """What to say of a value that its key cannot have."""
    example = shlex.quote(f"{key}={error.example or '...'}")
    return UserError(f"{key} = {text!r} is not allowed: {error.allowed}", example)


def _is_text(wanted: Any) -> bool:
    return wanted is str or set(typing.get_args(wanted)) == {str, type(None)}


def _plain_text(text: str) -> str:
    """Text as typed; one pair of quotes around all of it, as Hydra wants them elsewhere, is taken off."""
    return read_text(text).text if text.strip()[:1] in ("'", '"') else text


def _node_of(text: str, wanted: Any) -> Node:
    """The node of a list or dictionary; where a list of text is wanted, brackets may be a part of one name."""
    is_texts = typing.get_origin(wanted) is list and typing.get_args(wanted)[0] is str
    if is_texts and text.strip()[:1] not in ("[", "'", '"', ""):
        return Node("", items=[Node(text)])
    return read_text(text)


def tell_split_prompts(key: str, node: Node) -> None:
    """Say that a comma has split prompts which were not quoted."""
    plain = [item.text for item in node.items or [] if not item.is_quoted]
    if len(plain) > 1:
        whole = shlex.quote(f'{key}=["{", ".join(plain)}"]')
        print(f"note: {key} holds {len(node.items or [])} prompts, {' | '.join(plain)}: a comma splits prompts. "
              f"For one prompt: {whole}", file=sys.stderr)


# Into the composed config


def _put(config: DictConfig, key: str, value: Any) -> None:
    """Set a key; into a dictionary of the user's own names go the names that are given, the others stay."""
    node, parts = config, path_of(key)
    for place, part in enumerate(parts[:-1]):
        if part not in node:
            node[part] = OmegaConf.structured(Source) if parts[:place] == ["data", "sources"] else {}
        node = node[part]
    if isinstance(value, dict) and isinstance(node.get(parts[-1]), DictConfig):
        for name, inner in value.items():
            node[parts[-1]][name] = inner
    else:
        node[parts[-1]] = value


def _take_out(config: DictConfig, key: str) -> None:
    node, parts = config, path_of(key)
    for part in parts[:-1]:
        node = node.get(part) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or parts[-1] not in node or typing.get_origin(
            annotation(key.rpartition(".")[0])) is not dict:
        raise UserError(f"~{key}: only what stands in a dictionary can be taken out, such as a source",
                        "'~data.sources.NAME'")
    del node[parts[-1]]


def _readable(error: Exception) -> str:
    """Hydra's message with its cause: what was not foreseen here."""
    parts = [str(error).strip()]
    if error.__cause__ is not None and str(error.__cause__).strip() not in parts[0]:
        parts.append(str(error.__cause__).strip())
    return "\n".join(parts)
