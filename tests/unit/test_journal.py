"""The journal of the data tools: what is remembered hangs on how the work ended, and never on words."""

import json
from dataclasses import dataclass

import pytest

from wantrain import journal
from wantrain.jobs import Ending
from wantrain.journal import Journal, Outcome

ENDINGS = {"fine": Ending.DONE, "odd": Ending.FAULT, "late": Ending.TIMED_OUT, "dead": Ending.CRASHED}


@dataclass(frozen=True)
class Length:
    """How long a name is."""

    length: int = 0
    fault: str = ""


@pytest.fixture
def memory(tmp_path):
    return tmp_path / "below" / "m.journal"


def outcome(key, ending):
    """A result whose fault says nothing of its ending, or something wrong."""
    fault = "" if ending is Ending.DONE else "not finished after 3 s" if ending is Ending.FAULT else "gone"
    return {key: Outcome(Length(len(key), fault), ending)}


def filled(memory, keys, *kept):
    """(all results, keys that were worked on)."""
    asked = []

    def work(missing):
        asked.extend(missing)
        yield from (outcome(key, ENDINGS[key]) for key in missing)

    book = Journal(memory, lambda row: Length(**row), kept)
    return book.filled(book.read(), keys, work, "name", "count"), asked


@pytest.mark.parametrize("kept", [(Ending.DONE,), (Ending.DONE, Ending.FAULT), tuple({*Ending} - {Ending.TIMED_OUT})])
def test_what_ended_otherwise_is_tried_again(memory, kept):
    first, asked = filled(memory, [*ENDINGS, "fine"], *kept)
    assert (asked, first.keys()) == ([*ENDINGS], ENDINGS.keys())
    again, asked = filled(memory, [*ENDINGS], *kept)
    assert asked == [key for key, ending in ENDINGS.items() if ending not in kept]
    assert again == first


def test_what_comes_before_ctrl_c_is_kept_and_the_work_is_ended_at_once(memory, monkeypatch):
    ended = []

    def work(missing):
        try:
            yield from (outcome(key, Ending.DONE) for key in missing)
        finally:
            ended.append(True)

    def interrupted(*_):
        assert json.loads(memory.read_text().splitlines()[-1]) == {"key": "fine", "length": 4, "fault": ""}
        raise KeyboardInterrupt

    book = Journal(memory, lambda row: Length(**row))
    with monkeypatch.context() as patch:
        patch.setattr("tqdm.tqdm.update", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:  # which holds the frames, and with them the generator
            book.filled({}, ["fine", "odd"], work, "name", "count")
    assert (ended, caught.type) == ([True], KeyboardInterrupt)
    assert filled(memory, ["fine", "odd"], Ending.DONE)[1] == ["odd"]


def test_where_nothing_is_missing_nothing_is_opened(memory):
    known = {"fine": Length(4)}
    assert Journal(memory, Length).filled(known, ["fine"], lambda missing: iter(()), "name", "count") == known
    assert not memory.exists()


def test_an_outcome_is_a_fault_where_the_result_tells_one(monkeypatch):
    monkeypatch.setattr(journal, "in_workers", lambda function, items, *_, **__: (
        (item, function(item), None) for item in items))
    work = journal.by_workers(lambda text: Length(len(text), "!" * (text == "b")), dict(enumerate("abc")), None, 1, 1)
    found = list(work([0, 1]))
    assert found == [{0: Outcome(Length(1), Ending.DONE)}, {1: Outcome(Length(1, "!"), Ending.FAULT)}]
