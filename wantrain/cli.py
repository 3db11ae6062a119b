"""`wantrain VERB [key=value ...]`: one door to every verb; faults end in one message and a code that is not 0."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from wantrain.terms import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, UserError

VERBS = {
    "check": "compose the config and say what it would do, without loading weights",
    "cache": "decode clips, encode them and their captions, once",
    "train": "train the LoRA, going on from the newest checkpoint",
    "export": "write the LoRA as .safetensors for ComfyUI and diffusers, proven by reading it back",
    "sample": "prompts x seeds x strengths -> videos and a contact sheet",
    "evaluate": "base against LoRA: numbers and an HTML report",
}

SHARED_VERBS = ("cache", "train")
"""What several processes do together; the other verbs run in the first process of a launch."""

FILE_VERBS = {
    "inspect": "say what a weight or LoRA file holds and where it loads: inspect FILE [norms=all]",
    "convert": "rewrite a LoRA in another format: convert IN OUT format=NAME [dtype=float32] [expert=high|low]",
    "merge": "fold LoRAs into a transformer: merge BASE LORA[=STRENGTH] ... OUT [layout=official|diffusers] "
             "[dtype=bfloat16] [expert=high|low]",
    "extract": "take a LoRA out of a tuned transformer: extract TUNED BASE OUT [rank=32] [format=universal] "
               "[dtype=float32] [rest=refuse|diff|drop]",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a fault the user can mend, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0
    verb, rest = given[0], given[1:]
    if verb not in VERBS | FILE_VERBS:
        print(f"error: no verb {verb!r}; there are {', '.join(VERBS | FILE_VERBS)}\n  next: wantrain --help",
              file=sys.stderr)
        return EXIT_USER_ERROR
    if {"-h", "--help"} & set(rest):
        print(_verb_help(verb) if verb in VERBS else f"usage: wantrain {FILE_VERBS[verb]}")
        return 0
    process = int(os.environ.get("RANK", "0"))
    try:
        return 0 if process and verb not in SHARED_VERBS else _run(verb, rest)
    except UserError as error:
        print(f"error{f' in process {process}' if process else ''}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"\n{stop if str(stop) else 'interrupted; what was finished is kept'}\n  next: "
              f"{shlex.join(['wantrain', *given])}    goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(verb: str, rest: list[str]) -> int:
    if verb in FILE_VERBS:
        importlib.import_module(f"wantrain.stages.{verb}").run(rest)
        return 0
    config_dir = None
    if "--config-dir" in rest:
        place = rest.index("--config-dir")
        if place + 1 == len(rest) or not Path(rest[place + 1]).is_dir():
            raise UserError("--config-dir needs an existing folder",
                            "wantrain check --config-dir my_configs recipe=mine")
        config_dir = Path(rest[place + 1])
    overrides = [a for i, a in enumerate(rest) if a != "--config-dir" and rest[i - 1 : i] != ["--config-dir"]]
    if flags := [a for a in overrides if a.startswith("-")]:
        raise UserError(f"unknown option(s) {', '.join(flags)}", f"wantrain {verb} --help")
    # The libraries behind a verb take seconds to import, so help and faults of the config come first.
    config = importlib.import_module("wantrain.config").load(overrides, config_dir)
    importlib.import_module(f"wantrain.stages.{verb}").run(config, rest)
    return 0


def _help() -> str:
    verbs, file_verbs = ("\n".join(f"  {name:10}{text}" for name, text in table.items())
                         for table in (VERBS, FILE_VERBS))
    return (f"usage: wantrain VERB recipe=NAME [key=value ...]\n\n{verbs}\n\nfor any file:\n{file_verbs}\n\n"
            "wantrain VERB --help lists recipes and keys. With several processes:\n"
            "  accelerate launch --config_file launch/ddp.yaml -m wantrain train recipe=NAME")


def _verb_help(verb: str) -> str:
    schema = importlib.import_module("wantrain.config")
    lines = [f"usage: wantrain {verb} recipe=NAME [key=value ...] [--config-dir FOLDER]", "", f"  {VERBS[verb]}", "",
             f"recipes: {', '.join(schema.recipes())}",
             "your own: FOLDER/recipe/NAME.yaml with --config-dir FOLDER", "", "keys:"]
    for key, (default, sentence) in schema.described().items():
        lines.append(f"  {key} = {default}")
        lines += textwrap.wrap(sentence, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
