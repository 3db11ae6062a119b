"""Which windows go where: nothing is lost, every drop has its reason, and numbers are those computed by hand."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from tests import odd_files
from tests.conftest import moving_square
from wantrain import cli, journal, pictures
from wantrain.data import decode, media, plan
from wantrain.data.buckets import buckets
from wantrain.data.plan import Rules
from wantrain.jobs import Ending, Failure, in_workers
from wantrain.terms import Bucket, Clip, MediaInfo, UserError

quickly = hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)

SQUARE = Bucket(5, 64, 64)


def clip(name="a", **settings):
    return Clip(f"s/{name}", Path(f"{name}.mp4"), "text", "s", **settings)


def film(duration_s, width=64, height=64, **settings):
    return MediaInfo("digest", duration_s, width, height, **settings)


def placed(one, found, *buckets, **settings):
    """The windows of one clip at 16 fps, or why it is dropped. `found` by file name, or of the clip."""
    by_file = found if isinstance(found, dict) else {one.path: found}
    made = plan.place([one], by_file, Rules(buckets or [SQUARE], 16.0, **settings))
    assert made.num_found == 1
    assert bool(made.used) != bool(made.dropped)
    return made.used or made.dropped[0]


lengths = st.integers(1, 400)
num_frames = st.sampled_from([1, 5, 9, 17, 49, 81])


@quickly
@hypothesis.given(lengths, num_frames, st.sampled_from(plan.EXTRACTIONS))
def test_windows_lie_within_the_clip_in_order_and_twice_nowhere(available, length, extract):
    hypothesis.assume(length <= available)
    firsts = plan.windows(available, length, extract)
    assert firsts == sorted(set(firsts))
    assert 0 <= firsts[0] <= firsts[-1] <= available - length


@quickly
@hypothesis.given(lengths, num_frames)
def test_uniform_windows_miss_no_frame_and_are_the_fewest_and_spread(available, length):
    hypothesis.assume(length <= available)
    firsts = plan.windows(available, length, "uniform")
    assert {f for first in firsts for f in range(first, first + length)} == set(range(available))
    assert (len(firsts) - 1) * length < available
    gaps = [b - a for a, b in itertools.pairwise(firsts)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@quickly
@hypothesis.given(lengths, num_frames)
def test_sliding_windows_begin_half_a_window_apart_to_the_last_that_fits(available, length):
    hypothesis.assume(length <= available)
    firsts, half = plan.windows(available, length, "sliding"), max(1, length // 2)
    assert firsts[0] == 0
    assert all(b - a == half for a, b in itertools.pairwise(firsts))
    assert firsts[-1] + half + length > available


@quickly
@hypothesis.given(lengths, num_frames)
def test_the_head_is_at_the_start_and_the_middle_has_as_much_before_as_behind(available, length):
    hypothesis.assume(length <= available)
    first, = plan.windows(available, length, "middle")
    behind = available - length - first
    assert behind - first in (0, 1)
    assert plan.windows(available, length, "head") == plan.windows(available, length, "random") == [0]


def test_windows_begin_at_seconds_of_the_source():
    firsts = [p.start_s for p in placed(clip(start_s=2, end_s=3), film(9), extract="uniform")]
    assert firsts == [round(2 + first / 16, 6) for first in (0, 4, 7, 11)]  # round(11 i / 3)
    assert [p.name for p in placed(clip(start_s=2, end_s=3), film(9), extract="middle")] == ["s/a+0.312"]
    drawn, = placed(clip(start_s=2, end_s=3), film(9), extract="random")
    assert (drawn.start_s, drawn.latest_s) == (2, 2 + 11 / 16)
    exact, = placed(clip(end_s=5 / 16), film(9), extract="random")
    assert exact.latest_s is None


def test_a_clip_goes_to_the_longest_that_it_fills_then_the_nearest_in_aspect_then_the_largest():
    wide, tall, large = Bucket(5, 32, 64), Bucket(5, 64, 32), Bucket(5, 64, 128)
    longer = Bucket(9, 64, 32)
    everything = [tall, wide, longer, large]
    assert placed(clip(), film(1, 128, 64), *everything, Bucket(17, 64, 64))[0].bucket == longer
    assert placed(clip(end_s=8 / 16), film(1, 128, 64), *everything)[0].bucket == large
    assert placed(clip(end_s=8 / 16), film(1, 64, 96), *everything)[0].bucket == tall
    ratios = [Bucket(5, 32, 96), Bucket(5, 96, 32)]
    assert placed(clip(), film(1, 33, 32), *ratios)[0].bucket == ratios[0]
    assert placed(clip(), film(1, 32, 33), *ratios)[0].bucket == ratios[1]


@quickly
@hypothesis.given(num_frames, st.integers(1, 40), st.integers(1, 40), st.integers(1, 40000))
def test_a_longer_clip_has_a_smaller_picture_within_the_budget(length, rows, columns, budget):
    multiple = 16
    size, latent_frames = [rows * multiple, columns * multiple], 1 + (length - 1) // 4
    if budget < latent_frames:
        with pytest.raises(UserError, match=rf"max_tokens_per_clip = {budget} .* {length} frames"):
            buckets([length], [size], multiple, budget)
        return
    bucket, = buckets([length], [size], multiple, budget)
    assert bucket.num_frames == length
    assert bucket.height % multiple == bucket.width % multiple == 0
    assert 0 < bucket.height <= size[0]
    assert 0 < bucket.width <= size[1]
    assert bucket.num_tokens(multiple) <= budget
    if latent_frames * rows * columns <= budget:
        assert [bucket.height, bucket.width] == size


@pytest.mark.parametrize(("size", "budget", "wanted"), [
    ([480, 832], 21 * 30 * 52, (480, 832)), ([480, 832], 21 * 30 * 52 - 1, (480, 816)),
    ([480, 832], 21 * 390, (240, 416)), ([832, 480], 21 * 390, (416, 240)), ([512, 512], 21 * 100, (160, 160)),
    ([512, 32], 21 * 44, (352, 32)),  # (368, 16) is nearer in aspect by a hair, with half the picture
])
def test_the_smaller_picture_keeps_the_aspect_that_multiples_allow(size, budget, wanted):
    bucket, = buckets([81], [size], 16, budget)
    assert (bucket.height, bucket.width) == wanted


@quickly
@hypothesis.given(num_frames, st.integers(8, 40), st.integers(8, 40), st.integers(100, 40000))
def test_the_smaller_picture_is_never_far_from_the_aspect_and_uses_the_budget(length, rows, columns, budget):
    latent_frames = 1 + (length - 1) // 4
    area = min(budget // latent_frames, rows * columns)
    hypothesis.assume(area >= 64)
    bucket, = buckets([length], [[16 * rows, 16 * columns]], 16, budget)
    r, c = bucket.height // 16, bucket.width // 16
    ideal = min(r * columns / rows, c * rows / columns)  # the smaller side decides what one more row or column changes
    assert abs(math.log((r / c) / (rows / columns))) <= 1 / math.floor(ideal)
    assert r * c >= 0.6 * area


def test_speed_takes_frames_further_apart_and_leaves_the_span():
    fast, = placed(clip(speed=2), film(1))
    assert fast.fps == 8
    assert placed(clip(speed=2), film(9 / 16))[0].bucket == SQUARE
    assert placed(clip(speed=2), film(8 / 16)).kind == "too short"
    slow, = placed(clip(speed=0.5), film(3 / 16))
    assert slow.fps == 32
    assert [p.start_s for p in placed(clip(speed=2), film(20 / 16), extract="uniform")] == [0, 5 / 8]


@pytest.mark.parametrize("rate", [16, 24, 30])
def test_twice_the_speed_shows_every_second_frame(rate, tmp_path):
    pictures.write_mp4(tmp_path / "a.mp4", moving_square(1, rate, 64, 64), rate)
    seen = media.look(tmp_path / "a.mp4")
    one = Clip("s/a", tmp_path / "a.mp4", "x", "s", start_s=0.125)
    normal, = placed(one, seen, Bucket(13, 64, 64))
    fast, = placed(Clip("s/a", tmp_path / "a.mp4", "x", "s", start_s=0.125, speed=2), seen, Bucket(5, 64, 64))
    frames = decode.read_window(normal)
    assert len({bytes(f.numpy()) for f in frames}) == 13
    assert torch.equal(decode.read_window(fast), frames[:9:2])


@pytest.mark.parametrize(("value", "limit", "reason"), [
    (1.0, (0.5, 2.0), None), (0.5, (0.5, 2.0), None), (2.0, (0.5, 2.0), None), (-9.0, (None, 2.0), None),
    (9e9, (0.5, None), None), (0.25, (0.5, 2.0), "motion = 0.25 is below 0.5"),
    (2.5, (0.5, 2.0), "motion = 2.5 is above 2"),
    (0.25, (0.5, None), "motion = 0.25 is below 0.5"), (2.5, (None, 2.0), "motion = 2.5 is above 2"),
    (0.0, (0.0, 0.0), None), (-0.5, (0, None), "motion = -0.5 is below 0"),
])
def test_limits_hold_from_the_lower_to_the_upper_bound_inclusive(value, limit, reason):
    made = placed(clip(measures={"motion": value}), film(1), limits={"motion": limit})
    assert (made.kind, made.reason) == ("outside limits", reason) if reason else made[0].bucket == SQUARE


@pytest.mark.parametrize("measures", [{}, {"motion": None}, {"sharpness": 1.0}])
def test_a_clip_without_the_measurement_is_told_apart_from_one_outside(measures):
    dropped = placed(clip(measures=measures), film(1), limits={"motion": (0.5, None)})
    assert dropped.kind == "not measured"
    assert "data.limits.motion" in dropped.reason


def test_every_limit_counts():
    limits = {"motion": (0.5, None), "sharpness": (None, 3)}
    assert placed(clip(measures={"motion": 1, "sharpness": 2}), film(1), limits=limits)[0].bucket == SQUARE
    assert placed(clip(measures={"motion": 1, "sharpness": 4}), film(1), limits=limits).kind == "outside limits"
    assert placed(clip(measures={"motion": 0, "sharpness": 2}), film(1), limits=limits).kind == "outside limits"


def test_reasons_say_their_numbers():
    assert placed(clip(end_s=0.25), film(1)).reason == "4 frames at 16 fps, the shortest bucket needs 5"
    assert placed(clip(), MediaInfo("d", 0.0, 64, 64, "image", 1)).reason == (
        "1 frame at 16 fps, the shortest bucket needs 5; add 1 to data.num_frames")
    assert placed(clip(start_s=2), film(1)).kind == "too short"
    narrow = placed(clip(), film(1, 640, 64))
    assert (narrow.kind, narrow.reason) == ("shape", "640x64 would lose 90% of its picture in 5f 64x64")
    assert placed(clip(), film(1, 256, 64))[0].bucket == SQUARE  # three quarters, exactly
    assert placed(clip(), MediaInfo(fault="no video in it")).reason == "a.mp4: no video in it"


PARTNERED = clip(partners={"control": Path("c.mp4"), "mask": Path("m.mp4")})


def test_partners_get_the_windows_of_their_clip():
    found = {PARTNERED.path: film(1), Path("c.mp4"): film(2), Path("m.mp4"): film(1)}
    windows = placed(PARTNERED, found, extract="uniform")
    assert len(windows) == 4
    for window in windows:
        for kind in ("control", "mask"):
            partner = window.partners[kind]
            assert partner.clip.path == found_path(kind)
            assert partner.found is found[found_path(kind)]
            assert (partner.start_s, partner.fps, partner.bucket) == (window.start_s, window.fps, window.bucket)


def found_path(kind):
    return PARTNERED.partners[kind]


@pytest.mark.parametrize("extract", ["head", "middle", "uniform", "sliding", "random"])
@pytest.mark.parametrize("kind", ["control", "control_mask", "mask"])
def test_a_partner_that_ends_before_the_last_window_drops_the_clip(extract, kind):
    """Of 16 frames: where each way of extracting ends, a partner one frame shorter is too short."""
    end = {"head": 5, "middle": 10, "uniform": 16, "sliding": 15, "random": 16}[extract]
    one = clip(partners={kind: Path("p.mp4")})
    assert placed(one, {one.path: film(1), Path("p.mp4"): film(end / 16)}, extract=extract)[0].partners
    dropped = placed(one, {one.path: film(1), Path("p.mp4"): film((end - 1) / 16)}, extract=extract)
    assert dropped.kind == "partner"
    assert f"its {kind} p.mp4 ends before it" in dropped.reason


def test_an_unreadable_partner_or_a_still_control_drops_the_clip():
    found = {PARTNERED.path: film(1), Path("c.mp4"): film(1), Path("m.mp4"): MediaInfo(fault="no video frames")}
    assert placed(PARTNERED, found).reason == "its mask m.mp4: no video frames"
    still = MediaInfo("d", 0.0, 64, 64, "image", 1)
    assert placed(PARTNERED, found | {Path("m.mp4"): still, Path("c.mp4"): still}).kind == "partner"


def test_a_reference_is_an_image_shown_whole():
    one = clip(partners={"reference": Path("r.png")})
    found = {one.path: film(1), Path("r.png"): MediaInfo("d", 0.0, 32, 64, "image", 1)}
    window, = placed(one, found)
    assert (window.partners["reference"].bucket, window.partners["reference"].contain) == (Bucket(1, 64, 64), True)
    assert window.kind != placed(clip(), found)[0].kind, "a batch has references or none"
    dropped = placed(one, found | {Path("r.png"): film(1)})
    assert (dropped.kind, dropped.reason) == ("partner", "its reference r.png is a video of 1 s, not an image")


def test_one_image_masks_every_window():
    found = {PARTNERED.path: film(1), Path("c.mp4"): film(1), Path("m.mp4"): MediaInfo("d", 0.0, 64, 64, "image", 1)}
    windows = placed(PARTNERED, found, extract="sliding")
    assert [p.partners["mask"].bucket for p in windows] == [Bucket(1, 64, 64)] * 6
    assert [p.partners["control"].bucket for p in windows] == [SQUARE] * 6


def test_a_still_mask_of_a_late_window_is_read(tmp_path):
    Image.new("L", (64, 64), 255).save(tmp_path / "m.png")
    mask = tmp_path / "m.png"
    one = clip(start_s=3, end_s=4, partners={"mask": mask})
    window = placed(one, {one.path: film(9), mask: media.look(mask)}, extract="middle")[0]
    assert decode.read_window(window.partners["mask"]).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("size", "lost", "scale"), [
    ((64, 64), 0, 1), ((128, 128), 0, 0.5), ((128, 64), 1 / 2, 1), ((64, 96), 1 / 3, 1), ((32, 32), 0, 2),
    ((32, 48), 1 / 3, 2), ((96, 48), 1 / 2, 4 / 3),
])
def test_cropped_and_enlarged(size, lost, scale):
    found = film(1, *size)
    assert math.isclose(plan.cropped(SQUARE, found), lost, abs_tol=1e-12)
    assert math.isclose(plan.enlarged(SQUARE, found), scale)


@pytest.mark.parametrize(("extract", "frames", "missing"), [
    ("head", 16, 11), ("middle", 16, 11), ("uniform", 16, 0), ("sliding", 16, 1), ("random", 16, 0), ("head", 5, 0),
    ("sliding", 9, 0)])
@pytest.mark.parametrize("speed", [1, 2])
def test_trimmed_seconds_are_those_that_no_window_shows(extract, frames, missing, speed):
    one = clip(start_s=0.5, end_s=0.5 + frames * speed / 16, speed=speed)
    windows = placed(one, film(9), extract=extract)
    assert math.isclose(plan.trimmed_s(windows), missing * speed / 16, abs_tol=1e-9)


def test_an_image_is_never_trimmed():
    windows = placed(clip(), MediaInfo("d", 0.0, 64, 64, "image", 1), Bucket(1, 64, 64))
    assert plan.trimmed_s(windows) == 0


@quickly
@hypothesis.given(st.lists(st.tuples(st.floats(0, 3), st.integers(16, 400), st.integers(16, 400),
                                     st.sampled_from([None, 0.1, 2.0]), st.booleans()), max_size=9),
                  st.sampled_from(plan.EXTRACTIONS))
def test_found_is_used_plus_dropped_and_no_clip_is_both(films, extract):
    found, clips = {}, []
    for number, (duration_s, width, height, motion, is_broken) in enumerate(films):
        clips.append(clip(str(number), measures={"motion": motion}))
        found[clips[-1].path] = MediaInfo(fault="bad") if is_broken else film(duration_s, width, height)
    made = plan.place(clips, found, Rules([SQUARE, Bucket(9, 32, 64)], 16, extract, {"motion": (1, None)}))
    used, dropped = {p.clip.id for p in made.used}, {d.clip.id for d in made.dropped}
    assert used | dropped == {c.id for c in clips}
    assert not used & dropped
    assert made.num_found == len(films)
    assert {d.kind for d in made.dropped} <= set(plan.KINDS_OF_DROPS)
    assert len({p.name for p in made.used}) == len(made.used)


def test_files_to_look_into_are_each_named_once_with_their_partners():
    films = [clip("a", partners={"mask": Path("m.png")}), clip("a", start_s=1.0),
             clip("b", partners={"control": Path("c.mp4"), "mask": Path("m.png")})]
    assert plan.files_of(films) == [Path("a.mp4"), Path("b.mp4"), Path("c.mp4"), Path("m.png")]


# The verbs, on a set with a clip of each kind

DROPS = {"unreadable": "broken", "outside limits": "still standing", "not measured": "unmeasured",
         "too short": "short", "shape": "stripe", "partner": "partner"}


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """Overrides for a set of two good clips and one for each kind of drop."""
    root = tmp_path_factory.mktemp("kinds")
    pictures.write_mp4(root / "a.mp4", moving_square(1, 9, 64, 96), 16)
    pictures.write_mp4(root / "stripe.mp4", moving_square(2, 9, 16, 320), 16)
    pictures.write_mp4(root / "short mask.mp4", moving_square(2, 3, 64, 96), 16)
    (root / "broken.mp4").write_bytes(b"no film " * 99)
    rows = [
        {"id": "good", "video": "a.mp4", "mask": "a.mp4"}, {"id": "good too", "video": "a.mp4", "start_s": 0.125},
        {"id": "broken", "video": "broken.mp4"}, {"id": "still standing", "video": "a.mp4", "motion": 0.1},
        {"id": "unmeasured", "video": "a.mp4", "motion": None}, {"id": "short", "video": "a.mp4", "end_s": 0.2},
        {"id": "stripe", "video": "stripe.mp4"}, {"id": "partner", "video": "a.mp4", "mask": "short mask.mp4"},
    ]
    (root / "m.jsonl").write_text("".join(json.dumps({"caption": "x", "motion": 1} | row) + "\n" for row in rows))
    return overrides(root, "data.limits.motion=[0.5,null]", "data.extract=uniform")


def overrides(root, *more):
    return ["recipe=demo_anime", "tracker=none", "~data.sources.regularisation", "data.heldout=null",
            f"data.sources.style.path={root / 'm.jsonl'}", f"run.dir={root / 'run'}",
            f"data.cache_dir={root / 'cache'}",
            "validation.every_steps=0", "data.num_frames=[5]", "data.resolutions=[[32,48]]", "data.batch_size=2",
            "data.num_workers=1", "train.micro_batch_size=2", "train.num_steps=1", "lora.rank=2", *more]


def said(*arguments):
    """(exit code, all that the command printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = cli.main(list(arguments))
    return code, out.getvalue()


def counts(printed):
    """(found, used, dropped by kind) as the command line says them."""
    line = next(line for line in printed.splitlines() if line.startswith("source "))
    found, used = (int(n) for n in re.search(r"(\d+) clips = (\d+) used", line).groups())
    return found, used, {kind: int(n) for n, kind in re.findall(r"\+ (\d+) dropped \(([^)]+)\)", line)}


def test_every_kind_of_drop_is_made_counted_and_named(every_kind):
    assert DROPS.keys() == set(plan.KINDS_OF_DROPS)
    code, printed = said("check", *every_kind, "data.allow_drops=true")
    assert code == 0
    found, used, dropped = counts(printed)
    assert (found, used, dropped) == (8, 2, dict.fromkeys(DROPS, 1))
    assert found == used + sum(dropped.values())
    for name in DROPS.values():
        assert f"dropped    style/{name}: " in printed
    code, printed = said("cache", *every_kind, "data.allow_drops=true")
    assert code == 0
    # Of four windows two show the same; two captions are prompts that a training may sample.
    assert "3 clips, 2 masks and 4 captions ready" in printed


def test_without_leave_all_drops_are_named_but_those_that_limits_ask_for(every_kind):
    code, printed = said("cache", *every_kind)
    assert code == 2
    assert "5 clip(s) cannot be used" in printed
    for kind, name in DROPS.items():
        assert (f"style/{name}: " in printed) == (kind != "outside limits")


def test_what_does_not_decode_is_an_error_once_and_a_counted_drop_from_then_on(tmp_path):
    odd_files.make(tmp_path, ["no start.ts"])
    pictures.write_mp4(tmp_path / "a.mp4", moving_square(1, 9, 64, 96), 16)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"video": name, "caption": "x"}) + "\n"
                                              for name in ("a.mp4", "no start.ts")))
    settings = overrides(tmp_path, "data.allow_drops=true")
    assert "2 clips = 2 used" in said("check", *settings)[1]
    code, printed = said("cache", *settings)
    assert code == 2
    assert "style/no start.ts" in printed
    code, printed = said("check", *settings)
    assert (code, counts(printed)) == (0, (2, 1, {"unreadable": 1}))
    code, printed = said("check", *settings, "data.allow_drops=false")
    assert code == 2
    assert "1 clip(s) cannot be used" in printed


