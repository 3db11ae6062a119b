"""What filter measures is what was put in: known speeds, blurs, bars, subtitles and copies, and nothing is lost."""

import csv
import functools
import json
import random
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_tools import filter as tool
from data_tools import measuring
from tests import odd_files
from wantrain import journal
from wantrain.terms import UserError

DEMO = sorted((Path(__file__).parents[2] / "wantrain/assets/demo/footage").glob("*.mp4"))
SHAPE = (480, 854)


@functools.cache
def texture(seed=0, height=480, width=854):
    """A grey picture with detail of every size, as nature has."""
    generator = np.random.default_rng(seed)
    layers = [cv2.resize(generator.normal(0, 1, (height // s + 2, width // s + 2)), (width, height),
                         interpolation=cv2.INTER_CUBIC) * s**0.7 for s in (1, 2, 4, 8, 16, 32, 64)]
    picture = sum(layers)
    picture = (127 + 45 * picture / picture.std()).clip(0, 255).astype(np.uint8)
    picture.setflags(write=False)
    return picture


def blurred(picture, sigma):
    return cv2.GaussianBlur(picture, (0, 0), sigma)


def noisy(picture, sigma, seed):
    return (picture + np.random.default_rng(seed).normal(0, sigma, picture.shape)).clip(0, 255).astype(np.uint8)


def written(picture, text="I never said that", *, x=200, y=0.85, outline=2):
    image = Image.fromarray(picture)
    font = ImageFont.load_default(26)
    ImageDraw.Draw(image).text((x, int(y * picture.shape[0])), text, 255, font, stroke_width=outline, stroke_fill=0)
    return np.asarray(image)


def measured(*pictures, gap_s=0.125):
    """The measurements of a clip that shows these pictures, each twice."""
    pairs = np.stack([np.stack([p, p]) for p in pictures])
    return measuring.measure_pairs(pairs, np.full(len(pairs), gap_s))


def colour(frames_FHW):
    return np.repeat(np.stack(frames_FHW)[..., None], 3, -1)


@pytest.fixture
def cheap(here, monkeypatch):
    """`here`, where the pictures are not looked at: the hash hangs on the mean grey."""

    def measure_pairs(pairs_P2HW, gaps_s):
        grey = float(pairs_P2HW.mean())
        return measuring.Measured(luma=grey / 255, hashes=(random.Random(round(grey / 10)).getrandbits(256),))

    monkeypatch.setattr(measuring, "measure_pairs", measure_pairs)
    return here


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(manifest, out=None):
    return tool.run(manifest, out or manifest, 1, 60)


def film_of_greys(path, greys, fps=24):
    """A film that shows each grey for half a second."""
    frames = np.concatenate([np.full((12, 64, 96, 3), grey, np.uint8) for grey in greys])
    return odd_files.write_film(path, frames, fps)


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["480 lines", "240 lines"])
@pytest.mark.parametrize("speed", [0.03, 0.2, 0.5])
def test_a_pan_is_as_fast_as_it_was_made(speed, scale):
    wide = texture(1, int(560 * scale), int(1300 * scale))
    height, width = (round(side * scale) for side in SHAPE)
    shift = speed * 0.125 * np.hypot(height, width)
    first, second = (cv2.warpAffine(wide, np.float32([[1, 0, -x], [0, 1, 0]]), (width, height)) for x in (0, shift))
    assert measuring.motion(first, second, 0.125) == pytest.approx(speed, rel=0.08)
    assert measuring.motion(first, second, 0.25) == pytest.approx(speed / 2, rel=0.08)
    assert measuring.motion(noisy(first, 5, 1), noisy(second, 5, 2), 0.125) == pytest.approx(speed, rel=0.1)
    brighter = (second * 0.7 + 60).astype(np.uint8)
    assert measuring.motion(first, brighter, 0.125) == pytest.approx(speed, rel=0.1)
    framed = [cv2.copyMakeBorder(p, 0, 0, height, height, cv2.BORDER_CONSTANT) for p in (first, second)]
    found = measuring.measure_pairs(np.stack([framed]), np.array([0.125]))
    assert found.motion == pytest.approx(speed, rel=0.1)


def test_what_only_flickers_does_not_move():
    still, other = texture(1), texture(2)
    sky = np.broadcast_to(np.linspace(20, 220, SHAPE[1]).astype(np.uint8), SHAPE)
    cloud = sky.copy()
    cloud[100:300, 200:500] += 1
    for first, second in ((noisy(still, 10, 1), noisy(still, 10, 2)), (still, (still * 0.6).astype(np.uint8)),
                          (still, (still * 1.0 + 70).clip(0, 255).astype(np.uint8)), (still, np.full_like(still, 250)),
                          (cv2.addWeighted(still, 0.6, other, 0.4, 0), cv2.addWeighted(still, 0.4, other, 0.6, 0)),
                          (sky, cloud)):
        assert measuring.motion(first, second, 0.125) < 0.002
    assert measuring.motion(still, still, 0.0) == 0


def test_a_moving_subject_before_a_still_background_moves():
    def scene(x):
        picture = texture(1).copy()
        picture[100:280, x : x + 180] = texture(2)[:180, :180]  # 8 % of the picture
        return picture

    speed = 18 / 0.125 / np.hypot(*SHAPE)
    assert measuring.motion(scene(300), scene(318), 0.125) == pytest.approx(speed, rel=0.15)


def test_sharpness_falls_with_blur_and_not_with_contrast_or_grain():
    demo = [measuring.read_pairs(path, 0, None)[0][3, 0] for path in DEMO[:2]]
    none = np.zeros_like(demo[0])
    for picture in (texture(1, *none.shape), *demo):
        steps = [measuring.sharpness(p, none) for p in (picture, *(blurred(picture, sigma) for sigma in (1.5, 3, 5)))]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > 0.4
        assert steps[3] < 0.33
        low = (picture * 0.4).astype(np.uint8)
        assert measuring.sharpness(low, none) == pytest.approx(steps[0], rel=0.05)
        assert measuring.sharpness(noisy(picture, 4, 1), none) == pytest.approx(steps[0], rel=0.15)
        assert measuring.sharpness(noisy(blurred(picture, 5), 4, 1), none) < 0.33
    assert measuring.sharpness(np.full_like(none, 99), none) == 0


def test_the_blur_of_one_edge_is_told_exactly():
    edge = np.zeros(SHAPE, np.uint8)
    edge[:, 400:] = 200
    none = np.zeros_like(edge)
    for sigma in (1.0, 2.0, 4.0):
        assert measuring.sharpness(blurred(edge, sigma), none) == pytest.approx(1 / np.sqrt(1 + sigma**2), rel=0.15)


def test_subtitles_and_bars_do_not_make_a_blurred_film_sharp():
    soft = blurred(texture(1), 5)
    framed = written(cv2.copyMakeBorder(soft, 60, 60, 0, 0, cv2.BORDER_CONSTANT), y=0.75)
    assert measured(framed).sharpness == pytest.approx(measured(soft).sharpness, rel=0.05)
    assert measured(texture(1)).sharpness > 2 * measured(soft).sharpness


@pytest.mark.parametrize("level", [0, 16, 255])
@pytest.mark.parametrize("bars", [(20, 20, 0, 0), (90, 90, 0, 0), (0, 0, 250, 250), (100, 100, 300, 300), (6, 6, 0, 0)])
def test_bars_are_as_thick_as_they_were_made(bars, level):
    top, bottom, left, right = bars
    height, width = SHAPE[0] - top - bottom, SHAPE[1] - left - right
    film = np.stack([cv2.copyMakeBorder(texture(s, height, width), *bars, cv2.BORDER_CONSTANT, value=level)
                     for s in (1, 2, 3)])
    found = measuring.find_bars(film)
    assert found == pytest.approx((top, SHAPE[0] - bottom, left, SHAPE[1] - right), abs=1)
    small = np.stack([cv2.resize(picture, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA) for picture in film])
    assert measuring.find_bars(small) == pytest.approx([0.75 * side for side in found], abs=1.5)
    assert measured(film[0]).letterbox == pytest.approx(1 - height * width / (SHAPE[0] * SHAPE[1]), abs=0.005)


def test_black_on_one_side_and_subtitles_in_a_bar():
    one = cv2.copyMakeBorder(texture(1, 420), 0, 60, 0, 0, cv2.BORDER_CONSTANT)
    assert measuring.find_bars(one[None]) == (0, 420, 0, 854)
    both = cv2.copyMakeBorder(texture(1, 300), 90, 90, 0, 0, cv2.BORDER_CONSTANT)
    assert measuring.find_bars(written(both, y=0.88)[None]) == (90, 390, 0, 854)


def test_a_dark_or_plain_picture_has_no_bars():
    """A night sky over a skyline, black, a plain sky over a plain sea, bars that are there only at times, a hair."""
    night = np.full(SHAPE, 8, np.uint8)
    tops = np.random.default_rng(3).integers(120, 400, 40)
    for i, top in enumerate(tops):
        night[top:, i * 22 : (i + 1) * 22] = texture(4)[top:, i * 22 : (i + 1) * 22]
    sea = np.full(SHAPE, 200, np.uint8)
    sea[300:] = 90
    framed = cv2.copyMakeBorder(texture(1, 300), 90, 90, 0, 0, cv2.BORDER_CONSTANT)
    white = np.where(framed == 0, 255, framed).astype(np.uint8)
    hair = texture(1).copy()
    hair[:3] = 0
    for film in ([night], [np.zeros(SHAPE, np.uint8)], [sea], [framed, texture(1)], [texture(1)], [hair],
                 [white, texture(1)], [np.zeros(SHAPE, np.uint8), texture(1)]):
        assert measuring.find_bars(np.stack(film)) == (0, SHAPE[0], 0, SHAPE[1])


def test_subtitles_are_found_where_they_are():
    for path in DEMO[:2]:
        pairs = measuring.read_pairs(path, 0, None)[0]
        first, second = (np.ascontiguousarray(p) for p in pairs[2])
        assert not measuring.find_text(first, second).any()
        found = measuring.find_text(written(first), written(second))
        assert 0.005 < found.mean() < 0.02
        assert not found[: int(0.84 * found.shape[0])].any()
        plain, black = np.full_like(first, 230), 255 - written(np.full_like(first, 25), outline=0)
        assert measuring.find_text(black, black).mean() > 0.005
        assert (measuring.find_text(black, black) == measuring.find_text(255 - black, 255 - black)).all()
        assert not measuring.find_text(plain, black).any()  # a line that comes and goes, as in a moving scene
    always, half = measured(written(texture(1))), measured(written(texture(1)), texture(1))
    assert half.text == pytest.approx(always.text / 2, abs=1e-5)


def test_copies_are_near_and_other_shots_far(tmp_path, here):
    source = DEMO[7]
    small, bright = tmp_path / "small.mp4", tmp_path / "bright.mkv"
    odd_files.ffmpeg("-i", source, "-vf", "scale=240:-2", "-crf", 30, small)
    odd_files.ffmpeg("-i", source, "-vf", "eq=brightness=0.12:contrast=0.8,pad=iw:ih+40:0:20,fps=30", bright)
    names = [*map(str, DEMO[6:9]), small.name, bright.name]
    entries, _, _ = run(write(tmp_path / "m.jsonl", [{"video": name, "caption": ""} for name in names]))
    rows = [entry.values for entry in entries]
    assert rows[0]["duplicate"] == 256
    assert [row.get("duplicate_of") for row in rows] == [None, None, None, str(source), str(source)]
    assert max(row["duplicate"] for row in rows[3:]) < 15
    assert min(row["duplicate"] for row in rows[1:3]) > 50


def test_the_nearest_is_that_of_a_plain_loop():
    generator = np.random.default_rng(0)
    clips = [tuple(int.from_bytes(generator.bytes(32), "big") for _ in range(8)) for _ in range(6)]
    clips += [clips[2][3:] + clips[4][:3], (clips[1][5],), tuple(bits ^ 0b10110 for bits in clips[0])]

    def distance(a, b):
        table = [[(x ^ y).bit_count() for y in (b * 8)[:8]] for x in (a * 8)[:8]]
        return min(sum(map(min, table)), sum(map(min, zip(*table, strict=True)))) / 8

    wanted = [(256.0, -1)] + [min((distance(clips[n], clips[i]), i) for i in range(n)) for n in range(1, len(clips))]
    assert tool.nearest_earlier(clips) == wanted
    assert wanted[-2:] == [(0.0, 1), (3.0, 0)]
    assert tool.nearest_earlier([]) == []


def test_exposure_is_that_of_the_picture_within_its_bars():
    picture = np.full((400, 854), 128, np.uint8)
    picture[:, :427] = texture(1)[:400, :427].clip(30, 220)
    picture[300:, 427:] = 255
    picture[:100, 427:] = 4
    found = measured(cv2.copyMakeBorder(picture, 40, 40, 0, 0, cv2.BORDER_CONSTANT))
    assert (found.black, found.white) == pytest.approx((0.125, 0.125), abs=0.005)
    assert found.luma == pytest.approx(picture.mean() / 255, abs=0.01)
    assert found.letterbox == pytest.approx(80 / 480, abs=0.003)


def test_a_sign_grey_pales_and_confetti_are_no_subtitles():
    ground = np.full(SHAPE, 100, np.uint8)
    pales, confetti = ground.copy(), ground
    for x in range(100, 400, 20):
        pales[200:230, x : x + 8] = 185
        confetti = written(confetti, "n", x=x, y=0.4 + 0.01 * (0, 1, 2, 1)[x // 20 % 4], outline=0)
    for picture in (written(ground, "WWWW", outline=0), pales, confetti):
        assert not measuring.find_text(picture, picture).any()
    pales[pales == 185] = 230
    assert measuring.find_text(pales, pales).any()  # what no rule tells from letters


@pytest.mark.parametrize("fps", [12, 24, 60])
def test_speed_and_place_are_those_of_the_span_at_any_rate(tmp_path, fps):
    """A pan of 0.2 for a second, then a bright still; at the film's own rate, from a file."""
    wide = texture(1, 96, 700)
    shift = 0.2 * np.hypot(96, 160) / fps
    pan = [cv2.warpAffine(wide, np.float32([[1, 0, -i * shift], [0, 1, 0]]), (160, 96)) for i in range(fps)]
    path = odd_files.write_film(tmp_path / "pan.mp4", colour(pan + [np.full((96, 160), 240, np.uint8)] * fps), fps)
    moving, still = (measuring.measure(measuring.Job(path, *span, "")) for span in ((0.0, 1.0 - 1e-4), (1.0, None)))
    assert (moving.fault, still.fault) == ("", "")
    assert moving.motion == pytest.approx(0.2, rel=0.08)
    assert moving.luma < 0.6
    assert still.luma > 0.9
    assert still.motion == 0


def test_spans_of_odd_films_are_read_to_the_frame(tmp_path):
    """Only frames of the span, on the right clock: variable rate, edit list, open GOP, turned, an image."""
    odd_files.make(tmp_path, ["variable.mkv", "edit list.mp4", "open gop.ts", "turned.mp4", "still.png", "narrow.mp4"])
    for path in tmp_path.iterdir():
        pairs, gaps_s = measuring.read_pairs(path, 0.0, None)
        assert pairs.dtype == np.uint8
        assert len(pairs) == len(gaps_s) == (1 if path.suffix == ".png" else 8)
        assert pairs.shape[2:] == ((720, 480) if path.name == "turned.mp4" else (480, 720))
    path = film_of_greys(tmp_path / "greys.mp4", (40, 80, 120, 160))
    for start_s, end_s, grey in ((0.0, 0.4999, 40), (0.5, 0.9999, 80), (1.5, None, 160), (1.96, None, 160)):
        assert np.ptp(measuring.read_pairs(path, start_s, end_s)[0].astype(int) - grey) <= 2
        assert abs(measuring.read_pairs(path, start_s, end_s)[0].mean() - grey) < 3


def test_rows_keep_what_they_hold_and_paths_lead_to_the_same_files(tmp_path, cheap):
    (tmp_path / "in").mkdir()
    film_of_greys(tmp_path / "in" / "été.mp4", (40, 200))
    rows = [{"video": "été.mp4", "id": "a", "caption": "grün", "captions": ["x"], "start_s": 0.0, "end_s": 0.5,
             "control": "c.mp4", "mask": "/abs/m.mp4", "aesthetic": 5.5, "note": {"by": [1, None]}},
            {"video": str(tmp_path / "in" / "été.mp4"), "start_s": 0.5, "caption": "", "luma": 9,
             "duplicate_of": "old"},
            {"video": "été.mp4", "id": "c", "caption": "", "end_s": 0.5}]
    manifest, out = write(tmp_path / "in" / "m.jsonl", rows), tmp_path / "out" / "m.jsonl"
    before = manifest.read_bytes()
    run(manifest, out)
    assert manifest.read_bytes() == before
    assert cheap == ["été.mp4"] * 2  # a span that is there twice is looked at once
    got = read(out)
    moved = {"video": "../in/été.mp4", "control": "../in/c.mp4"}
    assert [{k: v for k, v in row.items() if k in given} for row, given in zip(got, rows, strict=True)] == [
        rows[0] | moved, {k: v for k, v in rows[1].items() if k != "duplicate_of"} | {"luma": got[1]["luma"]},
        rows[2] | {"video": "../in/été.mp4"}]
    assert [row.get("duplicate_of") for row in got] == [None, None, "a"]
    assert got[1]["luma"] == pytest.approx(200 / 255, abs=0.01)
    assert all(set(row) >= set(tool.SUGGESTED) for row in got)
    run(manifest)
    assert [row["video"] for row in read(manifest)] == [row["video"] for row in rows]


def test_csv_stays_csv(tmp_path, cheap):
    film_of_greys(tmp_path / "a.mp4", (40, 200))
    manifest = tmp_path / "m.csv"
    manifest.write_text('video,caption,start_s,end_s,id\na.mp4,"one, ""two""\nthree",0.5,,x\n'
                        'a.mp4,,,0.5,y\nno.mp4,,,,z\n')
    run(manifest)
    with manifest.open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert (first["caption"], first["start_s"], third["luma"]) == ('one, "two"\nthree', "0.5", "")
    assert (float(first["luma"]), float(second["luma"])) == pytest.approx((200 / 255, 40 / 255), abs=0.01)
    run(manifest, tmp_path / "m.jsonl")
    assert read(tmp_path / "m.jsonl")[0]["caption"] == first["caption"]
    with pytest.raises(UserError, match=r"m2\.csv: neither \.jsonl nor"):
        run(tmp_path / "m.jsonl", tmp_path / "m2.csv")


def test_a_killed_call_goes_on_and_only_what_is_new_or_changed_is_measured(tmp_path, cheap, monkeypatch):
    films = [film_of_greys(tmp_path / f"{name}.mp4", (40, 200)) for name in "abc"]
    manifest = write(tmp_path / "m.jsonl", [{"video": f.name, "caption": "", "end_s": 0.5} for f in films])
    given, in_workers = manifest.read_bytes(), journal.in_workers

    def killed(*arguments, **more):
        yield next(in_workers(*arguments, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "in_workers", killed)
    with pytest.raises(KeyboardInterrupt):
        run(manifest)
    assert manifest.read_bytes() == given
    with (tmp_path / "m.jsonl.measured").open("a") as memory:
        memory.write('{"key": "0", "lu')
    monkeypatch.setattr(journal, "in_workers", in_workers)
    assert run(manifest)[2] == 1
    assert cheap == ["a.mp4", "b.mp4", "c.mp4"]
    whole = manifest.read_bytes()
    assert run(manifest)[2] == 3
    assert (len(cheap), manifest.read_bytes()) == (3, whole)
    film_of_greys(films[1], (60, 200))
    rows = read(manifest)
    rows[2]["end_s"] = 0.75
    write(manifest, rows)
    assert run(manifest)[2] == 1
    assert cheap[3:] == ["b.mp4", "c.mp4"]
    assert read(manifest)[1]["luma"] == pytest.approx(60 / 255, abs=0.01)
    monkeypatch.setattr(tool, "VERSION", tool.VERSION + 1)
    assert run(manifest)[2] == 0


def test_captions_written_meanwhile_are_kept(tmp_path, cheap, monkeypatch):
    film_of_greys(tmp_path / "a.mp4", (40, 200))
    manifest = write(tmp_path / "m.jsonl", [{"video": "a.mp4", "caption": ""}])
    in_workers = journal.in_workers

    def meanwhile(*arguments, **more):
        yield from in_workers(*arguments, **more)
        if len(cheap) == 1:
            write(manifest, [{"video": "a.mp4", "caption": "a caption"}, {"video": "a.mp4", "id": "b", "start_s": 0.5}])

    monkeypatch.setattr(journal, "in_workers", meanwhile)
    run(manifest)
    first, second = read(manifest)
    assert first["caption"] == "a caption"
    assert second["luma"] > first["luma"]


def test_faulty_clips_are_named_and_stop_nothing(tmp_path, capsys):
    """In worker processes, as a user calls it."""
    names = ["empty.mp4", "garbage.mkv", "notes.png", "a link.mp4", "sound.mp4"]
    odd_files.make(tmp_path, names)
    film_of_greys(tmp_path / "fine.mp4", (40, 200))
    rows = [{"video": name, "caption": ""} for name in [*names, "gone.mp4", "fine.mp4"]]
    rows += [{"video": "fine.mp4", "caption": "", "id": "late", "start_s": 7.0}]
    manifest = write(tmp_path / "m.jsonl", rows)
    for counts in ("rows 8 = 1 measured + 0 remembered + 7 faulty", "rows 8 = 0 measured + 1 remembered + 7 faulty"):
        assert tool.main([str(manifest), "--jobs", "1"]) == 0
        shown = capsys.readouterr().out
        assert counts in shown
        for name in [*names, "gone.mp4"]:
            assert re.search(rf"fault: .*{name}", shown)
        assert "no frame from 7 s to its end; the film lasts 1 s" in shown
    got = read(manifest)
    assert [row["luma"] is None for row in got] == [True] * 6 + [False, True]
    assert all(got[0][column] is None for column in tool.SUGGESTED)
    assert got[6]["duplicate"] == 256


def test_the_table_says_what_the_suggested_limits_drop(tmp_path, here, capsys):
    film_of_greys(tmp_path / "dark.mp4", (2, 2))
    rows = [{"video": str(path), "caption": "", "id": f"demo {i}"} for i, path in enumerate((*DEMO[:2], DEMO[0]))]
    manifest = write(tmp_path / "m.jsonl", [*rows, {"video": "dark.mp4", "caption": ""}])
    assert tool.main([str(manifest)]) == 0
    shown, got = capsys.readouterr().out, read(manifest)
    limits = {name: json.loads(text) for name, text in re.findall(r"data\.limits\.(\w+)=(\S+)", shown)}
    assert list(limits) == list(tool.SUGGESTED)
    out = {name: {row.get("id") for row in got if (low is not None and row[name] < low)
                  or (high is not None and row[name] > high)} for name, (low, high) in limits.items()}
    assert (out["duplicate"], out["luma"], out["motion"]) == ({"demo 2"}, {None}, {None})
    for name, dropped in out.items():
        values = [row[name] for row in got]
        line = re.search(rf"^  {name} .*", shown, re.M).group().split()
        assert [float(n) for n in line[1:6:2]] == pytest.approx([min(values), np.median(values), max(values)], rel=1e-3)
        assert int(line[-1]) == len(dropped)
    assert f"all together drop {len(set.union(*out.values()))} of 4" in shown
    assert "sharpness, lowest: 0 dark.mp4" in shown
    assert "duplicate: demo 2 of demo 0 (0 bits)" in shown


def test_faults_of_the_manifest_are_told_together_and_nothing_is_written(tmp_path, here, capsys):
    lines = ['{"video": "a.mp4"}', "no json", '{"caption": ""}', "", "[1]", '{"video": "a.mp4"}',
             '{"video": "b.mp4", "start_s": "soon"}', '{"video": "c.mp4", "start_s": 3, "end_s": 2}',
             '{"video": "d.mp4", "start_s": [1]}', f'{{"video": "e.mp4", "end_s": {"9" * 400}}}']
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(lines))
    assert tool.main([str(manifest)]) == 2
    said = capsys.readouterr().err
    assert "8 fault(s)" in said
    assert sorted(map(int, re.findall(r"m.jsonl line (\d+):", said))) == [2, 3, 5, 6, 7, 8, 9, 10]
    assert "the id 'a.mp4' is also that of line 1" in said
    assert manifest.read_text() == "\n".join(lines)
    assert list(tmp_path.iterdir()) == [manifest]
    (tmp_path / "m.csv").write_text("video,caption\na.mp4,x,too many\n")
    assert tool.main([str(tmp_path / "m.csv")]) == 2
    assert "line 2: 3 cells for 2 columns" in capsys.readouterr().err
    for wrong, words in ((tmp_path, "is no manifest"), (tmp_path / "gone.jsonl", "gone.jsonl cannot be read")):
        assert tool.main([str(wrong)]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert "data.limits" in capsys.readouterr().out
