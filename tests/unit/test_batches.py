"""The order of samples: everything once an epoch, one bucket a step, any split the same."""

from collections import Counter
from pathlib import Path

import torch

from wantrain.data.batches import Draws, Order, Split, ahead, caption_for, micro_batches
from wantrain.flow import Density
from wantrain.terms import Bucket, Clip, Found, PlannedClip, Sample


def planned(number, bucket, repeats=1, prefix="clip"):
    return [PlannedClip(Clip(f"{prefix}{i}", Path("x"), f"caption {i}", "s", repeats), bucket, Found("d"), 16.0)
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
