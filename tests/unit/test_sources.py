"""Sources: every kind gives the same clips, every fault is told with its place, and a shard writes nothing.

The hub is not reached: `datasets.load_dataset` is made to load a folder or table of this machine instead.
"""

import csv
import dataclasses
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import datasets
import fsspec
import httpx2
import pytest
import torch
from PIL import Image

from tests.conftest import moving_square, write_tar
from wantrain import pictures
from wantrain.data import decode, manifest, media
from wantrain.data.shards import LONGEST_TEXT_BYTES
from wantrain.terms import PARTNERS, Bucket, Clip, MediaInfo, PlannedClip, Remote, UserError

WANTED = {
    "a.mp4": (["red square", "a second text", "a third, in Kyōto"], "control/a.mp4", "mask/a.png"),
    "a.b.mp4": (["blue square", "not a text of a.mp4"], None, None),
    "c.mov": (["green square"], None, "mask/c.mp4"),
    "still.png": (["a still"], None, None),
}
"""What the fixture's folder holds: captions in order, control, mask. Every other form is made from this."""


@pytest.fixture(scope="module", autouse=True)
def _tables_of_this_module(tmp_path_factory):
    """datasets keeps the tables that it has read: here, not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("tables"))
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path_factory.mktemp("downloads"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "set"
    for seed, name in enumerate(("a.mp4", "a.b.mp4", "c.mov", "control/a.mp4", "mask/c.mp4")):
        pictures.write_mp4(folder / name, moving_square(seed, 6, 32, 48), 16)
    for seed, name in enumerate(("still.png", "mask/a.png")):
        Image.effect_noise((48, 32), 50 + seed).save(folder / name)
    for name, (captions, _, _) in WANTED.items():
        stem = name.rpartition(".")[0]
        for number, caption in enumerate(captions):
            (folder / f"{stem}{f'.{number}' * (number > 0)}.txt").write_text(f"{caption}\n", encoding="utf-8")
    (folder / "notes.md").write_text("no clip")
    return folder


def read(path, **settings):
    return manifest.read(manifest.ClipSource("s", str(path), **settings))


def content(where):
    if where is None:
        return None
    with media.local(where) as path:
        return path.read_bytes()


def told(clips):
    """What clips hold, wherever it is: the bytes of the medium, captions, the bytes of control and mask."""
    return sorted((content(c.path), [c.caption, *c.more_captions],
                   *(content(c.partners.get(kind)) or b"" for kind in ("control", "mask"))) for c in clips)


@pytest.fixture(scope="module")
def wanted(folder):
    def there(name):
        return (folder / name).read_bytes() if name else b""

    return sorted((there(name), captions, there(control), there(mask))
                  for name, (captions, control, mask) in WANTED.items())


def rows(prefix="", whole=None):
    """The rows of a manifest; with the folder in `whole`, media as bytes."""
    def medium(name):
        if name is None or whole is None:
            return name and prefix + name
        return {"path": None, "bytes": (whole / name).read_bytes()}

    return [{"video": medium(name), "caption": captions[0], "captions": captions[1:], "control": medium(control),
             "mask": medium(mask)} for name, (captions, control, mask) in WANTED.items()]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    return path


def write_csv(path, lines):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in lines)
    return path


def write_parquet(path, lines, **kinds):
    table = datasets.Dataset.from_list(lines)
    for column, feature in kinds.items():
        table = table.cast_column(column, feature)
    table.to_parquet(path)
    return path


ENCODED = {"video": datasets.Video(), "control": datasets.Video(), "mask": datasets.Image()}


def samples(folder, texts_in_json=False):
    """The members of each sample of the folder, as WebDataset names them."""
    for number, (name, (captions, control, mask)) in enumerate(WANTED.items()):
        key = f"part_{number}/0000"
        members = [(f"{key}.{kind}{Path(file).suffix}", (folder / file).read_bytes())
                   for kind, file in (("control.", control), ("mask.", mask), ("", name)) if file]
        members = [(member.replace("..", "."), data) for member, data in members]
        if texts_in_json:
            members.append((f"{key}.json", json.dumps({"caption": captions[0], "captions": captions[1:]}).encode()))
        else:
            members += [(f"{key}.{f'{i}.' * (i > 0)}txt", c.encode()) for i, c in enumerate(captions)]
        yield members


def shards(folder, to, texts_in_json=False):
    first, *others = samples(folder, texts_in_json)
    write_tar(to / "0.tar", first)
    write_tar(to / "1.tar", [member for members in others for member in members])
    return to / "*.tar"


FORMS = {
    "folder": lambda folder, to: folder,
    "jsonl": lambda folder, to: write_jsonl(to / "m.jsonl", rows("set/")),
    "jsonl, absolute": lambda folder, to: write_jsonl(to / "m.jsonl", rows(f"{folder}/")),
    "csv": lambda folder, to: write_csv(to / "m.csv", rows("set/")),
    "csv with a byte order mark": lambda folder, to: (
        path := write_csv(to / "m.csv", rows("set/")), path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()))[0],
    "parquet": lambda folder, to: write_parquet(to / "m.parquet", rows("set/")),
    "parquet of embedded media": lambda folder, to: write_parquet(to / "m.parquet", rows(whole=folder), **ENCODED),
    "parquet of bytes": lambda folder, to: write_parquet(to / "m.parquet", [
        {k: v["bytes"] if isinstance(v, dict) else v for k, v in row.items()} for row in rows(whole=folder)]),
    "shards": shards,
    "shards with json": lambda folder, to: shards(folder, to, texts_in_json=True),
}


@pytest.mark.parametrize(("form", "remote"), [
    *((form, False) for form in FORMS), *((form, True) for form in FORMS if form != "jsonl, absolute")])
def test_every_kind_of_source_gives_the_same_clips(form, remote, folder, wanted, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    path = str(FORMS[form](folder, tmp_path))
    if remote:
        path = f"memory://{uploaded(tmp_path)}/{Path(path).relative_to(tmp_path) if form != 'folder' else 'set'}"
    clips = read(path, fetched=tmp_path / "fetched")
    assert told(clips) == wanted
    assert len({c.id for c in clips}) == len(wanted)
    assert {c.source for c in clips} == {"s"}


def uploaded(local):
    """The folder's files behind memory://; returns where."""
    memory, root = fsspec.filesystem("memory"), f"wantrain-{local.name}"
    for top, _, names in os.walk(local, followlinks=True):
        for name in names:
            path = Path(top) / name
            memory.pipe_file(f"/{root}/{path.relative_to(local)}", path.read_bytes())
    return root


