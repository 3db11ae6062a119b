"""How much memory a computation holds at the most, by following every storage that an operation makes.

Works on tensors without memory too (the meta device), so that full-size models can be counted on any machine. What a
GPU's library takes inside one operation, e.g. a convolution's workspace, is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """In the block: `alive` and `peak` bytes of storages that operations made there."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.setdefault(tensor.untyped_storage(), 0)  # was there before
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return made

    def _freed(self, size: int) -> None:
        self.alive -= size
