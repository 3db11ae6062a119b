"""What the data tools cannot do is one message and exit code 2; nothing is lost or left half done."""

import argparse
import hashlib
import json
import os
import resource
import sys

import pytest

from data_tools import caption, captioner, filter, manifest, measuring, review, split
from data_tools.command import answer
from tests import odd_files
from tests.splitting import RULES, rows, run
from tools import cut_footage
from tools.tiny_world import make_demo
from wantrain.files import atomic_path, remembered
from wantrain.journal import appending
from wantrain.terms import UserError

TOOLS = {"split": split, "filter": filter, "caption": caption, "manifest": manifest, "review": review}
ODD = "a\u2028b\x0bc\x0cd\x1ce\x1df\x1eg\x85h\u2029i"
"""Ends of lines for splitlines(), and for nobody else."""


@pytest.fixture
def odd_folder(tmp_path):
    """A folder without films, one of other files, one of a film of 0 bytes."""
    for name in ("empty", "others", "hollow", "sound"):
        (tmp_path / name).mkdir()
    (tmp_path / "others" / "notes.md").write_text("notes")
    (tmp_path / "hollow" / "a.mp4").touch()
    odd_files.make(tmp_path / "sound", ["sound.mp4"])
    return tmp_path


@pytest.mark.parametrize("folder", ["empty", "others", "hollow", "sound"])
@pytest.mark.parametrize("arguments", [
    ("split",), ("manifest", "build"), ("caption", "--from", "names"), ("filter",), ("review",)], ids=lambda a: a[0])
def test_nothing_to_work_on_is_one_message(odd_folder, here, capsys, folder, arguments):
    name, *options = arguments
    out = [] if name == "review" else ["--out", str(odd_folder / "m.jsonl")]
    if arguments[-1] == "build" and folder == "sound":
        pytest.skip("what needs a decoder is found by --probe and by check")
    if name == "caption" and folder in ("hollow", "sound"):
        options = ["--from", "sidecars"]
    assert TOOLS[name].main([*options, str(odd_folder / folder), *out]) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == told.count("\n  next: ") == 1


@pytest.mark.parametrize("name", ["filter", "review"])
def test_a_manifest_without_rows_is_one_message(tmp_path, capsys, name):
    (tmp_path / "m.jsonl").write_text("\n")
    assert TOOLS[name].main([str(tmp_path / "m.jsonl")]) == 2
    assert "has no rows" in capsys.readouterr().err


def test_outputs_that_would_overwrite_are_refused(tmp_path, capsys):
    film, out = tmp_path / "a.mp4", tmp_path / "m.jsonl"
    film.write_bytes(b"film")
    for arguments, words in [
            ((film, "--out", tmp_path / "b.MP4"), "name of a video"), ((film, "--out", tmp_path), "a folder"),
            ((film, "--out", out, "--rejected", out), "would be overwritten"), (("a\0.mp4",), "NUL"),
            ((out, "--out", out), "would be overwritten"), ((film, "--out", tmp_path / ("x" * 300)), "too long")]:
        with pytest.raises(SystemExit, match="2"):
            split.main([str(a) for a in arguments])
        assert words in capsys.readouterr().err
    assert film.read_bytes() == b"film"


def test_an_os_error_is_told_with_its_path(tmp_path, capsys):
    def work(args):
        raise PermissionError(13, "Permission denied", str(tmp_path / "locked"))

    assert answer(argparse.ArgumentParser(), work, []) == 2
    assert f"error: {tmp_path / 'locked'}: Permission denied" in capsys.readouterr().err
    for out in ("/proc/nowhere/m.jsonl", "/dev/null/m.jsonl"):
        (tmp_path / "a.mp4").touch()
        assert split.main([str(tmp_path / "a.mp4"), "--out", out]) == 2
        assert out.rpartition("/")[0] in capsys.readouterr().err
    with pytest.raises(UserError, match="x" * 300), atomic_path(tmp_path / ("x" * 300)):
        pass


