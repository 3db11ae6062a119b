"""How sigma is spread: base densities on (0, 1), the timestep shift, ranges. Draws from them are in `flow`.

torch is imported by what computes with tensors: what a config's density is can be told and checked without, as long as
it is uniform or over the whole range.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wantrain.terms import NUM_TIMESTEPS

if TYPE_CHECKING:
    import torch


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The timestep shift s*x / (1 + (s-1)*x) of Esser et al. 2024 (eq. 23); float32 in [0, 1] to the same."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def share_of_schedule(shift: float, low: float, high: float) -> float:
    """The share of the inference schedule, uniform before `shift`, whose sigmas lie in [low, high)."""
    return unshift_sigma(high, shift) - unshift_sigma(low, shift)


def shift_for(shift: float, num_tokens: int, native_tokens: int) -> float:
    """`shift`, meant for clips of `native_tokens`, for one of `num_tokens`: Esser et al. 2024, eq. 23.

    The paper shifts by sqrt(m / n) from n pixels to m; shifts compose by multiplication. Tokens stand for pixels.
    """
    return shift * math.sqrt(num_tokens / native_tokens)


@dataclass(frozen=True, slots=True)
class Density:
    """How sigma is spread: a base density on (0, 1), moved by the timestep `shift`, conditioned on `within`.

    `name` and `shape` give the base; an empty shape takes the default of `DISTRIBUTIONS`. `within` [low, high) is in
    sigma as the model sees it, after the shift. ValueError for what is not in `DISTRIBUTIONS`, and for a range where
    the density has next to nothing.
    """

    name: str = "uniform"
    shape: tuple[float, ...] = ()
    shift: float = 1.0
    within: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.name not in DISTRIBUTIONS:
            raise ValueError(f"distribution {self.name!r} is not one of {', '.join(DISTRIBUTIONS)}")
        parameters = DISTRIBUTIONS[self.name].parameters
        object.__setattr__(self, "shape", tuple(map(float, self.shape)) or tuple(p.default for p in parameters))
        if len(self.shape) != len(parameters):
            raise ValueError(f"shape {list(self.shape)} of {self.name} is to be {[p.name for p in parameters]}")
        for value, p in zip(self.shape, parameters, strict=True):
            if not p.low <= value <= p.high:
                raise ValueError(f"{p.name} {value:g} of {self.name} is not in [{p.low:g}, {p.high:g}]")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift {self.shift:g} is not a positive number")
        low, high = self.within
        if not low + 1 / NUM_TIMESTEPS <= high <= 1 or low < 0:
            raise ValueError(f"range [{low:g}, {high:g}] is not in [0, 1] and at least {1 / NUM_TIMESTEPS:g} wide")
        _, mass = self._bounds()
        if mass < 1e-9:
            raise ValueError(f"{self} has next to no draws in [{low:g}, {high:g}]")

    def __str__(self) -> str:
        numbers = f"({', '.join(f'{value:g}' for value in self.shape)})" if self.shape else ""
        return f"{self.name}{numbers}, shift {self.shift:.4g}"

    def base_cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        """The share of the base density below `sigma`: float64 in [0, 1], any shape, to the same."""
        return DISTRIBUTIONS[self.name].cdf(sigma.clamp(0, 1), *self.shape)  # undoing a shift may round beyond 1

    def base_quantile(self, u: torch.Tensor) -> torch.Tensor:
        """The inverse of `base_cdf`."""
        return DISTRIBUTIONS[self.name].quantile(u.clamp(0, 1), *self.shape)

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        """The share of all draws below `sigma`: float64 in [0, 1], any shape, to the same."""
        below, mass = self._bounds()
        return ((self.base_cdf(shift_sigma(sigma, 1 / self.shift)) - below) / mass).clamp(0, 1)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """The inverse of `cdf`; may round to the range's upper end, `sigma_at` does not."""
        below, mass = self._bounds()
        return shift_sigma(self.base_quantile(below + mass * u), self.shift)

    def _bounds(self) -> tuple[float, float]:
        """The base's share below the range, and in it."""
        if self.within == (0.0, 1.0):
            return 0.0, 1.0
        ends = [unshift_sigma(end, self.shift) for end in self.within]
        if self.name == "uniform":
            below, until = (min(max(end, 0.0), 1.0) for end in ends)
            return below, until - below
        import torch

        below, until = self.base_cdf(torch.tensor(ends, dtype=torch.float64)).tolist()
        return below, until - below


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number of a distribution's shape: its default and the range allowed, ends included."""

    name: str
    default: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """A density on (0, 1): `cdf` and `quantile` take a float64 tensor in [0, 1] and the shape's numbers."""

    parameters: tuple[Parameter, ...]
    cdf: Callable[..., torch.Tensor]
    quantile: Callable[..., torch.Tensor]


