"""Densities of sigma against mathematics written here, in numpy, and the plot of them."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from wantrain import flow
from wantrain.density import Density, share_of_schedule, shift_for, shift_sigma
from wantrain.pages import plots

MILLION = 1_000_000
SHAPES = [("uniform", ()), ("logit_normal", (0.0, 1.0)), ("mode", (1.29,)), ("beta", (2.0, 2.0))]
MORE_SHAPES = [("logit_normal", (-1.5, 0.4)), ("logit_normal", (2.0, 3.0)), ("mode", (-1.0,)), ("mode", (1.7519,)),
               ("mode", (0.0,)), ("beta", (5.0, 3.0)), ("beta", (0.5, 0.5)), ("beta", (0.3, 1.0)), ("beta", (1.0, 7.5)),
               ("beta", (100.0, 40.0))]
RANGES = [(0.875, 1.0), (0.0, 0.875), (0.9, 1.0), (0.0, 0.9)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On cores that other tests use as well, two threads wait for each other for longer than one works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_cdf(name, shape, sigma):
    """From the textbook."""
    if name == "logit_normal":
        z = (np.log(sigma / (1 - sigma)) - shape[0]) / shape[1]
        return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    if name == "mode":
        u = np.linspace(1, 0, 200_001)
        return np.interp(sigma, 1 - u - shape[0] * (np.cos(np.pi / 2 * u) ** 2 - 1 + u), 1 - u)
    return sigma if name == "uniform" else beta_cdf(*shape, sigma)


def beta_cdf(alpha, beta, sigma):
    if (alpha, beta) == (0.5, 0.5):
        return 2 / np.pi * np.arcsin(np.sqrt(sigma))
    if beta == 1:
        return sigma ** alpha
    if alpha == 1:
        return 1 - (1 - sigma) ** beta
    n = round(alpha + beta - 1)
    return sum(math.comb(n, j) * sigma ** j * (1 - sigma) ** (n - j) for j in range(round(alpha), n + 1))


def wanted_cdf(density, sigma):
    """The base's, shifted and conditioned on the range."""
    def below(s):
        return base_cdf(density.name, density.shape, s / (density.shift - (density.shift - 1) * s))

    low, high = (end if end in (0, 1) else float(below(np.array([end]))[0]) for end in density.within)
    return (below(sigma) - low) / (high - low)


def distance(drawn, density):
    """Kolmogorov and Smirnov's, of draws in rising order, at every hundredth."""
    ranks = np.arange(0, len(drawn), 100)
    return np.abs(wanted_cdf(density, drawn.double().numpy()[ranks]) - (ranks + 0.5) / len(drawn)).max()


@pytest.fixture(scope="module")
def million():
    """One u in each of a million strata, in rising order, as the draws of one huge batch are but for their order."""
    jitter = torch.rand(MILLION, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (torch.arange(MILLION, dtype=torch.float64) + jitter) / MILLION


@pytest.mark.parametrize("within", RANGES)
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_million_draws_are_in_range_and_have_the_wanted_density(name, shape, within, million):
    for shift in (12.0, 5.0):
        density = Density(name, shape, shift, within)
        drawn = flow.sigma_at(million, density)
        assert drawn.dtype == torch.float32
        assert (drawn.diff() >= 0).all()
        lowest, highest = drawn[[0, -1]]
        assert within[0] <= lowest.item() < highest.item() < within[1]
        told = flow.timestep(drawn[[0, -1]]).tolist()
        assert 1000 * within[0] <= told[0] < told[1] < 1000 * within[1], "diffusers asks t >= boundary * 1000"
        assert distance(drawn, density) < 0.002


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_the_draws_of_training_have_the_wanted_density(name, shape):
    density = Density(name, shape, 5.0, (0.0, 0.9))
    drawn = torch.cat([flow.draw_sigma(0, step, range(100), 100, density) for step in range(100)])
    assert distance(drawn.sort().values, density) < 0.01


@pytest.mark.parametrize(("name", "shape"), SHAPES + MORE_SHAPES)
def test_quantiles_and_cdfs_are_the_textbooks(name, shape):
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shift, within in ((1.0, (0.0, 1.0)), (3.0, (0.2, 0.8))):
        density = Density(name, shape, shift, within)
        sigma = density.quantile(u)
        np.testing.assert_allclose(wanted_cdf(density, sigma.numpy()), u, rtol=0, atol=1e-6)
        np.testing.assert_allclose(density.cdf(sigma), u, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), SHAPES + MORE_SHAPES)
