"""The verbs that read no recipe and their command lines, each option declared once. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import difflib
import shlex
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
    """`--NAME VALUE` or `NAME=VALUE`: its values, of which the first is the default (int: a whole number from 1).

    `is_free` takes any text, and has no default; `is_flag` is `--NAME` alone.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()
    default: int | None = None
    is_free: bool = False
    is_flag: bool = False


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

NEW = FileVerb("write a recipe for a folder of clips: recipes/NAME.yaml", (
    ("NAME", "of the recipe, its run and its LoRA file", None),), (
    Option("model", "the base, a name of configs/model (default: wan22_ti2v_5b)", is_free=True),
    Option("clips", "a folder of clips with .txt captions, or a manifest", is_free=True),
    Option("plain", "ordinary clips without the trigger, which keep the base's look when it is absent", is_free=True),
    Option("heldout", "clips never trained on; without it about a tenth of the clips is held out", is_free=True),
    Option("trigger", "made-up words that call what is trained; captions without them get them", is_free=True),
    Option("gpu", "the card, as for wantrain plan: rtx4090, or its memory, 24gb (default: the card here, else 24gb)",
           is_free=True),
    Option("yes", "take defaults for what is not given, and ask nothing", is_flag=True)))

MACHINE_VERBS = {
    "runs": FileVerb("how far the runs of a folder are, what they take on the disk, how to go on", (
        ("FOLDER", "of a run, or the one above runs (default: runs)", "*"),), ()),
    "ask": FileVerb("ask a run that trains for samples or a checkpoint now, or to stop", (
        ("RUN", "its folder, or its name in runs", None), ("WHAT", "sample, save or stop", None)), ()),
    "view": FileVerb("a page of runs in the browser, live while they train: curves, samples, the log, requests", (
        ("RUN", "folders or names in runs (default: all in runs)", "*"),), (
        Option("host", "the address to listen at, such as 0.0.0.0 for all machines (default: this machine alone)",
               is_free=True),
        Option("port", "of the address; without it a free one is found", default=0))),
    "share": FileVerb("a folder ready for a model hub: card, LoRA files, samples, workflow, recipe; nothing is sent", (
        ("RUN", "its folder, or its name in runs", None),), (
        Option("formats", "of the LoRA beside the exported one, with commas between, such as kohya,diffusers",
               is_free=True),
        Option("license", "of the LoRA, the hub's word for it (default: apache-2.0, as Wan's)", is_free=True))),
    "doctor": FileVerb("what this machine is, what of it limits wantrain, what mends that; the text for a bug report",
                       (), (Option("json", "one JSON object, for programs", is_flag=True),)),
    "completion": FileVerb("the script of Tab completion, for a shell's start-up file", (
        ("SHELL", "bash, zsh or fish", None),), ()),
}
"""What asks the machine, and no recipe."""

OPTION_VERBS = {"new": NEW, **FILE_VERBS, **MACHINE_VERBS}
"""Every verb whose arguments are files and options, not keys of a recipe."""


class _Parser(argparse.ArgumentParser):
    """Faults are UserErrors, as those of every other verb."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help")


def plan_parser() -> argparse.ArgumentParser:
    """The options of `plan` beside its recipe and keys."""
    made = _Parser("wantrain plan", add_help=False, allow_abbrev=False)
    made.add_argument("--gpu", metavar="CARD", help="rtx4090, h100, ... or a size such as 24gb; here: this machine's "
                      "card, whose rates are measured in 20 seconds; without: a line for each size")
    made.add_argument("--gpus", metavar="N", type=int, default=1, help="how many of them, each with the whole base "
                      "(default: 1)")
    made.add_argument("--ram", metavar="GIB", type=float, default=64.0, help="host memory for each of them (default: "
                      "64)")
    made.add_argument("--price", metavar="PER_HOUR", type=float, help="of one of them, in any currency")
    made.add_argument("--json", action="store_true", help="all numbers, for programs")
    return made


def parse_plan(arguments: Sequence[str]) -> tuple[list[argparse.Namespace], list[str]]:
    """The options of `plan`, as the one further argument of its stage, and the other words."""
    given, rest = plan_parser().parse_known_args(arguments)
    for name, value in (("gpus", given.gpus), ("ram", given.ram), ("price", given.price)):
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} is not allowed: a number above 0", "wantrain plan --help")
    return [given], rest


def tune_parser() -> argparse.ArgumentParser:
    """The options of `tune` beside its recipe and keys."""
    made = _Parser("wantrain tune", add_help=False, allow_abbrev=False)
    made.add_argument("--over", metavar="KEY=VALUE,VALUE,...", action="append", default=[], help="a key and values to "
                      "compare; of several --over, all combinations")
    made.add_argument("--steps", metavar="N", type=int, help="of each training (default: train.num_steps)")
    made.add_argument("--seeds", metavar="N", type=int, default=3, help="trainings of each setting (default: 3)")
    made.add_argument("--minutes", metavar="M", type=float, help="end by then: what does not fit is searched by "
                      "halving, shorter trainings first (default: all combinations)")
    return made


def parse_tune(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `tune`, and the other words."""
    given, rest = tune_parser().parse_known_args(arguments)
    for name, value in (("steps", given.steps), ("seeds", given.seeds), ("minutes", given.minutes)):
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} is not allowed: a number above 0", "wantrain tune --help")
    if not given.over:
        raise UserError("--over is not given: a key and the values to compare", "wantrain tune NAME --over "
                        "optim.lr=1e-4,3e-4")
    return given, rest


