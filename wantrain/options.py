"""The command line of the file verbs: `wantrain VERB FILE ... key=value ...` (`--key value` is the same)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from wantrain.terms import UserError

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
"""How the names of weight files end."""


def parse(arguments: Sequence[str], usage: str, options: Mapping[str, Sequence[str] | int]
          ) -> tuple[list[str], dict[str, str]]:
    """(files, options). `options`: key -> allowed values, the first the default; or a whole number, the default.

    A file that exists is a file whatever its name; so are FILE=NUMBER (with a strength) and names of weight files.
    Raises UserError for everything else that is not known.
    """
    chosen = {key: str(allowed) if isinstance(allowed, int) else allowed[0] for key, allowed in options.items()}
    files: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and words:
            word = f"{word}={words.pop(0)}"
        key, equals, value = word.removeprefix("--").partition("=")
        if Path(word).expanduser().exists():
            files.append(word)
        elif key in options:
            chosen[key] = _checked(key, value, options[key], usage)
        elif word.startswith("--") or (equals and not _is_file(word)):
            raise UserError(f"{word} is not known; there are {', '.join(options) or 'no options'}", usage)
        else:
            files.append(word)
    return files, chosen


def _checked(key: str, value: str, allowed: Sequence[str] | int, usage: str) -> str:
    if isinstance(allowed, int):
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{key}={value} is not allowed: a whole number from 1", usage)
    elif value not in allowed:
        raise UserError(f"{key}={value} is not allowed: {', '.join(filter(None, allowed))}", usage)
    return value


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
