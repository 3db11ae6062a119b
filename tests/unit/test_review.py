"""What the review page's server shows and refuses, and what an edit does to a manifest and does not."""

import http.client
import json
import os
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_tools import editing, review
from data_tools.editing import Edit, Manifest
from tests import odd_files
from wantrain import serving
from wantrain.data.decode import choose_frames
from wantrain.jobs import Ending, Failure
from wantrain.terms import UserError

ROWS = [
    '{"video": "film.mp4", "start_s": 0.5, "end_s": 1.25, "id": "film.mp4@0.500#1", "caption": "one", "motion": 1.50}',
    '{ "caption":"zwei \\u00fc", "video":"film.mp4","start_s":1e-1, "other": {"deep": [1, null]}, "keep": 0 }',
    '',
    '{"video": "still.png", "captions": ["a\u2028b", "c"]}',
    '{"video": "still.png", "captions": ["a\u2028b", "c"]}',
]
SHOTS = (12, 12, 12, 12)


@pytest.fixture
def path(tmp_path):
    """A manifest with Windows and other ends of lines, the last line without any."""
    path = tmp_path / "manifest.jsonl"
    path.write_bytes("\r\n".join(ROWS).replace("\r\n{ ", "\n{ ").encode())
    return path


def keys(manifest):
    return list(manifest.content().places)


def lines(path):
    return path.read_bytes().decode().split("\n")


def caption(key, was, now):
    return Edit(key, {"caption": was}, {"caption": now})


def test_an_edit_changes_one_line_and_no_other_byte(path):
    before, manifest = lines(path), Manifest(path)
    saved, refused = manifest.save([caption(keys(manifest)[1], "zwei \u00fc", 'dr\u00fcber\n"3" \U0001f600')])
    after = lines(path)
    assert refused == []
    assert next(iter(saved.values())).values == json.loads(after[1])
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [1]
    old, new = json.loads(before[1]), json.loads(after[1])
    assert list(new) == list(old)
    assert new == old | {"caption": 'dr\u00fcber\n"3" \U0001f600'}
    assert (before[1].endswith("\r"), after[1].endswith("\r")) == (True, True)


def test_nothing_to_change_writes_nothing(path):
    manifest, before = Manifest(path), path.stat()
    assert manifest.save([caption(keys(manifest)[0], "one", "one")])[1] == []
    assert path.stat() == before


def test_marks_and_further_captions_come_and_go(path):
    manifest, before = Manifest(path), lines(path)
    first, second = keys(manifest)[:2]
    marks = [Edit(first, {"keep": None, "captions": []}, {"keep": 0, "captions": ["x"]}),
             Edit(second, {"keep": 0}, {"keep": 1})]
    assert manifest.save(marks)[1] == []
    assert json.loads(lines(path)[0]) == json.loads(before[0]) | {"keep": 0, "captions": ["x"]}
    assert json.loads(lines(path)[1])["keep"] == 1
    back = [Edit(e.key, e.now, e.was) for e in marks]
    assert manifest.save(back)[1] == []
    assert lines(path)[0] == before[0].replace("1.50", "1.5")
    assert json.loads(lines(path)[1]) == json.loads(before[1])


def test_equal_rows_are_edited_apart(path):
    manifest = Manifest(path)
    assert len(set(keys(manifest))) == 4
    manifest.save([caption(keys(manifest)[3], "", "the last")])
    assert [json.loads(line).get("caption") for line in lines(path)[3:]] == [None, "the last"]


def test_an_edit_of_somebody_else_is_not_overwritten_and_other_changes_do_not_hinder(path):
    manifest = Manifest(path)
    first, second, *_ = keys(manifest)
    theirs = path.read_bytes().replace(b'"one"', b'"theirs"').replace(b'"keep": 0', b'"keep": 0, "sharp": 9')
    path.write_bytes(b'{"video": "new.mp4"}\n' + theirs)
    saved, refused = manifest.save([caption(first, "one", "mine"), caption(second, "zwei \u00fc", "two")])
    assert refused == [first]
    assert saved[first].value("caption") == "theirs"
    rows = [json.loads(line) for line in lines(path) if line.strip()]
    assert rows[0] == {"video": "new.mp4"}
    assert rows[1]["caption"] == "theirs"
    assert (rows[2]["caption"], rows[2]["sharp"]) == ("two", 9)
    assert manifest.save([caption(first, "theirs", "mine")])[1] == []
    path.write_bytes(b'{"video": "new.mp4"}\n')
    assert manifest.save([caption(first, "mine", "again")]) == ({first: None}, [first])
    assert path.read_bytes() == b'{"video": "new.mp4"}\n'


