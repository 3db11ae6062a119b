"""The numbers of flow matching against closed forms."""

import math

import pytest
import torch

from wantrain import flow
from wantrain.density import Density


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


def test_huber_and_pseudo_huber_have_their_closed_forms():
    predicted = torch.tensor([0.0, 0.2, -0.5, 3.0]).view(4, 1, 1, 1, 1)
    zero = torch.zeros_like(predicted)
    huber = flow.loss_per_sample(predicted, zero, kind="huber", delta=0.5)
    torch.testing.assert_close(huber, torch.tensor([0.0, 0.04, 0.25, 2 * 0.5 * 3 - 0.25]), rtol=1e-6, atol=0)
    pseudo = flow.loss_per_sample(predicted, zero, kind="pseudo_huber", delta=0.5)
    wanted = [0.0, 0.5 * (1.16 ** 0.5 - 1), 0.5 * (2 ** 0.5 - 1), 0.5 * (37 ** 0.5 - 1)]
    torch.testing.assert_close(pseudo, torch.tensor(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["huber", "pseudo_huber"])
def test_every_loss_is_mse_for_small_errors_even_where_float32_rounds(kind):
    predicted, target = 1e-5 * torch.randn(2, 3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = flow.loss_per_sample(predicted, target)
    torch.testing.assert_close(flow.loss_per_sample(predicted, target, kind=kind, delta=0.1), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["mse", "huber", "pseudo_huber"])
def test_every_loss_is_the_weighted_mean_of_its_elements(kind):
    predicted = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 1, 1)
    zero, weight = torch.zeros_like(predicted), torch.tensor([0.25, 0.75]).view(1, 1, 2, 1, 1)
    small, large = flow.errors_of(torch.tensor([1.0, 3.0]), kind, 0.5).tolist()
    assert float(flow.loss_per_sample(predicted, zero, weight, kind, 0.5)) == pytest.approx((small + 3 * large) / 4)
    assert float(flow.loss_per_sample(predicted, zero, None, kind, 0.5)) == pytest.approx((small + large) / 2)
    assert float(flow.loss_per_sample(predicted, zero, torch.zeros(1, 1, 1, 1, 1), kind, 0.5)) == 0


@pytest.mark.parametrize(("name", "gamma", "wanted"), [
    ("none", 5, [1, 1, 1, 1, 1, 1]),
    ("sigma_sqrt", 5, [10_000, 400, 16, 4, 1 / 0.81, 1]),
    ("cosmap", 5, [2 / math.pi, 2 / (math.pi * 0.905), 2 / (math.pi * 0.625), 4 / math.pi, 2 / (math.pi * 0.82),
                   2 / math.pi]),
    ("min_snr", 5, [0, 5 * 0.0025, 5 * 0.0625, 0.25, 0.01, 0]),
    ("bell", 5, [0, 5.277 * (math.exp(-0.405) - math.exp(-0.5)), 5.277 * (math.exp(-0.125) - math.exp(-0.5)),
                 5.277 * (1 - math.exp(-0.5)), 5.277 * (math.exp(-0.32) - math.exp(-0.5)), 0]),
    ("min_snr", 0.5, [0, 0.5 * 0.0025, 0.5 * 0.0625, 0.5 * 0.25, 0.01, 0]),
])
def test_weights_of_sigma_have_their_closed_forms_and_are_finite_at_both_ends(name, gamma, wanted):
    got = flow.weight_of_sigma(torch.tensor([0, 0.05, 0.25, 0.5, 0.9, 1]), name, gamma)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float32), rtol=1e-5, atol=1e-12)


def test_the_bell_has_a_mean_of_1_over_uniform_sigmas_shifted_by_5():
    """As where it is from, whose clipping and learning rate are made for that."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    assert float(flow.weight_of_sigma(5 * u / (1 + 4 * u), "bell").mean()) == pytest.approx(1, abs=1e-3)


def test_min_snr_weights_the_velocity_error_as_hang_et_al_weight_that_of_the_clean_latents():
    gamma, sigma_B = 5.0, torch.tensor([0.05, 0.3, 0.31, 0.6, 0.99], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents, noise, error = torch.randn(3, 5, 1, 1, 1, 1, dtype=torch.float64, generator=generator)
    noisy, target = flow.mix(latents, noise, sigma_B), flow.velocity(latents, noise)
    predicted = target + error
    clean = noisy - sigma_B.view(-1, 1, 1, 1, 1) * predicted
    snr = ((1 - sigma_B) / sigma_B) ** 2
    wanted = (snr.clamp(max=gamma) * (clean - latents).flatten().square()).float()
    got = flow.weight_of_sigma(sigma_B, "min_snr", gamma) * flow.loss_per_sample(predicted, target)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("call", "allowed"), [
    (lambda: flow.weight_of_sigma(torch.ones(1), "snr"), "none, sigma_sqrt, cosmap, min_snr, bell"),
    (lambda: flow.loss_per_sample(torch.ones(1, 1), torch.ones(1, 1), kind="l1"), "mse, huber, pseudo_huber"),
    (lambda: Density("gauss"), "uniform, logit_normal, mode, beta"),
])
def test_an_unknown_name_is_refused_with_those_allowed(call, allowed):
    with pytest.raises(ValueError, match=allowed):
        call()


def test_every_step_draws_one_sigma_from_each_stratum():
    n, shift = 16, 5.0
    for step in range(5):
        sigma = flow.draw_sigma(7, step, range(n), n, Density(shift=shift)).double()
        uniform = sigma / (shift - (shift - 1) * sigma)
        assert sorted((uniform * n).floor().int().tolist()) == list(range(n))


def test_sigma_is_uniform_after_undoing_the_shift():
    shift, n = 3.0, 8
    density = Density(shift=shift)
    sigma = torch.cat([flow.draw_sigma(0, step, range(n), n, density) for step in range(2000)]).double()
    uniform = (sigma / (shift - (shift - 1) * sigma)).sort().values
    ks = (uniform - torch.linspace(0, 1, len(uniform), dtype=torch.float64)).abs().max()
    assert ks < 0.01


def test_sigma_and_noise_do_not_depend_on_the_split():
    for density in (Density(shift=3.0), Density("beta", (2, 3), 5.0, (0.0, 0.9))):
        whole = flow.draw_sigma(3, 11, range(8), 8, density)
        parts = torch.cat([flow.draw_sigma(3, 11, [6, 7, 0, 1], 8, density),
                           flow.draw_sigma(3, 11, [2, 3, 4, 5], 8, density)])
        assert torch.equal(whole[[6, 7, 0, 1, 2, 3, 4, 5]], parts)
    noise = flow.draw_noise(3, 11, range(4), (2, 1, 2, 2))
    assert torch.equal(noise[[3, 1]], flow.draw_noise(3, 11, [3, 1], (2, 1, 2, 2)))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, flow.draw_noise(3, 12, range(4), (2, 1, 2, 2)))


def test_drawing_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    flow.draw_sigma(0, 0, range(4), 4, Density(shift=3.0))
    flow.draw_noise(0, 0, range(2), (1, 1, 2, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_timestep_is_1000_sigma_in_float32_never_rounded():
    sigma = torch.tensor([0.0, 0.9973, 1.0])
    assert flow.timestep(sigma).dtype == torch.float32
    assert flow.timestep(sigma.bfloat16()).dtype == torch.float32
    assert flow.timestep(sigma).tolist() == [0.0, float(torch.tensor(0.9973) * 1000), 1000.0]
