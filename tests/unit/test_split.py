"""Shots end where the film cuts: by content, on films whose cuts are known, and every shot is accounted for."""

import dataclasses
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_tools import shots, split
from tests import odd_files
from tests.splitting import DEMO, RULES, rows, run
from wantrain import journal
from wantrain.data import decode, films, manifest
from wantrain.terms import Bucket, UserError

SHOTS = (20, 31, 7, 26)
CUTS = (0, 20, 51, 58, 84)
UNEVEN_MS = tuple(np.cumsum(np.random.default_rng(0).integers(17, 70, sum(SHOTS))).tolist())


@pytest.fixture(scope="module")
def film():
    return odd_files.film_of_shots(SHOTS)


def nearest(frames_FHWC, film_FHWC):
    """For each frame the most alike frame of the film."""
    small = film_FHWC[:, ::3, ::5].astype(np.int16)
    return [int(np.abs(small - f[::3, ::5].astype(np.int16)).sum((1, 2, 3)).argmin()) for f in frames_FHWC]


@pytest.mark.parametrize(("fps", "times_ms"), [
    (24, None), (25, None), (Fraction(30000, 1001), None), (25, UNEVEN_MS)], ids=["24", "25", "29.97", "variable"])
def test_no_frame_of_the_next_shot_is_ever_read(tmp_path, film, fps, times_ms):
    path = odd_files.write_film(tmp_path / "film.mkv", film, fps, times_ms=times_ms)
    spans = shots.split_file(path, RULES).spans
    assert [(s.first, s.stop) for s in spans] == list(itertools.pairwise(CUTS))
    found = decode.probe(path)
    for span, read_fps in itertools.product(spans, (16, 30000 / 1001, 120)):
        number = films.count_frames(found, span.start_s, span.end_s, read_fps)
        read = decode.read_clip(path, span.start_s, span.end_s, read_fps, Bucket(number, 64, 96))
        seen = nearest(read.movedim(1, -1).numpy(), film)
        assert seen[0] == span.first
        assert max(seen) < span.stop
        if read_fps == 120:
            assert sorted(set(seen)) == list(range(span.first, span.stop))  # and none of this shot is lost


def test_the_guard_holds_where_a_wanted_time_falls_just_before_the_cut():
    """choose_frames looks up to 5.1e-4 s ahead, count_frames gives a frame up to 1e-3 frames late."""
    times_s = np.arange(100) / 24
    found = films.Probe(times_s, 100 / 24, 96, 64, "")
    span = next(shots.judge(found, [(48, 48)], np.zeros(100), RULES))
    for fps in np.linspace(5, 60, 4001):
        number = films.count_frames(found, span.start_s, span.end_s, fps)
        assert decode.choose_frames(times_s, span.start_s, fps, number)[-1] < 48


def test_cuts_beside_the_ends_and_flashes_are_found(tmp_path):
    path = odd_files.write_film(tmp_path / "film.mp4", odd_files.film_of_shots((1, 20, 2, 20, 1), seed=3))
    assert shots.find_shots(path, decode.probe(path).times_s, RULES)[0] == [(cut, cut) for cut in (1, 21, 23, 43)]


HOLDS = {"twos": (2,), "threes": (3,), "fours": (4,), "mixed": (3, 2, 2, 4, 3), "3:2": (3, 2),
         "one in five": (1, 1, 1, 2)}
CODING = {"exact": {"crf": "0"}, "noisy": {"crf": "30"}, "many keys": {"crf": "23", "g": "7"}}


