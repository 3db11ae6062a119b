"""A hostile file is dropped or named within the time limit, the others are used, and nothing is written beside them."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import opened
from tests.misbehaving import misbehave
from wantrain.data import manifest, media
from wantrain.data.cache import missing
from wantrain.jobs import Ending, Failure, in_workers
from wantrain.terms import Bucket, Clip, UserError

# Worker processes import this module: whatever brings torch is imported where it is needed.


class HungError(Exception):
    """A call did not come back."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises HungError in the block when it takes longer."""
    def stop(number, frame):
        raise HungError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def listener():
    """(address of a server, whether anyone has come)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def came() -> bool:
            try:
                server.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield f"127.0.0.1:{server.getsockname()[1]}", came


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A fine film of 24 frames."""
    from tests import odd_files

    return odd_files.write_film(tmp_path_factory.mktemp("film") / "film.mp4", odd_files.frames())


def frames_of(path):
    """The first frames as training would see them; raises UserError where they cannot be used."""
    from wantrain.data import decode

    found = media.look(path)
    if found.fault:
        raise UserError(found.fault, "")
    return decode.read_clip(path, 0, None, 24, Bucket(5, 64, 96))


@pytest.mark.parametrize("ordered", [False, True])
def test_a_worker_that_crashes_hangs_or_exits_stops_no_other_item(ordered):
    items = ["a", "crash", "b", "hang", "c", "raise", "d"]
    results = {item: (result, why) for item, result, why in
               in_workers(misbehave, items, 1, 1.5, "data.timeout_s", ordered=ordered)}
    assert results.keys() == set(items)
    assert [results[item] for item in "abcd"] == [(item, None) for item in "abcd"]
    assert results["crash"] == (None, Failure(Ending.CRASHED, "its reader crashed (exit code -11)"))
    assert results["raise"] == (None, Failure(Ending.CRASHED, "its reader crashed (exit code 3)"))
    late = Failure(Ending.TIMED_OUT, "not finished after 1.5 s; allow more with data.timeout_s")
    assert results["hang"] == (None, late)


@pytest.mark.parametrize("how", ["die later", "die while answering"])
def test_a_worker_that_dies_outside_its_function_stops_no_other_item(how):
    """As the kernel's out-of-memory killer does it."""
    results = []
    for item, result, _ in in_workers(misbehave, ["a", how, "b", "c"], 1, 20):
        results.append((item, result))
        time.sleep(0.6)  # as encoding does
    assert [item for item, _ in results] == ["a", how, "b", "c"]
    assert results[-1] == ("c", "c")