def _mode_quantile(u: torch.Tensor, scale: float) -> torch.Tensor:
    """f_mode(1 - u) of Esser et al. 2024, eq. 20: f_mode falls from 1 to 0, a quantile rises."""
    return u - scale * ((math.pi / 2 * u).sin().square() - u)


def _mode_cdf(sigma: torch.Tensor, scale: float) -> torch.Tensor:
    """The inverse of `_mode_quantile` by bisection: its slope is 0 at the middle or the ends for extreme scales."""
    import torch

    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(53):
        middle = (low + high) / 2
        less = _mode_quantile(middle, scale) < sigma
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return torch.where(sigma <= 0, 0.0, torch.where(sigma >= 1, 1.0, (low + high) / 2))


@functools.lru_cache(maxsize=16)
def _beta_table(alpha: float, beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, cdf and its slope for x = logit(sigma), float64 [N]: there the density, sigma^alpha * (1 - sigma)^beta up to
    a factor, is smooth and falls exponentially on both sides, whatever alpha and beta.
    """
    import torch

    peak = math.log(alpha / beta)
    x = torch.linspace(peak - 40 / min(alpha, 1), peak + 40 / min(beta, 1), 2 ** 15, dtype=torch.float64)
    log_slope = -alpha * torch.nn.functional.softplus(-x) - beta * torch.nn.functional.softplus(x)
    slope = (log_slope - log_slope.max()).exp()
    bend = slope * (alpha * torch.sigmoid(-x) - beta * torch.sigmoid(x))
    step = x[1] - x[0]
    areas = step / 2 * (slope[1:] + slope[:-1]) + step ** 2 / 12 * (bend[:-1] - bend[1:])
    cdf = torch.cat([torch.zeros_like(areas[:1]), areas.cumsum(0)])
    slope, cdf = slope / cdf[-1], cdf / cdf[-1]
    rises = cdf.diff(prepend=-cdf[:1] - 1) > 0
    kept = rises & (slope > 1e-60)  # the inverse's slope is finite
    return x[kept], cdf[kept], slope[kept]


def _hermite(x: torch.Tensor, x_N: torch.Tensor, y_N: torch.Tensor, slope_N: torch.Tensor) -> torch.Tensor:
    """The cubic Hermite interpolation of a table with rising x_N, constant beyond its ends."""
    import torch

    x = x.clamp(x_N[0], x_N[-1])
    i = torch.searchsorted(x_N, x, right=True).clamp(1, len(x_N) - 1)
    width = x_N[i] - x_N[i - 1]
    t = (x - x_N[i - 1]) / width
    rise = y_N[i] - y_N[i - 1]
    bow = (slope_N[i - 1] * width - rise) * (1 - t) + (rise - slope_N[i] * width) * t
    return y_N[i - 1] + t * rise + t * (1 - t) * bow


def _beta_cdf(sigma: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    x, cdf, slope = _beta_table(alpha, beta)
    return _hermite(sigma.logit(), x, cdf, slope)


def _beta_quantile(u: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    x, cdf, slope = _beta_table(alpha, beta)
    return _hermite(u, cdf, x, 1 / slope).sigmoid()


def _normal_cdf(sigma: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Of the logit-normal density."""
    import torch

    return torch.special.ndtr((sigma.logit() - mean) / std)


def _normal_quantile(u: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """The inverse of `_normal_cdf`."""
    import torch

    return torch.sigmoid(mean + std * torch.special.ndtri(u))


DISTRIBUTIONS = {
    "uniform": Distribution((), lambda sigma: sigma, lambda u: u),
    "logit_normal": Distribution(
        (Parameter("mean", 0.0, -10.0, 10.0), Parameter("std", 1.0, 0.05, 10.0)),
        _normal_cdf, _normal_quantile),
    "mode": Distribution((Parameter("scale", 1.29, -1.0, 1.7519),), _mode_cdf, _mode_quantile),
    "beta": Distribution((Parameter("alpha", 2.0, 0.1, 100.0), Parameter("beta", 2.0, 0.1, 100.0)),
                         _beta_cdf, _beta_quantile),
}
"""What a base density may be. Logit-normal and mode (1.29, heavy tails) are Esser et al. 2024, eq. 19 and 20, whose t
is sigma: a positive scale favours the middle, a negative one the ends; from -1 to 2 / (pi - 2) mode is monotone."""
