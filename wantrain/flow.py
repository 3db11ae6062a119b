"""Flow matching as pure functions: sampling sigma, shift, mix, target, loss.

noisy = (1 - sigma) * latents + sigma * noise; velocity = noise - latents (Lipman et al. 2022, Liu et al. 2022).
Noise and sigma are functions of (seed, step, index in the global batch) and of nothing else, so that any split
of a batch over processes or accumulation steps, and any resume, sees the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from wantrain.terms import NUM_TIMESTEPS


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


def draw_sigma(seed: int, step: int, index_B: Sequence[int], global_batch_size: int, shift: float, *,
               within: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
    """Sigma of the given samples of a global batch: uniform, stratified over the batch, then shifted.

    `within` [low, high) conditions the draw on that range, which an expert is asked for at inference; sigma is then
    never outside, nor rounds to its upper end. The batch's N strata are dealt to its samples at random, so every step
    covers the whole range. Returns float32, shape [len(index_B)].
    """
    generator = generator_for(seed, step, "sigma")
    strata = torch.randperm(global_batch_size, generator=generator)
    jitter = torch.rand(global_batch_size, generator=generator, dtype=torch.float64)
    low, high = (unshift_sigma(end, shift) for end in within)
    uniform = low + (high - low) * (strata.double() + jitter) / global_batch_size
    sigma = shift_sigma(uniform, shift)[list(index_B)].float()
    return sigma if within == (0.0, 1.0) else sigma.clamp(within[0], within[1] * (1 - 1e-6))


def draw_noise(seed: int, step: int, index_B: Sequence[int], shape_CTHW: Sequence[int]) -> torch.Tensor:
    """Standard normal noise_BCTHW, float32, each sample from its own stream."""
    return torch.stack([torch.randn(*shape_CTHW, generator=generator_for(seed, step, "noise", i)) for i in index_B])


def mix(latents_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """noisy_BCTHW = (1 - sigma) * latents + sigma * noise."""
    sigma_B1111 = sigma_B.view(-1, 1, 1, 1, 1)
    return (1 - sigma_B1111) * latents_BCTHW + sigma_B1111 * noise_BCTHW


def velocity(latents_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor) -> torch.Tensor:
    """The target: d noisy / d sigma."""
    return noise_BCTHW - latents_BCTHW


def timestep(sigma_B: torch.Tensor) -> torch.Tensor:
    """What the model is told: 1000 * sigma in float32, never rounded."""
    return sigma_B.float() * NUM_TIMESTEPS


def loss_per_sample(predicted_BCTHW: torch.Tensor, target_BCTHW: torch.Tensor, weight_B1THW: torch.Tensor | None = None
                    ) -> torch.Tensor:
    """Mean squared error of each sample in float32, weighted by `weight_B1THW` if given: loss_B."""
    if predicted_BCTHW.shape != target_BCTHW.shape:
        raise ValueError(f"predicted {tuple(predicted_BCTHW.shape)} and target {tuple(target_BCTHW.shape)} differ")
    errors_BCTHW = (predicted_BCTHW.float() - target_BCTHW.float()).square()
    if weight_B1THW is None:
        return errors_BCTHW.flatten(1).mean(1)
    weight_BCTHW = weight_B1THW.expand_as(errors_BCTHW)
    return (errors_BCTHW * weight_BCTHW).flatten(1).sum(1) / weight_BCTHW.flatten(1).sum(1).clamp(min=1e-6)
