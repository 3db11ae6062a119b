"""What `wantrain VERB --help` says of the keys: the twenty that most people set, one section, or all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from wantrain.config.keys import described, pasted
from wantrain.config.known import sections
from wantrain.config.values import nearest
from wantrain.terms import UserError

ALL = "all"
COMMON: dict[str, tuple[tuple[str, str, str], ...]] = {
    "what is trained": (("run.name", "a name", "my_style"), ("data.sources.NAME.path", "a folder", "my/clips"),
                        ("data.heldout", "a folder", "my/heldout"), ("data.trigger", "words", "mystyl style"),
                        ("model.path", "a folder or model id", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")),
    "clips": (("data.num_frames", "frames", "[49,81]"), ("data.resolutions", "pixels", "[[480,832]]"),
              ("data.batch_size", "samples a step", "4"), ("data.cache_dir", "a folder", "/fast/disk/cache")),
    "training": (("train.num_steps", "steps", "2000"), ("optim.lr", "a number", "5e-5"),
                 ("lora.rank", "a whole number", "16"), ("lora.targets", "presets or patterns", "[attn]"),
                 ("train.save_every", "steps", "250"), ("train.seed", "a whole number", "1")),
    "memory": (("memory.base", "a word", "int8"), ("train.micro_batch_size", "samples", "1")),
    "results": (("validation.every_steps", "steps", "250"), ("sampler.prompts", "texts", "[a house at dawn]"),
                ("export.format", "a word", "kohya")),
}
"""Keys that most people set, by purpose: (key, unit or kind, an example)."""


def keys_help(topic: str) -> Iterator[str]:
    """Lines on the keys of a section, on all, or, without a topic, on the common ones. Raises UserError."""
    known = described()
    if not topic:
        for purpose, rows in COMMON.items():
            yield f"\n{purpose}:"
            for key, unit, example in rows:
                yield from _told(key, known[key], f"    {unit}; e.g. {pasted(key, example)}")
        yield f"\n`--help {ALL}` lists all {len(known)} keys, `--help SECTION` one of {', '.join(sections())}"
        return
    section = topic.removesuffix(".")
    if section != ALL and section not in sections():
        close = nearest(section, sections())
        raise UserError(f"--help {topic}: no such section; {f'did you mean {close[0]}? ' if close else ''}There are "
                        f"{', '.join([*sections(), ALL])}", f"wantrain train --help {(close or [ALL])[0]}")
    for name in sections() if section == ALL else [section]:
        yield f"\n{name}:"
        for key, told in known.items():
            if key.startswith(f"{name}."):
                yield from _told(key, told, "")


def _told(key: str, told: tuple[str, str], more: str) -> Iterator[str]:
    default, sentence = told
    yield f"  {key} = {default}{more}"
    yield from textwrap.wrap(sentence, 110, initial_indent="      ", subsequent_indent="      ")
