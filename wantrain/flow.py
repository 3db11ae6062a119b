"""Flow matching as pure functions: sampling sigma, shift, mix, target, loss.

noisy = (1 - sigma) * latents + sigma * noise; velocity = noise - latents (Lipman et al. 2022, Liu et al. 2022).
Noise and sigma are functions of (seed, step, index in the global batch) and of nothing else, so that any split
of a batch over processes or accumulation steps, and any resume, sees the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from wantrain.density import Density
from wantrain.terms import NUM_TIMESTEPS

SMALLEST_SIGMA = 0.01
"""Where the weight 1 / sigma^2 stops growing: at 10,000."""

BELL = 5.277
"""With it the weighting `bell` has a mean of 1 over uniform sigmas shifted by 5."""


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose state is a hash of `key`: independent streams without any shared state."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def inference_sigmas(num_steps: int) -> list[float]:
    """Where the official sampler takes its steps, before `shift_sigma`: evenly from 0.999 (as float32) down to 0, which
    is not among them (docs/facts.md, "Sampler").
    """
    highest = float(torch.tensor(1 - 1 / NUM_TIMESTEPS))
    return torch.linspace(highest, 0, num_steps + 1, dtype=torch.float64)[:-1].tolist()


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
    - bell: BELL * (exp(-2 (sigma - 1/2)^2) - exp(-1/2)), 0 at both ends, as DiffSynth-Studio weights.
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
    if name == "bell":
        return BELL * (torch.exp(-2 * (sigma_B - 0.5).square()) - math.exp(-0.5))
    raise ValueError(f"weighting {name!r} is not one of none, sigma_sqrt, cosmap, min_snr, bell")


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