@pytest.fixture
def small_disk():
    """No file can grow beyond 2 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_cutting_onto_a_full_disk_loses_nothing(tmp_path, here, request):
    odd_files.write_film(tmp_path / "a.mp4", odd_files.film_of_shots((9, 12)))
    cut, out = tmp_path / "cut", tmp_path / "m.jsonl"
    out.write_text(json.dumps({"video": "b.mp4", "caption": "of another film"}) + "\n")
    cut.mkdir()
    (cut / ".a.mp4@0.000.mp4.1.tmp").write_text("of a worker that was ended")
    request.getfixturevalue("small_disk")
    with pytest.raises(UserError, match=str(cut)):
        run([tmp_path / "a.mp4"], out, cut_to=cut)
    assert [*cut.iterdir()] == []
    assert [row["video"] for row in rows(out)] == ["b.mp4"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not write .*file"):
        run([tmp_path / "a.mp4"], out, cut_to=tmp_path / "file")
    name = "é" * 120 + ".mp4"
    (tmp_path / "a.mp4").rename(tmp_path / name)
    with pytest.raises(UserError, match="leave no room"):
        run([tmp_path / name], out, cut_to=cut)
    assert len(run([tmp_path / name], tmp_path / "n.jsonl", RULES)[0].spans) == 2


def test_a_journal_keeps_every_line(tmp_path, small_disk):
    path = tmp_path / "j"
    with appending(path) as write:
        write(json.dumps({"key": ODD}, ensure_ascii=False) + "\n")
        write('[1]\n"x"\n' + "[" * 99 + '\n{"key": "cut')
    with appending(path) as write:
        write('{"key": "last"}\n')
        with pytest.raises(UserError, match="could not write"):
            write("x" * 4096)
    assert [*remembered(path, lambda row: row["key"])] == [ODD, "last"]


def test_the_tools_remember_what_holds_odd_ends_of_lines(tmp_path):
    for tool, value in ((caption, captioner.Answer(ODD)), (filter, measuring.Measured(fault=ODD))):
        journal = tool.journal_of(tmp_path / "m.jsonl")
        with appending(journal.path) as write:
            row = {name: getattr(value, name) for name in value.__dataclass_fields__}
            write(json.dumps({"key": "k"} | row, ensure_ascii=False) + "\n")
        assert journal.read() == {"k": value}


@pytest.mark.parametrize(("name", "module"), [("split", "scenedetect"), ("filter", "cv2")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, capsys, name, module):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4"}\n')
    monkeypatch.setitem(sys.modules, module, None)
    tool = TOOLS[name]
    given = tmp_path / ("a.mp4" if name == "split" else "m.jsonl")
    assert tool.main([str(given), "--out", str(tmp_path / "o.jsonl")]) == 2
    told = capsys.readouterr().err
    assert f"needs the package {module}" in told
    assert 'pip install "wantrain[data]"' in told
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])


@pytest.mark.parametrize("tool", [cut_footage, make_demo], ids=["cut_footage", "make_demo"])
def test_the_maintainers_tools_name_the_package_of_ffmpeg(tmp_path, monkeypatch, capsys, tool):
    excerpt = tmp_path / "excerpt.mp4"
    excerpt.write_bytes(b"film")
    monkeypatch.setattr(cut_footage, "EXCERPT_SHA256", hashlib.sha256(b"film").hexdigest())
    monkeypatch.setattr(cut_footage.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    given = [str(excerpt)] if tool is cut_footage else []
    (tmp_path / "out").mkdir()
    assert tool.main([*given, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "needs the package imageio_ffmpeg" in told
    assert 'next: pip install "wantrain[dev]"    (or: pip install "imageio-ffmpeg>=0.6,<1")' in told


@pytest.mark.parametrize("name", TOOLS)
def test_help_that_nobody_reads_to_its_end_is_no_fault(name, monkeypatch):
    there, here = os.pipe()
    os.close(there)
    with os.fdopen(here, "w") as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit, match="0"):
            TOOLS[name].main(["--help"])