def test_draws_are_finite_and_in_range_at_both_ends_of_the_unit_interval(name, shape):
    ends = torch.tensor([0.0, 2.0 ** -60, 1 - 2.0 ** -53, 1.0], dtype=torch.float64)
    for within in [(0.0, 1.0), *RANGES]:
        sigma = flow.sigma_at(ends, Density(name, shape, 5.0, within))
        assert ((sigma.double() >= within[0]) & (sigma.double() < within[1])).all(), sigma


def test_no_timestep_rounds_up_to_the_boundary():
    for boundary in torch.linspace(0.5, 0.999, 500, dtype=torch.float64).tolist():
        last = flow.sigma_at(torch.tensor([1 - 2.0 ** -53]).double(), Density(within=(0.0, boundary)))
        assert 1000 * boundary - 0.01 < flow.timestep(last).item() < 1000 * boundary


@pytest.mark.parametrize(("name", "shape"), SHAPES + MORE_SHAPES)
def test_rounding_at_the_ends_gives_no_nan_whatever_the_shift(name, shape):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for shift in (0.3, 1.0, 1.7, 3.7, 4.9, 7.3, 11.7, 12.0, 14.3):
        for within in ((0.0, 1.0), (0.3, 1.0)):
            density = Density(name, shape, float(shift), within)
            assert density.cdf(ends).tolist() == pytest.approx([0, 1], abs=1e-7)
            assert ((density.quantile(ends) >= within[0] - 1e-6) & (density.quantile(ends) <= 1 + 1e-12)).all()


