"""Loss on held-out clips at fixed noise and fixed sigmas: comparable between steps, runs and machines.

Everything random comes from generators keyed by the clip's place, so that validating never moves training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wantrain import flow
from wantrain.models.encode import predict_velocity

SEED = "validation"


@torch.no_grad()
def losses(transformer: torch.nn.Module, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], sigmas: Sequence[float],
           device: torch.device) -> torch.Tensor:
    """Loss of every clip at every sigma, float32 [clips, sigmas].

    `pairs` holds (latents_CTHW, text_LD padded) of each clip. Noise depends on (clip's place, sigma) only;
    precision is the caller's (its autocast).
    """
    sigma_B = torch.tensor(sigmas)
    rows = []
    for place, (latents_CTHW, text_LD) in enumerate(pairs):
        noise = torch.stack([torch.randn(latents_CTHW.shape, generator=flow.generator_for(SEED, place, str(sigma)))
                             for sigma in sigmas])
        latents = latents_CTHW.expand_as(noise)
        noisy = flow.mix(latents, noise, sigma_B).to(device)
        predicted = predict_velocity(transformer, noisy, sigma_B.to(device),
                                     text_LD.to(device).expand(len(sigmas), -1, -1))
        rows.append(flow.loss_per_sample(predicted.cpu(), flow.velocity(latents, noise)))
    return torch.stack(rows)
