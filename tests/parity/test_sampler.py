"""The sampler against UniPC written from its paper (Zhao et al. 2023), in float64, over the official sigmas."""

import math

import pytest
import torch

from wantrain.models import sampling
from wantrain.models.conditioning import Encoders
from wantrain.models.variants import VARIANTS
from wantrain.terms import Bucket

# shift, steps, first and last sigma as the official code prints them (docs/facts.md, "Sampler")
OFFICIAL = {"wan21_t2v_1b3": (5, 50, 0.99980, 0.09251), "wan22_t2v_a14b": (12, 40, 0.99992, 0.23511),
            "wan21_vace_14b": (16, 50, 0.99994, 0.24596), "wan21_i2v_14b_480p": (3, 40, 0.99967, 0.07136),
            "wan22_animate_14b": (5, 20, 0.99980, 0.20816)}


@pytest.mark.parametrize(("shift", "num_steps", "first", "last"), OFFICIAL.values(), ids=list(OFFICIAL))
def test_the_grid_is_the_official_one(shift, num_steps, first, last):
    scheduler = sampling.scheduler_for(shift, num_steps)
    assert len(scheduler.timesteps) == len(scheduler.sigmas) - 1 == num_steps
    assert scheduler.sigmas[[0, -2]].tolist() == pytest.approx([first, last], abs=6e-6)
    before = [0.999 * (num_steps - i) / num_steps for i in range(num_steps)]
    wanted = [shift * x / (1 + (shift - 1) * x) for x in before]
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(wanted, rel=1e-6)
    assert scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in wanted]


def unipc(velocity, noise, sigmas):
    """UniPC of order 2, B(h) = e^h - 1, predicting clean data; `sigmas` end with 0. Equations 3, 9 and 16 of the paper,
    with alpha = 1 - sigma and clean = x - sigma * velocity. The first and the last step are of order 1.
    """
    levels = [math.log((1 - s) / s) if s else math.inf for s in sigmas]
    x, cleans, before = noise.double(), [], None
    for i, sigma in enumerate(sigmas[:-1]):
        now = x - sigma * velocity(x, sigma)
        if before is not None:  # correct the step that led here, now that its end is known
            x = step(before[0], levels[max(i - 2, 0) : i + 1], [*cleans, now], before[1], corrects=True)
        cleans = [*cleans[-1:], now]
        order = min(2, i + 1, len(sigmas) - 1 - i)
        before = (x, order)
        x = step(x, levels[max(i - 1, 0) : i + 2], cleans, order, corrects=False)
    return x


def sigma_of(level):
    """lambda = log(alpha / sigma), and alpha + sigma = 1."""
    return 1 / (1 + math.exp(level)) if level < math.inf else 0.0


def step(x, levels, cleans, order, *, corrects):
    """From levels[-2] to levels[-1] (log alpha / sigma). `cleans` are predictions there, at the last only to correct.
    """
    *earlier, here = cleans[:-1] if corrects else cleans
    h = levels[-1] - levels[-2]
    alpha, b = 1 - sigma_of(levels[-1]), -math.expm1(-h)
    moved = sigma_of(levels[-1]) / sigma_of(levels[-2]) * x + alpha * b * here
    phi_2 = b / h - 1 if math.isfinite(h) else 0.0  # e^-h phi functions of the data prediction: varphi_2 and varphi_3
    weights = []
    if order == 2:
        ratio = (levels[-3] - levels[-2]) / h
        weights.append((ratio, earlier[-1]))
    if corrects:
        weights.append((1.0, cleans[-1]))
    if not weights:
        return moved
    if len(weights) == 1:  # one difference: 1/2 whatever h is (the paper's remark on order 1 and 2)
        rho = [0.5]
    else:
        phi_3 = phi_2 / -h - 0.5
        rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [weights[0][0], 1.0]], dtype=torch.float64),
                                 torch.tensor([phi_2 / -b, 2 * phi_3 / -b], dtype=torch.float64)).tolist()
    return moved + alpha * b * sum(r * (clean - here) / ratio for r, (ratio, clean) in zip(rho, weights, strict=True))


class Field(torch.nn.Module):
    """A smooth velocity that bends, as a transformer: towards data that depends on where one is and on the timestep."""

    def __init__(self, centre=0.3):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(centre))
        self.told = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.told.append(float(timestep[0]))
        return (self.at(hidden_states, timestep.double()[0] / 1000).to(hidden_states.dtype),)

    def at(self, x, sigma):
        return x - self.scale.item() - 0.5 * torch.sin(2 * x + 3 * sigma)


def sampled(variant, models, settings, noise, film=None):
    pipeline = sampling.Pipeline(VARIANTS[variant], models, None, Encoders(None, None), torch.float32)
    texts = [torch.zeros(1, 4, 8)] * 2
    given = sampling.DenoisingInputs(noise if film is None else film, None, {}, texts, film is not None)
    with torch.no_grad():
        return sampling.denoise(pipeline, settings, noise, given)


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