def test_betas_cdf_and_quantile_are_exact_where_they_are_polynomials():
    sigma = torch.tensor([0.0, 0.1, 0.5, 0.75, 1.0], dtype=torch.float64)
    density = Density("beta", (2, 2))
    u = 3 * sigma ** 2 - 2 * sigma ** 3
    torch.testing.assert_close(density.base_cdf(sigma), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(density.base_quantile(u), sigma, rtol=0, atol=1e-6)


def test_the_uniform_draws_are_those_of_the_first_version():
    """Constants from commit 4594a8e, before there were other distributions."""
    drawn = {
        (0, 0, 4, 3.0): ["0x1.fd0142p-1", "0x1.c4f082p-1", "0x1.9e76a6p-2", "0x1.5d1e44p-1"],
        (7, 12, 8, 5.0): ["0x1.c5ea80p-1", "0x1.43dadcp-1", "0x1.29a246p-1", "0x1.581ce2p-2", "0x1.f30c0cp-1",
                          "0x1.8d197cp-1", "0x1.eb8698p-1", "0x1.da2f64p-1"],
        (1, 500, 2, 12.0): ["0x1.c2d7c2p-1", "0x1.fe24cep-1"],
        (3, 1, 4, 1.7): ["0x1.dfb5a4p-1", "0x1.9aa396p-2", "0x1.4a5b2ep-1", "0x1.bd8c80p-3"],
    }
    for (seed, step, n, shift), constants in drawn.items():
        got = flow.draw_sigma(seed, step, range(n), n, Density("uniform", shift=shift))
        assert got.tolist() == [float.fromhex(constant) for constant in constants]
    experts = {
        (12.0, (0.875, 1.0)): ["0x1.f261f2p-1", "0x1.debe5ep-1", "0x1.db3076p-1", "0x1.fa8ecep-1"],
        (5.0, (0.0, 0.9)): ["0x1.86988cp-1", "0x1.0c0202p-1", "0x1.e4f872p-2", "0x1.b1fa98p-1"],
    }
    for (shift, within), constants in experts.items():
        got = flow.draw_sigma(7, 3, range(4), 4, Density("uniform", (), shift, within))
        assert got.tolist() == [float.fromhex(constant) for constant in constants]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_each_batch_has_one_draw_in_each_equal_share_of_the_density(name, shape):
    n = 16
    for within in ((0.0, 1.0), (0.0, 0.9)):
        density = Density(name, shape, 5.0, within)
        for step in range(5):
            sigma = flow.draw_sigma(7, step, range(n), n, density).double().numpy()
            assert sorted(np.floor(wanted_cdf(density, sigma) * n).astype(int).tolist()) == list(range(n))


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_batch_split_over_processes_has_the_whole_batchs_draws(name, shape):
    density = Density(name, shape, 5.0, (0.0, 0.9))
    whole = flow.draw_sigma(3, 11, range(13), 13, density)
    for num_processes in (2, 3, 13):
        for first in range(num_processes):
            own = range(first, 13, num_processes)
            assert torch.equal(flow.draw_sigma(3, 11, own, 13, density), whole[list(own)])


@pytest.mark.parametrize(("shift", "boundary", "high_share"), [(12.0, 0.875, 0.632), (5.0, 0.9, 0.357)])
def test_the_experts_shares_of_the_schedule_are_inferences(shift, boundary, high_share, million):
    steps = np.linspace(1, 0, 100_000, endpoint=False)
    counted = (shift * steps / (1 + (shift - 1) * steps) >= boundary).mean()
    assert share_of_schedule(shift, boundary, 1.0) == pytest.approx(high_share, abs=0.002)
    assert share_of_schedule(shift, boundary, 1.0) == pytest.approx(counted, abs=2e-5)
    assert share_of_schedule(shift, 0.0, boundary) + share_of_schedule(shift, boundary, 1.0) == pytest.approx(1)
    drawn = flow.sigma_at(million, Density(shift=shift))
    assert float((drawn >= boundary).double().mean()) == pytest.approx(high_share, abs=0.002)


def test_a_positive_mode_scale_favours_the_middle_and_a_negative_one_the_ends():
    middle = {scale: float(Density("mode", (scale,)).base_cdf(torch.tensor([0.25, 0.75]).double()).diff())
              for scale in (-1.0, 0.0, 1.29)}
    assert middle[0.0] == pytest.approx(0.5)
    assert middle[-1.0] < 0.4
    assert middle[1.29] > 0.6


def test_more_tokens_shift_more_and_shifts_compose():
    assert shift_for(3.0, 4 * 1560, 1560) == pytest.approx(6.0)
    assert shift_for(3.0, 1560, 1560) == 3.0
    sigma = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 3.0), 2.0),
                               shift_sigma(sigma, shift_for(3.0, 4000, 1000)))


def test_an_empty_shape_takes_the_default():
    assert Density("logit_normal") == Density("logit_normal", (0, 1))
    assert Density("mode").shape == (1.29,)
    assert Density("beta").shape == (2.0, 2.0)
    assert Density("uniform").shape == ()


@pytest.mark.parametrize(("arguments", "named"), [
    ({"name": "mode", "shape": (1.76,)}, r"scale 1.76 of mode is not in \[-1, 1.7519\]"),
    ({"name": "mode", "shape": (-1.01,)}, "scale -1.01"),
    ({"name": "logit_normal", "shape": (0, 0)}, "std 0"),
    ({"name": "logit_normal", "shape": (math.nan, 1)}, "mean nan"),
    ({"name": "beta", "shape": (2, 0)}, "beta 0"),
    ({"name": "beta", "shape": (2,)}, r"\[2.0\] of beta is to be \['alpha', 'beta'\]"),
    ({"shape": (1,)}, "uniform"),
    ({"shift": 0}, "shift 0"),
    ({"shift": math.nan}, "shift nan"),
    ({"within": (0.9, 0.9)}, r"\[0.9, 0.9\]"),
    ({"within": (-0.1, 0.9)}, r"\[-0.1, 0.9\]"),
    ({"within": (0.5, 1.1)}, r"\[0.5, 1.1\]"),
    ({"name": "logit_normal", "shape": (-3, 0.1), "within": (0.9, 1)}, r"next to no draws in \[0.9, 1\]"),
])
def test_a_density_that_cannot_be_drawn_from_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Density(**arguments)