def test_an_edit_whose_answer_was_lost_may_be_sent_again(path):
    manifest = Manifest(path)
    edit = caption(keys(manifest)[0], "one", "mine")
    assert manifest.save([edit])[1] == []
    assert manifest.save([edit])[1] == []


def test_a_change_in_the_moment_of_writing_is_seen(path, monkeypatch):
    manifest, real = Manifest(path), os.fsync

    def fsync(number):
        path.write_bytes(path.read_bytes().replace(b'"one"', b'"theirs"'))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(editing.Conflict):
        manifest.save([caption(keys(manifest)[1], "zwei \u00fc", "two")])
    assert b"theirs" in path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["manifest.jsonl"]


def test_edits_at_the_same_time_all_arrive(path):
    path.write_text("".join(json.dumps({"video": f"{i}.mp4"}) + "\n" for i in range(12)))
    manifest = Manifest(path)
    threads = [threading.Thread(target=manifest.save, args=([caption(key, "", "x")],)) for key in keys(manifest)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads(line)["caption"] for line in path.read_text().splitlines()] == ["x"] * 12


def test_csv_records_stay_as_they_are(tmp_path):
    path = tmp_path / "m.csv"
    text = ('\ufeffvideo,caption,start_s,note\r\n"a.mp4","one, with\r\na break",0.50,"q ""x"""\r\n'
            "b.mp4,,1.250,\r\n\r\nc.mp4,three,,z\r\n")
    path.write_bytes(text.encode())
    manifest = Manifest(path)
    assert manifest.content().faults == []
    assert manifest.content().pieces[1].value("caption") == "one, with\r\na break"
    b = keys(manifest)[1]
    assert manifest.save([Edit(b, {"caption": "", "keep": None}, {"caption": "two, \u00fc", "keep": 0})])[1] == []
    assert path.read_bytes().decode() == text.replace("note\r\n", "note,keep\r\n").replace(
        "b.mp4,,1.250,\r\n", 'b.mp4,"two, \u00fc",1.250,,0\r\n')
    assert Manifest(path).content().pieces[2].value("keep") == 0
    assert manifest.save([Edit(b, {"keep": 0}, {"keep": None})])[1] == []
    assert Manifest(path).content().pieces[2].value("keep") is None


def test_all_faults_are_told_with_their_lines_and_stay_in_the_file(path, capsys, monkeypatch):
    monkeypatch.setattr(review.Review, "serve_forever", lambda server: None)
    path.write_bytes(path.read_bytes() + b'\n{"video": \n[1]\n{"video": "x", "captions": "y"}\n'
                     b'{"video": "x", "start_s": "soon"}\n{"video": "x", "caption": 7}\n'
                     + b'{"video": "x", "end_s": %s}\n' % (b"9" * 400))
    assert review.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert "has 6 fault(s)" in said
    assert all(f"line {number}: " in said for number in (6, 7, 8, 9, 10, 11))
    manifest, tail = Manifest(path), lines(path)[5:]
    manifest.save([caption(keys(manifest)[0], "one", "mine")])
    assert lines(path)[5:] == tail
    (path.parent / "m.csv").write_text("video,caption\na.mp4,b,c\n")
    assert Manifest(path.parent / "m.csv").content().faults == ["line 2: more cells than columns"]


