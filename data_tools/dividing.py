"""How a set is divided into training and held-out clips, so that nothing of a film is on both sides."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_tools.rows import (
    Entry,
    refuse,
)
from wantrain.data.apart import OF_SPLIT
from wantrain.files import digest_text

TOUCHING_S = 1e-6
"""Spans nearer than this touch. Those of neighbouring shots are `split.GUARD_S` apart, which is more."""


def touching(rows: Iterable[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """(earlier row, row) of one file whose spans touch or overlap: for each row the one before that ends last."""
    longest: dict[str, Entry] = {}
    for row in sorted(rows, key=lambda r: r.clip):
        last = longest.setdefault(row.clip[0], row)
        if last is not row and row.span[0] <= last.span[1] + TOUCHING_S:
            yield last, row
        longest[row.clip[0]] = max(last, row, key=lambda r: r.span[1])


@dataclass(frozen=True, slots=True)
class Rule:
    """How clips are held out: about `share` of them, or `num`; all of one shot, or of one film, go together."""

    share: float | None
    num: int | None
    seed: int
    by_file: bool


def divide(rows: Sequence[Entry], rule: Rule, before: Mapping[tuple[str, float, float], bool]) -> list[bool]:
    """For each row whether it is held out. `before` says so for clips that were divided earlier, and is kept to.

    With a share, a group's side hangs on its name and the seed alone, not on what other clips there are. UserError
    where clips that were divided earlier now belong together.
    """
    held, faults, num_held = [False] * len(rows), [], 0
    free: list[tuple[float, list[int]]] = []
    for group in groups(rows, rule.by_file):
        sides = {before[rows[i].clip]: rows[i] for i in group if rows[i].clip in before}
        if len(sides) > 1:
            faults.append(f"{sides[False].place} is in --train and {sides[True].place} in --heldout, but they share a "
                          f"shot or are joined by another row of {len(group)}")
        elif sides:
            num_held += len(group) if True in sides else 0
            for i in group:
                held[i] = True in sides
        else:
            name = min(_home(rows[i], rule.by_file) for i in group)
            free.append((int(digest_text(rule.seed, name), 16) / 2**128, group))
    refuse(faults, "take one of them out, or divide anew: remove both --train and --heldout")
    for chance, group in sorted(free):
        if chance < rule.share if rule.share is not None else num_held + len(group) <= (rule.num or 0):
            num_held += len(group)
            for i in group:
                held[i] = True
    return held


def groups(rows: Sequence[Entry], by_file: bool) -> list[list[int]]:
    """Positions of rows that must not be parted: of one shot (or film), touching spans, a clip and its duplicates."""
    leader: dict[object, object] = {}

    def lead(one: object) -> object:
        while leader.setdefault(one, one) != one:
            leader[one] = leader[leader[one]]
            one = leader[one]
        return one

    pairs: list[tuple[object, object]] = [(id(a), id(b)) for a, b in touching(rows)]
    for row in rows:
        bonds = [("id", row.id), ("id", str(row.values.get("duplicate_of") or row.id))]
        if made := OF_SPLIT.fullmatch(row.id):
            bonds.append(("film", made["film"]) if by_file else ("shot", made["shot"]))
        bonds += [("file", row.clip[0])] if by_file else []
        pairs += [(id(row), bond) for bond in bonds]
    for one, other in pairs:
        leader[lead(one)] = lead(other)
    found: dict[object, list[int]] = collections.defaultdict(list)
    for i, row in enumerate(rows):
        found[lead(id(row))].append(i)
    return list(found.values())


def _home(row: Entry, by_file: bool) -> str:
    """The name that a clip's side hangs on; it does not change when rows come and go."""
    if made := OF_SPLIT.fullmatch(row.id):
        return made["film" if by_file else "shot"]
    return str(row.values["video"]) if by_file else row.id
