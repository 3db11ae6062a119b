"""A value as typed on the command line, or as it stands in a recipe's YAML, to the type that its key has.

The type decides how text is read, so a path, a prompt or a regular expression needs no quotes of ours: only what
belongs to a list or a dictionary is split.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any

import yaml


class Unfit(Exception):
    """A value does not fit the type of its key. Says what is allowed, and gives a value that would do."""

    def __init__(self, allowed: str, example: str = "") -> None:
        super().__init__(allowed)
        self.allowed, self.example = allowed, example


@dataclass(slots=True)
class Node:
    """One value of a list or dictionary: its text as typed, and its parts where it is one itself."""

    text: str
    is_quoted: bool = False
    items: list[Node] | None = None
    pairs: list[tuple[str, Node]] | None = None


_CLOSING = {"[": "]", "{": "}", "(": ")"}
_PLACEHOLDER = re.compile(r"\{\w*\}(?=[^\s,:\]}])")
"""`{expert}` at the beginning of a name, which is no dictionary."""


@dataclass(slots=True)
class _Reader:
    """Reads `[a, "b, c", {d: 1}]`. Brackets inside a plain word belong to it: patterns such as `blocks\\.[0-3]`."""

    text: str
    at: int = 0

    def node(self, stops: str) -> Node:
        self._skip()
        start = self.at
        char = self.text[start : start + 1]
        if char in ("[", "{") and char and not _PLACEHOLDER.match(self.text, start):
            parts = Node("", items=self._items()) if char == "[" else Node("", pairs=self._pairs())
            self._skip()
            if self.text[self.at : self.at + 1] in (*stops, ""):
                parts.text = self.text[start : self.at].strip()
                return parts
            self.at = start  # a word that only begins with a bracket
        end = _end_of_quote(self.text, start) if char in ("'", '"') and char else 0
        if end and self.text[end:].lstrip()[:1] in (*stops, ""):
            self.at = end
            self._skip()
            return Node(unquoted(self.text[start:end]), is_quoted=True)
        return Node(self._word(stops))

    def _skip(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def _word(self, stops: str) -> str:
        start, open_brackets = self.at, ""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "\\":
                self.at += 1
            elif not open_brackets and char in stops:
                break
            elif char in _CLOSING:
                open_brackets += _CLOSING[char]
            elif open_brackets.endswith(char):
                open_brackets = open_brackets[:-1]
            self.at += 1
        return self.text[start : self.at].strip()

    def _items(self) -> list[Node]:
        items: list[Node] = []
        self.at += 1
        while not self._ends("]"):
            items.append(self.node(",]"))
            self._next("]")
        return items

    def _pairs(self) -> list[tuple[str, Node]]:
        pairs: list[tuple[str, Node]] = []
        self.at += 1
        while not self._ends("}"):
            key = self.node(":}").text
            if self.text[self.at : self.at + 1] != ":":
                raise Unfit(f"a dictionary has KEY: VALUE, and {key!r} has no value")
            self.at += 1
            pairs.append((key, self.node(",}")))
            self._next("}")
        return pairs

    def _ends(self, closing: str) -> bool:
        self._skip()
        if self.at >= len(self.text):
            raise Unfit(f"it lacks its closing {closing}", f"{self.text}{closing}")
        if self.text[self.at] == closing:
            self.at += 1
            return True
        return False

    def _next(self, closing: str) -> None:
        self._skip()
        if self.text[self.at : self.at + 1] == ",":
            self.at += 1
        elif self.at < len(self.text) and self.text[self.at] != closing:
            raise Unfit(f"{self.text[self.at:]!r} follows where a comma or {closing} is due")


def _end_of_quote(text: str, start: int) -> int:
    """The place behind the quote that closes the one at `start`; 0 where none does."""
    at = start + 1
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] == text[start]:
            at += 1
        elif text[at] == text[start]:
            return at + 1
        at += 1
    return 0


def unquoted(text: str) -> str:
    """Take off one pair of quotes that encloses the whole text, if there is one."""
    if text[:1] in ("'", '"') and text and _end_of_quote(text, 0) == len(text):
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text


def read_text(text: str) -> Node:
    """Parse a list or dictionary of the command line into nodes; anything else is one word."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{")):
        return Node(unquoted(stripped), is_quoted=unquoted(stripped) != stripped)
    reader = _Reader(stripped)
    node = reader.node("")
    if reader.at < len(stripped) or (node.items is None and node.pairs is None):
        raise Unfit("its brackets do not match", "[a, b]")
    return node


