"""A GPU's autocast on the CPU: the operations that it computes in float32, which a CPU's leaves in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

FLOAT32 = frozenset((
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "cosh", "cosine_similarity", "cross_entropy",
    "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "kl_div", "l1_loss", "layer_norm", "log",
    "log10", "log1p", "log2", "log_softmax", "mse_loss", "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal",
    "rms_norm", "rsqrt", "sinh", "smooth_l1_loss", "softmax", "softmin", "softplus", "sum", "tan"))
"""By name, of torch's list "CUDA Ops that can autocast to float32", and rms_norm, which newer versions have there."""


class CudaAutocast(TorchFunctionMode):
    """In the block, autocast on the CPU does to these what it does to them on a GPU."""

    def __torch_function__(self, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if not torch.is_autocast_enabled("cpu") or getattr(function, "__name__", "") not in FLOAT32:
            return function(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(torch.Tensor, widened, (args, dict(kwargs or {})))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
