"""`wantrain report`: the page counts every clip, names every surprise, and shows the frames that training gets."""

import base64
import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import SIZE, moving_square, opened, write_clips
from wantrain import cli, pictures
from wantrain.config import load
from wantrain.data import decode
from wantrain.models.encode import count_tokens
from wantrain.stages import check, report


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory):
    """A manifest with a clip of each kind that the page has to speak of."""
    tmp_path = tmp_path_factory.mktemp("odd")
    folder = write_clips(tmp_path / "set", 3, "sqstyle, square {}")
    pictures.write_mp4(folder / "slow.mp4", moving_square(7, 9, 64, 96), 8)
    pictures.write_mp4(folder / "tall.mp4", moving_square(8, 9, 128, 64), 16)
    (folder / "broken.mp4").write_bytes(b"no film at all" * 99)
    rows = [
        {"video": "clip_0.mp4", "caption": "sqstyle, one", "captions": ["sqstyle, <b>two</b>"], "motion": 1.5},
        {"video": "clip_1.mp4", "caption": "sqstyle, one", "motion": 1.0},
        {"video": "clip_2.mp4", "caption": "no words", "motion": 1.0},
        {"video": "slow.mp4", "caption": "sqstyle, " + "very " * 600, "motion": 2.0},
        {"video": "tall.mp4", "caption": "sqstyle, tall", "motion": 3.0},
        {"video": "clip_0.mp4", "id": "still", "caption": "sqstyle, still", "motion": 0.1},
        {"video": "clip_1.mp4", "id": "late", "start_s": 0.5, "caption": "sqstyle, late", "motion": 1.0},
        {"video": "broken.mp4", "caption": "sqstyle, broken", "motion": 1.0},
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["recipe=demo_anime", "tracker=none", "~data.sources.regularisation",
            f"data.sources.style.path={folder / 'm.jsonl'}", f"run.dir={tmp_path / 'run'}",
            f"data.cache_dir={tmp_path / 'cache'}", "data.heldout=null", "validation.every_steps=0",
            "data.trigger=sqstyle", "data.num_frames=[5]", "data.limits.motion=[0.5,null]", "data.batch_size=4",
            f"data.resolutions=[[{SIZE[0]},{SIZE[1]}]]", "train.micro_batch_size=4"]


@pytest.fixture(scope="module")
def page(odd_set):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["report", *odd_set]) == 0
    assert "8 clips = 5 used + 3 dropped" in out.getvalue()
    return (Path(load(odd_set).run.dir) / "report" / "data.html").read_text()


def test_the_page_accounts_for_every_clip_and_says_every_surprise(odd_set, page):
    assert "2 clips cannot be used" in page
    for kind, reason in (("outside limits", "motion = 0.1 is below 0.5"), ("too short", "1 frame at 16 fps"),
                         ("unreadable", "broken.mp4")):
        assert re.search(rf"<td>{kind}</td><td>[^<]*{reason}", page), kind
    told = dict(report.surprises(clips := opened(odd_set, refuse=False)[1], lambda c: len(c.split())))
    assert [[name.removeprefix("style/").split(" ")[0] for name in which] for which in told.values()] == [
        ["slow.mp4"], ["clip_2.mp4"], ["clip_0.mp4", "clip_1.mp4"], ["tall.mp4"], ["slow.mp4"]]
    assert "&lt;b&gt;two&lt;/b&gt;" in page
    assert {p.clip.id for p in clips.planned} == {f"style/{n}.mp4" for n in ("clip_0", "clip_1", "clip_2", "slow",
                                                                              "tall")}


def test_what_the_look_told_of_pictures_is_said_by_check_and_report(odd_set, capsys):
    _, clips = opened(odd_set, refuse=False)
    one = clips.plan.used[0]
    clips.plan.used[0] = replace(one, found=replace(one.found, surprises="HDR (PQ), interlaced"))
    told = dict(report.surprises(clips, lambda c: len(c.split())))
    assert told["HDR (PQ)"] == told["interlaced"] == [one.name]
    check.print_data(clips)
    assert "\nbeware       HDR (PQ): 1 clips, interlaced: 1 clips\n" in capsys.readouterr().out


def test_the_clips_on_the_page_are_the_frames_of_training(odd_set, page):
    shown = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', page)
    _, clips = opened(odd_set, refuse=False)
    assert len(shown) == len(clips.planned) == 5
    for data, planned in zip(shown, clips.planned, strict=True):
        with av.open(io.BytesIO(base64.b64decode(data))) as film:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
        wanted = decode.read_window(planned).movedim(1, -1).numpy()
        assert frames.shape == wanted.shape
        assert np.abs(frames.astype(int) - wanted).mean() < 12  # H.264 at a few pixels


def test_the_size_of_the_cache_is_told_before_it_is_made(arguments, cached):
    recipe, clips = opened(arguments)
    tokenizer = recipe.base.tokenizer()
    entries = clips.cache.entries(clips.everything, clips.captions)
    told = clips.cache_bytes({c: count_tokens(tokenizer, c) for c in clips.captions}, recipe.dtype.itemsize)
    real = sum(path.stat().st_size for path in entries)
    assert 0.9 * real < told + 168 * len(entries) < 1.1 * real  # 168 bytes of header each


def test_a_page_shows_as_many_windows_as_asked_spread_over_the_set():
    assert report.spread(list(range(100)), 5) == [0, 24, 49, 74, 99]
    assert report.spread([1, 2], 5) == [1, 2]
