"""How much memory a computation holds, by following every storage that an operation makes.

Works on tensors without memory too (fake ones, and the meta device), so that full-size models can be counted on any
machine. What a GPU's library takes inside one operation, e.g. a convolution's workspace, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """In the block, `alive` are the bytes of all storages that operations made and something still refers to, and
    `peak` the most they ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref[Any] | None] = {}

    def count(self, tensors: Any) -> None:
        """Count the storages of these tensors that are not counted yet."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))
                self.alive += size
                self.peak = max(self.peak, self.alive)

    def elsewhere(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A function whose tensors do not count: they are the host's."""
        def made(*given: Any) -> torch.Tensor:
            alive, peak = self.alive, self.peak
            tensor = make(*given)
            self._known[tensor.untyped_storage()._cdata] = None
            self.alive, self.peak = alive, peak
            return tensor
        return made

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result)
        return result
