"""`wantrain VERB [key=value ...]`: one door to every verb; faults end in one message and a code that is not 0."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wantrain import logs
from wantrain.files import of_windows
from wantrain.options import (
    FILE_VERBS,
    MACHINE_VERBS,
    NEW,
    OPTION_VERBS,
    parse,
    parse_plan,
    parse_tune,
    parser,
    plan_parser,
    processes,
    split_strengths,
    tune_parser,
)
from wantrain.terms import EXIT_INTERRUPTED, EXIT_STALLED, EXIT_USER_ERROR, Interrupted, Stalled, UserError

if TYPE_CHECKING:  # every verb imports what it needs, and no more
    from wantrain.config import Config

VERBS = {
    "run": "all of it: check, cache, train, export, sample, evaluate, each left out where it is done; --gpus N",
    "check": "compose the config and say what it would do, without loading weights",
    "plan": "memory, hours and price on a card, and the fastest setting that fits it; no GPU, weights or clips needed",
    "report": "an HTML page of the data: what the model will see, what is dropped and why, tokens, cache size",
    "cache": "decode clips, encode them and their captions, once",
    "train": "train the LoRA, going on from the newest checkpoint",
    "export": "write the LoRA as .safetensors for ComfyUI and diffusers, proven by reading it back",
    "sample": "prompts x seeds x LoRAs x strengths -> videos and a contact sheet; going on with what is missing",
    "evaluate": "base against LoRAs and checkpoints: videos, numbers and an HTML page",
    "tune": "compare settings by held-out losses within a budget of minutes; the best becomes a recipe",
}

SHARED_VERBS = ("run", "cache", "train", "sample", "evaluate")
"""What several processes do together; the other verbs run in the first process of a launch."""

TOOLS = {"prepare": "films into captioned clips: probe, split, caption, filter, check, hold out (data_tools)"}
"""What is a tool of its own, started as a process: wantrain imports nothing of data_tools."""

READERS = ("run", "check", "report", "cache", "train")
"""What reads the clips; the others work from what these left."""

READ_FILES = {"FILE", "IN", "BASE", "TUNED"}
"""Arguments of the file verbs that are a path or a model id."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a fault the user can mend, 75 where a process was lost, 130 when
    interrupted; 1 is for our own faults.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with logs.lasting_console():
        if not given or given[0] in ("-h", "--help", "help"):
            print(_help())
            return 0
        verb, rest = given[0], given[1:]
        if verb == "__complete":  # Tab, by the scripts of `wantrain completion`
            found = importlib.import_module("wantrain.stages.completion").candidates
            print("\n".join(found(" ".join(rest), (*VERBS, *OPTION_VERBS, *TOOLS))))
            return 0
        if verb not in (*VERBS, *OPTION_VERBS, *TOOLS):
            close = difflib.get_close_matches(verb, (*VERBS, *OPTION_VERBS, *TOOLS), 1)
            print(f"error: no verb {verb!r}; there are {', '.join((*VERBS, *OPTION_VERBS, *TOOLS))}\n  next: "
                  f"{shlex.join(['wantrain', *close, *rest]) if close else 'wantrain --help'}", file=sys.stderr)
            return EXIT_USER_ERROR
        return _run_and_tell(verb, rest)


def _run_and_tell(verb: str, rest: list[str]) -> int:
    """Run a verb; what ended it is told on the console."""
    process = 0
    try:
        if (topic := _help_topic(rest)) is not None and verb not in TOOLS:
            print(_verb_help(verb, topic) if verb in VERBS else parser(verb).format_help())
            return 0
        _refuse_drives(verb, rest)
        process = _process(verb)
        return 0 if process and verb not in SHARED_VERBS else _run(verb, rest)
    except (UserError, OSError) as error:
        fault = _of_system(error) if isinstance(error, OSError) else error
        print(f"error{f' in process {process}' if process else ''}: {fault.message}\n  next: "
              f"{_whole(verb, rest, fault)}", file=sys.stderr)
        return _leave(EXIT_STALLED if isinstance(fault, Stalled) else EXIT_USER_ERROR)
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"\n{stop if str(stop) else 'interrupted; what was finished is kept'}\n  next: "
              f"{shlex.join(['wantrain', verb, *rest])}    goes on from there", file=sys.stderr)
        return _leave(EXIT_INTERRUPTED)