def test_a_manifest_behind_a_url_may_hold_whole_urls(folder, wanted, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    root = uploaded(tmp_path)
    clips = read(write_jsonl(tmp_path / "m.jsonl", rows(f"memory://{root}/set/")))
    assert told(clips) == wanted


def hub(patch, **local):
    """Make the hub's data set OWNER/NAME one of this machine."""
    load, open_url = datasets.load_dataset, fsspec.core.url_to_fs

    def instead(name, split):
        assert (name, split) == ("owner/name", "train")
        return load(split=split, **local)

    def here(url, **settings):
        assert not url.startswith("hf://"), "the hub would be asked"
        return open_url(url, **settings)

    patch.setattr(datasets, "load_dataset", instead)
    patch.setattr(fsspec.core, "url_to_fs", here)
    return "hf://datasets/owner/name"


def test_a_data_set_of_the_hub_with_embedded_media(folder, wanted, tmp_path, monkeypatch):
    table = write_parquet(tmp_path / "m.parquet", rows(whole=folder), **ENCODED)
    url = hub(monkeypatch, path="parquet", data_files=str(table))
    assert told(read(url, fetched=tmp_path / "fetched")) == wanted


def test_a_data_set_of_the_hub_whose_media_datasets_has_downloaded(folder, tmp_path, monkeypatch):
    """Folders of videos on the hub become rows with the paths of the downloaded files."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    write_jsonl(tmp_path / "hub" / "metadata.jsonl", [{"file_name": "a.mp4", "caption": "red square"}])
    url = hub(monkeypatch, path="videofolder", data_dir=str(tmp_path / "hub"))
    clip, = read(url, fetched=tmp_path / "fetched")
    assert (clip.caption, content(clip.path)) == ("red square", (folder / "a.mp4").read_bytes())


def test_a_relative_path_on_the_hub_is_the_hubs_file_though_one_of_that_name_is_here(folder, monkeypatch):
    """A manifest on the hub, whose file system is here the one in memory."""
    monkeypatch.chdir(folder)
    for module, name in ((fsspec.core, "url_to_fs"), (fsspec, "open")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda url, *given, _plain=plain, **named: _plain(
            url.replace("hf://", "memory://"), *given, **named))
    hub_files = fsspec.filesystem("memory")
    hub_files.pipe_file("/datasets/owner/name/m.jsonl", b'{"video": "a.mp4", "caption": "x"}')
    hub_files.pipe_file("/datasets/owner/name/a.mp4", b"of the hub")
    clip, = read("hf://datasets/owner/name/m.jsonl")
    assert content(clip.path) == b"of the hub"


def test_a_data_set_without_a_train_split_is_the_users_error(folder, tmp_path, monkeypatch):
    table = write_parquet(tmp_path / "m.parquet", rows("set/"))
    with pytest.raises(UserError, match="owner/name"):
        read(hub(monkeypatch, path="parquet", data_files={"test": str(table)}))


def test_embedded_media_are_written_once_under_names_of_their_content_and_nowhere_else(folder, tmp_path):
    table = write_parquet(tmp_path / "m.parquet", [rows(whole=folder)[1] | {"id": name} for name in ("one", "two")],
                          video=datasets.Video())
    before = tree(tmp_path)
    clips = read(table, fetched=tmp_path / "fetched")
    written = {path for path in tree(tmp_path) if path not in before}
    assert {c.path for c in clips} == {path for path in written if path.is_file()}
    assert written == {tmp_path / "fetched", clips[0].path}
    assert clips[0].path.suffix == ".mp4"
    noted = clips[0].path.stat().st_mtime_ns
    read(table, fetched=tmp_path / "fetched")
    assert {path for path in tree(tmp_path) if path not in before} == written
    assert clips[0].path.stat().st_mtime_ns == noted


def tree(folder):
    return set(folder.rglob("*"))


def test_a_parquet_that_changed_is_read_anew(folder, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    for caption in ("one", "two"):
        write_parquet(tmp_path / "m.parquet", [{"video": "set/c.mov", "caption": caption}])
        assert [c.caption for c in read(tmp_path / "m.parquet")] == [caption]


def test_a_parquet_behind_a_url_that_changed_is_read_anew(folder, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    for caption in ("one", "two"):
        write_parquet(tmp_path / "m.parquet", [{"video": "set/c.mov", "caption": caption}])
        clips = read(f"memory://{uploaded(tmp_path)}/m.parquet", fetched=tmp_path / "fetched")
        assert [c.caption for c in clips] == [caption]


NAMES = {"clip": "video", "prompt": "caption", "prompts": "captions"}


@pytest.mark.parametrize("form", [write_jsonl, write_csv, write_parquet])
def test_columns_of_other_names_are_mapped_and_are_no_measurements(form, folder, wanted, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    theirs = {ours: name for name, ours in NAMES.items()}
    lines = [{theirs.get(k, k): v for k, v in row.items()} | {"motion": 1.5} for row in rows("set/")]
    path = tmp_path / {"write_jsonl": "m.jsonl", "write_csv": "m.csv", "write_parquet": "m.parquet"}[form.__name__]
    clips = read(form(path, lines), columns=theirs)
    assert told(clips) == wanted
    assert all(c.measures == {"motion": 1.5} for c in clips)


def test_tables_that_others_made_may_hold_texts_that_nobody_knows(folder, tmp_path):
    row = {"video": str(folder / "c.mov"), "caption": "x", "licence": "free", "sharpness": 3}
    clip, = read(write_parquet(tmp_path / "m.parquet", [row]))
    assert clip.measures == {"sharpness": 3.0}


@pytest.mark.parametrize("form", [write_jsonl, write_csv, write_parquet])
def test_measurements_are_numbers_and_what_is_no_number_is_none(form, folder, tmp_path):
    lines = [{"video": str(folder / "c.mov"), "caption": "x", "id": f"{i}", "motion": value, "sharpness": 2}
             for i, value in enumerate((0.25, float("nan"), None, -3.0))]
    path = tmp_path / {"write_jsonl": "m.jsonl", "write_csv": "m.csv", "write_parquet": "m.parquet"}[form.__name__]
    clips = read(form(path, lines))
    assert [c.measures.get("motion") for c in clips] == [0.25, None, None, -3.0]
    assert all(c.measures["sharpness"] == 2.0 and c.measures.keys() <= {"motion", "sharpness"} for c in clips)


def test_spans_ids_and_numbers_of_a_csv_are_read(folder, tmp_path):
    (tmp_path / "m.csv").write_text(f'video,caption,id,start_s,end_s,motion\n{folder}/c.mov,"x,\ny",film@0.1#2,'
                                    f'0.1,0.3,1e-2\n{folder}/c.mov,z,,,,\n')
    clip, plain = read(tmp_path / "m.csv", repeats=0.5, speed=2)
    assert clip == Clip("s/film@0.1#2", folder / "c.mov", "x, y", "s", 0.5, 0.1, 0.3, speed=2,
                        measures={"motion": 0.01})
    assert (plain.id, plain.start_s, plain.end_s, plain.measures) == (f"s/{folder}/c.mov", 0.0, None, {"motion": None})


def test_the_json_of_a_shard_holds_spans_and_measurements(folder, tmp_path):
    columns = {"caption": "x", "start_s": 0.125, "end_s": 0.25, "motion": 2, "blur": None, "id": "own"}
    clip, = read(write_tar(tmp_path / "x.tar", [("k.mov", (folder / "c.mov").read_bytes()),
                                                ("k.json", json.dumps(columns).encode())]))
    assert (clip.id, clip.caption, clip.start_s, clip.end_s) == ("s/own", "x", 0.125, 0.25)
    assert {name: value for name, value in clip.measures.items() if value is not None} == {"motion": 2.0}


CSV_FAULTS = """video,caption,id,start_s,motion
{0}/c.mov,fine,one,,
{0}/gone.mp4,x,two,,
{0}/c.mov,"
 ",three,,
{0}/c.mov,again,one,,
{0}/c.mov,x,four,soon,
{0}/c.mov,x,five,,quick
,x,six,,
"""


def test_all_faults_of_a_csv_come_together_with_their_lines(folder, tmp_path):
    (tmp_path / "m.csv").write_text(CSV_FAULTS.format(folder))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "m.csv")
    lines = str(caught.value).splitlines()
    assert "6 fault(s)" in lines[0]
    for place, fault in ((3, "missing file"), (5, "empty caption"), (6, "duplicate id 's/one' (also line 2)"),
                         (7, "start_s is a number, not 'soon'"), (8, "unknown column 'motion' with 'quick'"),
                         (9, "no video")):
        assert any(line.startswith(f"  line {place}: {fault}") for line in lines), (place, lines)


def test_all_faults_of_a_table_and_of_shards_come_together_with_their_places(folder, tmp_path):
    lines = [{"video": str(folder / "c.mov"), "caption": "fine", "id": "one"},
             {"video": "gone.mp4", "caption": "x", "id": "two"}, {"video": None, "caption": "x", "id": "three"},
             {"video": str(folder / "c.mov"), "caption": None, "id": "four"}]
    with pytest.raises(UserError, match=r"3 fault\(s\)(.|\n)*row 1: missing(.|\n)*row 2: no video(.|\n)*row 3: no cap"):
        read(write_parquet(tmp_path / "m.parquet", lines))
    video = (folder / "c.mov").read_bytes()
    write_tar(tmp_path / "0.tar", [("a.mov", video), ("b.txt", b"x"), ("c.mov", video), ("c.json", b"{"),
                                   ("d.mov", video), ("d.mp4", video), ("d.txt", b"x")])
    write_tar(tmp_path / "1.tar", [("a.mov", video), ("a.txt", b" "), ("b.mov", video), ("b.txt", b"\xff"),
                                   ("e.mov", video), ("e.json", b'{"caption": "x", "start_s": "soon"}')])
    with pytest.raises(UserError) as caught:
        read(tmp_path / "*.tar")
    for place, fault in (("0.tar a", "no caption"), ("0.tar b", "no video"), ("0.tar c", "its json: "),
                         ("0.tar d", "more than one video"), ("1.tar a", "empty caption"),
                         ("1.tar b", "its txt: "), ("1.tar e", "start_s is a number")):
        assert f"{tmp_path}/{place}: " in str(caught.value)
        assert fault in next(line for line in str(caught.value).splitlines() if f"{tmp_path}/{place}: " in line)


def test_one_id_twice_in_shards_is_named_with_both_places(folder, tmp_path):
    video = (folder / "c.mov").read_bytes()
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", [("k.mov", video), ("k.json", b'{"id": "same", "caption": "x"}')])
    with pytest.raises(UserError, match=r"1\.tar k: duplicate id 's/same' \(also .*0\.tar k\)"):
        read(tmp_path / "*.tar")


LATIN = "Кадр, снят днём".encode("cp1251")


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "set"])
def test_a_text_that_is_not_utf8_is_a_fault_in_every_form(name, folder, tmp_path):
    medium = str(folder / "c.mov").encode()
    (tmp_path / "m.jsonl").write_bytes(b'{"video": "%b", "caption": "%b"}' % (medium, LATIN))
    (tmp_path / "m.csv").write_bytes(b"video,caption\n%b,%b\n" % (medium, LATIN))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "c.mov").write_bytes(b"")
    (tmp_path / "set" / "c.txt").write_bytes(LATIN)
    with pytest.raises(UserError):
        read(tmp_path / name)


@pytest.mark.parametrize("row", [{"captions": 5}, {"start_s": float("inf")}, {"caption": ["a list"]},
                                 {"video": {"bytes": "text"}}], ids=str)
def test_values_of_the_wrong_kind_are_faults(row, folder, tmp_path):
    lines = [{"video": str(folder / "c.mov"), "caption": "x"} | row, {"video": "gone.mp4", "caption": "x"}]
    with pytest.raises(UserError, match=r"2 fault\(s\)"):
        read(write_jsonl(tmp_path / "m.jsonl", lines))


def test_a_cell_that_is_too_long_for_csv_is_the_users_error(folder, tmp_path):
    with pytest.raises(UserError):
        read(write_csv(tmp_path / "m.csv", [{"video": str(folder / "c.mov"), "caption": "w " * 70000}]))


def test_frames_of_a_shard_are_those_of_the_plain_file(folder, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    write_tar(tmp_path / "x.tar", [("0.txt", b"first"), ("0.mp4", (folder / "a.b.mp4").read_bytes()),
                                   ("1.mp4", (folder / "a.mp4").read_bytes()), ("1.txt", b"x")])
    member = next(c for c in read(f"memory://{uploaded(tmp_path)}/x.tar") if c.id.endswith("1"))
    here = next(c for c in read(tmp_path / "x.tar") if c.id.endswith("1"))
    plain = next(c for c in read(folder) if c.id == "s/a.mp4")

    def frames(clip):
        return decode.read_window(PlannedClip(clip, Bucket(3, 32, 48), MediaInfo(), 16.0, 1 / 16))

    assert isinstance(member.path, Remote)
    assert torch.equal(frames(member), frames(plain))
    assert torch.equal(frames(here), frames(plain))
    assert media.look(member.path) == media.look(plain.path)


def test_a_shard_that_changes_is_noticed(folder, tmp_path):
    video = (folder / "c.mov").read_bytes()
    shard = write_tar(tmp_path / "x.tar", [("0.mp4", video), ("0.txt", b"x")])
    first, second = read(shard)[0].path, read(shard)[0].path
    assert first == second
    write_tar(shard, [("0.txt", b"x"), ("0.mp4", video + b"more")])
    assert read(shard)[0].path.key != first.key
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(UserError, match="is cut off"):
        media.fetch(first)
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        media.fetch(first)


def test_a_medium_behind_a_url_that_changes_is_noticed(folder, tmp_path):
    (tmp_path / "set").symlink_to(folder)
    root = uploaded(tmp_path)
    before = {c.id: c.path for c in read(f"memory://{root}/set")}
    assert before == {c.id: c.path for c in read(f"memory://{root}/set")}
    fsspec.filesystem("memory").pipe_file(f"/{root}/set/c.mov", b"another film")
    after = {c.id: c.path for c in read(f"memory://{root}/set")}
    assert {name for name in before if before[name] != after[name]} == {"s/c.mov"}


def test_a_shard_cut_off_anywhere_is_refused_or_whole(folder, tmp_path):
    """Cuts in headers, in data and in the padding at the end; what is accepted has lost nothing."""
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("mp4", b"v" * 700), ("txt", b"x"))]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    data_end = len(whole.rstrip(b"\0"))
    accepted, refused = [], []
    for length in (0, 1, *range(100, len(whole), 128), 512, 1024, data_end, data_end + 1):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        try:
            accepted.append((length, len(read(tmp_path / "cut.tar"))))
        except UserError as error:
            refused.append((length, "cut.tar" in error.message))
    assert accepted
    assert all(length >= data_end + 1024 and num_clips == 3 for length, num_clips in accepted)
    assert len(refused) > 30
    assert all(is_named for _, is_named in refused)


@pytest.mark.parametrize("kind", ["a flipped bit in a header", "two shards in one file", "cut off after empty data"])
def test_a_shard_that_tarfile_does_not_read_to_its_end_is_refused(kind, tmp_path):
    whole = write_tar(tmp_path / "0.tar", [("a.txt", b"x"), ("a.mp4", bytes(2048)), ("b.mp4", b"v"), ("b.txt", b"x")])
    content, after_a = bytearray(whole.read_bytes()), 512 + 512 + 512 + 2048
    if kind == "a flipped bit in a header":
        content[after_a + 5] ^= 1
    elif kind == "two shards in one file":
        content += write_tar(tmp_path / "1.tar", [("c.txt", b"x"), ("c.mp4", b"v")]).read_bytes()
    else:
        content = content[:after_a]
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.tar"):
        read(tmp_path / "bad.tar")


def test_a_packed_or_foreign_file_called_tar_is_refused(folder, tmp_path):
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(folder / "a.txt", "a.txt")
    (tmp_path / "text.tar").write_text("no archive " * 500)
    (tmp_path / "film.tar").write_bytes((folder / "a.mp4").read_bytes())
    for name in ("packed.tar", "text.tar", "film.tar"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder some levels down to stand in, with the temporary files of this process beside it."""
    here = tmp_path / "up" / "here"
    here.mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return here


HOSTILE = ("../../x.mp4", "/etc/wantrain-x.mp4", "..//y.mp4", "a/../../z.mp4", "~/w.mp4", "-rf.mp4", "b\n.mp4",
           "$(touch v).mp4")


def test_names_in_a_shard_place_nothing_anywhere(folder, sandbox, tmp_path):
    video = (folder / "a.mp4").read_bytes()
    members = [(name, video) for name in HOSTILE] + [(f"{name[:-3]}txt", b"x") for name in HOSTILE]
    write_tar(sandbox / "x.tar", members)
    before = tree(tmp_path)
    clips = read("x.tar")
    assert len(clips) == len(HOSTILE)
    for clip in clips:
        assert media.look(clip.path).num_frames == 6
        with media.local(clip.path) as path:
            assert path.read_bytes() == video
            new = tree(tmp_path) - before
            assert path in new
            assert all(p.is_relative_to(tmp_path / "temporary") for p in new)
    for name in HOSTILE:
        with media.local(dataclasses.replace(clips[0].path, name=name)) as path:
            assert {p for p in tree(tmp_path) - before if p.is_file()} == {path}
            assert path.resolve().is_relative_to(tmp_path / "temporary")
    assert tree(tmp_path) == before
    assert not Path("/etc/wantrain-x.mp4").exists()


def test_links_and_devices_in_a_shard_are_no_media(folder, sandbox, tmp_path):
    """What a link points to is not read, though it be there."""
    (sandbox / "secret.mp4").write_bytes((folder / "a.mp4").read_bytes())
    with tarfile.open(sandbox / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"k{kind.decode()}.mp4")
            member.type, member.linkname = kind, str(sandbox / "secret.mp4")
            tar.addfile(member)
            text = tarfile.TarInfo(f"k{kind.decode()}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"4 fault\(s\)") as caught:
        read("x.tar")
    assert str(caught.value).count("no video") == 4
    assert tree(tmp_path) == before


@pytest.mark.parametrize("column", ["video", *PARTNERS])
def test_the_json_of_a_shard_names_no_files_of_this_machine(column, folder, sandbox):
    write_tar(sandbox / "x.tar", [("k.mp4", b"v"), ("k.control.mp4", b"v"), ("k.mask.mp4", b"v"), ("k.txt", b"x"),
                                  ("k.json", json.dumps({column: str(folder / "a.mp4")}).encode())])
    with pytest.raises(UserError, match=column):
        read("x.tar")


def test_the_order_of_a_samples_members_does_not_matter(tmp_path):
    members = [("k.mp4", b"v"), ("k.txt", b"text"), ("k.json", b'{"caption": "text", "motion": 1}')]
    outcomes = []
    for number, order in enumerate((members, members[::-1])):
        try:
            clip, = read(write_tar(tmp_path / f"{number}.tar", order))
            outcomes.append((clip.caption, clip.measures))
        except UserError as error:
            outcomes.append(error.message.partition("k: ")[2])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("text", [b"[1]", b"5", b"null", b'{"captions": 5}', b'{"captions": "text"}'])
def test_json_that_is_no_object_or_has_no_list_of_captions_is_a_fault_of_its_sample(text, tmp_path):
    with pytest.raises(UserError, match="k: its json"):
        read(write_tar(tmp_path / "x.tar", [("k.mp4", b"v"), ("k.txt", b"x"), ("k.json", text)]))


@pytest.mark.parametrize("name", ["._k.mp4", ".DS_Store", "README.md", "LICENSE"])
def test_members_that_belong_to_no_sample_are_left_alone(name, tmp_path):
    shard = write_tar(tmp_path / "x.tar", [(name, b"other"), ("k.mp4", b"v"), ("k.txt", b"x")])
    listing = manifest.listed(manifest.ClipSource("s", str(shard)))
    assert [clip.caption for clip in listing.clips] == ["x"]
    assert list(listing.account.passed.values()) == [[name]]


def test_shards_that_others_made_may_hold_texts_that_nobody_knows(tmp_path):
    """As video2dataset and img2dataset write them."""
    columns = {"url": "somewhere", "key": "000", "status": "success", "sharpness": 2}
    clip, = read(write_tar(tmp_path / "x.tar", [("k.mp4", b"v"), ("k.txt", b"x"),
                                                ("k.json", json.dumps(columns).encode())]))
    assert clip.measures == {"sharpness": 2.0}


def test_the_endings_of_a_samples_members_may_be_capitals(tmp_path):
    clip, = read(write_tar(tmp_path / "x.tar", [("K.MP4", b"v"), ("K.JSON", b'{"motion": 1}'), ("K.TXT", b"x"),
                                                ("K.Mask.PNG", b"m")]))
    assert (clip.caption, clip.more_captions, clip.measures) == ("x", (), {"motion": 1.0})
    assert content(clip.partners["mask"]) == b"m"


def test_captions_of_a_shard_in_files_and_in_the_json_are_all_of_them(tmp_path):
    clip, = read(write_tar(tmp_path / "x.tar", [("k.1.txt", b"second"), ("k.json", b'{"captions": ["third", "first"]}'),
                                                ("k.mp4", b"v"), ("k.txt", b"first")]))
    assert (clip.caption, clip.more_captions) == ("first", ("second", "third"))


def test_a_text_as_long_as_allowed_is_read_whole(tmp_path):
    clip, = read(write_tar(tmp_path / "x.tar", [("k.mp4", b"v"), ("k.txt", b"w" * LONGEST_TEXT_BYTES)]))
    assert len(clip.caption) == LONGEST_TEXT_BYTES


def test_a_longer_text_is_a_fault(tmp_path):
    with pytest.raises(UserError, match="k: its txt"):
        read(write_tar(tmp_path / "x.tar", [("k.mp4", b"v"), ("k.txt", b"w" * (LONGEST_TEXT_BYTES + 1))]))


@pytest.mark.parametrize("path", ["memory://gone", "memory://gone/m.jsonl", "memory://gone/m.csv",
                                  "memory://gone/*.tar", "memory://gone/m.parquet", "gone/m.jsonl", "gone/*.tar",
                                  "gone://bucket", "gone://bucket/m.jsonl", "gone://bucket/*.tar"])
def test_what_cannot_be_read_is_the_users_error(path):
    with pytest.raises(UserError, match="gone") as caught:
        read(path)
    assert caught.value.next_step


def test_a_hub_that_cannot_be_reached_is_the_users_error(monkeypatch):
    def unreachable(url, *_, **__):
        raise httpx2.ConnectError(f"no way to {url}")

    monkeypatch.setattr(fsspec, "open", unreachable)
    with pytest.raises(UserError, match="hf://"):
        read("hf://datasets/owner/name/m.jsonl")


def test_a_damaged_table_is_the_users_error(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"PAR1 and no table" * 9)
    with pytest.raises(UserError, match=r"m\.parquet"):
        read(tmp_path / "m.parquet")


def test_a_missing_medium_behind_a_url_is_a_fault_with_its_place(tmp_path):
    write_jsonl(tmp_path / "m.jsonl", [{"video": "gone.mp4", "caption": "x"},
                                       {"video": "memory://gone/b.mp4", "caption": "x"}])
    with pytest.raises(UserError, match=r"2 fault\(s\)(.|\n)*line 1: missing file memory:(.|\n)*line 2: missing file"):
        read(f"memory://{uploaded(tmp_path)}/m.jsonl")