# Looking into files

@pytest.fixture
def looked(monkeypatch):
    """The files that `look_all` looks into, which it does here in this process."""
    seen = []

    def here(function, items, *_, **__):
        for item in items:
            seen.append(item)
            yield item, function(item), None

    monkeypatch.setattr(journal, "in_workers", here)
    return seen


@pytest.fixture
def three(tmp_path):
    for number in range(2):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    return [tmp_path / name for name in ("0.png", "1.png", "bad.png")]


def test_what_was_found_is_remembered_but_for_faults(three, looked, tmp_path):
    first = media.look_all(three, tmp_path / "cache", 1, 60)
    assert looked == three
    assert [first[path].width for path in three] == [8, 9, 0]
    assert [bool(first[path].fault) for path in three] == [False, False, True]
    looked.clear()
    assert media.look_all(three, tmp_path / "cache", 1, 60) == first
    assert looked == three[2:]


def test_a_changed_file_is_looked_at_again_and_a_mended_one_is_found(three, looked, tmp_path):
    media.look_all(three, tmp_path / "cache", 1, 60)
    looked.clear()
    Image.new("RGB", (20, 8)).save(three[0])
    Image.new("RGB", (30, 8)).save(three[2])
    found = media.look_all(three, tmp_path / "cache", 1, 60)
    assert looked == [three[0], three[2]]
    assert [found[path].width for path in three] == [20, 9, 30]
    same_size = three[1].read_bytes()
    os.utime(three[1], ns=(1, 1))
    three[1].write_bytes(same_size)
    looked.clear()
    media.look_all(three, tmp_path / "cache", 1, 60)
    assert looked == [three[1]]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_last_line_cut_off_by_a_kill_costs_that_line_only(three, looked, tmp_path, cut):
    found = media.look_all(three[:2], tmp_path / "cache", 1, 60)
    memory = tmp_path / "cache" / "sources.jsonl"
    memory.write_bytes(memory.read_bytes()[:-cut])
    for _ in range(2):
        looked.clear()
        assert media.look_all(three[:2], tmp_path / "cache", 1, 60) == found
    assert looked == []