@pytest.mark.parametrize(("name", "why"), [
    ("", "no manifest that can be edited"), ("m.parquet", "no manifest that can be edited"),
    ("gone.jsonl", "gone.jsonl cannot be read: "), ("latin.jsonl", "latin.jsonl cannot be read: "),
])
def test_what_cannot_be_edited_is_a_message(tmp_path, capsys, name, why):
    (tmp_path / "latin.jsonl").write_bytes(b'{"video": "\xfc.mp4"}')
    assert review.main([str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert "\n  next: " in said


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of four shots of half a second, 96x64 at 24 fps."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return odd_files.write_film(path, odd_files.film_of_shots(SHOTS))


def shown(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_preview_is_the_span_at_the_rate_of_training_in_h264(film, tmp_path):
    preview = review.preview_of({"video": film.name, "start_s": 0.5, "end_s": 1.25}, film.parent, 16, tmp_path / "p")
    assert review.write_preview(preview) == ""
    got, frames = shown(preview.target), odd_files.film_of_shots(SHOTS)
    expected = choose_frames(np.arange(48) / 24, 0.5, 16, 12)
    assert len(got) == len(expected)
    nearest = [int(np.argmin([np.abs(frame - other.astype(int)).mean() for other in frames])) for frame in got]
    assert nearest == expected.tolist()
    with av.open(str(preview.target)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)


def test_a_preview_is_another_when_span_rate_or_source_change(film, tmp_path):
    copy = tmp_path / "film.mp4"
    copy.write_bytes(film.read_bytes())

    def name(fps=16, **row):
        return review.preview_of({"video": "film.mp4"} | row, tmp_path, fps, tmp_path).target

    names = [name(), name(start_s=1), name(end_s=1), name(fps=24)]
    copy.write_bytes(film.read_bytes() + b" ")
    assert len({*names, name()}) == 5


def test_pictures_are_shown_upright_and_small_and_long_spans_cut(tmp_path, monkeypatch):
    odd_files.make(tmp_path, ["turned.jpeg"])
    odd_files.write_film(tmp_path / "wide.avi", odd_files.frames(0, 40, 66, 1030), 20, "mpeg4")
    turned = review.preview_of({"video": "turned.jpeg"}, tmp_path, 16, tmp_path / "p")
    assert review.write_preview(turned) == ""
    with Image.open(turned.target) as image:
        assert (image.format, image.size) == ("JPEG", (odd_files.HEIGHT, odd_files.WIDTH))
    monkeypatch.setattr(review, "PREVIEW_S", 0.5)
    wide = review.preview_of({"video": "wide.avi"}, tmp_path, 16, tmp_path / "p")
    assert review.write_preview(wide) == ""
    assert [frame.shape for frame in shown(wide.target)] == [(32, 512, 3)] * 8


@pytest.mark.parametrize(("row", "why"), [
    ({"video": "gone.mp4"}, "gone.mp4: No such file"), ({"video": "notes.txt"}, "notes.txt: a text file"),
    ({"video": "film.mp4", "start_s": 9}, "the span from 9 s on is empty: it is 2.00 s long"),
    ({"video": "broken.mp4"}, "broken.mp4 cannot be decoded"), ({"video": "broken.png"}, "cannot be decoded"),
])
def test_a_source_that_cannot_be_shown_is_named(film, tmp_path, row, why):
    (tmp_path / "film.mp4").symlink_to(film)
    (tmp_path / "notes.txt").write_text("root:x:0:0")
    for name in ("broken.mp4", "broken.png"):
        (tmp_path / name).write_bytes(film.read_bytes()[:300])
    preview = review.preview_of(row, tmp_path, 16, tmp_path / "p")
    assert why in review.write_preview(preview)
    assert not preview.target.exists()


@pytest.fixture
def server(path, film, monkeypatch):
    """A server that makes previews in its own process."""
    (path.parent / "film.mp4").symlink_to(film)
    (path.parent / "secret.txt").write_text("not for the page")
    monkeypatch.setattr(review, "in_workers", lambda do, items, jobs, timeout_s: ((i, do(i), None) for i in items))
    server = review.Review(Manifest(path), path.parent / "previews", 16, "sks", 0, jobs=1, timeout_s=9)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, name, body=None, secret=None, **headers):
    """(status, headers, body) of a request as the page makes it, with changes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    host = f"127.0.0.1:{server.server_port}"
    headers = {"Host": host} | ({} if body is None else {"Origin": f"http://{host}"}) | headers
    connection.request("GET" if body is None else "POST", f"/{secret or server.secret}/{name}", body,
                       {key: value for key, value in headers.items() if value is not None})
    with connection.getresponse() as reply:
        found = reply.status, reply.headers, reply.read()
    connection.close()
    return found


def saving(server, now="mine", was="one"):
    return json.dumps([{"key": keys(server.manifest)[0], "was": {"caption": was}, "now": {"caption": now}}])


def test_the_page_forbids_itself_everything_from_elsewhere(server):
    status, headers, body = ask(server, "")
    policy = headers["Content-Security-Policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy
    assert body.decode().count(f'nonce="{nonce}"') == 2
    assert b"http" not in body
    assert b"src=" not in body
    assert ask(server, "")[1]["Content-Security-Policy"] != policy


def test_rows_and_previews_are_served(server, film):
    status, _, body = ask(server, "rows")
    info = json.loads(body)
    assert (status, info["trigger"], info["faults"], len(info["rows"])) == (200, "sks", [], 4)
    first, second, third, _ = info["rows"]
    assert (first["name"], first["caption"], first["keep"], first["others"]) == (
        "film.mp4@0.500#1", "one", None, "motion 1.5")
    assert (second["keep"], second["start_s"], second["end_s"]) == (0, 0.1, None)
    assert (third["caption"], third["captions"]) == ("", ["a\u2028b", "c"])
    status, headers, body = ask(server, "preview/" + first["key"])
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "video/mp4")
    (server.previews / "check.mp4").write_bytes(body)
    assert len(shown(server.previews / "check.mp4")) == 12
    made = {p: p.stat() for p in server.previews.iterdir()}
    assert ask(server, "preview/" + first["key"])[2] == body
    assert {p: p.stat() for p in server.previews.iterdir()} == made
    status, _, body = ask(server, "preview/" + third["key"])
    assert (status, "still.png" in json.loads(body)["error"]) == (422, True)


def test_the_page_shows_what_others_have_written(server, path):
    assert json.loads(ask(server, "rows")[2])["rows"][0]["caption"] == "one"
    path.write_bytes(path.read_bytes().replace(b'"one"', b'"another"') + b"\n{")
    info = json.loads(ask(server, "rows")[2])
    assert info["rows"][0]["caption"] == "another"
    assert [fault.partition(": ")[0] for fault in info["faults"]] == ["line 6"]


def test_an_edit_is_saved_and_a_refused_one_comes_back_with_what_is_there(server, path):
    status, _, body = ask(server, "rows", saving(server))
    assert (status, json.loads(body)["refused"]) == (200, [])
    assert json.loads(lines(path)[0])["caption"] == "mine"
    assert server.num_saved == 1
    status, _, body = ask(server, "rows", saving(server, "third"))
    assert (status, json.loads(body)["refused"]) == (409, [keys(server.manifest)[0]])
    assert json.loads(body)["rows"][0]["caption"] == "mine"
    assert json.loads(lines(path)[0])["caption"] == "mine"
    assert server.num_saved == 1
    assert "1 edit(s) saved\n4 clips = 2 captioned + 2 empty\n4 clips = 0 kept + 1 dropped + 3 not marked" in (
        review.summary(server.manifest.content().pieces, server.num_saved))


@pytest.mark.parametrize("changes", [
    {"Host": "elsewhere"}, {"Host": "127.0.0.1"}, {"secret": "guess"}, {"Origin": None},
    {"Origin": "null"}, {"Origin": "http://elsewhere"}, {"Origin": "http://127.0.0.1"},
])
def test_nobody_else_can_write(server, path, changes):
    before = path.read_bytes()
    assert ask(server, "rows", saving(server), **changes)[0] == 403
    assert path.read_bytes() == before


@pytest.mark.parametrize("changes", [{"Host": "elsewhere:80"}, {"Host": "elsewhere"}, {"secret": "guess"}])
def test_nobody_else_can_read(server, changes):
    for name in ("", "rows", "preview/" + keys(server.manifest)[0]):
        status, _, body = ask(server, name, **changes)
        assert status == 403
        assert server.secret.encode() not in body
        assert set(json.loads(body)) == {"error"}


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.address.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("name", [
    "secret.txt", "../secret.txt", "preview/../secret.txt", "preview/..%2Fsecret.txt", "manifest.jsonl",
    "preview/film.mp4", "preview/" + "0" * 32, "preview//etc/passwd", "review.html", "previews",
])
def test_no_path_leads_to_a_file(server, name):
    status, _, body = ask(server, name)
    assert status in (404, 422)
    assert set(json.loads(body)) == {"error"}


@pytest.mark.parametrize("body", [
    "", "{", "[1]", "{}x", '[{"key": "KEY"}]',
    '[{"key": "KEY", "was": {"video": "film.mp4"}, "now": {"video": "/etc/passwd"}}]',
    '[{"key": "KEY", "was": {"caption": "one"}, "now": {"caption": 3}}]',
    '[{"key": "KEY", "was": {}, "now": {"caption": "mine"}}]',
    '[{"key": "KEY", "was": {"keep": null}, "now": {"keep": "1"}}]',
    '[{"key": "KEY", "was": {"captions": []}, "now": {"captions": "x"}}]',
    '[{"key": "KEY", "was": {"captions": []}, "now": {"captions": [1]}}]',
])
def test_what_the_page_does_not_send_changes_nothing(server, path, body):
    before = path.read_bytes()
    assert ask(server, "rows", body.replace("KEY", keys(server.manifest)[0]))[0] == 400
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", ["-1", "x", str(serving.LARGEST_BODY + 1)])
def test_a_body_of_no_sane_size_is_not_read(server, size):
    assert ask(server, "rows", saving(server), **{"Content-Length": size})[0] == 400


def test_a_csv_takes_no_lists(tmp_path):
    edit = '[{"key": "k", "was": {"captions": []}, "now": {"captions": ["x"]}}]'
    assert len(review._edits(edit.encode(), is_csv=False)) == 1
    with pytest.raises(ValueError, match=r"\['captions'\]"):
        review._edits(edit.encode(), is_csv=True)


def test_a_full_disk_is_told_and_nothing_is_lost(server, path, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, body = ask(server, "rows", saving(server))
    monkeypatch.undo()
    assert (status, "No space left" in json.loads(body)["error"]) == (422, True)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*tmp"))


def test_nothing_is_made_for_who_does_not_wait(server):
    key = keys(server.manifest)[0]
    assert server.preview(key, lambda: True) is None
    assert not server.previews.exists()
    assert server.preview(key, lambda: False).exists()


def test_a_preview_is_made_once_and_no_more_than_jobs_at_a_time(server, path, monkeypatch):
    first, other = keys(server.manifest)[0], '{"video": "film.mp4", "id": "other"}'
    path.write_text(f"{other}\n{path.read_bytes().decode()}")
    busy, most, made = [], [], []

    def slow(do, items, jobs, timeout_s):
        busy.append(items[0])
        most.append(len(busy))
        made.append(items[0].target)
        time.sleep(0.1)
        yield items[0], do(busy.pop()), None

    monkeypatch.setattr(review, "in_workers", slow)
    threads = [threading.Thread(target=server.preview, args=(key, lambda: False))
               for key in (first, first, keys(server.manifest)[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(set(made)), max(most)) == (2, 2, 1)


def test_a_source_on_another_machine_is_not_fetched(tmp_path):
    with pytest.raises(UserError, match="not on this machine"):
        review.preview_of({"video": "s3://bucket/film.mp4"}, tmp_path, 16, tmp_path)


def test_previews_are_made_by_workers_with_a_time_limit(server, monkeypatch):
    def late(do, items, jobs, timeout_s):
        yield items[0], None, Failure(Ending.TIMED_OUT, f"not finished after {timeout_s:g} s")

    monkeypatch.setattr(review, "in_workers", late)
    with pytest.raises(UserError, match=r"film.mp4: not finished after 9 s"):
        server.preview(keys(server.manifest)[0], lambda: False)


def test_the_command_prints_its_address_and_ends_with_counts(path, capsys, monkeypatch):
    opened, servers = [], []

    def stopped(server):
        servers.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(review.webbrowser, "open", opened.append)
    monkeypatch.setattr(review.Review, "serve_forever", stopped)
    assert review.main([str(path), "--open"]) == 0
    said = capsys.readouterr().out
    assert opened == [said.splitlines()[0]] == [servers[0].address]
    assert servers[0].previews == path.parent / ".manifest.jsonl.previews"
    assert "4 clips = 2 captioned + 2 empty" in said
    with review.Review(Manifest(path), path.parent, 16, "", 0, jobs=1, timeout_s=1) as other:
        assert review.main([str(path), "--port", str(other.server_port)]) == 2
    assert "leave --port out" in capsys.readouterr().err
