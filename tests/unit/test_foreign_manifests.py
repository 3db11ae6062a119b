"""Manifests and folders as others leave them: read where the meaning is certain, and every file accounted for."""

import errno
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from tests.conftest import arguments_for
from tests.foreign import FORMS, ROWS, read
from wantrain import cli, config, files, jobs, metrics
from wantrain.data import manifest, media, tables
from wantrain.engine import saved
from wantrain.terms import UserError


def said(folder, name, text, encoding="utf-8", **settings):
    """(file, caption) of every clip of the manifest of this text."""
    (folder / name).write_bytes(text.encode(encoding))
    return [(str(c.path.relative_to(folder)), c.caption) for c in read(folder / name, **settings)]


@pytest.mark.parametrize("form", FORMS)
def test_what_others_write_is_read_where_its_meaning_is_certain(form, folder):
    assert said(folder, *FORMS[form]) == ROWS


@pytest.mark.parametrize(("text", "words"), [
    ("video,caption\nclips/a.mp4,red, drifting\n", "line 2: 3 cells for 2 columns"),
    ('video,caption\nclips/a.mp4,"red\nclips/b.mp4,blue\n', "double quote"),
    ("video,caption,caption\nclips/a.mp4,x,y\n", "'caption' stands twice"),
    ("Video,video,caption\nclips/a.mp4,x,y\n", "the same column"),
    ("where,words\nclips/a.mp4,red\n", r"'where', 'words'(.|\n)*s\.columns=\{video: where, caption: words\}"),
    ("video,text,prompt\nclips/a.mp4,red,blue\n", r"'text', 'prompt'(.|\n)*columns="),
    ("video,caption\n./clips/a.mp4,x\nclips/a.mp4,y\n", "line 3: duplicate id 's/clips/a.mp4' "),
    ("video,caption\nclips/a.mp4,\u200b\ufeff\u2060\n", "empty caption"),
    ("video,caption\nclips/a.mp4,\ufeff\ufeff\n", "empty caption"),
    (f"video,caption\n{'n' * 300}.mp4,x\n", "line 2: .*too long"),
])
def test_what_is_not_certain_is_told_with_its_place(text, words, folder):
    with pytest.raises(UserError, match=words):
        said(folder, "m.csv", text)


def test_an_absolute_path_and_a_relative_one_are_one_clip(folder):
    with pytest.raises(UserError, match="line 3: duplicate"):
        said(folder, "m.csv", f"video,caption\nclips/a.mp4,x\n{folder}/clips/a.mp4,y\n")


@pytest.mark.parametrize("text", ['{"video": "clips/a.mp4", "caption": "x", "caption": "y"}', "[" * 100_000,
                                  '{"video": "clips/a.mp4", "caption": "x", "motion": 1' + "0" * 400 + "}",
                                  '[{"video": "clips/a.mp4", "caption": "x"}',
                                  '{"video": "clips/a.mp4", "caption": "x", "start_s": true}'])
def test_json_that_says_two_things_or_none_is_a_fault(text, folder):
    with pytest.raises(UserError, match="line 1"):
        said(folder, "m.jsonl", text)


