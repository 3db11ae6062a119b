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

from wantrain.config.keys import example_of
from wantrain.config.known import HELP, annotation, choice, file_of, nearest_keys
from wantrain.config.places import Place
from wantrain.config.values import Unfit, convert, is_said_text, read_yaml, without_null
from wantrain.terms import UserError

PACKAGE_LINE = "# @package _global_"


def examine(places: Sequence[Place], group: str, name: str, seen: set[Path], above: Sequence[Path] = ()) -> None:
    """Raise UserError for what is wrong in a group's file, and in those that its defaults list names.

    `seen` are the files that were looked into already, `above` those whose defaults lead here.
    """
    path = file_of(places, group, name)
    if path in above:
        raise UserError(f"{path}: its defaults lead back to itself by way of {', '.join(map(str, above))}",
                        "name another file there, such as a recipe that ships with wantrain")
    if path in seen:
        return
    seen.add(path)
    text, root = _read(path)
    if group == "recipe":
        _refuse_other_package(path, text)
    for key, value in _entries(path, root):
        if key.value == "defaults":
            for other_group, other in _defaults(path, group, value):
                examine(places, other_group, choice(places, other_group, other, f"{_at(path, value)}: "), seen,
                        [*above, path])
        else:
            _examine_value(path, key.value if group == "recipe" else f"{group}.{key.value}", key, value)