SVG = "{http://www.w3.org/2000/svg}"


def plotted(density, inference_shift, boundary):
    drawn = torch.cat([flow.draw_sigma(0, step, range(16), 16, density) for step in range(500)]).tolist()
    sigmas = shift_sigma(torch.linspace(1, 0.02, 50), inference_shift).tolist()
    return ET.fromstring(plots.density_svg("high & <mighty>", drawn, density, inference_shift=inference_shift,
                                           inference_sigmas=sigmas, boundary=boundary))


def points_of(line):
    return np.array([[float(n) for n in point.split(",")] for point in line.get("points").split()])


def area(points):
    """Under a curve, in pixels of the plot."""
    return np.trapezoid(plots.BOTTOM_PX - points[:, 1], points[:, 0])


def test_the_plot_shows_bars_curves_ticks_and_boundary_at_their_places():
    root = plotted(Density("logit_normal", (), 12.0, (0.875, 1.0)), 12.0, 0.875)
    texts = ["".join(t.itertext()) for t in root.iter(f"{SVG}text")]
    assert {"high & <mighty>", "wanted: logit_normal(0, 1), shift 12", "inference: uniform, shift 12", "boundary 0.875",
            "drawn: 8,000 in a simulation", "0.9", "900", "1", "1000"} <= set(texts)
    lines = list(root.iter(f"{SVG}polyline"))
    curves = {line.get("stroke"): points_of(line) for line in lines if line.get("stroke-width") == "2"}
    assert set(curves) == {plots.WANTED, plots.INFERENCE}
    bars = [b for b in root.iter(f"{SVG}rect") if b.get("fill") == plots.DRAWN]
    histogram = sum(float(b.get("width")) * float(b.get("height")) for b in bars)
    for curve in curves.values():
        assert area(curve) == pytest.approx(histogram, rel=0.02), "all three hold the same mass"
    inside = [line for line in lines if line.get("stroke") == plots.TICKS]
    counted = sum(12 * u / (1 + 11 * u) >= 0.875 for u in np.linspace(1, 0.02, 50))
    assert len(inside) == counted
    assert f"{counted} of the sampler's 50 sigmas" in texts
    edge = points_of(next(line for line in lines if line.get("stroke-dasharray") == "2 3"))[0, 0]
    assert float(bars[0].get("x")) == pytest.approx(edge, abs=0.1)


def test_the_plots_curves_coincide_only_where_training_draws_as_inference_does():
    same, other = (
        [points_of(line) for line in plotted(Density(shift=shift), 5.0, None).iter(f"{SVG}polyline")
         if line.get("stroke-width") == "2"] for shift in (5.0, 1.0))
    np.testing.assert_array_equal(*same)
    assert np.abs(other[0] - other[1]).max() > 50


def test_the_plot_stays_within_its_frame_for_a_density_without_bound():
    root = plotted(Density("mode", (-1.0,), 3.0), 5.0, 0.9)
    for line in root.iter(f"{SVG}polyline"):
        x, y = points_of(line).T
        assert (x >= plots.LEFT_PX).all()
        assert (x <= plots.RIGHT_PX).all()
        assert (y >= plots.TOP_PX).all()
        assert (y <= plots.BOTTOM_PX).all()
    assert not re.search("nan|inf", ET.tostring(root, "unicode").replace("inference", ""))
