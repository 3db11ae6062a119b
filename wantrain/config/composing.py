"""Files of groups and values of a command line, composed into a checked Config. Hydra and OmegaConf end here.

No other part of Hydra is used than its `compose`, and its search path for recipes (`places`): docs/facts.md, "Config"
says why. Its own grammar sees names of files alone.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from wantrain.config.foreign import told
from wantrain.config.keys import example_of, pasted
from wantrain.config.known import annotation, asset, key_types, path_of
from wantrain.config.loading import CommandLine
from wantrain.config.places import SCHEME, Place, configs_folder
from wantrain.config.schema import Config
from wantrain.config.sections.data import Source
from wantrain.config.values import without_null
from wantrain.terms import UserError

PROMPTS = (("sampler", "prompts"), ("evaluate", "prompts"), ("evaluate", "combined"), ("evaluate", "unrelated"))
"""The keys whose values may be text files of prompts."""


def compose(asked: CommandLine, own: Sequence[Place], places: Sequence[Place]) -> Config:
    """Compose `configs/wantrain.yaml` with what is asked for. Every fault is a UserError.

    `own` are the places of the user's own files, `places` these and what ships.
    """
    try:
        composed = _composed(asked.groups, own)
        with open_dict(composed):
            for key in asked.without:
                _take_out(composed, key)
            for key, value in asked.values:
                _put(composed, key, value)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise UserError(f"no value for {', '.join(missing)}", pasted(missing[0], example_of(missing[0])))
        _refuse_other_shapes(composed)
        for section, key in PROMPTS:
            if (words := composed[section][key]) is not None:
                composed[section][key] = [prompt for word in words for prompt in read_prompts(word)]
        config = OmegaConf.to_object(composed)
    except RecursionError as error:
        raise told(OmegaConfBaseException("RecursionError"), places) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise told(error, places) from error
    assert isinstance(config, Config)
    return config


def read_prompts(word: str) -> list[str]:
    """A prompt, or the prompts in a text file: a line each, without empty ones and those that begin with #."""
    if not word.endswith(".txt"):
        return [word]
    try:
        lines = [line.strip() for line in Path(word).expanduser().read_text("utf-8").splitlines()]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"prompts: {word} cannot be read: {error}", "give the path of a text file, a prompt a line") \
            from error
    return [line for line in lines if line and not line.startswith("#")]


class RecipeFolder(ConfigSource):
    """A folder of recipes as Hydra's search path has it: its files are those of the group `recipe`."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def _file(self, config_path: str) -> Path | None:
        group, _, name = self._normalize_file_name(config_path).rpartition("/")
        return Path(self.path) / name if group == "recipe" else None

    def load_config(self, config_path: str) -> ConfigResult:
        """One recipe, with the package that its first line names."""
        file = self._file(config_path)
        assert file is not None, "Hydra asked whether it is here"
        text = file.read_text(encoding="utf-8")
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", OmegaConf.create(text),
                            ConfigSource._get_header_dict(text[:512]))

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "recipe")

    def is_config(self, config_path: str) -> bool:
        file = self._file(config_path)
        return file is not None and file.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return [path.stem for path in Place(Path(self.path), is_flat=True).files(config_path)]


def _composed(groups: Mapping[str, str], own: Sequence[Place]) -> DictConfig:
    node = OmegaConf.structured(Config)
    for key, wanted in key_types().items():
        if typing.get_origin(wanted) is dict and not key.startswith("data.sources"):
            OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name="schema", node=node)
    OmegaConf.register_new_resolver("assets", lambda name: str(asset(name)), replace=True)
    GlobalHydra.instance().clear()
    Plugins.instance().register(RecipeFolder)
    search = [f"hydra.searchpath=[{','.join(_quoted(place.url) for place in own)}]"] if own else []
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        chosen = [f"{group}={_quoted(name)}" for group, name in groups.items()]
        return hydra.compose("wantrain", overrides=[*chosen, *search])


def _refuse_other_shapes(composed: DictConfig) -> None:
    """Raise UserError where `${...}` gives text for a list or a dictionary, which OmegaConf does not look at."""
    found = {key: OmegaConf.select(composed, key) for key in key_types() if not key.startswith("data.sources")}
    found |= {f"data.sources.{name}.columns": source.columns for name, source in composed.data.sources.items()}
    for key, value in found.items():
        shape = typing.get_origin(without_null(annotation(key)))
        if isinstance(value, str | int | float) and shape in (list, dict):
            raise UserError(f"{key}: it refers to {value!r}, which is one value", pasted(key, example_of(key)))


def _quoted(text: str) -> str:
    """A text as Hydra's grammar takes it whole, and as text: a recipe may be named 5, null or true."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


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