def _whole(verb: str, rest: Sequence[str], fault: UserError) -> str:
    """The next step of a fault. Where that is KEY=VALUE or --OPTION VALUE of this command line, the whole command with
    it, to be pasted: in place of what was given for the key, else of the word that is wrong.
    """
    step, gap, others = fault.next_step.partition("    ")
    try:
        words = _joined(verb, shlex.split(step))
    except ValueError:  # an apostrophe of a sentence
        words = []
    if not words or not all("=" in word and _takes(verb, _key(word)) for word in words) or "..." in step \
            or re.match(r".*\.yaml:\d+: ", fault.message):  # there the file is to be mended
        return fault.next_step
    keys, kept = [_key(word) for word in words], list[str]()
    values = ["=", *(text for word in words for text in (word.partition("=")[2], word[word.index("=") :]))]
    before = ""
    for word in _joined(verb, rest):
        if _key(word) in keys or _is_wrong(verb, word, fault, "recipe" in keys):
            before = word
        elif not before or "=" in before or word not in values:  # else it is the value, as in `lora.rank 4`
            kept.append(word)
    if not before and fault.message.startswith("unknown config key"):  # within the value of another word
        return fault.next_step
    return shlex.join(["wantrain", verb, *kept, *words]) + gap + others


def _is_wrong(verb: str, word: str, fault: UserError, is_of_recipe: bool) -> bool:
    """Whether a fault is about a word that can mean nothing here: an unknown key or option, or no KEY=VALUE at all."""
    if "=" in word or word.startswith("-"):
        is_named = word != "=" and re.search(rf"(?<![\w.]){re.escape(_key(word))}(?![\w.])", fault.message) is not None
        return is_named and (fault.message.startswith("unknown config key") or not _takes(verb, _key(word)))
    return fault.message.startswith(repr(word)) or (is_of_recipe and f" {word} " in f"{fault.message} ")


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("-+")


