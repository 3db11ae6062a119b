"""Long work item by item: results by key, in worker processes, with a progress bar, remembered as they come."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from wantrain.files import json_line, remembered
from wantrain.jobs import Ending, Failure, in_workers, progress
from wantrain.terms import UserError


class Told(Protocol):
    """A result: a dataclass that tells by `fault` what is wrong with its item, '' if nothing."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def fault(self) -> str: ...


Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result", bound=Told)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """What came of the work on one item."""

    result: Result
    ending: Ending


Outcomes = Mapping[Key, Outcome[Result]]


def by_workers(function: Callable[[Item], Result], items: Mapping[Key, Item], failed: Callable[[Item, Failure], Result],
               jobs: int, timeout_s: float, *, limit: str = "--timeout-s"
               ) -> Callable[[Iterable[Key]], Generator[Outcomes[Key, Result]]]:
    """Make a function that runs items in worker processes and gives their outcomes by key, as they finish.

    `failed` makes the result of an item that has none; `limit` is the setting of `timeout_s`. No two keys have the same
    item.
    """

    def work(wanted: Iterable[Key]) -> Generator[Outcomes[Key, Result]]:
        keys = {items[key]: key for key in wanted}
        with contextlib.closing(in_workers(function, list(keys), jobs, timeout_s, limit=limit)) as answers:
            for item, result, failure in answers:
                if failure or result is None:
                    assert failure, "what has no result says why"
                    yield {keys[item]: Outcome(failed(item, failure), failure.ending)}
                else:
                    yield {keys[item]: Outcome(result, Ending.FAULT if result.fault else Ending.DONE)}

    return work


@dataclass(frozen=True, slots=True)
class Journal(Generic[Result]):
    """Results by key in a file, a JSON line each, written when they are there: a kill loses only what is in work.

    `restore` makes a result of a line without its key. Remembered are results of the endings `kept`; what ended
    otherwise is tried again by the next call.
    """

    path: Path
    restore: Callable[[dict[str, Any]], Result]
    kept: Collection[Ending] = (Ending.DONE,)

    def read(self) -> dict[str, Result]:
        """What is remembered. Left out are a line that a kill cut off and lines of another version."""
        return dict(remembered(self.path, lambda row: (row.pop("key"), self.restore(row))))

    def filled(self, known: Mapping[str, Result], keys: Sequence[str],
               work: Callable[[Sequence[str]], Generator[Outcomes[str, Result]]], unit: str, what: str,
               *, delay_s: float = 0) -> dict[str, Result]:
        """`known`, and the results of those keys that are not in it; `work` gives their outcomes, some at a time."""
        found = dict(known)
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        if not missing:
            return found
        with (appending(self.path) as write, contextlib.closing(work(missing)) as coming,
              progress(len(keys), len(keys) - len(missing), unit, what, delay_s=delay_s) as bar):
            for some in coming:
                found |= {key: outcome.result for key, outcome in some.items()}
                write("".join(json_line({"key": key} | dataclasses.asdict(outcome.result))
                              for key, outcome in some.items() if outcome.ending in self.kept))
                bar.update(len(some))
        return found


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[str], None]]:
    """In the block, a function that appends lines to a file at once. If a kill has cut off the last line, that line is
    ended first. Raises UserError where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:

        def write(text: str) -> None:
            data = text.encode()
            try:
                while data:
                    data = data[file.write(data):]
            except OSError as error:
                raise UserError(f"could not write {path}: {error.strerror}",
                                "free some disk space, then run the same command again: what was finished is kept"
                                ) from error

        write("\n")
        yield write
