"""Flow matching as pure functions: sampling sigma, shift, mix, target, loss.

noisy = (1 - sigma) * latents + sigma * noise; velocity = noise - latents (Lipman et al. 2022, Liu et al. 2022).
Noise and sigma are functions of (seed, step, index in the global batch) and of nothing else, so that any split
of a batch over processes or accumulation steps, and any resume, sees the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from wantrain.terms import NUM_TIMESTEPS

SMALLEST_SIGMA = 0.01
"""Where the weight 1 / sigma^2 stops growing: at 10,000."""


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose state is a hash of `key`: independent streams without any shared state."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The timestep shift s*x / (1 + (s-1)*x) of Esser et al. 2024 (eq. 23); float32 in [0, 1] to the same."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def inference_sigmas(num_steps: int) -> list[float]:
    """Where the official sampler takes its steps, before `shift_sigma`: evenly from 0.999 (as float32) down to 0, which
    is not among them (docs/facts.md, "Sampler").
    """
    highest = float(torch.tensor(1 - 1 / NUM_TIMESTEPS))
    return torch.linspace(highest, 0, num_steps + 1, dtype=torch.float64)[:-1].tolist()


def share(shift: float, low: float, high: float) -> float:
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
        ends = torch.tensor([unshift_sigma(end, self.shift) for end in self.within], dtype=torch.float64)
        below, until = self.base_cdf(ends).tolist()
        return below, until - below


def sigma_at(u: torch.Tensor, density: Density) -> torch.Tensor:
    """The sigmas below which shares `u` of the draws lie: float64 in [0, 1), any shape, to float32 in [low, high)."""
    low, high = torch.tensor(density.within, dtype=torch.float64).float()
    if float(low) < density.within[0]:
        low = torch.nextafter(low, torch.tensor(torch.inf))
    # A timestep, 1000 times as large, must not round up to where the other expert works; nobody works from 1 on.
    highest = high * (1 - 1e-6) if density.within[1] < 1 else torch.nextafter(high, torch.tensor(0.0))
    return density.quantile(u).float().clamp(low, highest)


def draw_sigma(seed: int, step: int, index_B: Sequence[int], global_batch_size: int, density: Density
               ) -> torch.Tensor:
    """Sigma of the given samples of a global batch, drawn from `density`, stratified over the batch.

    Never outside density.within [low, high), nor rounded to its upper end. The batch's N strata, equal shares of the
    density, are dealt to its samples at random, so every step covers the whole range. Returns float32, shape
    [len(index_B)].
    """
    generator = generator_for(seed, step, "sigma")
    strata = torch.randperm(global_batch_size, generator=generator)
    jitter = torch.rand(global_batch_size, generator=generator, dtype=torch.float64)
    # The whole batch before the selection: how a vectorised function rounds may depend on the place in the vector.
    return sigma_at((strata.double() + jitter) / global_batch_size, density)[list(index_B)]


def draw_noise(seed: int, step: int, index_B: Sequence[int], shape_CTHW: Sequence[int]) -> torch.Tensor:
    """Standard normal noise_BCTHW, float32, each sample from its own stream."""
    return torch.stack([torch.randn(*shape_CTHW, generator=generator_for(seed, step, "noise", i)) for i in index_B])


def mix(latents_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """noisy_BCTHW = (1 - sigma) * latents + sigma * noise; sigma of each sample [B] or of its latent frames [B, T]."""
    sigma_B1T11 = sigma.view(len(sigma), 1, -1, 1, 1)
    return (1 - sigma_B1T11) * latents_BCTHW + sigma_B1T11 * noise_BCTHW


def velocity(latents_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor) -> torch.Tensor:
    """The target: d noisy / d sigma."""
    return noise_BCTHW - latents_BCTHW


def timestep(sigma_B: torch.Tensor) -> torch.Tensor:
    """What the model is told: 1000 * sigma in float32, never rounded."""
    return sigma_B.float() * NUM_TIMESTEPS


def weight_of_sigma(sigma_B: torch.Tensor, name: str = "none", gamma: float = 5.0) -> torch.Tensor:
    """weight_B of the squared velocity error, float32, finite on all of [0, 1]; not normalised.

    - none: 1.
    - sigma_sqrt: 1 / sigma^2, as diffusers' and SD3's scripts call it; held at its value at SMALLEST_SIGMA below that.
    - cosmap: 2 / (pi * (1 - 2 sigma + 2 sigma^2)), the density CosMap of Esser et al. 2024, section 3.1.
    - min_snr: Hang et al. 2023 weight the squared error of the predicted clean latents by min(snr, gamma).
      Here snr = ((1 - sigma) / sigma)^2, and as latents = noisy - sigma * velocity, that error is sigma^2 times the
      velocity's. So min(snr, gamma) * sigma^2 = min((1 - sigma)^2, gamma * sigma^2): 0 at both ends, at most
      gamma / (1 + sqrt(gamma))^2, at sigma = 1 / (1 + sqrt(gamma)).
    """
    sigma_B = sigma_B.float()
    if name == "none":
        return torch.ones_like(sigma_B)
    if name == "sigma_sqrt":
        return sigma_B.clamp(min=SMALLEST_SIGMA) ** -2
    if name == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B.square()))
    if name == "min_snr":
        return torch.minimum((1 - sigma_B).square(), gamma * sigma_B.square())
    raise ValueError(f"weighting {name!r} is not one of none, sigma_sqrt, cosmap, min_snr")


def errors_of(difference: torch.Tensor, kind: str = "mse", delta: float = 1.0) -> torch.Tensor:
    """What each element's difference e costs, same shape; all kinds near e^2 for |e| much below `delta`.

    - mse: e^2.
    - huber: e^2 up to delta, then 2 delta |e| - delta^2, twice torch's huber_loss.
    - pseudo_huber: 2 delta^2 (sqrt(1 + (e / delta)^2) - 1), twice Charbonnier et al. 1997; smooth, near
      2 delta |e| for large e.
    """
    if kind == "mse":
        return difference.square()
    if kind == "huber":
        return 2 * torch.nn.functional.huber_loss(difference, torch.zeros_like(difference), reduction="none",
                                                  delta=delta)
    if kind == "pseudo_huber":  # the difference of the root and 1 would lose small errors to rounding
        return 2 * difference.square() / (1 + (1 + (difference / delta).square()).sqrt())
    raise ValueError(f"loss {kind!r} is not one of mse, huber, pseudo_huber")


def loss_per_sample(predicted_BCTHW: torch.Tensor, target_BCTHW: torch.Tensor, weight_B1THW: torch.Tensor | None = None,
                    kind: str = "mse", delta: float = 1.0) -> torch.Tensor:
    """Mean of `errors_of` each sample in float32, weighted by `weight_B1THW` if given: loss_B."""
    if predicted_BCTHW.shape != target_BCTHW.shape:
        raise ValueError(f"predicted {tuple(predicted_BCTHW.shape)} and target {tuple(target_BCTHW.shape)} differ")
    errors_BCTHW = errors_of(predicted_BCTHW.float() - target_BCTHW.float(), kind, delta)
    if weight_B1THW is None:
        return errors_BCTHW.flatten(1).mean(1)
    weight_BCTHW = weight_B1THW.expand_as(errors_BCTHW)
    return (errors_BCTHW * weight_BCTHW).flatten(1).sum(1) / weight_BCTHW.flatten(1).sum(1).clamp(min=1e-6)


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
    return torch.sigmoid(_hermite(u, cdf, x, 1 / slope))


DISTRIBUTIONS = {
    "uniform": Distribution((), lambda sigma: sigma, lambda u: u),
    "logit_normal": Distribution(
        (Parameter("mean", 0.0, -10.0, 10.0), Parameter("std", 1.0, 0.05, 10.0)),
        lambda sigma, mean, std: torch.special.ndtr((sigma.logit() - mean) / std),
        lambda u, mean, std: torch.sigmoid(mean + std * torch.special.ndtri(u))),
    "mode": Distribution((Parameter("scale", 1.29, -1.0, 1.7519),), _mode_cdf, _mode_quantile),
    "beta": Distribution((Parameter("alpha", 2.0, 0.1, 100.0), Parameter("beta", 2.0, 0.1, 100.0)),
                         _beta_cdf, _beta_quantile),
}
"""What a base density may be. Logit-normal and mode (1.29, heavy tails) are Esser et al. 2024, eq. 19 and 20, whose t
is sigma: a positive scale favours the middle, a negative one the ends; from -1 to 2 / (pi - 2) mode is monotone."""