def _read(path: Path) -> tuple[str, yaml.MappingNode]:
    """A file's text and what YAML makes of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}", "a recipe is a text file in UTF-8") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: a recipe is a text file in UTF-8, and byte {error.object[error.start]:#x} is "
                        "none of it", f"save it anew as UTF-8: iconv -f CP1252 -t UTF-8 {shlex.quote(str(path))}"
                        ) from error
    if text.startswith("\ufeff"):
        raise UserError(f"{path}:1: it begins with a byte order mark, which hides its first line",
                        f"sed -i '1s/^\\xEF\\xBB\\xBF//' {shlex.quote(str(path))}    takes the mark off")
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
    if "escape" in str(problem):
        return UserError(f"{place}: {problem}", "between double quotes a backslash begins a sign of YAML's own: put "
                         "single quotes for the double ones")
    shown = f" in {lines[mark.line].strip()!r}" if mark and mark.line < len(lines) else ""
    return UserError(f"{place}: {problem}{shown}", "mend that line; text with a colon or brackets wants quotes, and "
                     "lines of one section the same indentation")


def _refuse_other_package(path: Path, text: str) -> None:
    comments = re.match(r"(\s*(#.*)?\n)*(#.*)?", text)
    package = re.search(r"#\s*@package\s+(\S+)", comments[0] if comments else "")
    if package is None or package[1] != "_global_":
        change = f"1i {PACKAGE_LINE}" if package is None else f"s/^#\\s*@package.*/{PACKAGE_LINE}/"
        remedy = f"sed -i '{change}' {shlex.quote(str(path))}" if text.strip() else \
            "it is empty; configs/recipe/demo_anime.yaml is an example"
        raise UserError(f"{path}:1: the first line must be {PACKAGE_LINE}", remedy)


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
            if group == "recipe" and words and not (words[0] == "override" and words[-1].startswith("/")):
                raise UserError(f"{_at(path, key)}: a recipe takes the place of what the root chooses, so override and "
                                f"/ stand before the group", f"- override /{words[-1].lstrip('/')}: "
                                f"{value.value if isinstance(value, yaml.ScalarNode) else 'NAME'}")
            if words and isinstance(value, yaml.ScalarNode) and value.value not in ("null", "???"):
                yield words[-1].lstrip("/").partition("@")[0], value.value


def _examine_value(path: Path, name: str, key: yaml.ScalarNode, value: yaml.Node) -> None:
    """Raise UserError for a key that is not known and a value that its type cannot have."""
    wanted: Any = annotation(name)
    if wanted is None or "." in key.value:
        close = nearest_keys(name) if wanted is None else []
        nested = "" if wanted is None else "; sections are indented in a recipe: " + ": {".join(
            name.split(".")) + ": ..." + "}" * name.count(".")
        raise UserError(f"{_at(path, key)}: unknown config key {name}{nested}"
                        + (f"; did you mean {' or '.join(close)}?" if close else ""),
                        HELP)
    if is_dataclass(wanted) or name == "data.sources":
        if not isinstance(value, yaml.MappingNode):
            inner = "path" if name.startswith("data.sources.") else "KEY"
            raise UserError(f"{_at(path, key)}: {name} holds keys of its own, and stands here without one",
                            f"indent its keys below it, or write {key.value}: {{{inner}: VALUE}}")
        for inner_key, inner_value in _entries(path, value):
            if name == "data.sources":
                _refuse_other_scalar(path, name, inner_key, str, is_key=True)
            _examine_value(path, f"{name}.{inner_key.value}", inner_key, inner_value)
        return
    if isinstance(value, yaml.ScalarNode) and value.value == "???":
        return
    if isinstance(value, yaml.MappingNode) and typing.get_origin(wanted) is dict:
        list(_entries(path, value))
    try:
        convert(read_yaml(value), wanted)
    except Unfit as error:
        raise _unfit(path, name, value, error) from error
    _refuse_other_reading(path, name, value, wanted)


def _unfit(path: Path, name: str, value: yaml.Node, error: Unfit) -> UserError:
    shown = value.value if isinstance(value, yaml.ScalarNode) else "a list" if isinstance(
        value, yaml.SequenceNode) else "a dictionary"
    return UserError(f"{_at(path, value)}: {name} = {shown!r} is not allowed: {error.allowed}",
                     f"write {name.rpartition('.')[2]}: {error.example or example_of(name)}")


def _refuse_other_reading(path: Path, name: str, value: yaml.Node, wanted: Any) -> None:
    """Raise UserError where the YAML says something else than what its text looks like, or one value for a list.

    YAML takes yes and on for true, 010 for 8, 1:30 for 90, an empty place for null.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if (inner := without_null(wanted)) is not wanted:
        if value.tag != "tag:yaml.org,2002:null":
            _refuse_other_reading(path, name, value, inner)
        return
    if origin is list and isinstance(value, yaml.ScalarNode) and "${" not in value.value:
        whole = convert(read_yaml(value), wanted)
        raise _unfit(path, name, value, Unfit("a list", _as_yaml(whole)))
    if origin is list and isinstance(value, yaml.SequenceNode):
        if typing.get_origin(arguments[0]) is list and value.value and all(
                isinstance(item, yaml.ScalarNode) and "${" not in item.value for item in value.value):
            raise _unfit(path, name, value, Unfit("a list of lists", _as_yaml(convert(read_yaml(value), wanted))))
        for item in value.value:
            _refuse_other_reading(path, name, item, arguments[0])
    elif origin is dict and isinstance(value, yaml.MappingNode):
        for key, one in value.value:
            _refuse_other_scalar(path, name, key, str, is_key=True)
            _refuse_other_reading(path, name, one, arguments[1])
    elif wanted in (str, int) and isinstance(value, yaml.ScalarNode):
        _refuse_other_scalar(path, name, value, wanted)


def _refuse_other_scalar(path: Path, name: str, value: yaml.ScalarNode, wanted: type, is_key: bool = False) -> None:
    """The same of one plain word; a key must be text itself, where a value may be a number that looks the same."""
    text = value.value
    if value.style is not None or is_said_text(value) or "${" in text or "???" in text or "\n" in text:
        return
    from omegaconf import DictConfig, OmegaConf

    read = OmegaConf.create(f"v: {text}")
    assert isinstance(read, DictConfig), "it is a mapping"
    meant = read["v"]
    place = f"{_at(path, value)}: {name} = {text!r} is not allowed"
    if wanted is str and not isinstance(meant, str) and (is_key or str(meant) != text):
        quoted = "'" + text.replace("'", "''") + "'" if text else example_of(name)
        raise UserError(f"{place}: it is text, and YAML takes this for {'null' if meant is None else meant}; text that "
                        "looks like something else wants quotes", f"write {quoted} there")
    if wanted is int and not isinstance(meant, str):
        whole = convert(read_yaml(value), int)
        if not isinstance(meant, int) or meant != whole:
            raise UserError(f"{place}: it is a whole number, and YAML takes this for {meant}", f"write {whole} there")


def _as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)).strip()