def _joined(verb: str, words: Sequence[str]) -> list[str]:
    """The words, with each --OPTION and its VALUE as one."""
    found: list[str] = []
    for word in words:
        is_value = bool(found) and re.fullmatch(r"--[\w-]+", found[-1]) and _takes(verb, _key(found[-1]))
        if is_value and not word.startswith("--"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _takes(verb: str, key: str) -> bool:
    """Whether the verb's command line may hold KEY=VALUE or --KEY VALUE."""
    if verb in OPTION_VERBS:
        return any(option.name == key and not option.is_flag for option in OPTION_VERBS[verb].options)
    schema = importlib.import_module("wantrain.config.known")
    own = {"plan": plan_parser, "tune": tune_parser}.get(verb)
    return bool(schema.annotation(key) is not None or key == "recipe"
                or (own and f"--{key} " in own().format_help()))


_DRIVE = re.compile(r"([\w.+~-]+=)?(['\"\[{]*)([A-Za-z]:[\\/].*)", re.DOTALL)


def _refuse_drives(verb: str, rest: Sequence[str]) -> None:
    """Raise UserError for a path with a drive of Windows, except there: it would name something in this folder."""
    for place, word in enumerate(rest):
        if os.name != "nt" and (found := _DRIVE.fullmatch(word)) and not Path(found[3]).exists():
            there = f"{found[1] or ''}{found[2]}{of_windows(found[3])}"
            raise UserError(f"{word} is a path of Windows, and this is {platform.system()}; WSL has its drives in /mnt",
                            shlex.join(["wantrain", verb, *rest[:place], there, *rest[place + 1 :]]))


def _process(verb: str) -> int:
    """This process's place among those of the launch; 0 without one.

    RANK without MASTER_ADDR is left over in a shell: no launcher sets one without the other.
    """
    rank, size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None and size is None:
        return 0
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        if value is not None and not value.isdecimal():
            raise UserError(f"{name}={value} is set, and is no number", f"unset {name}")
    if "MASTER_ADDR" in os.environ:
        return int(rank or 0)
    left = " and ".join(f"{name}={value}" for name, value in (("RANK", rank), ("WORLD_SIZE", size)) if value)
    if verb in SHARED_VERBS and int(size or 1) > 1:
        absent = [str(other) for other in range(int(size or 1)) if other != int(rank or 0)]
        raise Stalled(f"{left} and no MASTER_ADDR: {'processes' if len(absent) > 1 else 'process'} "
                      f"{', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''} of {size} cannot be met",
                      "unset RANK WORLD_SIZE    if they are left over; else start all with accelerate launch")
    print(f"note: {left} in the environment, and no MASTER_ADDR: left over, so this is taken as the only process",
          file=sys.stderr)
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return 0


def _of_system(error: OSError) -> UserError:
    """What the system refused, with the path that it was about. Raises the error where it was about none."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and error.filename is None:
        raise error
    if full:
        return UserError(f"could not write {error.filename or 'a file'}: {error.strerror}", "free some disk "
                         "space, then run the same command again: what was finished is kept")
    return UserError(f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: "
                     f"{error.strerror or type(error).__name__}", "mend the path or its rights, then run the same "
                     "command again: what was finished is kept")


def _leave(code: int) -> int:
    """Give the exit code back. Where a process group runs, end the process at once instead: at a normal exit torch
    waits for the other processes, and those may wait for this one; and its threads may abort the process (134).
    """
    distributed = sys.modules.get("torch.distributed")  # which takes seconds to import, where nothing else has
    if distributed and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(verb: str, rest: list[str]) -> int:
    if verb in TOOLS:
        return subprocess.run([sys.executable, "-m", f"data_tools.{verb}", *rest], check=False).returncode
    if verb in OPTION_VERBS:
        _run_without_recipe(verb, rest)
        return 0
    if verb == "sample" and "--like" in rest:
        _repeat(rest)
        return 0
    if verb == "tune":
        return _tune(rest)
    num_gpus, words = processes(rest) if verb == "run" else (1, rest)
    options, words = ([], words) if verb != "plan" else parse_plan(words)
    config_dir, overrides = _config_dir(words)
    # The libraries behind a verb take seconds to import, so help and faults of the config come first.
    schema = importlib.import_module("wantrain.config")
    config = schema.load(overrides, config_dir)
    if verb in READERS:
        schema.refuse_absent_clips(config)
    if verb in (*SHARED_VERBS, "check"):
        _refuse_missing(config, verb)
    if verb in ("run", "check", "sample") and any("sampler.prompts" in word for word in overrides):
        schema.tell_untriggered(config)
    if num_gpus > 1:
        importlib.import_module("wantrain.runner").launch_over(config, num_gpus, words)
    process = int(os.environ.get("RANK", "0"))
    log = logs.kept(Path(config.run.dir), process, ["wantrain", verb, *rest]) if verb in SHARED_VERBS \
        else contextlib.nullcontext()
    with log:
        if verb == "train":
            importlib.import_module("wantrain.recipe.clips").refuse_unready(config, words)
        room = "wantrain.runner" if verb == "run" else f"wantrain.stages.{verb}"
        importlib.import_module(room).run(config, words, *options)
    return 0


def _refuse_missing(config: Config, verb: str) -> None:
    """Raise UserError for what the config names as a LoRA and is none, and for a chat model that is nowhere, where the
    verb takes them.
    """
    lora_names = importlib.import_module("wantrain.models.lora_names")
    own = [lora_names.named(word)[0] for word in config.model.merge]
    if verb in ("run", "check", "train"):
        own += filter(None, [config.lora.start_from])
    if verb in ("run", "check", "sample", "evaluate"):
        own += [split_strengths(word)[0] for word in filter(None, [config.sampler.fast_lora, *config.sampler.loras])]
        if config.sampler.extend_prompts:
            importlib.import_module("wantrain.models.hub").here(config.sampler.extend_prompts)
    if own:
        lora_names.refuse_other_files(own)


def _run_without_recipe(verb: str, rest: Sequence[str]) -> None:
    """A verb of files or of the machine. Its arguments, and whether its files are there, come before the libraries
    behind it, which take seconds to import.
    """
    given = parse(verb, rest)
    for name in READ_FILES & vars(given).keys():
        found = importlib.import_module("wantrain.models.hub").here(getattr(given, name))
        if found and found.is_file():
            importlib.import_module("wantrain.models.weight_files").kind_of(found)
        elif found and name in ("FILE", "IN") and (lora_names := importlib.import_module(
                "wantrain.models.lora_names")).is_run(found):
            lora_names.weights_of(found)
    importlib.import_module(f"wantrain.stages.{verb}").run(given)


def _repeat(rest: Sequence[str]) -> None:
    """`sample --like VIDEO`."""
    if len(rest) != 2 or rest[0] != "--like":
        raise UserError("--like takes one video and nothing else, for all is as it was",
                        "wantrain sample --like VIDEO.mp4")
    video = Path(rest[1]).expanduser()
    if not video.exists():
        raise UserError(f"--like {video}: there is no such file", "wantrain sample --like VIDEO.mp4")
    importlib.import_module("wantrain.stages.sample").repeat(video)


def _tune(rest: Sequence[str]) -> int:
    given, words = parse_tune(rest)
    config_dir, overrides = _config_dir(words)
    schema = importlib.import_module("wantrain.config")
    config = schema.load(overrides, config_dir)
    schema.refuse_absent_clips(config)
    configs = importlib.import_module("wantrain.tuner.settings").configs_of(config, given.over, overrides, config_dir)
    importlib.import_module("wantrain.tuner.tune").run(configs, rest, given, overrides, config_dir)
    return 0


_CONFIG_DIR = re.compile(r"-{0,2}config[-_]?dir(?:=(.*))?", re.DOTALL)


def _config_dir(rest: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder of the user's own groups, and the other arguments. The folder `recipe` inside it is understood."""
    overrides: list[str] = []
    given, words = None, list(rest)
    while words:
        word = words.pop(0)
        if option := _CONFIG_DIR.fullmatch(word):
            given = option[1] if option[1] is not None else words.pop(0) if words else ""
        else:
            overrides.append(word)
    if given is None:
        return None, overrides
    folder = Path(given).expanduser()
    if folder.parent.name == "recipe" and folder.suffix == ".yaml" and folder.is_file():
        raise UserError(f"--config-dir needs a folder, and {given} is a recipe",
                        shlex.join(["wantrain", "check", "--config-dir", str(folder.parent.parent),
                                    f"recipe={folder.stem}"]))
    if not given or not folder.is_dir():
        raise UserError(f"--config-dir needs an existing folder, not {given!r}",
                        "wantrain check --config-dir my_configs recipe=mine")
    return folder.parent if folder.name == "recipe" and not (folder / "recipe").is_dir() else folder, overrides


def _help() -> str:
    verbs = "\n".join(f"  {name:10}{does}" for name, does in VERBS.items())
    tools = "\n".join(f"  {name:10}{does}" for name, does in TOOLS.items())
    file_verbs = "\n".join(f"  {name:10}{verb.does}" for name, verb in FILE_VERBS.items())
    machine_verbs = "\n".join(f"  {name:11}{verb.does}" for name, verb in MACHINE_VERBS.items())
    return (f"usage: wantrain VERB recipe=NAME [key=value ...]\n\n{tools}\n  {'new':10}{NEW.does}\n{verbs}\n\n"
            f"for any file:\n{file_verbs}\n\nof this machine:\n{machine_verbs}\n\n"
            "wantrain VERB --help tells the common keys, --help all every key. With several processes:\n"
            "  accelerate launch --config_file launch/ddp.yaml -m wantrain train recipe=NAME")


def _help_topic(rest: Sequence[str]) -> str | None:
    """What --help is asked about: the word behind it, '' for none; None where no help is asked for."""
    for place, word in enumerate(rest):
        option, _, topic = word.partition("=")
        if option in ("-h", "--help"):
            following = rest[place + 1] if len(rest) > place + 1 and "=" not in rest[place + 1] else ""
            return topic or following
    return None


def _verb_help(verb: str, topic: str) -> str:
    schema = importlib.import_module("wantrain.config")
    again = ["       wantrain sample --like VIDEO    makes a sampled video again, from what it says of itself"]
    own = [line for name, made in (("plan", plan_parser), ("tune", tune_parser)) if verb == name
           for line in made().format_help().partition("options:\n")[2].splitlines()]
    return "\n".join([f"usage: wantrain {verb} recipe=NAME [key=value ...] [--config-dir FOLDER]",
                      *(again if verb == "sample" else []), "",
                      f"  {VERBS[verb]}", "", *own, f"recipes: {', '.join(schema.recipes())}",
                      "your own: recipes/NAME.yaml, a file itself, or FOLDER/recipe/NAME.yaml with --config-dir FOLDER",
                      *schema.keys_help(topic)])