def test_what_was_found_before_a_kill_is_kept(three, monkeypatch, tmp_path):
    def dies_after_one(function, items, *_, **__):
        yield items[0], function(items[0]), None
        assert '"width": 8' in (tmp_path / "cache" / "sources.jsonl").read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "in_workers", dies_after_one)
    with pytest.raises(KeyboardInterrupt):
        media.look_all(three, tmp_path / "cache", 1, 60)
    asked = []
    monkeypatch.setattr(journal, "in_workers", lambda function, items, *_, **__: (
        asked.append(item) or (item, function(item), None) for item in items))
    media.look_all(three, tmp_path / "cache", 1, 60)
    assert asked == three[1:]


def test_a_file_that_hangs_is_a_fault_after_the_limit_and_stops_nothing(three, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    found = media.look_all([tmp_path / "pipe.mp4", *three], tmp_path / "cache", 1, 1.0)
    assert found[tmp_path / "pipe.mp4"].fault == "not finished after 1 s; allow more with data.timeout_s"
    assert [found[path].width for path in three] == [8, 9, 0]


def test_a_look_that_crashes_or_hangs_takes_no_other_with_it():
    work = ["1 + 1", "__import__('os')._exit(7)", "__import__('time').sleep(99)", "'last'"]
    got = {item: (result, why) for item, result, why in in_workers(eval, work, 1, 0.5)}
    assert got[work[0]] == (2, None)
    assert got[work[1]] == (None, Failure(Ending.CRASHED, "its reader crashed (exit code 7)"))
    assert got[work[2]][1].ending is Ending.TIMED_OUT
    assert got[work[3]] == ("last", None)


HOLDS_A_LOCK = """
from wantrain.jobs import in_workers
if __name__ == "__main__":
    print(list(in_workers(eval, ["globals().update(kept=__import__('multiprocessing').Lock())"], 1, 60.0)))
"""


def test_workers_give_back_what_they_hold_of_the_system(tmp_path):
    script = tmp_path / "holds_a_lock.py"
    script.write_text(HOLDS_A_LOCK)
    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # Python tells of semaphores that nobody gave back
