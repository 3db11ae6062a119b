"""`wantrain completion SHELL`: the script of Tab completion, and the answers that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from enum import Enum

from wantrain.options import OPTION_VERBS, Option
from wantrain.terms import UserError

ASK = "__complete"
"""What a script calls in place of a verb, with the line up to the cursor."""

SCRIPTS = {
    "bash": """# eval "$(wantrain completion bash)"    in ~/.bashrc
_wantrain() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }"
    local found=($(wantrain __complete "$line" 2>/dev/null))
    COMPREPLY=("${found[@]#"${word%"${word##*=}"}"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace
}
complete -o default -F _wantrain wantrain
""",
    "zsh": """# eval "$(wantrain completion zsh)"    in ~/.zshrc, after compinit
_wantrain() {
    local -a found
    found=("${(@f)$(wantrain __complete "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    compadd -Q -S '' -- ${(M)found:#*[.=]}
    compadd -Q -- ${found:#*[.=]}
    [[ -n "$found" ]] || _files
}
compdef _wantrain wantrain
""",
    "fish": """# wantrain completion fish | source    in ~/.config/fish/config.fish
complete -c wantrain -a '(wantrain __complete (commandline -cp) 2>/dev/null)'
""",
}


def run(given: argparse.Namespace) -> None:
    """Print the script of a shell. Raises UserError where there is none."""
    if given.SHELL not in SCRIPTS:
        raise UserError(f"no completion for {given.SHELL}: {', '.join(SCRIPTS)}", "wantrain completion bash")
    print(SCRIPTS[given.SHELL], end="")


def candidates(line: str, verbs: Collection[str]) -> list[str]:
    """The words that may stand at the end of a command line, which begins with `wantrain`."""
    *words, current = line.split(" ")
    words = [word for word in words if word]
    if len(words) < 2:
        return sorted(verb for verb in verbs if verb.startswith(current))
    if words[1] in OPTION_VERBS:
        return _options(words[1], words[-1], current)
    return _keys(current) if words[1] in verbs else []


def _options(verb: str, before: str, current: str) -> list[str]:
    """Of a verb without a recipe: its options and their values, as `--NAME VALUE` where a word begins so, else as
    `NAME=VALUE`.
    """
    known = OPTION_VERBS[verb].options
    found = [value for option in known if before == f"--{option.name}" for value in _values(option)]
    if not found and current.startswith("--") and "=" not in current:
        found = [f"--{option.name}" for option in known]
    if not found:
        dashes = "--" * current.startswith("--")
        found = [f"{dashes}{option.name}={value}" for option in known if not option.is_flag
                 for value in _values(option) or [""]]
    return [one for one in found if one.startswith(current) and (current or before.startswith("--"))]


def _values(option: Option) -> list[str]:
    """The values that an option may have, where they can be told."""
    from wantrain.config.known import choices
    from wantrain.config.places import Place, configs_folder

    return choices([Place(configs_folder())], "model") if option.name == "model" else [*filter(None, option.values)]


def _keys(current: str) -> list[str]:
    """Of a verb with a recipe: groups, keys, their values; sections alone until one is typed."""
    from wantrain.config.known import annotation, choices, groups_of, key_types, sections
    from wantrain.config.places import Place, configs_folder, own_places
    from wantrain.config.values import without_null

    places = [*own_places(), Place(configs_folder())]
    groups = groups_of(places)
    key, equals, value = current.partition("=")
    if equals:
        wanted = without_null(annotation(key)) if annotation(key) is not None else None
        names = choices(places, key) if key in groups else list(wanted.__members__) if isinstance(
            wanted, type) and issubclass(wanted, Enum) else ["true", "false"] if wanted is bool else []
        return [f"{key}={name}" for name in names if name.startswith(value)]
    found = [f"{group}=" for group in groups] + (
        [f"{one}=" for one in key_types()] if "." in current else [f"{name}." for name in sections()])
    return [one for one in found if one.startswith(current)]
