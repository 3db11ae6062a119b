"""The official sampler against UniPC written from its paper (tests/solvers.py) over the official sigmas."""

import pytest
import torch

from tests.solvers import Field, sampled, unipc
from wantrain.models import sampling
from wantrain.terms import Bucket

# shift, steps, first and last sigma as the official code prints them (docs/facts.md, "Sampler")
OFFICIAL = {"wan21_t2v_1b3": (5, 50, 0.99980, 0.09251), "wan22_t2v_a14b": (12, 40, 0.99992, 0.23511),
            "wan21_vace_14b": (16, 50, 0.99994, 0.24596), "wan21_i2v_14b_480p": (3, 40, 0.99967, 0.07136),
            "wan22_animate_14b": (5, 20, 0.99980, 0.20816)}


@pytest.mark.parametrize(("shift", "num_steps", "first", "last"), OFFICIAL.values(), ids=list(OFFICIAL))
def test_the_grid_is_the_official_one(shift, num_steps, first, last):
    settings = sampling.Settings(num_steps, (1.0, 1.0), shift, Bucket(1, 32, 32), "")
    sigmas = settings.sigmas
    assert len(sigmas) - 1 == num_steps
    assert sigmas[[0, -2]].tolist() == pytest.approx([first, last], abs=6e-6)
    before = [0.999 * (num_steps - i) / num_steps for i in range(num_steps)]
    wanted = [shift * x / (1 + (shift - 1) * x) for x in before]
    assert sigmas.tolist() == pytest.approx([*wanted, 0], rel=1e-6)
    assert settings.tool_solver.timesteps(sigmas[:-1]) == [int(1000 * sigma) for sigma in wanted]


def official(shift, num_steps):
    before = [0.999 * (num_steps - i) / num_steps for i in range(num_steps)]
    return [*(shift * x / (1 + (shift - 1) * x) for x in before), 0.0]


def told(sigma):
    """The timestep that the model is told, as the official code cuts it to a whole number."""
    return int(1000 * sigma) / 1000


@pytest.mark.parametrize(("shift", "num_steps"), [(5, 50), (3, 7), (16, 2), (5, 1)])
def test_denoising_is_unipc_over_the_official_sigmas(shift, num_steps):
    noise = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    field = Field()
    settings = sampling.Settings(num_steps, (1.0, 1.0), shift, Bucket(1, 32, 32), "")
    found = sampled("tiny_wan", [field], settings, noise)
    sigmas = official(shift, num_steps)
    wanted = unipc(lambda x, sigma: field.at(x, told(sigma)), noise, sigmas)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    assert field.told == [1000 * told(sigma) for sigma in sigmas[:-1]]
    if num_steps > 2:  # diffusers' own grid gives something else
        grid = [1 - 0.999 * i / num_steps for i in range(num_steps)]
        other = [*(min(shift * x / (1 + (shift - 1) * x), 1 - 1e-6) for x in grid), 0.0]
        assert (unipc(lambda x, sigma: field.at(x, told(sigma)), noise, other) - found).abs().max() > 1e-4


def test_a_video_to_start_from_enters_at_its_own_sigma():
    noise, film = torch.randn(2, 1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    field = Field()
    settings = sampling.Settings(10, (1.0, 1.0), 5.0, Bucket(1, 32, 32), "", strength=0.6)
    sigmas = official(5, 10)[4:]
    started = (1 - sigmas[0]) * film.double() + sigmas[0] * noise.double()
    wanted = unipc(lambda x, sigma: field.at(x, told(sigma)), started, sigmas)
    torch.testing.assert_close(sampled("tiny_wan", [field], settings, noise, film).double(), wanted, rtol=2e-5,
                               atol=2e-5)


def test_each_expert_of_a_pair_works_on_its_side_of_the_boundary():
    noise = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    high, low = Field(0.8), Field(-0.4)
    settings = sampling.Settings(40, (1.0, 1.0), 12.0, Bucket(1, 32, 32), "")
    found = sampled("wan22_t2v_a14b", [high, low], settings, noise)
    wanted = unipc(lambda x, sigma: (high if told(sigma) >= 0.875 else low).at(x, told(sigma)), noise,
                   official(12, 40))
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    assert min(high.told) >= 875 > max(low.told)

