"""What there is to choose: the groups with their files, the recipes, the keys with their types."""

from __future__ import annotations

import functools
import shlex
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from wantrain.config.places import Place, configs_folder
from wantrain.config.schema import Config
from wantrain.config.sections.data import Source
from wantrain.config.values import Unfit, convert, fields_of, leaves, nearest, read_text
from wantrain.terms import UserError

HELP = "wantrain train --help all    lists every key with its meaning"


def asset(name: str) -> Path:
    """A file or folder that ships inside the package, e.g. `demo/anime`; `${assets:demo/anime}` in a config."""
    return Path(__file__).parents[1] / "assets" / name


def recipes() -> list[str]:
    """Names of the recipes that ship with wantrain."""
    return sorted(p.stem for p in (configs_folder() / "recipe").glob("*.yaml"))


def groups_of(places: Sequence[Place]) -> list[str]:
    """The config groups: folders of YAML files."""
    return sorted(set().union(*(place.groups() for place in places)))


def choices(places: Sequence[Place], group: str) -> list[str]:
    """The names of a group's files."""
    return sorted({path.stem for place in places for path in place.files(group)})


def file_of(places: Sequence[Place], group: str, name: str) -> Path:
    """The file of that name. Raises UserError where two places have one: it would not be clear which is meant."""
    found = [path for place in places for path in place.files(group) if path.stem == name]
    if len({path.resolve() for path in found}) > 1:
        raise UserError(f"{group} = {name!r} is the name of {' and of '.join(map(str, found))}",
                        f"mv {shlex.quote(str(found[0]))} {shlex.quote(str(found[0].with_stem('my_' + name)))}")
    return found[0]


def choice(places: Sequence[Place], group: str, text: str, place: str = "") -> str:
    """Check the name of a group's file and return it without its ending. Raises UserError with the nearest names."""
    name, known = text.strip().strip("'\"").removesuffix(".yaml"), choices(places, group)
    if name in known:
        file_of(places, group, name)
        return name
    if group == "recipe" and ("/" in text or text.strip().endswith(".yaml")):
        close = nearest(Path(name).stem, known, 1)
        raise UserError(f"{place}recipe = {text!r}: there is no such file, looked at from {Path.cwd()}",
                        f"recipe={(close or known)[0]}    by its name, or the path of a file")
    if not known:
        raise UserError(f"{place}{group} is no group of files; there are {', '.join(groups_of(places))}", HELP)
    close = nearest(name, known)
    others = [other for other in known if other not in close]
    meant = [f"{group}={other}" for other in close[:1]]
    named = annotation(f"{group}.name")
    if isinstance(named, type) and issubclass(named, Enum):  # a value of the key is more than a file that is like it
        meant = [f"{group}.name={other}" for other in nearest(name, named.__members__, 1)] or meant
    own = "    (your own: recipes/NAME.yaml, or the file itself: recipe=FILE.yaml)" if group == "recipe" else ""
    raise UserError(f"{place}{group} = {name!r} is not there; {f'did you mean {meant[0]}? There' if meant else 'there'}"
                    f" are {', '.join([*close, *others])}", f"{(meant or [f'{group}={known[0]}'])[0]}{own}")


@functools.cache
def key_types() -> dict[str, Any]:
    """The type of every key of the schema, by dotted key. Keys of a source have NAME for its name."""
    return {**dict(leaves(Config)), **dict(leaves(Source, "data.sources.NAME."))}


@functools.cache
def sections() -> dict[str, Any]:
    """The config's sections by name."""
    return {name: wanted for name, wanted in fields_of(Config).items() if is_dataclass(wanted)}


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


def fits(text: str, key: str) -> bool:
    """Whether a text that was typed for another key is a value of this one."""
    try:
        convert(read_text(text), annotation(key))
    except (Unfit, KeyError, TypeError):  # of another type, or the key is a group
        return False
    return bool(text)