@pytest.mark.parametrize("holds", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("options", CODING.values(), ids=CODING)
def test_held_drawings_are_cut_where_the_film_cuts(tmp_path, film, holds, options):
    """Repeats that coding made inexact are repeats, and cuts are the film's frames."""
    film = film[:58].repeat([*itertools.islice(itertools.cycle(holds), 58)], 0)
    starts = np.cumsum([0, *itertools.islice(itertools.cycle(holds), 58)])[[20, 51]].tolist()
    path = odd_files.write_film(tmp_path / "film.mp4", film, preset="veryfast", **options)
    assert shots.find_shots(path, decode.probe(path).times_s, RULES)[0] == [(cut, cut) for cut in starts]


def test_a_film_that_stands_still_is_cut_as_before(tmp_path, film):
    """Stills of seconds, of half a second and of a moment: what stands for long is no held drawing."""
    lengths = (48, 12, 12, 36, 4, 36)
    path = odd_files.write_film(tmp_path / "film.mp4", film[[0, 30, 55, 70, 25, 10]].repeat(lengths, 0))
    starts = np.cumsum(lengths)[:-1].tolist()
    assert shots.find_shots(path, decode.probe(path).times_s, RULES)[0] == [(cut, cut) for cut in starts]


def test_a_pan_on_ones_over_a_held_figure_is_one_shot(tmp_path, film):
    wide = np.concatenate([film[0], film[30], film[55]], 1)
    pan = np.stack([wide[:, 2 * f:2 * f + 96] for f in range(72)])
    pan[:, 16:48, 32:64] = film[58:82].repeat(3, 0)[:, 16:48, 32:64]
    path = odd_files.write_film(tmp_path / "film.mp4", np.ascontiguousarray(pan), crf="28", preset="veryfast")
    assert shots.find_shots(path, decode.probe(path).times_s, RULES)[0] == []


END = math.inf


@pytest.mark.parametrize(("change", "repeats"), [
    ([END, 9, 9, 9, 9, END], []),
    ([END, 0, 0, 20, 0, 0, 20, 0, 0, 20, END], [1, 2, 4, 5, 7, 8]),
    ([END, 1, 3, 20, 2, 3, 20, 1, 3.9, 20, END], [1, 2, 4, 5, 7, 8]),
    ([END, 4.1, 20, 4.1, 20, 4.1, 20, END], []),  # a movement that varies
    ([END, .1, .1, .1, .1, .1, .1, 50, .1, .1, 50, .1, .1, .1, .1, .1, .1, END], []),  # a short shot between two cuts
    ([END, 0, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 20, 0, 20, 0, 20, END], [13, 15]),  # and a still among holds
    ([END, 0, 1.9, 0, 1.9, 0, 1.9, END], [])])  # so little never looks like a cut
def test_repeats_lie_between_changes(change, repeats):
    assert [i for i in range(1, len(change) - 1) if shots.is_repeat(change, i, 4)] == repeats


def test_the_case_on_threes_is_one_shot():
    path = Path(__file__).parents[3] / "shared/cases/media/one_shot_on_threes.mp4"
    if not path.exists():
        pytest.skip("the cases are elsewhere")
    span, = shots.split_file(path, dataclasses.replace(RULES, min_s=1.0, max_s=10.0)).spans
    assert (span.end_s - span.start_s, span.reason) == (pytest.approx(3.0, abs=0.01), "")


@pytest.mark.parametrize("path", DEMO[:4], ids=lambda p: p.stem)
def test_real_footage_within_one_shot_is_not_cut(path):
    assert len(shots.split_file(path, RULES).spans) == 1


def test_two_real_shots_are_cut_where_they_meet(tmp_path):
    joined = tmp_path / "joined.mp4"
    (tmp_path / "list").write_text("".join(f"file '{p}'\n" for p in DEMO[:2]))
    odd_files.ffmpeg("-f", "concat", "-safe", 0, "-i", tmp_path / "list", "-c", "copy", joined)
    numbers = [len(decode.probe(p).times_s) for p in DEMO[:2]]
    spans = shots.split_file(joined, RULES).spans
    assert [(s.first, s.stop) for s in spans] == [(0, numbers[0]), (numbers[0], sum(numbers))]


@pytest.mark.parametrize(("max_s", "number"), [(10.0, 1), (9.99, 2), (5.0, 3), (3.0, 4), (0.5, 22), (0.01, 240)])
def test_a_long_shot_is_cut_into_equal_parts(max_s, number):
    times_s = np.arange(240) / 24
    found = films.Probe(times_s, 10.0, 96, 64, "")
    spans = list(shots.judge(found, [], np.zeros(240), shots.Rules(3.0, 0.01, max_s, None)))
    assert len(spans) == number
    assert [s.first for s in spans[1:]] == [s.stop for s in spans[:-1]]
    assert (spans[0].first, spans[-1].stop) == (0, 240)
    lengths = [s.stop - s.first for s in spans]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == 1 or max(s.end_s - s.start_s for s in spans) <= max_s
    assert [s.part for s in spans] == list(range(1, number + 1))


def test_every_shot_is_accounted_for(tmp_path, film, here, capsys):
    still = np.repeat(film[70:71], 30, 0)
    odd_files.write_film(tmp_path / "film.mp4", np.concatenate([film, still]))
    (tmp_path / "still.png").touch()
    (tmp_path / "notes.txt").touch()
    out, rejected = tmp_path / "out" / "m.jsonl", tmp_path / "out" / "r.jsonl"
    arguments = ["--min-s", "0.5", "--max-s", "1.1", "--drop-static", "--out", out, "--rejected", rejected]
    assert split.main([str(a) for a in [tmp_path, *arguments]]) == 0
    assert [(r["video"], r["reason"]) for r in rows(rejected)] == [
        ("../film.mp4", "too short"), ("../film.mp4", "static"), ("../film.mp4", "static")]
    assert [r["start_s"] for r in rows(out)] == [0.0, round(20 / 24, 6), round(36 / 24, 6), round(58 / 24, 6)]
    shown = capsys.readouterr().out
    for words in ("found 3 = 1 films split + 0 faulty + 2 ignored", "5 shots, 7 spans after cutting those longer than",
                  "kept      4,", "too short 1,", "static    2,"):
        assert words in shown
    covered = sorted((r["start_s"], r["end_s"]) for r in rows(out) + rows(rejected))
    assert covered[-1][1] == round(114 / 24, 6)
    assert all(b[0] - a[1] == pytest.approx(shots.GUARD_S, abs=2e-6) for a, b in itertools.pairwise(covered))


def test_motion_is_that_of_the_span_alone(tmp_path, film):
    """The first frames of a still shot differ from those before the cut, which must not count."""
    still = np.repeat(film[70:71], 10, 0)
    path = odd_files.write_film(tmp_path / "film.mp4", np.concatenate([film[:20], still, film[20:51]]))
    motions = [s.motion for s in shots.split_file(path, RULES).spans]
    assert motions[1] < 0.3
    assert min(motions[0], motions[2]) > 1


def test_the_manifest_is_one_and_captions_stay(tmp_path, film, here):
    odd_files.write_film(tmp_path / "a.mp4", film)
    out = tmp_path / "m.jsonl"
    other = {"video": "other.mp4", "caption": "of another film", "id": "x"}
    out.write_text(json.dumps(other) + "\n")
    run([tmp_path / "a.mp4"], out)
    first, *ours = rows(out)
    assert first == other
    assert [set(r) <= set(manifest.COLUMNS) for r in ours] == [True] * 4
    assert [r["id"] for r in ours] == ["a.mp4@0.000#1", "a.mp4@0.833#1", "a.mp4@2.125#1", "a.mp4@2.417#1"]
    assert split.shot_of(ours[1]["id"]) == "a.mp4@0.833"
    out.write_text("".join(json.dumps(r | {"caption": f"shot {i}", "keep": i}) + "\n" for i, r in enumerate(ours)))
    odd_files.write_film(tmp_path / "b.mp4", film[20:])
    run([tmp_path], out)
    assert [r["caption"] for r in rows(out)] == ["shot 0", "shot 1", "shot 2", "shot 3", "", "", ""]
    assert [r.get("keep") for r in rows(out)] == [0, 1, 2, 3, None, None, None], "a reviewer's marks stay as well"
    with pytest.raises(UserError, match=r"captions for 1 span.*a\.mp4@2\.125#1"):
        run([tmp_path], out, shots.Rules(3.0, 0.5, 100.0, None))
    assert len(rows(out)) == 7
    out.write_text("".join(json.dumps(r | {"caption": "x"}) + "\n" for r in rows(out)))
    clips = manifest.read(manifest.ClipSource("films", str(out)))
    assert [(c.start_s, c.end_s) for c in clips][:4] == [(r["start_s"], r["end_s"]) for r in ours]


def test_a_killed_call_goes_on_and_only_what_is_new_is_looked_at(tmp_path, film, here, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        odd_files.write_film(tmp_path / name, film)
    out, in_workers = tmp_path / "out" / "m.jsonl", journal.in_workers

    def killed(*given, **more):
        yield next(in_workers(*given, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "in_workers", killed)
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path], out)
    assert not out.exists()
    with out.with_name("m.jsonl.shots").open("a") as memory:
        memory.write('{"key": "0", "pa')
    monkeypatch.setattr(journal, "in_workers", in_workers)
    run([tmp_path], out)
    assert here == ["a.mp4", "b.mp4"]
    whole = rows(out)
    run([tmp_path], out)
    assert (here, rows(out)) == (["a.mp4", "b.mp4"], whole)
    odd_files.write_film(tmp_path / "b.mp4", film[20:])
    run([tmp_path], out)
    assert here[2:] == ["b.mp4"]
    assert len(rows(out)) == 4 + 3


@pytest.mark.parametrize(("name", "fps", "times_ms"), [
    ("even.mp4", 24, None), ("ntsc.mp4", Fraction(30000, 1001), None), ("odd.mkv", 25, None),
    ("uneven.mkv", 25, UNEVEN_MS), ("turned.mp4", 24, None)])
def test_spans_cut_out_are_those_frames_at_those_times(tmp_path, here, name, fps, times_ms):
    film = odd_files.film_of_shots(SHOTS, *((75, 101) if name == "odd.mkv" else (64, 96)))
    (tmp_path / "in" / "day 1").mkdir(parents=True)
    path = tmp_path / "in" / "day 1" / name
    odd_files.write_film(path, film, fps, pix_fmt="yuv444p" if name == "odd.mkv" else "yuv420p", times_ms=times_ms)
    with av.open(str(path)) as container:
        film = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if name == "turned.mp4":
        source = path.rename(tmp_path / "plain.mp4")
        odd_files.ffmpeg("-display_rotation", 90, "-i", source, "-c", "copy", path)
        film = np.rot90(film, axes=(1, 2))
    before = path.read_bytes()
    out = tmp_path / "m.jsonl"
    spans = run([tmp_path / "in"], out, cut_to=tmp_path / "cut")[0].spans
    assert path.read_bytes() == before
    times_s = decode.probe(path).times_s
    assert len(rows(out)) == len(spans) == 4
    for row, span in zip(rows(out), spans, strict=True):
        target = tmp_path / row["video"]
        assert target.parent == tmp_path / "cut" / "day 1"
        found = decode.probe(target)
        assert (found.height, found.width) == film.shape[1:3]
        assert found.times_s == pytest.approx(times_s[span.first : span.stop] - times_s[span.first], abs=1e-4)
        assert "edit list" not in found.why_not_decord
        read = decode.read_clip(target, 0, None, 120, Bucket(films.count_frames(found, 0, None, 120),
                                                             found.height, found.width))
        assert sorted(set(nearest(read.movedim(1, -1).numpy(), film))) == list(range(span.first, span.stop))
        if not times_ms:
            assert found.duration_s == pytest.approx(len(found.times_s) / float(fps), abs=1e-3)
    run([tmp_path / "in"], out, cut_to=tmp_path / "cut")
    assert here == [name]
    target.unlink()
    run([tmp_path / "in"], out, cut_to=tmp_path / "cut")
    assert here == [name, name]
    assert target.exists()


def test_films_of_one_name_are_not_cut_into_one_file(tmp_path, here):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").touch()
    with pytest.raises(UserError, match=r"the same names: a\.mp4"):
        run([tmp_path / "x", tmp_path / "y"], tmp_path / "m.jsonl", cut_to=tmp_path / "cut")


def test_faulty_films_are_named_and_stop_nothing(tmp_path, film, here, capsys):
    (tmp_path / "in").mkdir()
    odd_files.make(tmp_path / "in", ["empty.mp4", "cut off.mp4", "no index.mp4", "notes.mp4", "a pipe.mp4",
                                     "a link.mp4", "sound.mp4", "no start.ts"])
    odd_files.write_film(tmp_path / "in" / "映画.mp4", film)
    out, rejected = tmp_path / "m.jsonl", tmp_path / "r.jsonl"
    assert split.main([str(a) for a in (tmp_path / "in", "--out", out, "--rejected", rejected, "--min-s", 0.1,
                                        "--jobs", 1, "--timeout-s", 30)]) == 0
    shown = capsys.readouterr().out
    assert "found 9 = 1 films split + 8 faulty + 0 ignored" in shown
    for row in rows(rejected):
        assert row["video"] in row["reason"]
        assert f"fault: {row['reason']}" in shown
    assert re.search(r"no start\.ts.*: 1\d of 2\d frames decode", shown)
    assert {r["video"] for r in rows(rejected)} == {p.relative_to(tmp_path).as_posix() for p in (
        tmp_path / "in").glob("[!映]*")}
    assert [r["video"] for r in rows(out)] == ["in/映画.mp4"] * 4


def test_what_a_user_does_wrong(tmp_path, here, capsys):
    (tmp_path / "a.mp4").touch()
    assert split.main([str(tmp_path), "--min-s", "2", "--max-s", "3"]) == 2
    assert "--max-s 3 is less than twice --min-s 2" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text("no manifest\n")
    assert split.main([str(tmp_path), "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "m.jsonl line 1: not JSON" in capsys.readouterr().err
    assert (tmp_path / "m.jsonl").read_text() == "no manifest\n"
    with pytest.raises(SystemExit, match="0"):
        split.main(["--help"])
    assert "--drop-static" in capsys.readouterr().out
