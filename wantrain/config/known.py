"""What there is to choose: the groups with their files, the recipes, the keys with their types."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from wantrain.config.schema import Config, Source
from wantrain.config.values import leaves, nearest
from wantrain.terms import UserError

HELP = "wantrain train --help    lists every key with its meaning"


def configs_folder() -> Path:
    """`configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def asset(name: str) -> Path:
    """A file or folder that ships inside the package, e.g. `demo/anime`; `${assets:demo/anime}` in a config."""
    return Path(__file__).parents[1] / "assets" / name


def recipes() -> list[str]:
    """Names of the recipes that ship with wantrain."""
    return sorted(p.stem for p in (configs_folder() / "recipe").glob("*.yaml"))


def groups_of(folders: Sequence[Path]) -> list[str]:
    """The config groups: folders of YAML files."""
    return sorted({p.parent.name for folder in folders for p in folder.glob("*/*.yaml")})


def choices(folders: Sequence[Path], group: str) -> list[str]:
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def choice(folders: Sequence[Path], group: str, text: str, place: str = "") -> str:
    """The name of a group's file. Raises UserError with the nearest names."""
    name, known = text.strip().strip("'\"").removesuffix(".yaml"), choices(folders, group)
    if name in known:
        return name
    if not known:
        raise UserError(f"{place}{group} is no group of files; there are {', '.join(groups_of(folders))}", HELP)
    close = nearest(name, known)
    others = [other for other in known if other not in close]
    meant = f"did you mean {group}={close[0]}? " if close else ""
    own = "    (your own: --config-dir FOLDER, with FOLDER/recipe/NAME.yaml)" if group == "recipe" else ""
    raise UserError(f"{place}{group} = {name!r} is not there; {meant}There are {', '.join([*close, *others])}",
                    f"{group}={(close or known)[0]}{own}")


@functools.cache
def key_types() -> dict[str, Any]:
    """Dotted key -> annotation, of every value of the schema; those of a source stand under NAME."""
    return {**dict(leaves(Config)), **dict(leaves(Source, "data.sources.NAME."))}


@functools.cache
def sections() -> dict[str, Any]:
    """The config's sections by name."""
    return {name: wanted for name, wanted in typing.get_type_hints(Config).items() if is_dataclass(wanted)}


def annotation(key: str) -> Any:
    """The type of a key; None where there is no such key."""
    known, parts = key_types(), key.split(".")
    if key in known or key in sections():
        return known.get(key, sections().get(key))
    if parts[:2] == ["data", "sources"] and len(parts) > 2:
        if len(parts) == 3:
            return typing.get_args(known["data.sources"])[1]
        key = ".".join(["data", "sources", "NAME", *parts[3:]])
        if key in known:
            return known[key]
    for end in range(len(key)):  # a name of the user's own may have points
        if key[end] == "." and typing.get_origin(known.get(key[:end])) is dict and key[:end] != "data.sources":
            return typing.get_args(known[key[:end]])[1]
    return None


def known_key(key: str, groups: Sequence[str]) -> str:
    """The key. Raises UserError with the nearest ones where there is none."""
    if annotation(key) is None:
        close = nearest_keys(key, groups)
        raise UserError(f"unknown config key {key}" + (f"; did you mean {' or '.join(close)}?" if close else ""), HELP)
    return key


def nearest_keys(key: str, groups: Sequence[str] = ()) -> list[str]:
    """The known keys that are likely meant: of the same section first, then by the last part, then by the whole."""
    known = [*key_types(), *groups]
    section, _, word = key.rpartition(".")
    last: dict[str, list[str]] = {}
    for one in sorted(known, key=lambda one: one.startswith(("high.", "low."))):  # an expert's own stand behind
        last.setdefault(one.rpartition(".")[2], []).append(one)
    by_last = [one for close in nearest(word, last) for one in last[close]]
    same = [one for one in by_last if section and one.rpartition(".")[0] == section]
    return list(dict.fromkeys(same or [*by_last[:2], *nearest(key, known, 2)]))[:3]


def path_of(key: str) -> list[str]:
    """The parts of a key; the last one of a dictionary's may have points itself."""
    for end in range(len(key)):
        if key[end] == "." and typing.get_origin(key_types().get(key[:end])) is dict and key[:end] != "data.sources":
            return [*key[:end].split("."), key[end + 1 :]]
    return key.split(".")
