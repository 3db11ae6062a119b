"""Loss on held-out clips at fixed noise and fixed sigmas: comparable between steps, runs and machines.

Everything random comes from generators keyed by the clip's place, so that validating never moves training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wantrain import flow
from wantrain.models.encode import predict_velocity
from wantrain.terms import Sample

SEED = "validation"


@torch.no_grad()
def losses(transformer: torch.nn.Module, samples: Sequence[Sample], sigmas: Sequence[float], device: torch.device
           ) -> torch.Tensor:
    """Loss of every held-out sample at every sigma, float32 [samples, sigmas].

    Latent frames that are given clean do not count. Noise depends on (the sample's place, sigma) only; precision is the
    caller's (its autocast).
    """
    rows = []
    for place, sample in enumerate(samples):
        noise = torch.stack([torch.randn(sample.latents_CTHW.shape,
                                         generator=flow.generator_for(SEED, place, str(sigma))) for sigma in sigmas])
        latents = sample.latents_CTHW.expand_as(noise)
        sigma, unknown = torch.tensor(sigmas), None
        if sample.known_T is not None:
            sigma = sigma[:, None] * (1 - sample.known_T)
            unknown = (1 - sample.known_T).view(1, 1, -1, 1, 1).expand(len(sigmas), 1, *latents.shape[2:])
        text, *condition = (t.to(device).expand(len(sigmas), *t.shape)
                            for t in (sample.text_LD, *sample.condition.values()))
        predicted = predict_velocity(transformer, flow.mix(latents, noise, sigma).to(device), sigma.to(device), text,
                                     dict(zip(sample.condition, condition, strict=True)))
        rows.append(flow.loss_per_sample(predicted.cpu(), flow.velocity(latents, noise), unknown))
    return torch.stack(rows)
