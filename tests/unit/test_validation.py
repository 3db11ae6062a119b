"""Held-out losses: rows of (clip, sigma, draw), the same for any size and number of processes, none moving another's;
and the statistics over them.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wantrain import flow, objective
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip, Sample
from wantrain.validation import (
    Extent,
    HeldOut,
    Share,
    by_clip,
    by_sigma,
    crossed,
    difference,
    extent_within,
    interval,
    losses,
    noise_error,
    t_quantile,
)

CPU = torch.device("cpu")
SIGMAS = [0.1, 0.5, 0.9]
SMALL, LARGE = Bucket(5, 32, 32), Bucket(9, 32, 32)
CLIPS = [PlannedClip(Clip(f"c{i}", Path("x"), "", "s"), bucket, MediaInfo(f"digest {i}"), 16.0)
         for i, bucket in enumerate([SMALL, LARGE, SMALL, SMALL, LARGE])]


def sample_of(planned):
    number = int(planned.clip.id[1:])
    shape = (4, 2 if planned.bucket == SMALL else 3, 2, 2)
    generator = torch.Generator().manual_seed(number)
    return Sample(torch.randn(shape, generator=generator), torch.full((3, 8), float(number)))


class Model(torch.nn.Module):
    """Answers by sample alone, as a transformer does, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.sizes.append(len(hidden_states))
        told = (timestep / 1000 + encoder_hidden_states.mean((1, 2))).view(-1, 1, 1, 1, 1)
        return (torch.tanh(hidden_states) * told,)


def loss_of(model):
    return lambda batch: objective.losses(model, batch, objective.Objective(), device=CPU, dtype=torch.float32)


def rows_of(own):
    """Every clip at every sigma."""
    return [(place, s, 0) for place in range(len(own.clips)) for s in range(len(own.sigmas))]


def table(own, model):
    """The losses of every clip at every sigma, [clips, sigmas]."""
    return losses(own, rows_of(own), loss_of(model)).view(len(own.clips), len(own.sigmas))


def heldout(clips=CLIPS, sigmas=SIGMAS, size=4, share=None):
    return HeldOut(clips, sigmas, lambda place: sample_of(clips[place]), size, share or Share())


def in_processes(number, size=4):
    """The losses that each of `number` processes ends with, and how often each called its model."""
    given: list[torch.Tensor] = []
    models = [Model() for _ in range(number)]
    for process in range(number):  # first what each gives
        share = Share(number, process, lambda v: given.append(v) or v[None].expand(number, -1))
        table(heldout(size=size, share=share), models[process])
    calls = [len(model.sizes) for model in models]
    return [table(heldout(size=size, share=Share(number, process, lambda _: torch.stack(given))), Model())
            for process in range(number)], calls


def test_each_number_is_the_clips_own_at_its_sigma():
    found = table(heldout(), Model())
    assert found.shape == (5, 3)
    for place, planned in enumerate(CLIPS):
        for s, sigma in enumerate(SIGMAS):
            sample = sample_of(planned)
            noise = torch.randn(sample.latents_CTHW.shape, generator=flow.generator_for(
                "validation", planned.found.digest, str(planned.start_s), str(sigma)))
            noisy = (1 - sigma) * sample.latents_CTHW + sigma * noise
            predicted = torch.tanh(noisy) * (sigma + float(planned.clip.id[1:]))
            wanted = (predicted - (noise - sample.latents_CTHW)).square().mean()
            assert float(found[place, s]) == pytest.approx(float(wanted), rel=1e-5)
    assert len(set(found.flatten().tolist())) == 15


