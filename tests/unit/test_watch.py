"""Alarms of a training: each for what it names, once, and for nothing else."""

from __future__ import annotations

import random

from wantrain.engine.watch import Watch

MIB = 2**20


def after(watch: Watch, steps: list[tuple[int, float, float, int]]) -> list[str]:
    return [text for step in steps for text in watch.alarms(*step)]


def test_a_training_as_it_should_be_gives_no_alarm():
    """Steps of two sizes, one of them three times the other, with noise, one outlier and a first step that compiles."""
    draw = random.Random(0)
    steps = [(tokens, 0.01 * tokens * draw.uniform(0.8, 1.3), 0.01, 900 * MIB + draw.randrange(30 * MIB))
             for tokens in (100, 300) * 300]
    assert after(Watch(), [(100, 30.0, 0.0, 0), *steps[:200], (100, 5.0, 0.0, 0), *steps[200:]]) == []


def test_slow_steps_are_told_once_and_by_the_median_of_their_size():
    watch = Watch()
    assert after(watch, [(100, 1.0, 0.0, 0)] * 20 + [(300, 3.0, 0.0, 0)] * 20) == []
    told = after(watch, [(100, 2.5, 0.0, 0)] * 30)
    assert len(told) == 1
    assert "took 2.5 s, where such steps of this run take 1 s" in told[0]
    assert after(watch, [(300, 9.0, 0.0, 0)] * 30) == []  # once


def test_waiting_for_batches_is_the_loader_and_no_slow_step():
    told = after(Watch(), [(100, 1.0, 0.0, 0)] * 20 + [(100, 4.0, 3.0, 0)] * 30)
    assert len(told) == 1
    assert "the loader is the limit" in told[0]


def test_memory_that_grows_is_told_and_memory_that_levels_off_is_not():
    growing = [(100, 1.0, 0.0, i * MIB) for i in range(200)]
    told = after(Watch(), growing)
    assert len(told) == 1
    assert "grows from step to step" in told[0]
    assert after(Watch(), [(100, 1.0, 0.0, min(i, 60) * MIB) for i in range(400)]) == []
