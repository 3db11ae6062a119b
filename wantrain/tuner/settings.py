"""The settings that `wantrain tune` compares, from its command line. Nothing heavy is imported."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wantrain import config as schema
from wantrain.config import Config
from wantrain.config.known import HELP, annotation, nearest_keys
from wantrain.config.values import read_text
from wantrain.terms import UserError

DEFAULT = "default"
SECTIONS = ("lora", "optim", "sigma", "loss", "data", "high", "low")
FIXED = ("data.heldout", "data.trigger", "data.cache_dir", "data.mode", "high.num_steps", "low.num_steps")
"""Keys of these sections that say what is measured, or for how long, and not how it is trained."""


def read_over(words: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=VALUE,VALUE` of each --over, by key; commas inside of brackets part nothing. Raises UserError."""
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = [node.text for node in read_text(f"[{text}]").items or ()]
        if not equals or not all(values) or not values:
            raise UserError(f"--over {word} is not allowed: KEY=VALUE,VALUE,...", "--over optim.lr=1e-4,3e-4")
        if key in found:
            raise UserError(f"--over {key} stands twice", f"--over {key}={','.join([*found[key], *values])}")
        found[key] = list(dict.fromkeys(values))
    return found


def product(over: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Every combination of the values: its words by its name."""
    combined = [tuple(f"{key}={value}" for key, value in zip(over, values, strict=True))
                for values in itertools.product(*over.values())]
    return {" ".join(words): words for words in combined}


def configs_of(config: Config, over: Sequence[str], overrides: Sequence[str], config_dir: Path | None
               ) -> dict[str, Config]:
    """The default and every combination, by name. A combination that is the default again is left out. Raises UserError
    for what cannot be compared.
    """
    asked = read_over(over)
    for key, values in asked.items():
        if annotation(key) is None:
            close = nearest_keys(key)
            raise UserError(f"--over {key} is no key of a config" + (f"; did you mean {close[0]}?" if close else ""),
                            f"--over {shlex.quote(f'{close[0]}={chr(44).join(values)}')}" if close else HELP)
        if key.partition(".")[0] not in SECTIONS or key in FIXED:
            raise UserError(f"--over {key} is not allowed: keys of {', '.join(SECTIONS)} that say how it is trained "
                            "(steps and seeds: --steps N, --seeds N)", "--over optim.lr=1e-4,3e-4")
    configs = {DEFAULT: config}
    for name, words in product(asked).items():
        own = schema.load([*overrides, *words], config_dir)
        if "lora.rank" in asked and "lora.alpha" not in asked:  # as where an expert has a rank of its own
            alpha = config.lora.alpha / config.lora.rank * own.lora.rank
            own = replace(own, lora=replace(own.lora, alpha=alpha))
        configs |= {name: own} if schema.flat(own) != schema.flat(config) else {}
    if len(configs) == 1:
        raise UserError("there is nothing to compare the recipe with: --over names no other value",
                        "--over optim.lr=1e-4,3e-4")
    return configs
