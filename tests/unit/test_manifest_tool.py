"""Manifests made, checked, merged and divided: every file and row is accounted for, no shot stands on both sides."""

import dataclasses
import itertools
import json
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from pyarrow import Table, parquet

from data_tools import dividing
from data_tools import manifest as tool
from data_tools.probing import Probed
from data_tools.rows import Entry, read_entries, sidecars
from data_tools.shots import GUARD_S
from data_tools.split import shot_of
from tests import odd_files
from tests.conftest import write_clips
from wantrain.data import manifest
from wantrain.terms import UserError

BYTES = b"\0\1\2\3"
"""Of a file that is only named, never opened."""


def run(*arguments):
    return tool.main([str(a) for a in arguments])


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text(f" {path.name}\n text ")
        else:
            path.write_bytes(BYTES)


# build


def test_every_file_found_is_a_row_or_named(tmp_path, capsys):
    touch(tmp_path / "in", "a.mp4", "a.txt", "a.2.txt", "a.b.mp4", "a.b.txt", "a.b.long.txt", "deep/er/c.PNG", "d.mov",
          "d.other.txt", "strya.txt", "f.mp4", "x.nfo", "x.mp3", "y.mp3")
    (tmp_path / "in/e.mp4").touch()
    (tmp_path / "in/f.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "in/a.empty.txt").write_text(" \n")
    assert run("build", tmp_path / "in", "--out", tmp_path / "out/m.jsonl") == 0
    assert rows(tmp_path / "out/m.jsonl") == [
        {"video": "../in/a.b.mp4", "caption": "a.b.txt text", "captions": ["a.b.long.txt text"]},
        {"video": "../in/a.mp4", "caption": "a.txt text", "captions": ["a.2.txt text"]},
        {"video": "../in/d.mov", "caption": "d.other.txt text"},
        {"video": "../in/deep/er/c.PNG", "caption": ""}]
    said = capsys.readouterr().out
    for words in ("found 17 = 4 clips + 2 faulty + 0 partners + 7 captions + 1 captions of no clip + 3 ",
                  "3 others (.mp3 2, .nfo 1)", "4 rows = 4 new + 0 of 0 there before; 3 captioned",
                  "e.mp4: empty (0 bytes)", "f.mp4: its caption f.txt cannot be read", "of no clip: ", "strya.txt"):
        assert words in said


def test_the_folder_form_and_the_manifest_built_of_it_are_the_same_clips(tmp_path):
    folder = write_clips(tmp_path / "set", 2, "a square {}")
    touch(folder, "clip_0.more.txt", "control/clip_1.mkv", "mask/clip_0.png")
    assert run("build", folder, "--out", tmp_path / "m.jsonl") == 0

    def clips(path):
        return [(c.path, c.caption, c.more_captions, c.partners)
                for c in manifest.read(manifest.ClipSource("s", str(path)))]

    assert clips(tmp_path / "m.jsonl") == clips(folder)


def test_rows_that_are_there_keep_what_they_say(tmp_path, capsys):
    touch(tmp_path, "a.mp4", "a.txt", "b.mp4", "b.txt", "film.mp4", "film.txt", "new.mp4", "same.mp4", "same.txt")
    before = [
        {"video": "gone.mp4", "caption": "of another folder", "id": "g"},
        {"video": "film.mp4", "start_s": 0, "end_s": 2, "caption": "", "id": "film.mp4@0.000#1"},
        {"video": "film.mp4", "start_s": 2, "end_s": 3, "caption": "span", "id": "film.mp4@2.000#1", "motion": 0.5},
        {"video": "a.mp4", "caption": "mine", "note": "x", "sharpness": None},
        {"video": "b.mp4", "caption": "", "sharpness": 2},
        {"video": "same.mp4", "caption": "same.txt text"},
    ]
    out = write(tmp_path / "m.jsonl", *before)
    assert run("build", tmp_path, "--out", out) == 0
    assert rows(out) == [*before[:4], before[4] | {"caption": "b.txt text"}, before[5],
                         {"video": "new.mp4", "caption": ""}]
    said = capsys.readouterr().out
    assert "7 rows = 1 new + 6 of 6 there before; 5 captioned" in said
    assert "line 4: its caption stays, its sidecars say otherwise: 'a.txt text'" in said
    assert "line 6" not in said
    whole = out.read_text()
    assert run("build", tmp_path, "--out", out) == 0
    assert out.read_text() == whole


def test_files_that_probe_found_faulty_are_left_out_and_no_caption_with_them(tmp_path, capsys):
    touch(tmp_path / "in", "a.mp4", "bad.mp4", "bad.txt", "changed.mp4")
    found = [Probed(str(tmp_path / "in" / name), *tool.stamp(tmp_path / "in" / name), fault=fault)
             for name, fault in (("a.mp4", ""), ("bad.mp4", "bad.mp4: damaged"), ("changed.mp4", "changed.mp4: cut"))]
    write(tmp_path / "in/probe.jsonl", *(dataclasses.asdict(p) | {"path": Path(p.path).name} for p in found))
    (tmp_path / "in/changed.mp4").write_bytes(BYTES * 2)
    out = write(tmp_path / "m.jsonl", {"video": "in/bad.mp4", "caption": "bad.txt text"}, {"video": "in/a.mp4"})
    arguments = ("build", tmp_path / "in", "--out", out, "--probe", tmp_path / "in/probe.jsonl")
    assert run(*arguments) == 0
    assert [row["video"] for row in rows(out)] == ["in/a.mp4", "in/changed.mp4"]
    said = capsys.readouterr().out
    assert "2 clips + 1 faulty" in said
    assert "fault: bad.mp4: damaged" in said
    assert "1 files are not in" in said
    write(out, {"video": "in/bad.mp4", "caption": "written by hand"})
    assert run(*arguments) == 2
    assert "line 1: its file is faulty, and its caption is in no sidecar: bad.mp4: damaged" in capsys.readouterr().err
    assert rows(out) == [{"video": "in/bad.mp4", "caption": "written by hand"}]
    assert run(*arguments[:-1], tmp_path / "no.jsonl") == 2


def test_controls_and_masks_are_paired_by_relative_name(tmp_path, capsys):
    touch(tmp_path, "in/a.mp4", "in/x/a.mp4", "in/b.mov", "in/c.mp4", "in/d.mp4", "in/control/a.mp4",
          "in/control/x/a.mp4", "in/control/b.mp4", "in/control/d.mkv", "in/control/d.avi", "in/control/lost.mp4",
          "masks/a.png", "masks/c.mkv", "masks/c.mp4")
    out = write(tmp_path / "m.jsonl", {"video": "in/a.mp4", "mask": "mine.png"})
    assert run("build", tmp_path / "in", "--out", out, "--mask", tmp_path / "masks") == 0
    assert {row["video"]: (row.get("control"), row.get("mask")) for row in rows(out)} == {
        "in/a.mp4": ("in/control/a.mp4", "mine.png"), "in/x/a.mp4": ("in/control/x/a.mp4", None),
        "in/b.mov": ("in/control/b.mp4", None), "in/c.mp4": (None, "masks/c.mp4"), "in/d.mp4": (None, None)}
    said = capsys.readouterr().out
    for words in ("found 11 = 5 clips + 0 faulty + 6 partners", "in/c.mp4 has no control",
                  "in/d.mp4 has several control", "lost.mp4 is the control of no clip", "c.mkv is the mask of no clip"):
        assert words in said


# reading


def test_three_forms_give_the_same_rows(tmp_path):
    values = [{"video": "a.mp4", "caption": "one, \u2028 two", "captions": ["x"], "id": "007", "start_s": 1.5,
               "end_s": 2.0, "motion": 0.25, "frames": 81},
              {"video": "b.mp4", "caption": "", "captions": None, "id": "b", "start_s": None, "end_s": None,
               "motion": None, "frames": 7}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in values)
    (tmp_path / "m.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "m.csv").write_text("\ufeffvideo,caption,captions,id,start_s,end_s,motion,frames\n"
                                    'a.mp4,"one, \u2028 two","[""x""]",007,1.5,2.0,0.25,81\nb.mp4,,,b,,,,7\n',
                                    encoding="utf-8")
    parquet.write_table(Table.from_pylist(values), tmp_path / "m.parquet")
    read = [read_entries(tmp_path / f"m.{kind}") for kind in ("jsonl", "csv", "parquet")]
    assert [faults for _, faults in read] == [[], [], []]
    for found, _ in read:
        assert [{k: v for k, v in row.values.items() if v is not None} for row in found] == [
            {k: v for k, v in row.items() if v is not None} for row in values]
    assert [r.place.rpartition("/")[2] for r in read[0][0]] == ["m.jsonl line 1", "m.jsonl line 3"]


BROKEN = ['{"video": "a.mp4"', "[1]", '{"caption": "x"}', '{"video": 7}', '{"video": "a.mp4", "start_s": "soon"}',
          '{"video": "a.mp4", "start_s": 2, "end_s": 2}', '{"video": "a.mp4", "start_s": -1}',
          '{"video": "a.mp4", "captions": "x"}', '{"video": "a.mp4", "captions": [1]}',
          '{"video": "a.mp4", "caption": true}', '{"video": "a.mp4", "start_s": true}',
          *(f'{{"video": "a.mp4", "{column}": -{"9" * 400}}}' for column in ("end_s", "luma"))]


@pytest.mark.parametrize("verb", ["build", "check", "merge", "split", "stats"])
def test_all_broken_lines_are_told_and_nothing_is_written(tmp_path, here, capsys, verb):
    """Two manifests of broken lines, one sound row between them."""
    touch(tmp_path, "a.mp4")
    sound = '{"video": "s3://bucket/a.mp4", "caption": "x"}'
    first = tmp_path / "m.jsonl"
    first.write_text("\n".join([BROKEN[0], sound, *BROKEN[1:]]))
    (tmp_path / "m.csv").write_text("video,caption\na.mp4,x,y\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out.jsonl"
    assert run(verb, *{"build": [tmp_path, "--out", first], "check": [first], "stats": [first],
                       "merge": [first, tmp_path / "m.csv", "--out", out],
                       "split": [first, "--train", out, "--heldout", tmp_path / "h.jsonl"]}[verb]) == 2
    said = capsys.readouterr().err
    assert [f"m.jsonl line {n}: " in said for n in range(1, 16)] == [True, False, *[True] * 12, False]
    assert ("m.csv line 2: 3 cells for 2 columns" in said) == (verb == "merge")
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".looked"} == before


# check


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A film and a picture, each of a second at most, and files that are neither."""
    folder = tmp_path_factory.mktemp("media")
    odd_files.make(folder, ["24 fps.mp4", "still.png", "garbage.mkv"])
    odd_files.write_film(folder / "short.mp4", odd_files.frames(0, 12))
    return folder


FILM = {"video": "24 fps.mp4", "caption": "sks a dog"}
CHECKED = {
    "no caption yet": {"caption": ""}, "one of its captions is empty": {"captions": [" "]},
    "the caption lacks 'sks'": {"captions": ["asks", "sks too"]}, "unknown column 'captoin'": {"captoin": "x"},
    "missing file": {"video": "gone.mp4"}, "duplicate id 'film'": {"id": "film"},
    "Invalid data": {"video": "garbage.mkv"},
    "begins at 1.1 s, but the video ends at 1 s": {"start_s": 1.1},
    "ends at 1.1 s, but the video at 1 s": {"end_s": 1.1},
    "control": {"control": "gone.mp4"},
    "ends at 0.9 s, but the control at 0.5 s": {"control": "short.mp4", "end_s": 0.9},
    "ends at 1 s, but the mask at 0.5 s": {"mask": "short.mp4"},
}


def test_check_tells_every_fault_with_its_line_and_training_agrees(media, tmp_path, here, capsys):
    wrong = [FILM | {"id": str(n)} | columns for n, columns in enumerate(CHECKED.values())]
    fine = [FILM | {"id": "film", "motion": 0.5, "start_s": 0.5, "end_s": 1.03},
            {"video": "still.png", "caption": "sks"},
            {"video": "still.png", "caption": "sks", "id": "with an end", "end_s": 2, "control": "short.mp4"},
            FILM | {"id": "c", "control": "short.mp4", "end_s": 0.5, "mask": "still.png"}]
    file = write(media / "wrong.jsonl", *fine, *wrong)
    assert run("check", file, "--trigger", "sks") == 2
    said = capsys.readouterr().err
    told = [line for line in said.splitlines() if "  fault: " in line]
    assert f"16 rows, {len(CHECKED)} faults" in said
    for number, words in enumerate(CHECKED, 5):
        assert any(f"line {number}: " in line and words in line for line in told), words
    for row in wrong:
        alone = write(media / "alone.jsonl", *fine[:1], row)
        try:
            manifest.read(manifest.ClipSource("s", str(alone)))
        except UserError:
            assert run("check", alone) == 2
    assert run("check", write(media / "fine.jsonl", *fine), "--trigger", "sks") == 0


def test_what_only_training_refuses_is_a_fault_too(media, here, monkeypatch, capsys):
    def refuse(source):
        raise UserError(f"{source.path}: of another day", "")

    monkeypatch.setattr(manifest, "read", refuse)
    assert run("check", write(media / "fine.jsonl", FILM)) == 2
    assert "of another day" in capsys.readouterr().err


def test_notes_are_no_faults(media, here, capsys):
    spans = [(0, 0.5), (0.5, 0.6), (0.55, 0.7), (0.1, 0.2), (0.1, 0.2)]
    file = write(media / "notes.jsonl", *(FILM | {"id": f"{n}", "start_s": a, "end_s": b}
                                          for n, (a, b) in enumerate(spans)),
                 {"video": "still.png", "caption": "w " * 40, "id": "\uff33till ", "control": "still.png"},
                 {"video": "still.png", "caption": "x", "id": "still", "start_s": 0})
    assert run("check", file) == 0
    notes = [line.replace(f"{file} ", "") for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert notes == [
        "  note: line 4: overlaps line 1", "  note: line 5: overlaps line 1", "  note: line 3: overlaps line 2",
        "  note: line 7: the same span as line 6", "  note: line 7: id 'still' is nearly '\uff33till ' (line 6)",
        "  note: 6 of 7 rows have no control: line 1, line 2, line 3, line 4, line 5, line 7",
        "  note: the longest caption has 40 words (line 6); the model reads 512 tokens"]


def test_files_are_looked_into_once_unless_they_change_or_are_faulty(media, tmp_path, here):
    (tmp_path / "a.mp4").write_bytes((media / "24 fps.mp4").read_bytes())
    touch(tmp_path, "bad.mkv")
    file = write(tmp_path / "m.jsonl", {"video": "a.mp4"}, {"video": "a.mp4", "start_s": 1}, {"video": "bad.mkv"})
    run("stats", file)
    with (tmp_path / "m.jsonl.looked").open("a") as memory:
        memory.write('{"key": "0", "fo')
    run("check", file)
    assert here == ["a.mp4", "bad.mkv", "bad.mkv"]
    (tmp_path / "a.mp4").write_bytes((media / "short.mp4").read_bytes())
    run("stats", file)
    assert here[3:] == ["a.mp4", "bad.mkv"]


# merge


def test_merged_rows_name_the_same_files_and_a_clip_stands_once(tmp_path, capsys):
    write(tmp_path / "one/m.jsonl",
          {"video": "a.mp4", "caption": "first", "id": "a", "motion": 1.5, "note": "kept"},
          {"video": "../f.mp4", "start_s": 1, "end_s": 2, "caption": "", "id": "f1", "control": "k.mp4"},
          {"video": "s3://bucket/a.mp4", "caption": "far"},
          {"video": "c.mp4", "caption": "c"}, {"video": "c.mp4", "caption": "c", "id": "twice"})
    write(tmp_path / "two/m.jsonl",
          {"video": "link.mp4", "caption": "second", "captions": ["first", "third"], "id": "z", "sharpness": 9,
           "motion": None},
          {"video": "../f.mp4", "start_s": 1.0, "end_s": 2.0, "caption": "found", "mask": "../one/k.mp4"},
          {"video": "../f.mp4", "start_s": 1, "end_s": 3, "caption": "longer", "id": "f2", "duplicate_of": "z"},
          {"video": "c.mp4", "caption": "another c", "duplicate_of": "d.mp4"}, {"video": "d.mp4", "caption": "d"})
    (tmp_path / "two/link.mp4").symlink_to("../one/a.mp4")
    out = tmp_path / "sub/all.jsonl"
    assert run("merge", tmp_path / "one/m.jsonl", tmp_path / "two/m.jsonl", "--out", out) == 0
    none = {"motion": None, "note": None, "sharpness": None}
    assert rows(out) == [row | none | {k: row[k] for k in none if k in row} for row in [
        {"video": "../one/a.mp4", "caption": "first", "id": "a", "motion": 1.5, "note": "kept",
         "captions": ["second", "third"], "sharpness": 9},
        {"video": "../f.mp4", "start_s": 1, "end_s": 2, "caption": "found", "id": "f1", "control": "../one/k.mp4",
         "mask": "../one/k.mp4"},
        {"video": "s3://bucket/a.mp4", "caption": "far"},
        {"video": "../one/c.mp4", "caption": "c"}, {"video": "../one/c.mp4", "caption": "c", "id": "twice"},
        {"video": "../f.mp4", "start_s": 1, "end_s": 3, "caption": "longer", "id": "f2", "duplicate_of": "a"},
        {"video": "../two/c.mp4", "caption": "another c", "duplicate_of": "../two/d.mp4"},
        {"video": "../two/d.mp4", "caption": "d"}]]
    assert "10 rows of 2 manifests = 8 rows of" in capsys.readouterr().out
    whole = out.read_text()
    assert run("merge", out, tmp_path / "one/m.jsonl", "--out", out) == 0
    assert out.read_text() == whole


def test_clashes_and_contradictions_are_told_and_prefixes_help(tmp_path, capsys):
    one = write(tmp_path / "one/m.jsonl", {"video": "a.mp4", "caption": "", "id": "x", "motion": 1},
                {"video": "b.mp4", "caption": "", "id": "y"})
    two = write(tmp_path / "two/m.jsonl", {"video": "../one/a.mp4", "caption": "", "motion": 2},
                {"video": "b.mp4", "caption": "", "id": "y"},
                {"video": "c.mp4", "caption": "", "id": "w", "duplicate_of": "y"})
    out = tmp_path / "all.jsonl"
    assert run("merge", one, two, "--out", out) == 2
    said = capsys.readouterr().err
    assert "2 fault(s)" in said
    assert f"{two} line 1: motion 2, but 1 in {one} line 1" in said
    assert f"id 'y' stands for several clips: {one} line 2, {two} line 2" in said
    assert not out.exists()
    write(two, *rows(two)[1:])
    assert run("merge", one, two, "--out", out, "--prefix") == 0
    assert [row["id"] for row in rows(out)] == ["one/m/x", "one/m/y", "two/m/y", "two/m/w"]
    assert rows(out)[3]["duplicate_of"] == "two/m/y"
    assert run("merge", one, "--out", out) == 2
    assert "its rows would be lost" in capsys.readouterr().err
    assert len(rows(out)) == 4


# split


def clip(film, start_s, end_s, **columns):
    values = {"video": f"{film}.mp4", "caption": "", "start_s": start_s, "end_s": end_s} | columns
    return Entry(Path("/nowhere"), f"line {film} {start_s}", values)


@st.composite
def cut_films(draw):
    """Films as split cuts them, in shots of three parts that follow each other at once, and spans with a pause between
    them that others made; not all of them are there.
    """
    found = []
    for film in range(draw(st.integers(2, 8))):
        for start_s in sorted(draw(st.sets(st.integers(0, 11), min_size=1))):
            made = f"{film}.mp4@{start_s // 3 * 3}.000#{start_s % 3 + 1}" if film else f"own {start_s}"
            found.append(clip(film, start_s, start_s + (0.9999 if film else 0.5), id=made))
    return found


@st.composite
def any_rows(draw):
    """Those, spans of any kind, and duplicates of anything."""
    found = draw(cut_films())
    spans = st.tuples(st.integers(0, 2), st.integers(0, 12), st.sampled_from([0.5, 1, 3, None]))
    for number, (film, start_s, length_s) in enumerate(draw(st.lists(spans, max_size=8))):
        end_s = None if length_s is None else start_s + length_s
        found.append(clip(film, start_s, end_s, **draw(st.sampled_from([{}, {"id": f"other {number}"}]))))
    for row in draw(st.lists(st.sampled_from(found), max_size=3, unique_by=id)):
        row.values["duplicate_of"] = draw(st.sampled_from([*(r.id for r in found), "gone"]))
    return draw(st.permutations(found))


rules = (st.builds(dividing.Rule, st.sampled_from([0.1, 0.5, 0.8]), st.none(), st.integers(0, 3), st.booleans())
         | st.builds(dividing.Rule, st.none(), st.integers(1, 9), st.integers(0, 3), st.booleans()))
quickly = hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)


def belong(a, b, by_file):
    """Whether two rows must not be parted, said anew and slowly."""
    same_file = a.values["video"] == b.values["video"]
    (a0, a1), (b0, b1) = a.span, b.span
    shots = [shot_of(row.id) if "@" in row.id else "" for row in (a, b)]
    copies = [row.values.get("duplicate_of") for row in (a, b)]
    return (shots[0] and shots[0] == shots[1]) or (same_file and (by_file or (a0 <= b1 and b0 <= a1))) or (
        a.id == b.id or copies[0] == b.id or copies[1] == a.id or (copies[0] is not None and copies[0] == copies[1]))


@quickly
@hypothesis.given(any_rows(), rules)
def test_nothing_that_belongs_together_is_parted(found, rule):
    held = dividing.divide(found, rule, {})
    for (a, a_held), (b, b_held) in itertools.combinations(zip(found, held, strict=True), 2):
        assert a_held == b_held or not belong(a, b, rule.by_file)
    assert rule.num is None or sum(held) <= rule.num


@quickly
@hypothesis.given(cut_films())
def test_shots_that_only_follow_each_other_may_be_parted(found):
    shots = {shot_of(row.id) or row.id for row in found}
    assert len(dividing.groups(found, by_file=False)) == len(shots)
    assert len(dividing.groups(found, by_file=True)) == len({row.values["video"] for row in found})


def test_spans_that_touch_go_together_and_those_of_two_shots_do_not_touch():
    for end_s, number in ((1, 1), (1.5, 1), (1 - GUARD_S, 2)):
        assert len(dividing.groups([clip(0, 1, 2, id="b"), clip(0, 0, end_s, id="a")], by_file=False)) == number


@quickly
@hypothesis.given(cut_films(), cut_films(), st.integers(0, 9), st.booleans())
def test_more_clips_move_no_other_even_where_the_sides_are_forgotten(found, more, seed, by_file):
    rule = dividing.Rule(0.4, None, seed, by_file)
    all_rows = list({row.id: row for row in [*more, *found]}.values())
    before, after = ({row.id: side for row, side in zip(some, dividing.divide(some, rule, {}), strict=True)}
                     for some in (found, all_rows))
    assert before.items() <= after.items()


@quickly
@hypothesis.given(any_rows(), st.integers(0, 99), rules)
def test_no_clip_changes_its_side_whatever_is_added(found, number, rule):
    first = found[: number % len(found)]
    before = {row.clip: side for row, side in zip(first, dividing.divide(first, rule, {}), strict=True)}
    now = [{before[found[i].clip] for i in group if found[i].clip in before}
           for group in dividing.groups(found, rule.by_file)]
    if {True, False} in now:
        with pytest.raises(UserError, match="joined by another row"):
            dividing.divide(found, rule, before)
    else:
        assert [before[row.clip] for row in first] == dividing.divide(found, rule, before)[: len(first)]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_is_near_what_was_asked(share, seed):
    many = [clip(n, 0, 1, id=f"{n}.mp4@0.000#1") for n in range(800)]
    held = dividing.divide(many, dividing.Rule(share, None, seed, False), {})
    assert sum(held) / len(many) == pytest.approx(share, abs=4 * (share * (1 - share) / len(many)) ** 0.5)
    assert sum(dividing.divide(many, dividing.Rule(None, 7, seed, False), {})) == 7


def test_another_seed_is_another_choice_and_the_same_one_is_not():
    many = [clip(n, 0, 1) for n in range(100)]
    for share, num in ((0.3, None), (None, 30)):
        choices = [dividing.divide(some, dividing.Rule(share, num, seed, False), {})
                   for some, seed in ((many, 0), (many[::-1], 0), (many, 1))]
        assert choices[0] == choices[1][::-1] != choices[2]


def test_both_sides_together_are_the_manifest(tmp_path, media, here, capsys):
    film = str(media / "24 fps.mp4")
    given = [{"video": f"set {n % 2}/{n}.mp4", "caption": f"{n}", "start_s": 0, "end_s": 2, "motion": n}
             for n in range(20)]
    file = write(tmp_path / "m.jsonl", *given, {"video": film, "caption": "", "id": "film", "start_s": 0.25})
    train, heldout = tmp_path / "parts/t.jsonl", tmp_path / "parts/h.jsonl"
    arguments = ("split", file, "--train", train, "--heldout", heldout, "--num", 6)
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "t.jsonl: 15 clips (71.4%)" in said
    assert "h.jsonl: 6 clips (28.6%)" in said
    seconds = [float(line.split()[-2]) for line in said.splitlines()[:2]]
    assert sum(seconds) == pytest.approx(40.8, abs=0.06)
    parts = sorted(rows(train) + rows(heldout), key=lambda r: r.get("motion", 99))
    assert [r | {"video": r["video"].removeprefix("../")} for r in parts[:20]] == given
    assert (parts[20]["id"], (train.parent / parts[20]["video"]).resolve()) == ("film", Path(film))
    write(file, *given[::-1], *({"video": f"{n}.mp4", "caption": ""} for n in range(30)))
    assert run(*arguments) == 2
    assert "a clip that the manifest lacks: film" in capsys.readouterr().err
    write(file, *rows(file), {"video": film, "caption": "", "id": "film", "start_s": 0.25})
    sides = {r["video"] for r in rows(heldout)}
    assert run(*arguments[:-1], 9) == 0
    assert sides < {r["video"] for r in rows(heldout)}
    assert len(rows(heldout)) == 9
    assert "21 clips stayed where they were" in capsys.readouterr().out
    write(train, *(r | {"caption": "by hand"} for r in rows(train)))
    assert run(*arguments) == 2
    assert "a caption that the manifest lacks: 'by hand'" in capsys.readouterr().err


def test_clips_that_were_parted_and_now_belong_together_are_told(tmp_path, capsys):
    file = write(tmp_path / "m.jsonl", {"video": "a.mp4", "caption": "", "start_s": 0, "end_s": 2, "id": "a"},
                 {"video": "a.mp4", "caption": "", "start_s": 3, "end_s": 4, "id": "b"})
    write(tmp_path / "t.jsonl", rows(file)[0])
    write(tmp_path / "h.jsonl", rows(file)[1])
    write(file, *rows(file), {"video": "a.mp4", "caption": "", "start_s": 1, "end_s": 5, "id": "c"})
    arguments = ("split", file, "--train", tmp_path / "t.jsonl", "--heldout", tmp_path / "h.jsonl")
    assert run(*arguments) == 2
    assert "line 1 is in --train and " in capsys.readouterr().err
    write(tmp_path / "h.jsonl", *rows(file)[:2])
    assert run(*arguments) == 2
    assert "line 1: also in" in capsys.readouterr().err
    assert len(rows(tmp_path / "h.jsonl")) == 2


def test_a_folder_of_which_nothing_is_held_out_is_named(tmp_path, here, capsys):
    given = [{"video": f"day {n % 2}/{n}.mp4", "caption": "", "end_s": 1} for n in range(4)]
    file = write(tmp_path / "m.jsonl", *given)
    assert run("split", file, "--train", tmp_path / "t.jsonl", "--heldout", tmp_path / "h.jsonl", "--num", 1) == 0
    held = rows(tmp_path / "h.jsonl")[0]["video"]
    other = {"day 0": "day 1", "day 1": "day 0"}[held.partition("/")[0]]
    assert f"note: nothing is held out of {other} (2 clips)" in capsys.readouterr().out


# stats


def test_stats_in_numbers(media, here, capsys):
    film = {"video": "24 fps.mp4"}
    file = write(media / "stats.jsonl", film | {"caption": "sks a brown dog", "motion": 1, "end_s": 17 / 24},
                 film | {"caption": "a brown cat", "captions": ["asks brown"], "motion": 4, "id": "x"},
                 film | {"caption": "", "motion": None, "id": "y", "start_s": 0.75},
                 {"video": "still.png", "caption": "a brown cat", "motion": 2.5, "source": "web"},
                 {"video": "gone.mp4", "caption": "a"})
    assert run("stats", file, "--trigger", "sks") == 0
    said = capsys.readouterr().out
    for words in ("5 clips of 3 files, 1 of them images; 2.0 s of video, 1 not looked into", "size      96x64 4",
                  "aspect    1.50 4", "fps       24 3",
                  "captions  4 of 5 clips have one, 5 in all; words 1 to 4, median 3",
                  "'sks' is in 1 of 5", "words     brown 4, asks 1",
                  "2 times: 'a brown cat'", "motion    1 to 4, median 2.5, of 3 clips", "0 to 1 s           2 ##",
                  "1 to 2 s           1 ##", "gone.mp4: missing file"):
        assert words in said, words
    assert "source" not in said
    assert "1 times" not in said
    table = [line.split() for line in said.splitlines() if "at 16 fps" in line or "at 24 fps" in line]
    assert table == [["at", "16", "fps", "3", "3", "3", "3"], ["at", "24", "fps", "1", "3", "3", "3"]]


# the command


def test_what_a_user_does_wrong(tmp_path, capsys):
    file = write(tmp_path / "m.jsonl", {"video": "a.mp4", "caption": "", "end_s": 1})
    for arguments, words in [
            (("check", tmp_path), "is no manifest"), (("stats", tmp_path / "no.jsonl"), "cannot be read"),
            (("build", tmp_path, "--out", tmp_path / "m.csv"), "written as .jsonl"),
            (("split", file, "--train", file, "--heldout", tmp_path / "h.jsonl"), "not three files"),
            (("split", file, "--train", tmp_path / "t.jsonl", "--heldout", tmp_path / "h.jsonl"), "of the 1 clips")]:
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    for arguments in (["--help"], ["split", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            tool.main(arguments)
    with pytest.raises(SystemExit, match="2"):
        run("split", file, "--train", "t", "--heldout", "h", "--share", "1.5")


def test_names_that_differ_in_case_or_accents_and_what_macos_leaves_beside_clips(tmp_path):
    """The same rules as for a folder that is a source."""
    from data_tools import caption, command

    nfd, nfc = "e\u0301te\u0301", "\u00e9t\u00e9"
    for name in (f"{nfd}.mp4", "Clip.mp4", "._Clip.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    for name in (f"{nfc}.txt", "clip.txt", "b.TXT", "c.txt"):
        (tmp_path / name).write_text(f"a caption of {name}")
    media, others = command.find_files([tmp_path])
    assert [file.name for file in media] == ["Clip.mp4", "b.mp4", f"{nfd}.mp4"]
    texts, strays = sidecars(media, others)
    assert {clip.name: [text.name for text in found] for clip, found in texts.items()} == {
        "Clip.mp4": ["clip.txt"], "b.mp4": ["b.TXT"], f"{nfd}.mp4": [f"{nfc}.txt"]}
    assert [text.name for text in strays] == ["c.txt"]
    rows = [Entry(tmp_path, "", {"video": file.name}) for file in media]
    assert caption.from_texts(rows, "sidecars")[0] == [[f"a caption of {name}"] for name in (
        "clip.txt", "b.TXT", f"{nfc}.txt")]