def known_key(key: str, groups: Sequence[str], text: str = "") -> str:
    """Return the key if it is known. Raises UserError with the nearest keys otherwise; `text` is the value typed."""
    if annotation(key) is None:
        if key.isupper():
            raise UserError(f"unknown config key {key}; a variable of the environment stands before the command",
                            f"{key}={shlex.quote(text)} wantrain ...")
        close = nearest_keys(key, groups)
        meant = f"{shlex.quote(f'{close[0]}={text}')}    or {HELP}" if close and fits(text, close[0]) else HELP
        raise UserError(f"unknown config key {key}" + (f"; did you mean {' or '.join(close)}?" if close else ""), meant)
    return key


ELSEWHERE = {
    "learning_rate": "optim.lr", "unet_lr": "optim.lr", "optimizer": "optim.name", "optimizer_type": "optim.name",
    "ema_decay": "optim.ema",
    "lr_scheduler": "optim.schedule", "lr_warmup_steps": "optim.warmup_steps", "epochs": "train.num_steps",
    "num_epochs": "train.num_steps", "max_train_steps": "train.num_steps", "max_train_epochs": "train.num_steps",
    "gradient_checkpointing": "memory.keep", "activation_checkpointing": "memory.keep",
     "save_every_n_steps": "train.save_every",
    "gradient_accumulation_steps": "data.batch_size", "train_batch_size": "data.batch_size",
    "network_dim": "lora.rank", "lora_rank": "lora.rank", "dim": "lora.rank", "network_alpha": "lora.alpha",
    "lora_alpha": "lora.alpha", "target_modules": "lora.targets", "network_weights": "lora.start_from",
    "output_dir": "run.dir", "output_name": "run.name", "logging_dir": "run.dir", "mixed_precision": "model.dtype",
    "precision": "model.dtype", "dataset": "data.sources", "dataset_path": "data.sources.NAME.path",
    "train_data_dir": "data.sources.NAME.path", "resolution": "data.resolutions", "frames": "data.num_frames",
    "trigger_word": "data.trigger", "cfg": "sampler.guidance", "guidance_scale": "sampler.guidance",
    "num_inference_steps": "sampler.num_steps", "flow_shift": "sigma.shift", "discrete_flow_shift": "sigma.shift",
    "timestep_sampling": "sigma.distribution", "checkpoint": "model.path", "ckpt": "model.path", "dit": "model.path",
    "wandb": "tracker", "log_with": "tracker", "report_to": "tracker",
}
"""What other trainers call a thing -> the key that it has here."""


def nearest_keys(key: str, groups: Sequence[str] = ()) -> list[str]:
    """The known keys that are likely meant: of the same section first, then by the last part, then by the whole."""
    section, _, word = key.rpartition(".")
    if word.lower().replace("-", "_") in ELSEWHERE:
        return [ELSEWHERE[word.lower().replace("-", "_")]]
    if section.startswith("data.sources.") and section.count(".") == 2:
        own = nearest(word, fields_of(Source))
        return [f"{section}.{name}" for name in own or ["path"]]
    known = [*key_types(), *groups]
    last: dict[str, list[str]] = {}
    for one in sorted(known, key=lambda one: one.startswith(("high.", "low."))):  # an expert's own stand behind
        last.setdefault(one.rpartition(".")[2], []).append(one)
    by_last = [one for close in nearest(word, last, likeness=0.6) for one in last[close]]
    same = [one for one in by_last if section and one.rpartition(".")[0] == section]
    return list(dict.fromkeys(same or [*by_last[:2], *nearest(key, known, 2, 0.6)]))[:3]


def path_of(key: str) -> list[str]:
    """Split a key at its points. A key inside a dictionary may itself hold points, so that part stays whole."""
    for end in range(len(key)):
        if key[end] == "." and typing.get_origin(key_types().get(key[:end])) is dict and key[:end] != "data.sources":
            return [*key[:end].split("."), key[end + 1 :]]
    return key.split(".")