@pytest.mark.parametrize(("number", "size"), [(2, 4), (3, 4), (4, 1), (9, 4), (2, 32)])
def test_any_number_of_processes_measures_the_same_in_as_many_calls_each(number, size):
    wanted = table(heldout(size=size), Model())
    found, calls = in_processes(number, size)
    assert all(torch.equal(one, wanted) for one in found)
    num_chunks = -(-9 // size) + -(-6 // size)  # nine rows of one bucket, six of the other
    assert calls == [-(-num_chunks // number)] * number


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_forward_has_no_more_rows_than_a_micro_batch_and_its_size_changes_no_number(size):
    model = Model()
    found = table(heldout(size=size), model)
    assert max(model.sizes) <= size
    assert sum(model.sizes) == 15
    torch.testing.assert_close(found, table(heldout(size=4), Model()), rtol=1e-6, atol=0)


def test_a_clip_or_a_sigma_more_or_less_moves_no_other_number():
    found = table(heldout(), Model())
    fewer = table(heldout(CLIPS[1:4], [0.9, 0.1]), Model())
    torch.testing.assert_close(fewer, found[1:4][:, [2, 0]], rtol=1e-6, atol=0)
    renamed = [replace(p, clip=replace(p.clip, path=Path("elsewhere"))) for p in CLIPS]
    assert torch.equal(table(heldout(renamed), Model()), found)


def test_a_process_reads_its_own_clips_only():
    asked = Counter()
    share = Share(5, 1)  # of its five chunks of three rows, each a clip, the second
    one = replace(heldout(size=3, share=share), sample=lambda place: asked.update([place]))
    one.read(rows_of(one))
    assert asked == {2: 1}


def test_latent_frames_that_are_given_clean_do_not_count():
    def sample(place):
        return replace(sample_of(CLIPS[0]), known_T=torch.tensor([1.0, 0.0]))

    told = []

    class Zero(torch.nn.Module):
        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            told.append(timestep)
            return (torch.zeros_like(hidden_states),)

    found = table(HeldOut(CLIPS[:1], [0.5], sample, 4), Zero())
    clean = sample_of(CLIPS[0]).latents_CTHW
    noise = torch.randn(clean.shape, generator=flow.generator_for("validation", "digest 0", "0.0", "0.5"))
    assert float(found) == pytest.approx(float((noise - clean)[:, 1:].square().mean()), rel=1e-6)
    assert told[0][0].tolist() == [0.0, 500.0]


@pytest.mark.parametrize(("num_clips", "num_sigmas"), [(1, 9), (2, 9), (3, 9), (4, 9), (8, 9), (9, 9), (30, 9), (2, 1)])
def test_few_passes_meet_every_sigma_and_as_many_as_sigmas_show_each_clip_all(num_clips, num_sigmas):
    fewest = Extent(num_clips, num_sigmas, -(-num_sigmas // num_clips)).rows
    assert {s for _, s, _ in fewest} == set(range(num_sigmas))
    whole = Extent(num_clips, num_sigmas, 2 * num_sigmas).rows
    assert sorted(whole) == list(itertools.product(range(num_clips), range(num_sigmas), range(2)))
    assert whole[: len(fewest)] == fewest  # more passes add rows, and move none


@pytest.mark.parametrize(("max_rows", "num_clips", "num_passes"), [
    (0, 2, 5), (17, 9, 1), (18, 9, 2), (5, 5, 2), (81, 9, 9), (100, 9, 11), (10_000, 9, 72)])
def test_a_budget_buys_clips_then_sigmas_then_draws_and_never_less_than_two_clips(max_rows, num_clips, num_passes):
    found = extent_within(9, 9, max_rows)
    assert (found.num_clips, found.num_passes) == (num_clips, num_passes)


def test_another_draw_is_another_noise_and_the_first_stays():
    own = heldout()
    rows = [(0, 1, 0), (0, 1, 1), (0, 1, 2)]
    found = losses(own, rows, loss_of(Model()))
    assert len(set(found.tolist())) == 3
    assert found[0] == table(own, Model())[0, 1]


def test_means_by_clip_and_by_sigma_and_what_the_draws_leave():
    rows = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    values = torch.tensor([1.0, 2, 3, 4, 3, 2, 3, 8])
    assert by_clip(rows, values).tolist() == [2.5, 4.0]
    assert by_sigma(rows, values) == {0: 2.0, 1: 4.5}
    # the cells' draws are {1, 3}, {2, 2}, {3, 3}, {4, 8}: variances 2, 0, 0 and 8, of means of two 1, 0, 0 and 4
    assert noise_error(rows, values) == pytest.approx(math.sqrt(5) / 4)


@pytest.mark.parametrize(("num_free", "wanted"), [
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (10, 2.2281), (30, 2.0423), (120, 1.9799)])
def test_students_t_is_that_of_the_printed_tables(num_free, wanted):
    assert t_quantile(num_free) == pytest.approx(wanted, abs=5e-5)


def test_an_interval_by_hand():
    found = interval(torch.tensor([1.0, 2.0, 4.0, 5.0]))  # deviations 2, 1, 1, 2: variance 10/3, error sqrt(10/12)
    assert found.mean == 3.0
    assert found.half == pytest.approx(3.1824 * math.sqrt(10 / 12), rel=1e-4)
    assert math.isnan(interval(torch.tensor([1.0])).half)


@pytest.mark.parametrize("number", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (5, 16))])
def test_intervals_hold_a_known_effect_in_95_of_100_runs(number):
    """Clips differ by ten times the effect, their pairs do not; the effect itself differs from clip to clip."""
    generator = torch.Generator().manual_seed(number)
    effect, runs = -0.1, 4000
    base = 1 + torch.randn(runs, number, generator=generator)
    now = base + effect + 0.05 * torch.randn(runs, number, generator=generator)
    held = 0
    for before, after in zip(base, now, strict=True):
        told = interval(after - before)
        held += abs(told.mean - effect) <= told.half
    assert 0.93 < held / runs < 0.97


def test_the_interval_of_a_gap_between_two_sets_of_clips_holds_it_as_often_or_more():
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(2000):
        told = difference(0.3 + torch.randn(6, generator=generator), 2 * torch.randn(6, generator=generator))
        held += abs(told.mean - 0.3) <= told.half
    assert 0.94 < held / 2000 < 0.99


@pytest.mark.parametrize(("confidence", "num_free", "wanted"), [
    (0.99, 2, 9.9248), (0.995, 1, 127.3213), (0.9, 7, 1.8946)])
def test_students_t_of_other_confidences_is_that_of_the_printed_tables(confidence, num_free, wanted):
    assert t_quantile(num_free, confidence) == pytest.approx(wanted, abs=5e-4)


def test_crossed_seeds_and_clips_by_hand():
    """Values 1 + seed + clip: no rest, so that the error is that of both means alone."""
    found = crossed(torch.tensor([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]))
    # mean squares: seeds 3 * 0.5 = 1.5 with 1, clips 2 * 4 = 8 with 2; 9.5^2 / (1.5^2 + 8^2 / 2) = 2.6 degrees
    assert found.mean == 2.5
    assert found.half == pytest.approx(4.3027 * math.sqrt(9.5 / 6), rel=1e-4)


def test_of_one_seed_or_one_clip_the_crossed_interval_is_the_plain_one():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0])
    assert crossed(values[None]) == interval(values)
    assert crossed(values[:, None]) == interval(values)
    assert math.isnan(crossed(torch.ones(1, 1)).half)
    assert crossed(torch.ones(3, 4)).half == 0


@pytest.mark.parametrize(("seed_std", "clip_std", "rest_std"), [(1.0, 1.0, 1.0), (1.0, 0.0, 0.3), (0.0, 1.0, 0.3),
                                                                (0.0, 0.0, 1.0)])
def test_crossed_intervals_hold_the_mean_over_new_seeds_and_new_clips(seed_std, clip_std, rest_std):
    generator = torch.Generator().manual_seed(5)
    held, runs = 0, 600
    for _ in range(runs):
        drawn = [std * torch.randn(shape, generator=generator, dtype=torch.float64)
                 for std, shape in ((seed_std, (3, 1)), (clip_std, (1, 8)), (rest_std, (3, 8)))]
        told = crossed(sum(drawn))
        held += abs(told.mean) <= told.half
    assert held / runs > 0.93


def test_the_best_of_many_is_in_its_interval_as_often_as_one_alone():
    """Nothing differs; the least of ten means is far from 0 for an interval of 95 %, and not for one of all ten."""
    generator = torch.Generator().manual_seed(6)
    runs, alone, together = 200, 0, 0
    for _ in range(runs):
        best = min((torch.randn(3, 8, generator=generator) for _ in range(10)), key=lambda values: float(values.mean()))
        alone += abs(crossed(best).mean) <= crossed(best).half
        together += abs(crossed(best, 10).mean) <= crossed(best, 10).half
    assert together / runs > 0.93
    assert alone < together