def parser(verb: str) -> argparse.ArgumentParser:
    """The verb's arguments, with its help."""
    told = OPTION_VERBS[verb]
    may_be_id = " A file may be a model id: owner/name/path/in/it." * (verb in FILE_VERBS)
    made = _Parser(f"wantrain {verb}", description=told.does, allow_abbrev=False,
                   epilog=f"--NAME VALUE may be written NAME=VALUE, as for the other verbs.{may_be_id}")
    for name, text, nargs in told.files:
        made.add_argument(name.partition("[")[0], metavar=name, nargs=nargs, help=text)
    for option in told.options:
        if option.is_flag:
            made.add_argument(f"--{option.name}", action="store_true", help=option.help)
            continue
        if option.is_free:
            made.add_argument(f"--{option.name}", metavar="VALUE", default="", help=option.help)
            continue
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
    told = OPTION_VERBS[verb]
    known = {option.name: option for option in told.options}
    files: list[str] = []
    options: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if (flag := known.get(word.removeprefix("--"))) and flag.is_flag and word.startswith("--"):
            options.append(word)
            continue
        if word.startswith("--") and "=" not in word and words:
            word = f"{word}={words.pop(0)}"
        key, equals, value = word.removeprefix("--").partition("=")
        if _exists(word):
            files.append(word)
        elif key in known:
            options.append(f"--{key}={value}")
        elif word.startswith("--") or (equals and not _is_file(word)):
            close = difflib.get_close_matches(key, known, 1)
            meant = f"{shlex.quote(f'{close[0]}={value}' if equals else f'--{close[0]}')}    or " if close else ""
            options_there = f"are {', '.join(known)}" if known else "is no option"
            raise UserError(f"{word} is not known; there {options_there}", f"{meant}wantrain {verb} --help")
        else:
            files.append(word)
    made = parser(verb)
    least = len(told.files) - sum(nargs == "*" for *_, nargs in told.files)
    most = len(told.files) if not any(nargs in ("+", "*") for *_, nargs in told.files) else len(files)
    if not least <= len(files) <= most:
        wanted = " ".join(f"[{name}]" if nargs == "*" else name for name, _, nargs in told.files) or "no file"
        raise UserError(f"{verb} takes {wanted}, and got {len(files)}: {', '.join(files) or 'nothing'}",
                        f"wantrain {verb} {wanted if told.files else ''}".rstrip())
    return made.parse_args([*options, *(["--", *files] if files else [])])


_MEANT = {"true": "yes", "1": "yes", "on": "yes", "y": "yes", "false": "no", "0": "no", "off": "no", "n": "no",
          "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "comfyui": "universal", "comfy": "universal",
          "musubi": "kohya"}
"""What people write for a value of an option."""


def _checked(verb: str, option: Option, value: str) -> str | int:
    """The value of an option as argparse is to keep it. Raises UserError for one that is not allowed."""
    if option.default is not None:
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{option.name}={value} is not allowed: a whole number from 1", f"wantrain {verb} --help")
        return int(value)
    if value not in option.values:
        close = _MEANT.get(value.lower()) or next(iter(difflib.get_close_matches(value, option.values, 1)), "")
        raise UserError(f"{option.name}={value} is not allowed: {', '.join(filter(None, option.values))}",
                        f"{option.name}={close}" if close in option.values and close else f"wantrain {verb} --help")
    return value


def _exists(word: str) -> bool:
    try:
        return Path(word).expanduser().exists()
    except (RuntimeError, OSError) as error:  # the home of somebody that is not known; a name that is too long
        raise UserError(f"{word}: {error}", "write the path out, from the root or from this folder") from error


def _is_file(word: str) -> bool:
    """Whether a word with an equals sign is meant as a file, one that is yet to be written perhaps."""
    return word.endswith(FILE_SUFFIXES) or split_strength(word)[1] is not None


def split_strengths(word: str) -> tuple[str, list[float]]:
    """FILE, FILE=STRENGTH or FILE=HIGH/LOW as (FILE, one or two strengths); 1 where none stands behind it."""
    file, _, numbers = word.rpartition("=")
    try:
        strengths = [float(number) for number in numbers.split("/")]
    except ValueError:
        return word, [1.0]
    return (file, strengths) if file and len(strengths) <= 2 else (word, [1.0])


def split_strength(word: str) -> tuple[str, float | None]:
    """FILE=STRENGTH as (FILE, strength), cut at the last equals sign; (word, None) where no number stands behind it."""
    file, _, strength = word.rpartition("=")
    try:
        return (file, float(strength)) if file else (word, None)
    except ValueError:
        return word, None


def processes(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """(how many processes `wantrain run` is to start, by --gpus N, the other arguments). Raises UserError."""
    text, others, words = "1", [], list(arguments)
    while words:
        word = words.pop(0)
        if word == "--gpus" or word.startswith("--gpus="):
            text = word.partition("=")[2] if "=" in word else words.pop(0) if words else ""
        else:
            others.append(word)
    if not text.isdecimal() or not int(text):
        raise UserError(f"--gpus {text!r} is not allowed: a whole number from 1", "wantrain run NAME --gpus 2")
    return int(text), others
