"""What sections are made of: rules, fields with what each value may be, and the class above all sections."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

if TYPE_CHECKING:  # it is made of the sections
    from wantrain.config.schema import Config

MISSING: Any = "???"
"""OmegaConf's default of a key that must be given."""

Rule = tuple[bool, str, object, str]
"""Whether it holds, key, value, what is allowed."""


class Section:
    """The base class of all sections. A rule stands in the section that it complains about."""

    __slots__ = ()
    may_change: ClassVar[tuple[str, ...]] = ()
    """Fields that a resume may change, for they do not fix the training's numbers; `*` stands for all."""
    entangled: ClassVar[tuple[str, ...]] = ()
    """Fields whose default other settings may forbid, so that it is no advice before these are known."""

    def rules(self, config: Config) -> Iterator[Rule]:
        """The rules that no single field's annotation can say.

        They may take for granted that every value fits its annotation, and that the sections before this one are right.
        """
        yield from ()

    def remedies(self, config: Config) -> dict[str, object]:
        """For an error's advice: values by key, for keys whose default other settings may forbid."""
        return {}


@dataclass(frozen=True, slots=True)
class Allowed:
    """A part of a field's annotation that says what each of its values may be. Null passes where the type allows it."""

    words: str
    holds: Callable[[Any], bool]


_ABOVE_0 = Allowed("above 0", lambda number: number > 0)
_FROM_0 = Allowed("0 or more", lambda number: number >= 0)
IntFrom0 = Annotated[int, _FROM_0]
IntFrom1 = Annotated[int, Allowed("1 or more", lambda number: number >= 1)]
FloatAbove0 = Annotated[float, _ABOVE_0]
FloatFrom0 = Annotated[float, _FROM_0]
Share = Annotated[float, Allowed("a share in [0, 1]", lambda share: 0 <= share <= 1)]
Seconds = Annotated[float, Allowed("seconds, above 0 and at most 1e8", lambda seconds: 0 < seconds <= 1e8)]
Seed = Annotated[int, Allowed("a whole number from 0, below 2^63", lambda seed: 0 <= seed < 2**63)]
Frames = Annotated[int, Allowed("each must be 4n+1: 1, 5, ..., 81", lambda frames: frames >= 1 and frames % 4 == 1)]


def _may_be_folder(path: str) -> bool:
    """False where a file is in the place of the folder or of one above it."""
    try:
        return all(above.is_dir() for above in (Path(path), *Path(path).parents) if above.exists())
    except OSError:
        return True  # whoever makes the folder says why it cannot


def _is_of_this_system(path: str) -> bool:
    return os.sep == "\\" or "\\" not in path or Path(path).is_dir()


Folder = Annotated[str, Allowed("the path of a folder", bool),
                   Allowed("a path with / between its folders, for a \\ is a part of a name here",
                           _is_of_this_system),
                   Allowed("a folder, or a path where one can be made; this is a file", _may_be_folder)]


def size_rule(key: str, size: list[int]) -> Rule:
    """The rule for a [height, width]."""
    return len(size) == 2 and min(size) > 0, key, size, "two positive numbers, [height, width]"


def near_size(size: Sequence[int], multiple: int) -> str:
    """The multiples that are nearest to a size, as a command line takes them."""
    return f"[{','.join(str(max(1, round(side / multiple)) * multiple) for side in size)}]"
