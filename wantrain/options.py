"""The verbs for any file and their command lines, each option declared once. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from wantrain.terms import UserError

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
"""How the names of weight files end."""

LORA_FORMATS = ("universal", "comfy_updown", "fun", "kohya", "diffusers", "peft", "lycoris", "diffsynth_pipe",
                "diffsynth")
"""What a LoRA file may be written as: the names of wantrain.models.lora_formats.GRAMMARS."""


@dataclass(frozen=True, slots=True)
class Option:
    """`--NAME VALUE` or `NAME=VALUE`: its values, of which the first is the default (int: a whole number from 1)."""

    name: str
    help: str
    values: tuple[str, ...] = ()
    default: int | None = None


@dataclass(frozen=True, slots=True)
class FileVerb:
    """What a verb does, its files (name, help, how many: argparse's nargs), and its options."""

    does: str
    files: tuple[tuple[str, str, int | str | None], ...]
    options: tuple[Option, ...]


_EXPERT = Option("expert", "which half of a file that holds LoRAs for both A14B experts", ("", "high", "low"))
_STORED = Option("dtype", "how the tensors are stored", ("float32", "bfloat16", "float16"))
_FORMAT = Option("format", "the format to write", LORA_FORMATS)

FILE_VERBS = {
    "inspect": FileVerb("say what a weight or LoRA file holds, and where it loads", (
        ("FILE", "a file, a folder of shards, a PEFT folder, or a whole checkpoint", None),), (
        Option("norms", "all: the norm of every module's delta, not a line for each kind of module",
               ("summary", "all")), _EXPERT)),
    "convert": FileVerb("rewrite a LoRA in another tool's format, proven by reading it back", (
        ("IN", "the LoRA", None), ("OUT", "the file to write; a folder for peft", None)), (_FORMAT, _STORED, _EXPERT)),
    "merge": FileVerb("fold LoRAs into a transformer, read back to prove it", (
        ("BASE", "the transformer: a file, a folder of shards or a whole checkpoint", None),
        ("LORA[=STRENGTH]", "LoRAs in any format", "+"), ("OUT", "the file or folder to write", None)), (
        Option("layout", "official: one file with the names of the public and ComfyUI files; diffusers: a folder",
               ("official", "diffusers")),
        Option("dtype", "how the tensors are stored", ("bfloat16", "float16", "float32")), _EXPERT)),
    "extract": FileVerb("take a LoRA out of a tuned transformer, with the share of the change it keeps, by layer", (
        ("TUNED", "the tuned transformer", None), ("BASE", "what it was tuned from", None),
        ("OUT", "the LoRA to write", None)), (
        Option("rank", "of every module", default=32), _FORMAT, _STORED,
        Option("rest", "changed norms and biases: refuse names them, diff keeps them whole (comfy_updown), drop leaves "
               "them out", ("refuse", "diff", "drop")))),
    "prune": FileVerb("list what each run needs of a cache, and delete what none does", (
        ("CACHE_FOLDER", "data.cache_dir of the runs", None), ("RUN", "runs, by name or folder, that no longer count",
                                                               "*")), (
        Option("delete", "yes: delete what is not needed; else it is only counted", ("no", "yes")),
        Option("verify", "yes: read every entry, and count damaged ones as not needed", ("no", "yes")))),
}


class _Parser(argparse.ArgumentParser):
    """Faults are UserErrors, as those of every other verb."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help")


def parser(verb: str) -> argparse.ArgumentParser:
    """The verb's arguments, with its help."""
    told = FILE_VERBS[verb]
    made = _Parser(f"wantrain {verb}", description=told.does, allow_abbrev=False, epilog="--NAME VALUE may be written "
                   "NAME=VALUE, as for the other verbs. A file may be a model id: owner/name/path/in/it.")
    for name, text, nargs in told.files:
        made.add_argument(name.partition("[")[0], metavar=name, nargs=nargs, help=text)
    for option in told.options:
        default = option.values[0] if option.values else option.default
        allowed = ", ".join(filter(None, option.values)) or "a number from 1"
        made.add_argument(f"--{option.name}", metavar="VALUE", default=default,
                          type=partial(_checked, verb, option),
                          help=f"{option.help}: {allowed}" + (f" (default: {default})" if default else ""))
    return made


def parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a file verb by name.

    A file that exists is a file whatever its name; so are FILE=NUMBER (with a strength) and names of weight files.
    Raises UserError for everything else that is not known, and for a value that is not allowed.
    """
    told = FILE_VERBS[verb]
    known = {option.name: option for option in told.options}
    files: list[str] = []
    options: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and words:
            word = f"{word}={words.pop(0)}"
        key, equals, value = word.removeprefix("--").partition("=")
        if _exists(word):
            files.append(word)
        elif key in known:
            options.append(f"--{key}={value}")
        elif word.startswith("--") or (equals and not _is_file(word)):
            raise UserError(f"{word} is not known; there are {', '.join(known)}", f"wantrain {verb} --help")
        else:
            files.append(word)
    made = parser(verb)
    least = len(told.files) - sum(nargs == "*" for *_, nargs in told.files)
    most = len(told.files) if not any(nargs in ("+", "*") for *_, nargs in told.files) else len(files)
    if not least <= len(files) <= most:
        wanted = " ".join(f"[{name}]" if nargs == "*" else name for name, _, nargs in told.files)
        raise UserError(f"{verb} takes {wanted}, and got {len(files)}: {', '.join(files) or 'nothing'}",
                        f"wantrain {verb} {wanted}")
    return made.parse_args([*options, "--", *files])


def _checked(verb: str, option: Option, value: str) -> str | int:
    """The value of an option as argparse is to keep it. Raises UserError for one that is not allowed."""
    if option.default is not None:
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{option.name}={value} is not allowed: a whole number from 1", f"wantrain {verb} --help")
        return int(value)
    if value not in option.values:
        raise UserError(f"{option.name}={value} is not allowed: {', '.join(filter(None, option.values))}",
                        f"wantrain {verb} --help")
    return value


def _exists(word: str) -> bool:
    try:
        return Path(word).expanduser().exists()
    except (RuntimeError, OSError) as error:  # the home of somebody that is not known; a name that is too long
        raise UserError(f"{word}: {error}", "write the path out, from the root or from this folder") from error


def _is_file(word: str) -> bool:
    """Whether a word with an equals sign is meant as a file, one that is yet to be written perhaps."""
    return word.endswith(FILE_SUFFIXES) or split_strength(word)[1] is not None


def split_strength(word: str) -> tuple[str, float | None]:
    """FILE=STRENGTH as (FILE, strength), cut at the last equals sign; (word, None) where no number stands behind it."""
    file, _, strength = word.rpartition("=")
    try:
        return (file, float(strength)) if file else (word, None)
    except ValueError:
        return word, None