def test_a_line_separator_inside_a_text_ends_no_line(folder):
    text = json.dumps({"video": "clips/a.mp4", "caption": "one\u2028two\x85three"}, ensure_ascii=False)
    assert said(folder, "m.jsonl", text) == [("clips/a.mp4", "one two three")]
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "note": "one\u2028two"}\n{"step": 2}\n{"st', encoding="utf-8")
    assert [row["step"] for row in metrics.read(path)] == [1, 2]
    assert [row["step"] for row in files.remembered(path, dict)] == [1, 2]


def test_text_of_another_code_page_is_not_guessed(folder):
    for words, encoding in (("Кадр, снят днём", "cp1251"), ("zażółć gęślą", "cp1250"), ("赤い家", "shift-jis")):
        with pytest.raises(UserError, match=r"not UTF-8(.|\n)*iconv"):
            said(folder, "m.csv", f"video,caption\nclips/a.mp4,{words}\n", encoding)


def test_columns_that_are_named_are_taken_also_from_shards_and_not_guessed(folder):
    rows = said(folder, "m.csv", "video,text,prompt\nclips/a.mp4,red,blue\n".replace(",blue", ",1"),
                columns={"caption": "text"})
    assert rows == [("clips/a.mp4", "red")]
    assert tables.columns_of(["file_name", "text"], {"video": "file_name"}) == {"video": "file_name", "caption": "text"}


NFD = unicodedata.normalize("NFD", "été")


def test_every_file_of_a_folder_is_used_or_passed_over_by_name(tmp_path):
    used = {f"{NFD}.mp4": "été.txt", "a.mp4": "a.TXT", "Clip.mp4": "clip.txt"}
    others = ["._a.mp4", ".DS_Store", "x.avif", "x.heic", "x.tif", "x.wmv", "stray.txt", "README", "deep/c.mp4",
              "control/a.mp4", "control/z.mp4", "control/notes.md"]
    for name in [*used, *used.values(), *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"caption {name}")
    listing = manifest.listed(manifest.ClipSource("s", str(tmp_path)))
    assert {c.path.name: c.caption for c in listing.clips} == {k: f"caption {v}" for k, v in used.items()}
    assert [c.partners.keys() for c in listing.clips if c.path.name == "a.mp4"] == [{"control"}]
    assert listing.account.with_clips == {"captions": 3, "partners": 1}
    assert listing.account.passed == {
        "hidden": [*sorted(["._a.mp4", ".DS_Store"], reverse=listing.account.passed["hidden"][0] == "._a.mp4")],
        "subfolders": ["deep/ (1 videos and images in it)"], ".avif": ["x.avif"], ".heic": ["x.heic"],
        ".tif": ["x.tif"], ".wmv": ["x.wmv"], "captions without a clip": ["stray.txt"], "without an ending": ["README"],
        "control without a clip": ["control/z.mp4"], ".md": ["control/notes.md"]}


@pytest.mark.parametrize(("names", "words"), [
    (["a.mp4", "a.txt", "a.TXT"], r"a\.mp4: .*which of them is meant"),
    (["a.mp4", "A.mp4", "a.txt"], r"A\.mp4: no caption"),
    (["a.mp4", "a.txt", "mask/a.png", "mask/a.mp4"], r"a\.mp4: .*which of them is meant"),
    (["b.wmv", "deep/a.mp4"], r"no clips(.|\n)*\.wmv: b\.wmv(.|\n)*deep/"),
])
def test_names_that_leave_a_choice_are_told(names, words, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_paths_that_cannot_be_opened_are_the_users_error_with_that_path(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "m.jsonl").mkdir()
    (tmp_path / "blocked").write_text("")
    for path in (tmp_path / "loop", tmp_path / "m.jsonl", tmp_path / ("n" * 300), tmp_path / "blocked" / "x",
                 "~nobody-of-this-name/clips", tmp_path / "blocked"):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in caught.value.message
    for write in (lambda path: files.write_text(path, "x"), lambda path: files.write_json(path, {})):
        with pytest.raises(UserError, match="blocked/x/y"):
            write(tmp_path / "blocked" / "x" / "y")


def test_a_folder_that_cannot_be_written_costs_only_memory(tmp_path, monkeypatch):
    """As on a read-only mount: digests and looks are made again."""
    film = tmp_path / "a.png"
    film.write_bytes(b"no picture")
    digest, temporary = files.digest_file(film), Path.touch
    (tmp_path / "memo").mkdir()

    def touch(path, *given, **named):
        if path.is_relative_to(tmp_path / "memo"):
            raise OSError(errno.EROFS, "Read-only file system")
        temporary(path, *given, **named)

    monkeypatch.setattr(Path, "touch", touch)
    assert files.digest_file(film, tmp_path / "memo") == digest
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert media.look_all([film], tmp_path / "memo", 1, 60.0)[film].fault
    assert not list((tmp_path / "memo").iterdir())


@pytest.mark.parametrize(("affinity", "quota", "wanted"), [
    ({0, 5, 7}, {"cpu.max": "max 100000"}, 3), ({0, 5, 7}, {"cpu.max": "150000 100000"}, 2), ({3}, {"cpu.max": ""}, 1),
    ({0, 1}, {"cpu.max": "1000 100000"}, 1), ({0, 5, 7}, {}, 3),
    ({0, 5, 7}, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({0, 5, 7}, {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2)])
def test_cores_are_those_that_this_process_may_use(affinity, quota, wanted, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, text in quota.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(jobs, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: affinity)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert jobs.cores() == wanted


def test_check_and_report_count_files_and_name_a_trigger_that_no_caption_holds(clips, cache_dir, cached, tmp_path,
                                                                             capsys):
    given = [*arguments_for(clips, cache_dir, tmp_path / "run"), "data.trigger=nosuchword"]
    stray = clips / "style" / "stray.wmv"
    stray.write_text("x")
    try:
        assert cli.main(["check", *given]) == 0
        shown = capsys.readouterr().out
        assert ("found      13 = 6 used + 0 dropped + 6 captions + 1 passed over\n"
                "  passed over 1 .wmv: stray.wmv") in shown
        assert "'nosuchword' is in captions of 0 of 8 clips: a surprise; they begin with 'sqstyle' (6)" in shown
        assert cli.main(["report", *given, "report.num_windows=1"]) == 0
        page = (tmp_path / "run" / "report" / "data.html").read_text()
        assert "passed over in style: .wmv" in page
        assert "no caption holds the trigger (nosuchword); they begin with" in page
    finally:
        stray.unlink()
    capsys.readouterr()
    assert cli.main(["check", *given, "data.sources.style.repeats=0.01"]) == 2
    assert "data.sources.style.repeats = 0.01 is too small" in capsys.readouterr().err


def test_where_clips_are_is_no_part_of_what_a_resume_compares():
    def keys(*overrides):
        return config.resume_keys(config.load(["recipe=demo_anime", *overrides]))

    moved = keys("data.sources.style.path=/elsewhere", "+data.sources.style.columns.caption=text")
    assert moved == keys()
    assert moved != keys("data.sources.style.repeats=7")
    saved.refuse_another_config({**moved, "data.sources.style.path": "/before"}, moved, {})


@pytest.mark.slow
def test_clips_that_moved_go_on_and_others_are_refused(wantrain, clips, tmp_path, capsys):
    shutil.copytree(clips / "style", tmp_path / "another name")
    elsewhere = f"data.sources.style.path='{tmp_path / 'another name'}'"
    assert wantrain("train", "train.num_steps=2") == 0
    (tmp_path / "another name" / "clip_0.txt").write_text("sqstyle, another text")
    assert wantrain("cache", elsewhere) == 0
    assert wantrain("train", elsewhere) == 2
    assert "(clips and captions)" in capsys.readouterr().err
    (tmp_path / "another name" / "clip_0.txt").write_text("sqstyle, square number 0")
    assert wantrain("train", elsewhere) == 0
    assert wantrain("train", "run.dir=" + str(tmp_path / "whole")) == 0
    ends = [next((run / "checkpoints").glob("step_000004")) / saved.TENSORS
            for run in (tmp_path / "run", tmp_path / "whole")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
