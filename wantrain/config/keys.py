"""A config as dotted keys: what each means, its values, and which of them fix a training's numbers."""

from __future__ import annotations

import ast
import inspect
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

import yaml

from wantrain.config.schema import Config
from wantrain.config.sections.data import Source
from wantrain.config.sections.model import ExpertOwn
from wantrain.config.sections.parts import MISSING
from wantrain.config.sections.training import Schedule
from wantrain.config.values import fields_of
from wantrain.files import digest_text
from wantrain.models.variants import VARIANTS, Expert, Variant
from wantrain.terms import OF_A_PLACE


def _harmless() -> Iterator[str]:
    """What each section says of itself in `may_change`, as prefixes of dotted keys."""
    for name, section in fields_of(Config).items():
        for entry in section.may_change:
            yield f"{name}." if entry == "*" else f"{name}.{entry}"


HARMLESS_TO_RESUME = tuple(_harmless())
"""Keys (prefixes) that may differ between a checkpoint and the config that goes on from it."""


def described() -> dict[str, tuple[str, str]]:
    """Every config key -> (default as YAML, its sentence), read from the dataclasses of the schema."""
    return dict(_described(Config, ""))


def _described(schema: type, prefix: str) -> Iterator[tuple[str, tuple[str, str]]]:
    sentences = _sentences(schema)
    for entry in fields(schema):
        factory = entry.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from _described(factory, f"{prefix}{entry.name}.")
            continue
        default = entry.default if factory is NO_DEFAULT else factory()
        yield f"{prefix}{entry.name}", (_as_yaml(default), sentences[entry.name])
        if prefix + entry.name == "data.sources":
            yield from _described(Source, "data.sources.NAME.")


def _sentences(schema: type) -> dict[str, str]:
    """The string below each field."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {statement.target.id: " ".join(str(following.value.value).split()) for statement, following in
            zip(body.body, body.body[1:], strict=False)
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)}


def _as_yaml(default: Any) -> str:
    if default == MISSING:
        return "required"
    plain = default.name if isinstance(default, Enum) else default
    return f"{plain:g}" if isinstance(plain, float) else str(yaml.safe_dump(
        plain, default_flow_style=True, width=1000)).removesuffix("...\n").strip()


_EXAMPLES = {
    "run.name": "my_style", "model.variant": "wan21_t2v_1b3", "model.parts": "{vae: FILE}", "train.num_steps": "1000",
    "lora.rank_pattern": "{attn: 16}", "lora.alpha_pattern": "{attn: 16}", "optim.lr_factors": "{attn: 0.5}",
    "data.num_frames": "[81]", "data.resolutions": "[[480, 832]]", "data.limits": "{motion: [0.1, null]}",
    "data.sources": "{style: {path: FOLDER}}", "data.sources.NAME.path": "FOLDER",
    "data.sources.NAME.columns": "{video: mp4, caption: text}"}
"""Values of the keys that have no default, or an empty dictionary."""


def example_of(key: str) -> str:
    """A value that the key may have: its default, else an example; `...` for a key that is not known."""
    if key.startswith("data.sources.") and key.count(".") == 3:
        key = f"data.sources.NAME.{key.rpartition('.')[2]}"
    if key.startswith("data.limits."):
        return "[0.1, null]"
    return _EXAMPLES.get(key) or described().get(key, ("...", ""))[0]


def pasted(key: str, value: object) -> str:
    """KEY=VALUE, quoted for a shell. YAML writes the empty text as two quotes, a command line as nothing."""
    return shlex.quote(f"{key}={'' if value == chr(39) * 2 else value}")


def to_yaml(config: Config) -> str:
    """The whole resolved config as YAML."""
    from omegaconf import OmegaConf  # which help and most faults do without

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> plain value, of a config or of one read from YAML: for trackers, pages, the fingerprint."""
    return dict(_flat(config, ""))


LATER = {"optim.ema": None}
"""What was done before a key had its default of now."""


def formerly() -> dict[str, Any]:
    """What was done before a key was there, by dotted key: its default, unless that is of a later day."""
    for_each: dict[str, Any] = {}
    for section in fields(Config):
        assert section.default_factory is not NO_DEFAULT, "a config is made of sections"
        for_each[section.name] = section.default_factory()
    return {key: value for key, value in _flat(for_each, "") if value != MISSING} | LATER


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The values of sections and dictionaries by dotted key; a list is one value."""
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value.name if isinstance(value, Enum) else value


def resume_keys(config: Config) -> dict[str, Any]:
    """The keys that fix the training's numbers; a resume refuses when one differs."""
    keys = {k: v for k, v in flat(config).items() if not k.startswith(HARMLESS_TO_RESUME) and not OF_A_PLACE.match(k)}
    if config.optim.schedule is not Schedule.constant:
        keys["train.num_steps"] = config.train.num_steps
    if config.loss.class_words:
        keys["data.trigger"] = config.data.trigger
    return keys


def expert_config(config: Config, expert: str | None) -> Config:
    """The config of one expert's training: what `high` or `low` sets replaces lora, optim and train.

    Where an expert sets a rank and no alpha, alpha / rank stays as it was.
    """
    own = {"high": config.high, "low": config.low}.get(expert or "", ExpertOwn())
    lora, optim, train = config.lora, config.optim, config.train
    rank = own.rank or lora.rank
    return replace(config, lora=replace(lora, rank=rank, alpha=own.alpha or lora.alpha * rank / lora.rank),
                   optim=replace(optim, lr=own.lr or optim.lr),
                   train=replace(train, num_steps=own.num_steps or train.num_steps))


def variant_of(config: Config) -> Variant:
    """The config's row of the variants table; the rules of the config have looked at it."""
    return VARIANTS[config.model.variant]


def experts_of(config: Config) -> list[Expert | None]:
    """The experts whose LoRAs the config asks for, high noise first; [None] where there is one transformer."""
    experts: Sequence[Expert | None] = variant_of(config).experts or (None,)
    return [expert for expert in experts if expert is None or config.model.experts.name in ("both", expert)]


def digest(config: Config) -> str:
    """A digest of the whole config."""
    return digest_text(to_yaml(config))
