"""What each sample is given: its turn, caption, window and weight, the same for any split; and ordered workers."""

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wantrain import flow
from wantrain.data import batches, buckets
from wantrain.data.batches import Draws, Order, Split, caption_for, window_for
from wantrain.data.captions import captions_of
from wantrain.density import Density
from wantrain.jobs import in_workers
from wantrain.models.encode import pool_mask
from wantrain.recipe import clips as clips_of_recipe
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip, Sample, UserError

SMALL, LARGE = Bucket(5, 32, 32), Bucket(9, 32, 64)


def unshifted(bucket):
    return Density("uniform", (), 1.0)


def shifted(bucket):
    return Density("uniform", (), 3.0)


def planned(number, bucket=SMALL, prefix="clip", **settings):
    return [PlannedClip(Clip(f"{prefix}{i}", Path("x"), f"caption {i}", prefix, **settings), bucket,
                        MediaInfo("d", 9.0), 16.0) for i in range(number)]


def ids(order, steps):
    return [[p.clip.id for p in order.samples(step)] for step in steps]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


# Repeats and weights

@pytest.mark.parametrize("number", [4, 7])
def test_a_clip_with_half_a_repeat_is_seen_once_in_two_epochs_and_halves_alternate(number):
    row = flat(ids(Order(planned(number, repeats=0.5), 1, seed=3), range(4 * number)))
    pairs = [row[i : i + number] for i in range(0, len(row), number)]  # two epochs each
    for pair in pairs:
        assert Counter(pair) == {f"clip{i}": 1 for i in range(number)}
    halves = [{frozenset(pair[:number // 2]), frozenset(pair[number // 2:])} for pair in pairs]
    assert all(half == halves[0] for half in halves)
    assert len({tuple(pair) for pair in pairs}) > 1


def test_one_and_a_half_repeats_are_one_in_one_epoch_and_two_in_the_next():
    order = Order(planned(6, repeats=1.5), 3, seed=0)
    epochs = [Counter(flat(ids(order, range(3 * e, 3 * e + 3)))) for e in range(8)]
    assert all(set(epoch.values()) == {1, 2} for epoch in epochs)
    assert all(a[clip] + b[clip] == 3 for a, b in itertools.pairwise(epochs) for clip in a)


def test_mixtures_of_repeats_are_exact_over_many_epochs():
    shares = {"third": 1 / 3, "half": 0.5, "once": 1.0, "much": 2.25}
    clips = flat(planned(5, prefix=name, repeats=share) for name, share in shares.items())
    in_twelve_epochs = round(12 * 5 * sum(shares.values()))
    assert in_twelve_epochs == 245
    seen = Counter(flat(ids(Order(clips, 5, seed=1), range(49))))
    assert seen == {f"{name}{i}": round(12 * share) for name, share in shares.items() for i in range(5)}


def test_a_quarter_of_a_repeat_is_once_in_four_epochs():
    clips = planned(3, prefix="rare", repeats=0.25) + planned(20)
    row = flat(ids(Order(clips, 1, seed=0), range(4 * 20 + 3)))
    assert Counter(clip for clip in row if clip.startswith("rare")) == {f"rare{i}": 1 for i in range(3)}


def config(**weights):
    return SimpleNamespace(data=SimpleNamespace(sources={
        name: SimpleNamespace(weight=weight) for name, weight in weights.items()}))


def test_weights_share_the_samples_whatever_the_sizes_and_keep_their_total():
    clips = planned(40, prefix="big") + planned(5, prefix="small") + planned(5, LARGE, prefix="small")
    weighted = clips_of_recipe._weighted(clips, config(big=1, small=3))
    total = sum(p.clip.repeats for p in weighted)
    assert math.isclose(total, 50)
    assert [p.clip.id for p in weighted] == [p.clip.id for p in clips]
    order = Order(weighted, 2, seed=0)
    seen = Counter(p.clip.source for step in range(500) for p in order.samples(step))
    assert abs(seen["small"] / seen.total() - 0.75) < 0.01
    assert clips_of_recipe._weighted(clips, config(big=None, small=None)) == clips


def test_weights_without_a_source_that_has_no_clips_left():
    weighted = clips_of_recipe._weighted(planned(4, prefix="big"), config(big=1, gone=9))
    assert [p.clip.repeats for p in weighted] == [1.0] * 4


# Batch sizes by tokens

def test_a_step_has_as_many_samples_as_fit_in_whole_multiples():
    assert (SMALL.num_tokens(16), LARGE.num_tokens(16)) == (8, 24)
    assert buckets.batch_factors([SMALL, LARGE], 2, None, 16) == {}
    for budget in range(48, 200, 7):
        factors = buckets.batch_factors([SMALL, LARGE], 2, budget, 16)
        for bucket, factor in factors.items():
            tokens = 2 * bucket.num_tokens(16)
            assert factor * tokens <= budget < (factor + 1) * tokens
    with pytest.raises(UserError, match=r"max_tokens_per_batch = 47, .*batch_size = 2 of bucket 9f 32x64 has 48 tokens"
                       ) as caught:
        buckets.batch_factors([SMALL, LARGE], 2, 47, 16)
    assert "data.max_tokens_per_batch=48" in caught.value.next_step


FACTORS = {SMALL: 3, LARGE: 1}


def test_batches_of_different_sizes_drop_nothing_and_take_steps_in_proportion():
    order = Order(planned(30) + planned(10, LARGE, "large"), 2, seed=0, factors=FACTORS)
    steps = [order.samples(step) for step in range(40)]
    assert all(len(samples) == 2 * FACTORS[samples[0].bucket] for samples in steps)
    assert all(len({p.bucket for p in samples}) == 1 for samples in steps)
    assert Counter(samples[0].bucket for samples in steps) == {SMALL: 20, LARGE: 20}
    assert set(Counter(p.clip.id for samples in steps for p in samples).values()) == {4}
    shares = [sum(s[0].bucket == SMALL for s in steps[:n]) - n / 2 for n in range(41)]
    assert max(map(abs, shares)) <= 1


SPLITS = [(4, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 4)]
"""Samples of a micro-step and processes, for a global batch of 4."""


def number_of(p, caption, first):
    """Tensors that tell which window and caption they are of."""
    code = float(p.clip.id.strip("aeglr-c ip") or 0)
    latents = torch.full((1, 1, 1, 1), code + p.start_s)
    return Sample(latents, torch.full((1, 1), float(len(caption))), torch.full((1, 1, 1, 1), code),
                  {"image": torch.full((1,), code)}, torch.tensor([float(first)]), torch.full((1, 1), code))


@pytest.mark.parametrize(("micro", "processes"), SPLITS)
def test_every_split_trains_on_the_same_global_batches(micro, processes):
    clips = [PlannedClip(Clip(f"{i}", Path("x"), f"red, {'tag, ' * i}end", "s", more_captions=("x" * 50,)), bucket,
                         MediaInfo("d", 9.0), 16.0, 1.0, 5.0)
             for i, bucket in enumerate([SMALL] * 7 + [LARGE] * 3)]
    draws = Draws(shifted, dropout=0.2, first_frame=0.5)

    def dealt(micro, processes, step):
        """Every sample of a step by its index in the global batch."""
        order, got = Order(clips, 4, seed=2, factors=FACTORS), {}
        for process in range(processes):
            made = batches.micro_batches(order, Split(4, micro, processes, process), step, draws, number_of)
            assert len(made) == 4 // (micro * processes)
            for batch in made:
                for k, index in enumerate(batch.index_B):
                    assert index not in got
                    got[index] = (batch.ids[k], *(float(t[k].sum()) for t in (
                        batch.latents_BCTHW, batch.text_BLD, batch.mask_B1THW, batch.noise_BCTHW, batch.sigma_B,
                        batch.condition["image"], batch.known_BT, batch.class_text_BLD)))
        return got

    for step in (0, 1, 7, 30):
        whole = dealt(4, 1, step)
        assert sorted(whole) == list(range(len(whole)))
        assert len(whole) in (4, 12)
        assert dealt(micro, processes, step) == whole


# Captions

def test_tags_take_other_orders_behind_the_first():
    clip = Clip("a", Path("x"), "trigger, red, blue, green", "s", more_captions=("a plain sentence", "one, two"))
    assert captions_of(clip, 0) == ["trigger, red, blue, green", "a plain sentence", "one, two"]
    texts = captions_of(clip, 3)
    assert texts == captions_of(clip, 3)
    assert texts[:1] == ["trigger, red, blue, green"]
    assert {"a plain sentence", "one, two"} < set(texts)
    orders = [text for text in texts if text.startswith("trigger")]
    assert 2 <= len(orders) <= 4
    assert all(sorted(text.split(", ")[1:]) == ["blue", "green", "red"] for text in orders)
    assert len(captions_of(clip, 60)) == 2 + math.factorial(3)
    long = Clip("a", Path("x"), ", ".join(map(str, range(20))), "s")
    assert len(captions_of(long, 5)) == 6
    assert set(captions_of(long, 2)) < set(captions_of(long, 5))


def test_tags_may_be_separated_by_bare_commas():
    texts = captions_of(Clip("a", Path("x"), "trigger,red,blue,green", "s"), 60)
    orders = {tuple(re.split(" *, *", text)) for text in texts}
    assert orders == {("trigger", *tags) for tags in itertools.permutations(("red", "blue", "green"))}


def test_captions_are_drawn_in_equal_shares_and_emptied_in_theirs():
    clip = planned(1)[0].clip
    one = PlannedClip(Clip("a", clip.path, "t, a, b", "s", more_captions=("second",)), SMALL, MediaInfo("d"), 16.0)
    texts = captions_of(one.clip, 5)
    assert len(texts) == 3
    drawn = Counter(caption_for(one, 0, step, i, Draws(unshifted, dropout=0.1, tag_orders=5))
                    for step in range(400) for i in range(4))
    assert drawn.keys() == {"", *texts}
    assert abs(drawn[""] / 1600 - 0.1) < 0.02
    assert all(abs(drawn[text] / 1600 - 0.3) < 0.04 for text in texts)


def test_caption_and_dropout_are_drawn_apart_from_each_other():
    """With more dropout fewer samples have a caption, and those that have keep theirs."""
    clip = Clip("a", Path("x"), "first", "s", more_captions=("second", "third"))
    one = PlannedClip(clip, SMALL, MediaInfo("d"), 16.0)
    without, some = ([caption_for(one, 0, step, 1, Draws(unshifted, dropout=dropout)) for step in range(200)]
                     for dropout in (0.0, 0.5))
    assert "" not in without
    assert all(b in (a, "") for a, b in zip(without, some, strict=True))
    assert Counter(b for b in some if b).keys() == {"first", "second", "third"}


# Windows

def drawn_window(**settings):
    mask = PlannedClip(Clip("a", Path("m"), "x", "s"), SMALL, MediaInfo("m", 9.0), 16.0, 1.0)
    return PlannedClip(Clip("a", Path("x"), "x", "s", start_s=1.0), SMALL, MediaInfo("d", 9.0), 16.0, 1.0,
                       **{"latest_s": 5.0, "partners": {"mask": mask, "control": mask}} | settings)


def test_random_windows_are_uniform_and_partners_move_with_them():
    starts = []
    for step, index in itertools.product(range(500), range(4)):
        window = window_for(drawn_window(), 0, step, index)
        assert window.latest_s is None
        assert {p.start_s for p in window.partners.values()} == {window.start_s}
        assert window_for(drawn_window(), 0, step, index) == window
        starts.append(window.start_s)
    assert 1.0 <= min(starts) < 1.01
    assert 4.99 < max(starts) <= 5.0
    for share in (0.25, 0.5, 0.75):
        assert abs(sum(s < 1 + 4 * share for s in starts) / len(starts) - share) < 0.03
    assert len(set(starts)) > 1990
    assert window_for(drawn_window(), 1, 0, 0) != window_for(drawn_window(), 0, 0, 0)


def test_windows_that_the_plan_has_fixed_stay():
    fixed = drawn_window(latest_s=None)
    assert window_for(fixed, 0, 3, 1) is fixed


@pytest.mark.parametrize(("micro", "processes", "process"), [(4, 1, 0), (1, 2, 0), (1, 2, 1), (2, 2, 1)])
def test_what_is_decoded_ahead_is_what_will_be_asked_for(micro, processes, process):
    clips = [drawn_window(), drawn_window(partners={}), *planned(3), *planned(4, LARGE)]
    split, asked = Split(4, micro, processes, process), []

    def fetch(window, caption, first):
        asked.append(window)
        return Sample(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1))

    order = Order(clips, 4, seed=0, factors=FACTORS)
    for step in range(5, 17):
        batches.micro_batches(order, split, step, Draws(unshifted), fetch)
    assert list(batches.coming(Order(clips, 4, seed=0, factors=FACTORS), split, range(5, 17))) == asked
    assert len({w.start_s for w in asked}) > 5


# Masks

def test_a_mask_becomes_the_mean_over_what_each_latent_covers():
    frames = torch.randint(0, 256, (9, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = pool_mask(frames, Bucket(9, 16, 24), 8)
    assert mask.shape == (1, 3, 2, 3)
    assert mask.dtype == torch.float32
    for t, span in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for y, x in itertools.product(range(2), range(3)):
            covered = frames[span, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].double().mean() / 255
            assert math.isclose(float(mask[0, t, y, x]), float(covered), rel_tol=1e-5)
    white = torch.full((1, 3, 16, 24), 255, dtype=torch.uint8)
    assert torch.equal(pool_mask(white, Bucket(9, 16, 24), 8), torch.ones(1, 3, 2, 3))
    assert torch.equal(pool_mask(white, Bucket(1, 16, 24), 8), torch.ones(1, 1, 2, 3))


def test_one_frame_stands_for_all():
    frame = torch.randint(0, 256, (1, 3, 16, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask = pool_mask(frame, Bucket(9, 16, 24), 8)
    torch.testing.assert_close(mask, pool_mask(frame.expand(9, -1, -1, -1), Bucket(9, 16, 24), 8), rtol=0, atol=1e-7)


def masked(*shapes_THW):
    """mask_B1THW of a batch whose samples have masks of these shapes (None: no mask), latents of 3x2x2."""
    clips = planned(len(shapes_THW))
    masks = {p.clip.id: shape and torch.full((1, *shape), 0.5) for p, shape in zip(clips, shapes_THW, strict=True)}
    size = len(clips)
    batch, = batches.micro_batches(
        Order(clips, size, seed=0), Split(size, size, 1, 0), 0, Draws(unshifted),
        lambda p, *_: Sample(torch.zeros(2, 3, 2, 2), torch.zeros(1, 1), masks[p.clip.id]))
    return dict(zip(batch.ids, batch.mask_B1THW, strict=True)) if batch.mask_B1THW is not None else None


def test_a_sample_without_a_mask_counts_everywhere():
    assert masked(None, None) is None
    mixed = masked(None, (3, 2, 2))
    assert torch.equal(mixed["clip0"], torch.ones(1, 3, 2, 2))
    assert torch.equal(mixed["clip1"], torch.full((1, 3, 2, 2), 0.5))


@pytest.mark.parametrize("other", [None, (3, 2, 2)], ids=str)
def test_still_masks_share_a_batch_with_moving_ones_and_none(other):
    mixed = masked((1, 2, 2), other)
    assert torch.equal(mixed["clip0"].expand(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5))


def test_a_weighted_loss_is_the_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 4, 5, 4, 6, generator=generator)
    weight = torch.rand(3, 1, 5, 4, 6, generator=generator)
    squares = (predicted - target).square().double()
    wanted = [float((squares[b] * weight[b]).sum() / (4 * weight[b].double().sum())) for b in range(3)]
    got = flow.loss_per_sample(predicted, target, weight)
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-5, atol=0)
    plain = flow.loss_per_sample(predicted, target)
    for same in (torch.ones_like(weight), torch.full_like(weight, 0.25), torch.ones(3, 1, 1, 4, 6)):
        torch.testing.assert_close(flow.loss_per_sample(predicted, target, same), plain, rtol=1e-6, atol=0)


def test_nothing_outside_a_mask_counts_and_the_inside_counts_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 3, 4, 4, generator=generator)
    weight = torch.zeros(2, 1, 3, 4, 4)
    weight[:, :, 1:, :2] = 1
    inside = flow.loss_per_sample(predicted[:, :, 1:, :2], target[:, :, 1:, :2])
    torch.testing.assert_close(flow.loss_per_sample(predicted, target, weight), inside, rtol=1e-6, atol=0)
    moved = predicted + 100 * (1 - weight)
    torch.testing.assert_close(flow.loss_per_sample(moved, target, weight), inside, rtol=1e-6, atol=0)


def test_a_mask_that_is_black_throughout_gives_no_loss_and_not_nan():
    predicted = torch.ones(1, 2, 1, 2, 2)
    assert float(flow.loss_per_sample(predicted, 2 * predicted, torch.zeros(1, 1, 1, 2, 2))) == 0


# Workers

@pytest.fixture
def first_waits(tmp_path):
    """Items of which the first is not done before the fourth."""
    flag = f"__import__('pathlib').Path({str(tmp_path / 'flag')!r})"
    return [f"[0 for _ in iter({flag}.exists, True)].clear() or 0", "1", "2", f"{flag}.touch() or 3",
            *(str(i) for i in range(4, 9))]


def test_ordered_results_come_in_the_order_of_the_items(first_waits):
    got = list(in_workers(eval, first_waits, 2, 60, ordered=True))
    assert [item for item, _, _ in got] == first_waits
    assert [result for _, result, _ in got] == list(range(9))


def test_unordered_results_all_come_and_none_waits_for_a_slow_one(first_waits):
    got = [result for _, result, _ in in_workers(eval, first_waits, 2, 60)]
    assert sorted(got) == list(range(9))
    assert got[:2] == [1, 2]


def test_ordered_results_keep_their_place_where_a_worker_dies_or_hangs():
    items = ["1", "__import__('os')._exit(3)", "__import__('time').sleep(99)", "4"]
    got = list(in_workers(eval, items, 2, 0.5, ordered=True))
    assert [(item, result) for item, result, _ in got] == [(items[0], 1), (items[1], None), (items[2], None),
                                                           (items[3], 4)]
    assert "exit code 3" in str(got[1][2])
    assert "not finished after 0.5 s" in str(got[2][2])


def test_an_endless_row_of_items_is_taken_up_two_ahead_for_each_worker():
    """The first item takes long: one worker is busy with it, the other runs ahead as far as it may."""
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield f"{i} if {i} else __import__('time').sleep(0.3) or 0"

    results = in_workers(eval, endless(), 2, 60, ordered=True)
    assert next(results)[1] == 0
    assert len(taken) == 4
    for number in range(1, 9):
        assert next(results)[1] == number
        assert len(taken) <= number + 4
    results.close()


def test_no_items_give_no_results():
    assert list(in_workers(abs, [], 2, 60)) == list(in_workers(abs, [], 2, 60, ordered=True)) == []
