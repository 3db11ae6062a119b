"""Held-out losses: rows of (clip, sigma), the same for any size and number of processes, none moving another's."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wantrain import flow, objective
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip, Sample
from wantrain.validation import HeldOut, Share, losses

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


def heldout(clips=CLIPS, sigmas=SIGMAS, size=4, share=None):
    return HeldOut(clips, sigmas, lambda place: sample_of(clips[place]), size, share or Share())


def in_processes(number, size=4):
    """The losses that each of `number` processes ends with, and how often each called its model."""
    given: list[torch.Tensor] = []
    models = [Model() for _ in range(number)]
    for process in range(number):  # first what each gives
        share = Share(number, process, lambda v: given.append(v) or v[None].expand(number, -1))
        losses(heldout(size=size, share=share), loss_of(models[process]))
    calls = [len(model.sizes) for model in models]
    return [losses(heldout(size=size, share=Share(number, process, lambda _: torch.stack(given))), loss_of(Model()))
            for process in range(number)], calls


def test_each_number_is_the_clips_own_at_its_sigma():
    found = losses(heldout(), loss_of(Model()))
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
    wanted = losses(heldout(size=size), loss_of(Model()))
    found, calls = in_processes(number, size)
    assert all(torch.equal(one, wanted) for one in found)
    num_chunks = -(-9 // size) + -(-6 // size)  # nine rows of one bucket, six of the other
    assert calls == [-(-num_chunks // number)] * number


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_forward_has_no_more_rows_than_a_micro_batch_and_its_size_changes_no_number(size):
    model = Model()
    found = losses(heldout(size=size), loss_of(model))
    assert max(model.sizes) <= size
    assert sum(model.sizes) == 15
    torch.testing.assert_close(found, losses(heldout(size=4), loss_of(Model())), rtol=1e-6, atol=0)


def test_a_clip_or_a_sigma_more_or_less_moves_no_other_number():
    found = losses(heldout(), loss_of(Model()))
    fewer = losses(heldout(CLIPS[1:4], [0.9, 0.1]), loss_of(Model()))
    torch.testing.assert_close(fewer, found[1:4][:, [2, 0]], rtol=1e-6, atol=0)
    renamed = [replace(p, clip=replace(p.clip, path=Path("elsewhere"))) for p in CLIPS]
    assert torch.equal(losses(heldout(renamed), loss_of(Model())), found)


def test_a_process_reads_its_own_clips_only():
    asked = Counter()
    share = Share(5, 1)  # of its five chunks of three rows, each a clip, the second
    one = replace(heldout(size=3, share=share), sample=lambda place: asked.update([place]))
    one.read()
    assert asked == {2: 1}


def test_latent_frames_that_are_given_clean_do_not_count():
    def sample(place):
        return replace(sample_of(CLIPS[0]), known_T=torch.tensor([1.0, 0.0]))

    told = []

    class Zero(torch.nn.Module):
        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            told.append(timestep)
            return (torch.zeros_like(hidden_states),)

    found = losses(HeldOut(CLIPS[:1], [0.5], sample, 4), loss_of(Zero()))
    clean = sample_of(CLIPS[0]).latents_CTHW
    noise = torch.randn(clean.shape, generator=flow.generator_for("validation", "digest 0", "0.0", "0.5"))
    assert float(found) == pytest.approx(float((noise - clean)[:, 1:].square().mean()), rel=1e-6)
    assert told[0][0].tolist() == [0.0, 500.0]
