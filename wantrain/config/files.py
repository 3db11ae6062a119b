"""A look into the YAML files that a command line chooses, before Hydra composes them: faults have a file and a line."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from wantrain.config.known import annotation, choice, nearest_keys
from wantrain.config.values import Unfit, convert, read_yaml
from wantrain.terms import UserError

PACKAGE_LINE = "# @package _global_"


def examine(folders: Sequence[Path], group: str, name: str, seen: set[Path]) -> None:
    """Raise UserError for what is wrong in a group's file, and in those that its defaults list names.

    `folders` hold the groups, the user's own first; `seen` are the files that were looked into already.
    """
    path = next(folder / group / f"{name}.yaml" for folder in folders if (folder / group / f"{name}.yaml").exists())
    if path in seen:
        return
    seen.add(path)
    text, root = _read(path)
    if group == "recipe":
        _refuse_other_package(path, text)
    for key, value in _entries(path, root):
        if key.value == "defaults":
            for other_group, other in _defaults(path, group, value):
                examine(folders, other_group, choice(folders, other_group, other, f"{_at(path, value)}: "), seen)
        elif key.value != "hydra":
            _examine_value(path, key.value if group == "recipe" else f"{group}.{key.value}", key, value)


def _read(path: Path) -> tuple[str, yaml.MappingNode]:
    """A file's text and what YAML makes of it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "a recipe is a text file in UTF-8") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _malformed(path, text, error) from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: holds no KEY: VALUE lines", "configs/recipe/demo_anime.yaml is an example")
    return text, root or yaml.MappingNode("", [])


def _malformed(path: Path, text: str, error: yaml.YAMLError) -> UserError:
    """What is wrong with a file that is no YAML."""
    marked = error if isinstance(error, yaml.MarkedYAMLError) else yaml.MarkedYAMLError(problem=str(error))
    mark, problem = marked.problem_mark, marked.problem
    lines = text.split("\n")
    if mark and marked.context_mark and not "".join(lines[mark.line :]).strip():
        mark = marked.context_mark  # what is not closed began there
    place = f"{path}:{mark.line + 1}" if mark else str(path)
    if "'\\t'" in str(problem):
        return UserError(f"{place}: a tab is no indentation in YAML",
                         f"sed -i 's/\\t/  /g' {shlex.quote(str(path))}    puts spaces for tabs")
    shown = f" in {lines[mark.line].strip()!r}" if mark and mark.line < len(lines) else ""
    return UserError(f"{place}: {problem}{shown}", "mend that line; text with a colon or brackets wants quotes, and "
                     "lines of one section the same indentation")


def _refuse_other_package(path: Path, text: str) -> None:
    comments = re.match(r"(\s*(#.*)?\n)*(#.*)?", text)
    package = re.search(r"#\s*@package\s+(\S+)", comments[0] if comments else "")
    if package is None or package[1] != "_global_":
        raise UserError(f"{path}:1: the first line must be {PACKAGE_LINE}",
                        f"sed -i '1i {PACKAGE_LINE}' {shlex.quote(str(path))}")


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}" if node.start_mark else str(path)


def _entries(path: Path, node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The entries of a mapping. Raises UserError where a key stands twice, or is none."""
    before: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{_at(path, key)}: a key must be a word", "write KEY: VALUE")
        if key.value in before:
            raise UserError(f"{_at(path, key)}: {key.value} stands twice, first in line "
                            f"{before[key.value].start_mark.line + 1}", "put both into one, or take one out")
        before[key.value] = key
        if key.value != "<<":
            yield key, value


def _defaults(path: Path, group: str, node: yaml.Node) -> Iterator[tuple[str, str]]:
    """(group, name) of the files in a defaults list; names alone are of the file's own group."""
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"{_at(path, node)}: defaults is to be a list", "a line for each: - NAME")
    for entry in node.value:
        if isinstance(entry, yaml.ScalarNode) and entry.value != "_self_":
            yield group, entry.value
        for key, value in entry.value if isinstance(entry, yaml.MappingNode) else ():
            words = str(key.value).split()
            if isinstance(value, yaml.SequenceNode | yaml.MappingNode):
                raise UserError(f"{_at(path, value)}: defaults names one file of each group", f"- {key.value}: NAME")
            if words and isinstance(value, yaml.ScalarNode) and value.value not in ("null", "???"):
                yield words[-1].lstrip("/").partition("@")[0], value.value


def _examine_value(path: Path, name: str, key: yaml.Node, value: yaml.Node) -> None:
    """Raise UserError for a key that is not known and a value that its type cannot have."""
    wanted: Any = annotation(name)
    if wanted is None:
        close = nearest_keys(name)
        raise UserError(f"{_at(path, key)}: unknown config key {name}"
                        + (f"; did you mean {' or '.join(close)}?" if close else ""),
                        "wantrain train --help    lists every key with its meaning")
    if is_dataclass(wanted) or name == "data.sources":
        if not isinstance(value, yaml.MappingNode):
            raise UserError(f"{_at(path, key)}: {name} holds keys of its own, and stands here without one",
                            f"indent its keys below it, or write {name}: {{KEY: VALUE}}")
        for inner_key, inner in _entries(path, value):
            _examine_value(path, f"{name}.{inner_key.value}", inner_key, inner)
        return
    if isinstance(value, yaml.ScalarNode) and value.value == "???":
        return
    if isinstance(value, yaml.MappingNode) and typing.get_origin(wanted) is dict:
        list(_entries(path, value))
    try:
        convert(read_yaml(value), wanted)
    except Unfit as error:
        shown = value.value if isinstance(value, yaml.ScalarNode) else "a list" if isinstance(
            value, yaml.SequenceNode) else "a dictionary"
        raise UserError(f"{_at(path, value)}: {name} = {shown!r} is not allowed: {error.allowed}",
                        f"write {name.rpartition('.')[2]}: {error.example or '...'}") from error