@pytest.mark.parametrize(("body", "code", "said"), [
    ("raise RuntimeError('no such device')", 1, "RuntimeError: no such device"),
    ("import nowhere_to_be_found", 1, "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ("import os; os._exit(7)", 7, "it said nothing")])
def test_a_worker_that_dies_while_it_imports_says_why(tmp_path, monkeypatch, body, code, said):
    """In a worker alone: here its module is sound."""
    (tmp_path / "frail.py").write_text(f"import multiprocessing\n\n\ndef work(item):\n    return item\n\n\n"
                                       f"if multiprocessing.parent_process():\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "frail", raising=False)
    frail = importlib.import_module("frail")
    with pytest.raises(UserError, match=re.escape(
            f"worker 1 died while it imported frail (exit code {code}): {said}")) as told:
        list(in_workers(frail.work, [1, 2], 1, 20))
    assert f"{sys.executable} -c 'import frail'" in told.value.next_step


def test_a_pipe_that_no_one_writes_runs_into_the_time_limit(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (_, found, why), = in_workers(media.look, [tmp_path / "pipe.mp4"], 1, 0.5, "data.timeout_s")
    assert found is None
    assert why.ending is Ending.TIMED_OUT


def test_pipes_and_links_in_circles_are_named_and_not_opened(tmp_path, film):
    shutil.copy(film, tmp_path / "good.mp4")
    (tmp_path / "good.txt").write_text("good")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("pool.mp4")
    (tmp_path / "pool.mp4").symlink_to("loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "in").symlink_to(tmp_path)
    with within(5), pytest.raises(UserError) as caught:
        manifest.read(manifest.ClipSource("s", str(tmp_path)))
    for name in ("pipe", "loop", "pool", "folder"):
        assert f"missing file {tmp_path / name}.mp4" in caught.value.message
    assert "good" not in caught.value.message


def test_a_pipe_as_a_caption_does_not_hang_the_job(tmp_path, film):
    shutil.copy(film, tmp_path / "good.mp4")
    os.mkfifo(tmp_path / "good.txt")
    with within(1), pytest.raises(UserError, match=r"good\.txt"):
        manifest.read(manifest.ClipSource("s", str(tmp_path)))


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
DASH = ('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'profiles="urn:mpeg:dash:profile:isoff-main:2011" mediaPresentationDuration="PT1S"><Period><AdaptationSet '
        'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>")
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
CONCAT = "ffconcat version 1.0\nfile {}\n"


@pytest.mark.parametrize("text", [HLS, DASH, SDP, CONCAT, "rtsptext\nrtsp://{}\n"])
def test_no_playlist_reaches_an_address(tmp_path, listener, text):
    address, came = listener
    for suffix in ("mp4", "ts", "gif", "mkv"):
        (tmp_path / f"list.{suffix}").write_text(text.format(f"http://{address}/film.mp4"))
        with within(5):
            assert media.look(tmp_path / f"list.{suffix}").fault
    assert not came()


@pytest.mark.parametrize("text", [HLS, DASH, CONCAT])
def test_no_playlist_passes_for_the_film_it_points_to(tmp_path, film, text):
    shutil.copy(film, tmp_path / "other.mp4")
    (tmp_path / "list.mp4").write_text(text.format("other.mp4"))
    assert media.look(tmp_path / "list.mp4").fault


def test_what_a_playlist_points_to_is_not_even_opened(tmp_path):
    os.mkfifo(tmp_path / "other.mp4")  # who opens it waits for a writer
    (tmp_path / "list.mp4").write_text(CONCAT.format("other.mp4"))
    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(media.look, tmp_path / "list.mp4")
        is_opened, until = False, time.monotonic() + 1
        while not (looked.done() or is_opened or time.monotonic() > until):
            with contextlib.suppress(OSError):  # no one reads it
                os.close(os.open(tmp_path / "other.mp4", os.O_WRONLY | os.O_NONBLOCK))
                is_opened = True
            time.sleep(0.01)
        assert looked.result(timeout=5).fault
    assert not is_opened


@pytest.mark.parametrize("scheme", ["concat", "file"])
def test_a_name_that_looks_like_an_address_is_a_name(tmp_path, film, monkeypatch, scheme):
    from tests import odd_files

    monkeypatch.chdir(tmp_path)
    shutil.copy(film, f"{scheme}:other.mp4")
    odd_files.write_film(Path("other.mp4"), 255 - odd_files.frames())
    assert frames_of(Path(f"{scheme}:other.mp4")).equal(frames_of(film))


def patched(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """The file with bytes of a box overwritten, `offset` after its name."""
    at = content.index(box) + len(box) + offset
    return content[:at] + value + content[at + len(value):]


MOST, HIGH = b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"
HEADERS = {
    "entries of times": (b"stts", 4, MOST),
    "samples of a time": (b"stts", 8, MOST),
    "sizes": (b"stsz", 8, HIGH),
    "most sizes": (b"stsz", 8, MOST),
    "samples of one byte": (b"stsz", 4, b"\0\0\0\1" + HIGH),
    "samples of 2 GB": (b"stsz", 4, HIGH),
    "samples in a chunk": (b"stsc", 8, MOST * 3),
    "place of a chunk": (b"stco", 8, MOST),
    "an edit": (b"elst", 8, MOST * 3),
    "no time scale of the film": (b"mvhd", 12, bytes(4)),
    "size on screen": (b"tkhd", 76, b"\x60\0\0\0\x40\0\0\0"),
    "shape on screen": (b"tkhd", 76, HIGH + b"\0\1\0\0"),
    "size of the codec": (b"avc1", 24, MOST),
}
LONG_HEADERS = {
    "length of a frame": (b"stts", 12, HIGH),
    "no time scale": (b"mdhd", 12, bytes(4)),
    "largest time scale": (b"mdhd", 12, MOST),
}


@pytest.mark.parametrize("name", [*HEADERS, *LONG_HEADERS])
def test_absurd_headers_give_a_fault_or_the_frames_that_are_there(tmp_path, film, name):
    (tmp_path / "patched.mp4").write_bytes(patched(film.read_bytes(), *(HEADERS | LONG_HEADERS)[name]))
    with within(5):
        try:
            frames = frames_of(tmp_path / "patched.mp4")
        except UserError:
            return
    assert frames.equal(frames_of(film))


def test_one_frame_that_claims_two_days_is_not_a_hundred_thousand_windows(tmp_path, film):
    from wantrain.data import plan

    path = tmp_path / "long.mp4"
    path.write_bytes(patched(film.read_bytes(), *LONG_HEADERS["length of a frame"]))
    rules = plan.Rules([Bucket(81, 64, 96)], 1, "sliding")
    placed = plan.place([Clip("s/long", path, "x", "s")], {path: media.look(path)}, rules)
    assert len(placed.used) <= 24 * 60


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A picture that claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(
        ">I", zlib.crc32(name + data)) for name, data in chunks)


def write_pictures(folder: Path) -> dict[str, str]:
    """Hostile pictures: name -> words of the fault, '' for one that is fine."""
    from tests import odd_files

    (folder / "bomb.png").write_bytes(png(50000, 50000))
    (folder / "bomb of text.png").write_bytes(png(96, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23)))))
    (folder / "bomb.mp4").write_bytes(png(50000, 50000))
    odd_files.make(folder, ["cut off.jpg", "clear moving.webp", "moving.gif"])
    gif = bytearray((folder / "moving.gif").read_bytes())
    gif[6:10] = MOST
    (folder / "bomb.gif").write_bytes(gif)
    return {"bomb.png": "decompression bomb", "bomb of text.png": "too large", "bomb.mp4": "Invalid",
            "bomb.gif": "Invalid", "cut off.jpg": "truncated", "clear moving.webp": "", "moving.gif": ""}


def test_bombs_and_cut_off_pictures_are_faults_at_once(tmp_path):
    for name, words in write_pictures(tmp_path).items():
        with within(3):
            found = media.look(tmp_path / name)
        assert words in found.fault, name
        assert bool(words) == bool(found.fault), name


def write_bad_tail(path: Path) -> None:
    """A film whose first frame is fine and whose rest is garbage."""
    import av

    from tests import odd_files

    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 96, 3), np.uint8)
    content = odd_files.write_film(path, noise, preset="ultrafast", bf="0").read_bytes()
    with av.open(str(path)) as container:
        first = next(container.demux(video=0))
        assert first.pos is not None
        end = first.pos + first.size
    path.write_bytes(content[:end] + b"\xff" * (len(content) - end))


ODD_NAMES = ("new\nline.mp4", "quo\"te'.mp4", "$(touch owned) `x`;&.mp4", "%03d.mp4", "{}{0}%s.mp4", "-delete=yes.mp4",
             " .mp4", "a::b.mp4", "映画 été #1.mp4")


@pytest.fixture(scope="module")
def world(tmp_path_factory, film):
    """A folder of clips, hostile and good ones; `cache` and `run` beside it are ours."""
    from tests import odd_files

    root = tmp_path_factory.mktemp("world")
    style = root / "style"
    style.mkdir()
    faults = {name: words for name, words in write_pictures(style).items() if words}
    Image.new("RGB", (100_000, 1)).save(style / "wide.png")
    (style / "list.mp4").write_text(CONCAT.format("film.mp4"))
    (style / "hls.mp4").write_text(HLS.format("film.mp4"))
    (style / "headers.mp4").write_bytes(patched(film.read_bytes(), *HEADERS["most sizes"]))
    faults |= {"wide.png": "of its picture", "list.mp4": "playlist", "hls.mp4": "playlist", "headers.mp4": "Invalid"}
    write_bad_tail(style / "bad tail.mp4")
    for number, name in enumerate(("film.mp4", *ODD_NAMES)):
        odd_files.write_film(style / name, odd_files.frames(number, 6))
    for path in list(style.iterdir()):
        path.with_suffix(".txt").write_text("the same for all")
    (style / "film.txt").write_text("word " * 200_000)
    return root, faults


def listing(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything but `cache` and `run`: name -> mode, time of change, content."""
    return {str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in root.rglob("*") if path.relative_to(root).parts[0] not in ("cache", "run")}


def test_a_folder_of_hostile_files_is_cached_but_for_them(world, monkeypatch, capsys):
    """Refused with every fault; then without them; what only decoding shows is named, remembered, and then dropped."""
    from wantrain import cli

    root, faults = world
    monkeypatch.chdir(root)
    arguments = ["recipe=demo_anime", f"run.dir={root / 'run'}", f"data.cache_dir={root / 'cache'}",
                 f"data.sources.style.path={root / 'style'}", "~data.sources.regularisation", "data.heldout=null",
                 "validation.every_steps=0", "data.num_workers=1", "data.num_frames=[1,5]",
                 "data.resolutions=[[32,48]]", "data.timeout_s=60"]
    before = listing(root)
    assert cli.main(["cache", *arguments]) == 2
    shown = capsys.readouterr().err
    assert f"{len(faults)} clip(s) cannot be used" in shown
    assert all(f"style/{name}: " in shown for name in faults)
    assert cli.main(["cache", *arguments, "data.allow_drops=true"]) == 2
    shown = capsys.readouterr().err
    assert "1 of this process's clips cannot be decoded (everything else is cached)" in shown
    assert "style/bad tail.mp4" in shown
    assert cli.main(["cache", *arguments, "data.allow_drops=true"]) == 0
    shown = capsys.readouterr().out
    assert "(0 clips and 0 captions made now)" in shown
    _, clips = opened([*arguments, "data.allow_drops=true"])
    dropped = {one.clip.id.removeprefix("style/"): one.reason for one in clips.plan.dropped}
    expected = faults | {"bad tail.mp4": "cannot be decoded"}
    assert dropped.keys() == expected.keys()
    assert all(words in dropped[name] for name, words in expected.items())
    used = {planned.clip.id.removeprefix("style/") for planned in clips.planned}
    assert used == {"film.mp4", "clear moving.webp", "moving.gif", *ODD_NAMES}
    assert not missing(clips.entries)
    assert listing(root) == before
    assert {path.name for path in root.iterdir()} <= {"style", "cache", "run"}


@pytest.mark.parametrize("suffix", ["png", "mp4"])
def test_a_name_that_is_not_utf8_is_named_or_used(tmp_path, film, suffix):
    from wantrain.data import decode
    from wantrain.files import write_text

    path = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9." + suffix.encode()))
    if suffix == "mp4":
        shutil.copy(film, path)
    else:
        Image.new("RGB", (96, 64)).save(path)
    path.with_suffix(".txt").write_text("x")
    with contextlib.suppress(UserError):
        clip, = manifest.read(manifest.ClipSource("s", str(tmp_path)))
        assert isinstance(clip.path, Path)
        decode.read_clip(clip.path, 0, None, 24, Bucket(1, 64, 96))
        write_text(tmp_path / "report.html", clip.id)  # as the report and run.json do