def read_yaml(node: yaml.Node) -> Node:
    """Turn a node of a YAML file into our nodes."""
    if isinstance(node, yaml.SequenceNode):
        return Node("a list", items=[read_yaml(item) for item in node.value])
    if isinstance(node, yaml.MappingNode):
        return Node("a dictionary", pairs=[(key.value, read_yaml(value)) for key, value in node.value])
    assert isinstance(node, yaml.ScalarNode), "YAML has no other nodes"
    return Node(node.value, is_quoted=is_said_text(node))


def is_said_text(node: yaml.ScalarNode) -> bool:
    """Whether quotes or the tag `!!str` mark a word as text, although it may look like a number."""
    start, end = node.start_mark, node.end_mark
    written = start.buffer[start.pointer : end.pointer] if start.buffer else ""
    return node.style in ("'", '"') or ("!" in written.removesuffix(node.value) and node.tag == "tag:yaml.org,2002:str")


def convert(node: Node, wanted: Any) -> Any:
    """The value of the type `wanted` (an annotation of the schema). Raises Unfit.

    `${...}` is passed on as it is: OmegaConf resolves it when all keys are known.
    """
    if "${" in node.text and node.items is None and node.pairs is None:
        return node.text
    arguments = typing.get_args(wanted)
    if (inner := without_null(wanted)) is not wanted:
        is_null = not node.is_quoted and node.text in ("null", "~", "none", "None", "")
        return None if is_null and node.items is None else convert(node, inner)
    origin = typing.get_origin(wanted)
    if origin is list:
        return [convert(item, arguments[0]) for item in _as_items(node, arguments[0])]
    if origin is dict:
        return {key: convert(value, arguments[1]) for key, value in _as_pairs(node)}
    if is_dataclass(wanted):
        return _as_section(node, wanted)
    return _as_any(node) if wanted is Any else _as_scalar(node, wanted)


def without_null(wanted: Any) -> Any:
    """The type X of `X | None`; any other type as it is."""
    parts = typing.get_args(wanted)
    return next(part for part in parts if part is not type(None)) if type(None) in parts else wanted


def _as_scalar(node: Node, wanted: Any) -> Any:
    if node.items is not None and wanted is not str:
        raise Unfit("one value, not a list", node.items[0].text if node.items else "")
    if wanted is str and node.text == "null" and not node.is_quoted:
        raise Unfit("text, which null is not; nothing at all is the empty text, and the word itself wants quotes")
    return _SCALARS[wanted](node.text) if wanted in _SCALARS else _as_enum(node.text, wanted)


def _as_section(node: Node, wanted: Any) -> dict[str, Any]:
    """The values of a dataclass, by field."""
    hints = fields_of(wanted)
    for key, _ in (pairs := _as_pairs(node)):
        if key not in hints:
            raise Unfit(f"it has no {key}, but {', '.join(hints)}", (nearest(key, hints) or [""])[0])
    return {key: convert(value, hints[key]) for key, value in pairs}


def _as_items(node: Node, inner: Any) -> Sequence[Node]:
    """The items of a list; one name alone, or numbers with commas or an x between them, are understood as one."""
    if node.items is not None:
        is_one = typing.get_origin(inner) is list and all(item.text.isdecimal() for item in node.items)
        return [node] if is_one and node.items else node.items
    if not node.is_quoted and node.text in ("null", "~", ""):
        return []
    if inner is float and (number := _with_point(node.text)):
        raise Unfit(f"numbers in brackets, for a comma may be a decimal sign: [{number}] is one number, "
                    f"[{node.text.replace(',', ', ')}] are two", f"[{number}]")
    if inner in (int, float):
        return [Node(part.strip()) for part in re.split("[,x]", node.text)]
    return [node]


def _as_pairs(node: Node) -> list[tuple[str, Node]]:
    if node.pairs is None:
        raise Unfit("a dictionary, {KEY: VALUE}")
    return node.pairs


