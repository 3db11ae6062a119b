"""Muon for weight matrices, AdamW for the rest, and an exponential moving average of weights."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz and scaled so that AdamW's learning rate fits (arXiv:2502.16982)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(_orthogonal(update).view_as(parameter), alpha=-group["lr"] * scale)


def _orthogonal(matrix: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def optimizers(model: nn.Module, lr: float, not_muon: tuple[str, ...]) -> list[torch.optim.Optimizer]:
    """Muon for trainable matrices and kernels whose name holds none of `not_muon`, AdamW for all others."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1
            (matrices if is_matrix and not any(part in name for part in not_muon) else others).append(parameter)
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0)]


class Average:
    """Exponential moving average of a model's trainable parameters, young averages following faster."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the current weights."""
        self.num_updates += 1
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [live[name] for name in self.values], weight)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the averaged and the live weights; calling it twice restores both."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                parameter.data, self.values[name] = self.values[name], parameter.data


def average_over_processes(parameters: list[Tensor], elapsed: float) -> float:
    """Averages gradients and the clock over all processes; returns the common elapsed seconds."""
    if not dist.is_initialized():
        return elapsed
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([elapsed])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
    return flat[-1].item()
