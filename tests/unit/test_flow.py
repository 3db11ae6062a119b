"""The numbers of flow matching against closed forms."""

import pytest
import torch

from wantrain import flow


def test_mix_velocity_and_loss_have_their_closed_forms():
    latents, noise = torch.full((2, 1, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1, 1), -1.0)
    sigma_B = torch.tensor([0.0, 0.25])
    assert flow.mix(latents, noise, sigma_B).flatten().tolist() == [3.0, 2.0]
    assert flow.velocity(latents, noise).flatten().tolist() == [-4.0, -4.0]
    assert flow.loss_per_sample(torch.zeros(2, 1, 1, 1, 1), flow.velocity(latents, noise)).tolist() == [16.0, 16.0]


def test_velocity_leads_from_noisy_to_both_ends():
    latents, noise = torch.randn(2, 3, 4, 2, 2, 2).unbind(0)
    sigma_B = torch.tensor([0.1, 0.6, 0.9])
    noisy, target = flow.mix(latents, noise, sigma_B), flow.velocity(latents, noise)
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, latents)
    torch.testing.assert_close(noisy + (1 - sigma) * target, noise)


def test_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="differ"):
        flow.loss_per_sample(torch.zeros(2, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1))


def test_every_step_draws_one_sigma_from_each_stratum():
    n, shift = 16, 5.0
    for step in range(5):
        sigma = flow.draw_sigma(7, step, range(n), n, shift).double()
        uniform = sigma / (shift - (shift - 1) * sigma)
        assert sorted((uniform * n).floor().int().tolist()) == list(range(n))


def test_sigma_is_uniform_after_undoing_the_shift():
    shift, n = 3.0, 8
    sigma = torch.cat([flow.draw_sigma(0, step, range(n), n, shift) for step in range(2000)]).double()
    uniform = (sigma / (shift - (shift - 1) * sigma)).sort().values
    ks = (uniform - torch.linspace(0, 1, len(uniform), dtype=torch.float64)).abs().max()
    assert ks < 0.01


def test_sigma_and_noise_do_not_depend_on_the_split():
    whole = flow.draw_sigma(3, 11, range(8), 8, 3.0)
    parts = torch.cat([flow.draw_sigma(3, 11, [6, 7, 0, 1], 8, 3.0), flow.draw_sigma(3, 11, [2, 3, 4, 5], 8, 3.0)])
    assert torch.equal(whole[[6, 7, 0, 1, 2, 3, 4, 5]], parts)
    noise = flow.draw_noise(3, 11, range(4), (2, 1, 2, 2))
    assert torch.equal(noise[[3, 1]], flow.draw_noise(3, 11, [3, 1], (2, 1, 2, 2)))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, flow.draw_noise(3, 12, range(4), (2, 1, 2, 2)))


def test_drawing_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    flow.draw_sigma(0, 0, range(4), 4, 3.0)
    flow.draw_noise(0, 0, range(2), (1, 1, 2, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_timestep_is_1000_sigma_in_float32_never_rounded():
    sigma = torch.tensor([0.0, 0.9973, 1.0])
    assert flow.timestep(sigma).dtype == torch.float32
    assert flow.timestep(sigma.bfloat16()).dtype == torch.float32
    assert flow.timestep(sigma).tolist() == [0.0, float(torch.tensor(0.9973) * 1000), 1000.0]
