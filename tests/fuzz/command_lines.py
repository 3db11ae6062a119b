"""Mutated command lines and recipes, composed as a verb composes them: nothing but a UserError leaves `load`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random

from wantrain import cli, config
from wantrain.config.known import key_types
from wantrain.terms import UserError

WORDS = ("", "null", "true", "0", "-1", "1e-4", "1e999", "nan", "9" * 40, "[", "]", "{", "}", "[]", "{}", "[[1,2]]",
         "'", '"', "${", "${x}", "${data.trigger}", "${oc.env:HOME}", "${assets:../..}", "???", "~", "=", ",", ":",
         "\\", "a,b", "a=b", "{a: 1}", "{a: {b: [1, {c: d}]}}", "[a, [b, {c: 1}]]", "été", "日本", "\u2028", "\0",
         "\udcff", "\t", "a b", "*", "&x", "!!python/object:os.system x", "- a", "# x", "high", "low", "both",
         "bfloat16", "/", ".", "..", "(" * 300, "[" * 300)
PREFIXES = ("", "", "", "", "+", "++", "~", "--", "-")
LINES = ("train: {num_steps: 5}", "train:\n  seed: 3", "optim: {lr: 1e-4, betas: [0.9, 0.99]}", "run: {name: mine}",
         "lora:\n  rank_pattern: {attn: 2}\n  targets: [attn, 'ffn.*']", "model: {parts: {vae: /x}}",
         "sampler:\n  prompts:\n    - a, b\n    - \"c: d\"",
         "data:\n  sources:\n    more: {path: x, repeats: 2}\n  limits: {motion: [0, null]}")
SECTIONS = ("model", "recipe", "lora", "optim", "tracker", "data", "data.sources", "hydra", "defaults")


def one(random: Random, folder: Path) -> None:
    """Compose a mutated command line, over a mutated recipe of the user's own one time in two."""
    own = folder / "groups"
    (own / "recipe").mkdir(parents=True)
    (own / "recipe" / "mine.yaml").write_bytes(recipe(random))
    recipe_word = random.choice(("recipe=mine", "recipe=demo_anime", "demo_anime", "recipe=mine.yaml", "mine", ""))
    typed = [recipe_word, *(argument(random) for _ in range(random.randint(0, 4)))]
    random.shuffle(typed)
    with contextlib.suppress(UserError):
        given, others = cli._config_dir([f"--config-dir={own}", *typed])
        composed = config.load(others, given)
        config.digest(composed)
        config.resume_keys(config.expert_config(composed, random.choice((None, "high", "low"))))


def argument(random: Random) -> str:
    """A known or nearly known key with a value of any sort."""
    key = random.choice(sorted(key_types())).replace("NAME", random.choice(("style", "mine", "a.b", "")))
    if random.random() < 0.2:
        key = mutated(random, key)
    if random.random() < 0.1:
        key = random.choice(SECTIONS)
    equals = random.choice(("=", "=", "=", "=", "=", "", " = ", "=="))
    return random.choice(PREFIXES) + key + equals + value(random)


def value(random: Random) -> str:
    """Words in brackets, or not."""
    text = random.choice((" ", ",", ", ", ": ", "")).join(random.choice(WORDS) for _ in range(random.randint(0, 3)))
    left, right = random.choice((("", ""), ("[", "]"), ("{", "}"), ("{a: ", "}"), ("'", "'"), ('"', '"'), ("[", "")))
    return left + text + right


def mutated(random: Random, text: str) -> str:
    """The text with a character gone, doubled or another."""
    place = random.randrange(len(text) + 1)
    return text[:place] + random.choice(("", random.choice(".=[]{}'\"\\:,~+é \n\t"), text[place : place + 1] * 2)) \
        + text[place + random.randint(0, 1) :]


def recipe(random: Random) -> bytes:
    """A recipe out of whole lines, with some changed bytes."""
    head = random.choice(("# @package _global_\n",) * 6 + ("", "\ufeff# @package _global_\n", "# @package foo\n"))
    defaults = random.choice(("defaults:\n  - demo_anime\n  - _self_\n",) * 4 + (
        "defaults:\n  - override /model: tiny_wan\n", "defaults: demo_anime\n", "defaults: [mine]\n",
        "defaults:\n  - {a: 1}\n", "defaults:\n  - override /lora: [style]\n", ""))
    text = head + defaults + "\n".join(random.choice(LINES) for _ in range(random.randint(0, 4))) + "\n"
    for _ in range(random.choice((0, 0, 0, 1, 2, 5))):
        text = mutated(random, text) if random.random() < 0.6 else text.replace(
            random.choice(text.split() or ["x"]), random.choice(WORDS), 1)
    data = bytearray(text.encode("utf-8", "surrogateescape"))
    if random.random() < 0.1 and data:
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)
