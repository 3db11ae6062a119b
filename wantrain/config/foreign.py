"""What Hydra and OmegaConf say of a config, in our words: key, value, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from wantrain.config.keys import example_of, pasted
from wantrain.config.known import HELP, choices, nearest_keys
from wantrain.config.places import Place
from wantrain.terms import UserError

_WORDS = (
    (r"Interpolation key '(?P<it>[^']*)' not found", "it refers to ${{{it}}}, and there is no key {it}{meant}",
     "where no reference is meant, a backslash before the sign: \\${{{it}}}"),
    (r"Environment variable '(?P<it>[^']*)' not found", "it wants the environment variable {it}, which is not set",
     "export {it}=..."),
    (r"Missing mandatory value: (?P<it>\S+)", "it refers to {it}, which has no value", "{pasted}"),
    (r"Recursive interpolation|RecursionError", "a value in ${{...}} refers to itself",
     "write the value itself in one of the places"),
    (r"Unsupported interpolation type (?P<it>\S+)", "${{{it}:...}} is not known; ${{oc.env:NAME}} is an environment "
     "variable, ${{section.key}} another key", "where no reference is meant, a backslash before the sign: \\${{"),
    (r"no viable alternative|mismatched input|extraneous input|token recognition|missing BRACE",
     "what stands in ${{...}} is not understood, or not closed",
     "${{section.key}} refers to a key; where no reference is meant, a backslash before the sign: \\${{"),
    (r"alue '(?P<it>[^']*)'.* could not be converted to (?P<kind>\w+)", "{it!r} is no {kind}", "{pasted}"),
    (r"Invalid value '(?P<it>[^']*)', expected one of \[(?P<kind>[^]]*)\]", "{it!r} is none of {kind}", "{pasted}"),
)
"""(pattern of theirs, what is wrong, what to do)."""


_KINDS = {"Float": "number", "Integer": "whole number", "Boolean": "true or false"}


def told(error: Exception, places: Sequence[Place]) -> UserError:
    """Turn an error of Hydra or OmegaConf into a UserError. `places` hold the files of the groups."""
    text = "\n".join(str(one).strip() for one in (error, error.__cause__) if one is not None)
    if absent := re.search(r"You must specify '(\w+)'", text):
        group = absent[1]
        names = choices(places, group)
        return UserError(f"the recipe chooses no {group}; there are {', '.join(names)}",
                         f"{group}={names[0]}    or in the recipe, below defaults: - override /{group}: {names[0]}")
    found = re.search(r"full_key: (\S+)", text)
    key = re.sub(r"\[.*", "", found[1]) if found else ""
    for pattern, wrong, remedy in _WORDS:
        if match := re.search(pattern, text):
            words = {"it": "", "kind": "", **match.groupdict(), "key": key}
            close = nearest_keys(words["it"]) if words["it"] else []
            lacking = words["it"] if pattern.startswith("Missing") else key
            words |= {"meant": f"; did you mean ${{{close[0]}}}?" if close else "",
                      "kind": _KINDS.get(words["kind"], words["kind"]), "pasted": pasted(lacking, example_of(lacking))}
            return UserError(f"{key + ': ' if key else ''}{wrong.format(**words)}", remedy.format(**words))
    plain = [line for line in text.splitlines() if not re.match(r"\s*(full_key|reference_type|object_type)", line)]
    return UserError(f"{key + ': ' if key else ''}{' '.join(' '.join(plain).split())}", HELP)
