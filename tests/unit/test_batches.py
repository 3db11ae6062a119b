"""The order of samples: everything once an epoch, one bucket a step, any split the same."""

import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import torch

from wantrain.data.batches import Draws, Order, Split, ahead, caption_for, micro_batches
from wantrain.density import Density
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip, Sample


def planned(number, bucket, repeats=1, prefix="clip"):
    return [PlannedClip(Clip(f"{prefix}{i}", Path("x"), f"caption {i}", "s", repeats), bucket, MediaInfo("d"), 16.0)
            for i in range(number)]


SMALL, LARGE = Bucket(5, 32, 32), Bucket(9, 32, 32)


def plain(bucket):
    return Density("uniform", (), 1.0)


def test_every_clip_is_seen_as_often_as_it_repeats_and_none_is_dropped_to_fill_a_batch():
    clips = planned(7, SMALL) + planned(3, SMALL, repeats=2, prefix="twice")
    order = Order(clips, 4, seed=1)
    seen = Counter(p.clip.id for step in range(13) for p in order.samples(step))
    assert seen == {**{f"clip{i}": 4 for i in range(7)}, **{f"twice{i}": 8 for i in range(3)}}


def test_a_step_holds_one_bucket_and_buckets_get_their_share():
    order = Order(planned(30, SMALL) + planned(10, LARGE, prefix="large"), 4, seed=0)
    buckets = []
    for step in range(40):
        kinds = {p.bucket for p in order.samples(step)}
        assert len(kinds) == 1
        buckets += kinds
    assert Counter(buckets) == {SMALL: 30, LARGE: 10}


def test_order_is_a_function_of_seed_and_step():
    clips = planned(9, SMALL)
    forward, jump = Order(clips, 4, seed=5), Order(clips, 4, seed=5)
    ids = [[p.clip.id for p in forward.samples(step)] for step in range(20)]
    assert [p.clip.id for p in jump.samples(17)] == ids[17]
    assert [p.clip.id for p in jump.samples(3)] == ids[3]
    assert [[p.clip.id for p in Order(clips, 4, seed=6).samples(s)] for s in range(20)] != ids


MIXED = [(SMALL, 1, 7), (LARGE, 0.5, 5), (LARGE, 2, 3), (Bucket(13, 32, 32), 1 / 3, 6), (Bucket(1, 64, 64), 1.25, 4)]


def mixed_order():
    clips = [p for number, (bucket, repeats, count) in enumerate(MIXED)
             for p in planned(count, bucket, repeats, f"of {number} ")]
    return Order(clips, 3, seed=4, factors={LARGE: 2})


def test_any_step_is_reached_alone_and_epochs_are_exact():
    order = mixed_order()
    steps = [[p.clip.id for p in order.samples(step)] for step in range(400)]
    assert [[p.clip.id for p in mixed_order().samples(step)] for step in range(0, 400, 13)] == steps[::13]
    seen = Counter(name for step in steps for name in step)
    for number, (_, repeats, count) in enumerate(MIXED):
        per_epoch = {seen[f"of {number} {i}"] / repeats for i in range(count)}
        assert max(per_epoch) - min(per_epoch) <= 2 / min(repeats, 1), "a turn or two of the epoch at hand"


def test_every_bucket_is_near_its_share_at_every_step():
    needs = {SMALL: Fraction(7, 3), LARGE: Fraction(17, 12), Bucket(13, 32, 32): Fraction(2, 3),
             Bucket(1, 64, 64): Fraction(5, 3)}  # batches an epoch
    order, seen = mixed_order(), Counter()
    for step in range(300):
        seen[order.samples(step)[0].bucket] += 1
        for bucket, need in needs.items():
            assert abs(seen[bucket] - (step + 1) * need / sum(needs.values())) <= 1


def test_neither_clips_nor_steps_cost_anything():
    """Before, a step of 10,000 windows took 83 ms, and the first at step 100,000 two hours."""
    order = Order([p for bucket in (SMALL, LARGE) for p in planned(10_000, bucket, 0.7)], 4, seed=0)
    began = time.process_time()
    for step in (0, 100_000, 10**9):
        order.samples(step)
    one_epoch_each = time.process_time() - began
    for step in range(100_000, 101_000):
        order.samples(step)
    assert one_epoch_each < 1
    assert time.process_time() - began < 3


def test_any_split_deals_each_index_once():
    for micro, processes in ((4, 1), (1, 1), (2, 2), (1, 4), (1, 2)):
        dealt = [i for p in range(processes) for split in [Split(4, micro, processes, p)]
                 for m in range(split.num_micro_steps) for i in split.indices(m)]
        assert sorted(dealt) == [0, 1, 2, 3], (micro, processes)


def test_caption_dropout_has_its_share_and_ignores_the_split():
    clip = planned(1, SMALL)[0]
    draws = [caption_for(clip, 0, step, i, Draws(plain, dropout=0.2)) for step in range(500) for i in range(4)]
    assert abs(draws.count("") / len(draws) - 0.2) < 0.03
    assert caption_for(clip, 0, 3, 1, Draws(plain)) == "caption 0"
    assert caption_for(clip, 0, 3, 1, Draws(plain, dropout=1)) == ""


def test_reading_ahead_changes_neither_batches_nor_order():
    clips = planned(5, SMALL)
    order = Order(clips, 2, seed=2)

    def fetch(clip, caption, first):
        return Sample(torch.full((1, 1, 1, 1), float(clip.clip.id[4:])), torch.zeros(1, 1))

    def make(step):
        return micro_batches(order, Split(2, 1, 1, 0), step, Draws(plain, dropout=0.1), fetch)

    straight = [[b.ids for b in make(step)] for step in range(3, 9)]
    assert [[b.ids for b in step] for step in ahead(range(3, 9), make)] == straight