def _as_any(node: Node) -> Any:
    if node.items is not None:
        return [_as_any(item) for item in node.items]
    if node.pairs is not None:
        return {key: _as_any(value) for key, value in node.pairs}
    if not node.is_quoted and node.text in ("null", "~", ""):
        return None
    try:
        return _as_float(node.text)
    except Unfit:
        return node.text


def _as_int(text: str) -> int:
    plain = text.replace("_", "")
    if re.fullmatch(r"[+-]?\d{1,4000}", plain):
        return int(plain)
    if re.fullmatch(r"[+-]?\d+(\.0*)?([eE]\+?\d)?", plain) and float(plain).is_integer():
        return int(float(plain))
    raise Unfit("a whole number")


def _as_float(text: str) -> float:
    try:
        return float(text.replace("_", ""))
    except ValueError as error:
        if number := _with_point(text):
            raise Unfit(f"a number; a comma makes a list, the decimal sign is a point: {number}", number) from error
        raise Unfit("a number such as 1e-4", _without_unit(text)) from error


def _without_unit(text: str) -> str:
    """The number before letters, as in 24gb or 30 s; '' for other text."""
    number = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*[a-zA-Z%]+", text)
    return number[1] if number else ""


def _with_point(text: str) -> str:
    """The number that is written with a decimal comma, with a point; '' for other text."""
    return text.replace(",", ".") if re.fullmatch(r"[+-]?\d+,\d+([eE][+-]?\d+)?", text) else ""


def _as_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise Unfit("true or false")
    return words[text.lower()]


_SCALARS: Mapping[Any, Any] = {int: _as_int, float: _as_float, bool: _as_bool, str: str}

_MEANT: dict[tuple[str, str], tuple[str, str]] = {
    ("Resume", "true"): ("auto", "auto is what true would mean"),
    ("Resume", "yes"): ("auto", "auto is what yes would mean"),
    ("Resume", "false"): ("never", "never is what false would mean"),
    ("Resume", "no"): ("never", "never is what no would mean"),
    ("LoraFormat", "comfyui"): ("universal", "universal is what ComfyUI loads"),
    ("LoraFormat", "comfy"): ("universal", "universal is what ComfyUI loads"),
    ("LoraFormat", "musubi"): ("kohya", "kohya is what musubi-tuner writes and loads"),
    **{("Dtype", name): ("bfloat16", "float16 ends at 65,504 and would need its loss scaled; bfloat16 has float32's "
                         "range and needs nothing") for name in ("fp16", "float16", "half", "f16")},
    ("Dtype", "bf16"): ("bfloat16", "bf16 is spelled bfloat16"),
    ("Dtype", "fp32"): ("float32", "fp32 is spelled float32"),
}
"""(enum, a word that people type) -> the value that comes nearest, and why."""


def _as_enum(text: str, wanted: type[Enum]) -> str:
    """The name of one of the enum's values."""
    names = [one.name for one in wanted]
    if text in names:
        return text
    name, why = _MEANT.get((wanted.__name__, text.lower()), ("", ""))
    name = name or (nearest(text, names) or [names[0]])[0]
    raise Unfit(f"{why + '; ' if why else ''}one of {', '.join([name, *(n for n in names if n != name)])}", name)


def nearest(word: str, known: Mapping[str, Any] | Sequence[str], number: int = 3, likeness: float = 0.5) -> list[str]:
    """The known words that come nearest to a mistyped one, the nearest first; signs and case count for nothing.

    `likeness` in [0, 1] is what a word must have.
    """
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(_plain(one), one)
    return [plain[close] for close in difflib.get_close_matches(_plain(word), plain, number, likeness)]


def _plain(word: str) -> str:
    return re.sub(r"[^0-9a-z一-鿿]", "", re.sub(r"(\d)\.(\d)b", r"\1b\2", word.lower()))


def fields_of(schema: type) -> dict[str, Any]:
    """The fields of a section with their types; what a section says of itself (ClassVar) is no field."""
    return {name: wanted for name, wanted in typing.get_type_hints(schema).items()
            if typing.get_origin(wanted) is not typing.ClassVar}


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every field that is no section."""
    for name, wanted in fields_of(schema).items():
        if is_dataclass(wanted) and isinstance(wanted, type):
            yield from leaves(wanted, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", wanted
