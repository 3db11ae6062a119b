"""Every tool reads a manifest as training does, whoever wrote it, and leaves one of which training reads the same."""

import json
import re
import shlex

import pytest

from data_tools import caption, editing, filter, looking, measuring, review
from data_tools import manifest as tool
from tests.foreign import FORMS, ROWS, read
from wantrain import journal

FOUND = {"measure": measuring.Measured(hashes=(1,)), "look": looking.Medium("", 9.0, 4, 4, fps=24.0)}
PLAIN = {"hub, jsonl", "musubi", "trailing commas", "CRLF", "hub", "an index and empty columns", "joined by cat",
         "CR", "backslashes", "capitals", "two marks"}
"""Forms with a row a line, which are edited where they stand."""


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """What workers find: every file is sound."""
    monkeypatch.setattr(journal, "in_workers", lambda function, items, *_, **__: (
        (item, FOUND[function.__name__], None) for item in items))


@pytest.fixture
def given(folder, request):
    """The manifest of a form."""
    name, text, encoding = FORMS[request.param]
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def clips(*paths):
    return sorted((str(clip.path.resolve()), clip.caption) for path in paths for clip in read(path))


def run(main, *arguments):
    assert main([str(argument) for argument in arguments]) == 0


def captioned(given, out):
    run(caption.main, given, "--from", "caption", "--overwrite", "--out", out)


def kept(given, out):
    run(caption.main, given, "--from", "names", "--out", out)


def filtered(given, out):
    run(filter.main, given, "--jobs", "1", "--out", out)


def merged(given, out):
    run(tool.main, "merge", given, "--out", out)


def divided(given, out):
    run(tool.main, "split", given, "--train", out, "--heldout", out.with_name("h.jsonl"), "--num", "1")


@pytest.mark.parametrize("given", FORMS, indirect=True)
@pytest.mark.parametrize("work", [captioned, kept, filtered, merged, divided])
def test_what_is_written_is_what_training_reads_of_the_original(work, given, folder):
    before = given.read_bytes()
    (folder / "deep").mkdir()
    out = folder / "deep" / "out.jsonl"
    work(given, out)
    assert clips(*out.parent.glob("*.jsonl")) == clips(given)
    assert given.read_bytes() == before


@pytest.mark.parametrize("given", FORMS, indirect=True)
def test_check_and_stats_read_it_too(given, capsys):
    run(tool.main, "check", given)
    run(tool.main, "stats", given)
    said = capsys.readouterr().out
    assert "2 rows, 0 faults" in said
    assert "2 of 2 clips have one" in said


@pytest.mark.parametrize("given", FORMS, indirect=True)
def test_captions_are_edited_in_their_place_or_the_command_that_makes_it_possible_is_told(given, request, capsys,
                                                                                         monkeypatch):
    monkeypatch.setattr(review.Review, "serve_forever", lambda server: None)
    is_plain = request.node.callspec.params["given"] in PLAIN
    assert review.main([str(given)]) == (0 if is_plain else 2)
    if not is_plain:
        command = shlex.split(re.search(r"next: (python -m data_tools\.manifest .*?)(    |$)", capsys.readouterr().err,
                                        re.M)[1])
        run(tool.main, *command[3:])
        given = given.parent / command[-1]
    manifest = editing.Manifest(given)
    key = next(iter(manifest.content().places))
    was = ROWS[0][1]
    assert manifest.save([editing.Edit(key, {"caption": was, "keep": None}, {"caption": "new", "keep": 1})])[1] == []
    assert [text for _, text in clips(given)] == ["new", ROWS[1][1]]
    assert [clip.measures.get("keep") for clip in read(given)] == [1, None]
    assert manifest.save([editing.Edit(key, {"keep": 1}, {"keep": None})])[1] == []


def test_in_place_a_manifest_of_others_becomes_lines_of_json_with_all_its_columns(folder):
    path = folder / "m.jsonl"
    rows = [{"file_name": f"clips\\{name}.mp4", "text": "\u200b", "score": "7.5", "tags": ["x"]} for name in "ab"]
    path.write_bytes(json.dumps(rows).encode("utf-16"))
    run(caption.main, path, "--from", "names")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"video": f"clips/{name}.mp4", "caption": name, "score": "7.5", "tags": ["x"]} for name in "ab"]


@pytest.mark.parametrize("main", [lambda path: tool.main(["check", path]), lambda path: filter.main([path])])
def test_columns_of_which_none_is_certainly_the_video_are_named(folder, main, capsys):
    (folder / "m.csv").write_text("where,words\nclips/a.mp4,a red house\n")
    assert main(str(folder / "m.csv")) == 2
    said = capsys.readouterr().err
    assert "has the columns 'where', 'words', and none that is certainly the video" in said
    assert "next: give them our names in the file: video for where, caption for words" in said


def test_sidecars_are_read_as_training_reads_them(folder):
    for name in "ab":
        (folder / "clips" / f"{name}.mp4").write_bytes(b"\0\1")
    for name, text, encoding in (("a", "caf\u00e9, drifting", "cp1252"), ("b", "red\n\u200b house", "utf-16")):
        (folder / "clips" / f"{name}.txt").write_bytes(text.encode(encoding))
    run(tool.main, "build", folder / "clips", "--out", folder / "built.jsonl")
    run(caption.main, folder / "clips", "--from", "names", "--out", folder / "kept.jsonl")
    run(caption.main, folder / "built.jsonl", "--from", "sidecars", "--overwrite", "--out", folder / "again.jsonl")
    for name in ("built", "kept", "again"):
        assert clips(folder / f"{name}.jsonl") == clips(folder / "clips")
    (folder / "clips" / "a.txt").write_bytes("\u0412 \u043b\u0435\u0441\u0443".encode("cp1251"))
    assert caption.main([str(folder / "clips"), "--from", "names", "--out", str(folder / "new.jsonl")]) == 2
