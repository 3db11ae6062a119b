"""What the transformer is given of a batch, what it should answer, and how its errors become a loss.

Training, validation and `evaluate` all call `losses`. Arguments are plain: a batch, a model, an Objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wantrain import flow, lora
from wantrain.models.encode import autocast, predict_velocity
from wantrain.terms import Batch


@dataclass(frozen=True, slots=True)
class Objective:
    """How errors become a loss. `kind` and `delta` are of flow.errors_of, `weighting` and `min_snr_gamma` of
    flow.weight_of_sigma.

    Outside its mask a sample counts `mask_background`, and `mask_preserve` more against what the frozen base predicts
    there. The caption with the class words counts `class_weight`, against the frozen base. `asks_base` says whether
    any sample of the training needs the frozen base; it is the same in every process.
    """

    kind: str = "mse"
    delta: float = 1.0
    weighting: str = "none"
    min_snr_gamma: float = 5.0
    mask_background: float = 1.0
    mask_preserve: float = 0.0
    class_weight: float = 0.0
    asks_base: bool = False


@dataclass(slots=True)
class LossInputs:
    """Rows of a batch on the device: what the transformer is given, and the `target` that it should answer.

    Where `asks_base_N` is true, `base` gets what the frozen base answers (zeros before and elsewhere); where
    `from_base_N` is true as well, that takes the place of `target`.
    """

    noisy: torch.Tensor
    sigma: torch.Tensor
    text: torch.Tensor
    condition: dict[str, torch.Tensor]
    target: torch.Tensor
    base: torch.Tensor
    asks_base_N: torch.Tensor
    from_base_N: torch.Tensor

    def rows(self, index_N: torch.Tensor) -> LossInputs:
        """A copy with these rows only, in this order."""
        return LossInputs(self.noisy[index_N], self.sigma[index_N], self.text[index_N],
                          {name: tensor[index_N] for name, tensor in self.condition.items()}, self.target[index_N],
                          self.base[index_N], self.asks_base_N[index_N], self.from_base_N[index_N])


def losses(model: torch.nn.Module, batch: Batch, objective: Objective, *, device: torch.device, dtype: torch.dtype,
           unwrapped: torch.nn.Module | None = None) -> torch.Tensor:
    """loss_B of one micro-batch, float32: mix, predict, compare, weigh.

    `model` is called as it is (an engine may have wrapped it); `unwrapped` is the transformer inside, with its
    adapter, of which the frozen base is asked. `dtype` is that of the base. Rows: one a sample, and after them one a
    sample with the class words in place of the trigger, where those are trained.
    """
    rows = loss_inputs(batch, objective, device, dtype)
    if objective.asks_base:
        ask_base(unwrapped or model, rows, dtype)
    with autocast(device, dtype):
        predicted = predict_velocity(model, rows.noisy, rows.sigma, rows.text, rows.condition)
    num_samples = len(batch.planned_B)
    weight = place_weight(batch, 1, objective.mask_background)
    if weight is not None:
        weight = weight.to(device).repeat(len(predicted) // num_samples, 1, 1, 1, 1)
    loss_N = flow.loss_per_sample(predicted, rows.target, weight, objective.kind, objective.delta)
    loss_B = loss_N[:num_samples]
    if batch.class_text_BLD is not None:
        has_words_B = batch.class_text_BLD.ne(0).any(-1).any(-1).to(device)
        loss_B = loss_B + objective.class_weight * has_words_B * loss_N[num_samples:]
    if objective.mask_preserve and batch.mask_B1THW is not None:
        outside = place_weight(batch, 0, 1)
        assert outside is not None, "a batch with masks has weights"
        loss_B = loss_B + objective.mask_preserve * flow.loss_per_sample(
            predicted[:num_samples], rows.base[:num_samples], outside.to(device), objective.kind, objective.delta)
    return loss_B * flow.weight_of_sigma(batch.sigma_B, objective.weighting, objective.min_snr_gamma).to(device)


def loss_inputs(batch: Batch, objective: Objective, device: torch.device, dtype: torch.dtype) -> LossInputs:
    """One row a sample, and after them one with the class words in place of the trigger, where those are trained."""
    latents, noise, sigma, text = (t.to(device, non_blocking=True) for t in (
        batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma, batch.text_BLD))
    preserved_B = torch.tensor([p.clip.preserve for p in batch.planned_B])
    outside_B = torch.zeros_like(preserved_B)
    if objective.mask_preserve and batch.mask_B1THW is not None:
        outside_B = batch.mask_B1THW.lt(1).flatten(1).any(1)
    rows = LossInputs(flow.mix(latents, noise, sigma).to(dtype), sigma, text.to(dtype),
                      {name: t.to(device, non_blocking=True) for name, t in batch.condition.items()},
                      flow.velocity(latents, noise), torch.zeros_like(latents), (preserved_B | outside_B).to(device),
                      preserved_B.to(device))
    if batch.class_text_BLD is not None:
        rows = rows.rows(torch.arange(2 * len(latents), device=device) % len(latents))
        rows.text[len(latents):] = batch.class_text_BLD.to(device, dtype)
        rows.asks_base_N[len(latents):] = rows.from_base_N[len(latents):] = True
    return rows


def ask_base(transformer: torch.nn.Module, rows: LossInputs, dtype: torch.dtype) -> None:
    """Get the frozen base's answers, and put them in place of those targets that are to be its own.

    One forward in every process, whatever the rows: under ZeRO-3 all must call it.
    """
    device = rows.noisy.device
    places_N = rows.asks_base_N.nonzero()[:, 0]
    some = places_N if len(places_N) else torch.zeros(1, dtype=torch.long, device=device)
    part = rows.rows(some)
    with torch.no_grad(), lora.switched_off(transformer), autocast(device, dtype):
        answer = predict_velocity(transformer, part.noisy, part.sigma, part.text, part.condition)
    rows.base[places_N] = answer[: len(places_N)].float()
    rows.target[rows.from_base_N] = rows.base[rows.from_base_N]


def place_weight(batch: Batch, inside: float, outside: float) -> torch.Tensor | None:
    """The weight of each latent place in a loss, [B, 1, T, H, W]: `inside` and `outside` the masks, 0 for latent frames
    that were given clean. None where every place counts the same.
    """
    weight = None
    if batch.mask_B1THW is not None:
        weight = outside + (inside - outside) * batch.mask_B1THW
    if batch.known_BT is None:
        return weight
    unknown = (1 - batch.known_BT).view(len(batch.known_BT), 1, -1, 1, 1)
    return unknown.expand(-1, 1, -1, *batch.latents_BCTHW.shape[3:]) if weight is None else weight * unknown
