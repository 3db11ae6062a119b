"""Manifests in their three forms, and every fault reported at once with its place."""

import json

import pytest

from tests.conftest import write_clips
from wantrain.data import manifest
from wantrain.data.buckets import buckets
from wantrain.terms import UserError


def read(path, name="s", **settings):
    return manifest.read(manifest.ClipSource(name, str(path), **settings))


@pytest.fixture
def folder(tmp_path):
    return write_clips(tmp_path / "set", 3, "a square {}")


def test_folder_jsonl_and_csv_give_the_same_clips(folder, tmp_path):
    rows = [(f"set/clip_{i}.mp4", f"a square {i}") for i in range(3)]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"video": v, "caption": c}) for v, c in rows))
    (tmp_path / "m.csv").write_text("video,caption\n" + "\n".join(f'{v},"{c}"' for v, c in rows))
    forms = [[(c.path.resolve(), c.caption) for c in read(p)]
             for p in (folder, tmp_path / "m.jsonl", tmp_path / "m.csv")]
    assert forms[0] == forms[1] == forms[2]
    assert len(forms[0]) == 3


def test_spans_and_ids_are_read(folder):
    row = {"video": "clip_0.mp4", "caption": "x", "id": "a", "start_s": 0.1, "end_s": 0.4}
    (folder / "m.jsonl").write_text(json.dumps(row))
    clip, = read(folder / "m.jsonl", repeats=3)
    assert (clip.id, clip.start_s, clip.end_s, clip.repeats) == ("s/a", 0.1, 0.4, 3)


def test_all_faults_are_reported_together_with_their_lines(folder):
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in [
        {"video": "clip_0.mp4", "caption": "fine"},
        {"video": "gone.mp4", "caption": "x"},
        {"video": "clip_1.mp4", "caption": "  "},
        {"video": "clip_0.mp4", "caption": "again"},
        {"video": "clip_2.mp4"},
        {"video": "clip_2.mp4", "caption": "x", "start_s": 2, "end_s": 1},
    ]))
    with pytest.raises(UserError) as caught:
        read(folder / "m.jsonl")
    text = str(caught.value)
    for line, fault in ((2, "missing file"), (3, "empty caption"), (4, "duplicate id"), (5, "no caption"), (6, "span")):
        assert any(f"line {line}:" in row and fault in row for row in text.splitlines()), (line, text)
    assert "5 fault(s)" in text


@pytest.mark.parametrize(("content", "said"), [
    ("{broken", "line 1: not JSON"), ("[1]", "line 1: expected an object"),
    ('{"video": "clip_0.mp4", "captoin": "x"}', "unknown column"), ("", "no clips"),
])
def test_a_malformed_manifest_names_the_line(folder, content, said):
    (folder / "m.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        read(folder / "m.jsonl")


def test_a_missing_or_empty_sidecar_is_named(folder):
    (folder / "clip_1.txt").unlink()
    (folder / "clip_2.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"clip_1\.mp4: no caption(.|\n)*clip_2\.mp4: empty caption"):
        read(folder)


def test_a_missing_source_names_its_key(tmp_path):
    with pytest.raises(UserError, match=r"does not exist") as caught:
        read(tmp_path / "no", "style")
    assert "data.sources.style.path" in caught.value.next_step


def test_a_size_off_the_grid_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="multiple of 16") as caught:
        buckets([5], [[40, 50]], 16)
    assert "[32, 48]" in caught.value.next_step
