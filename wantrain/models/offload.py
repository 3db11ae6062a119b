"""What blocks keep for their backward pass, in host memory meanwhile: away while the next block computes, and back one
block ahead of its turn.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from wantrain.models.copies import copies_of


@dataclass(slots=True, weakref_slot=True)
class Parcel:
    """The tensors of one block: where each lies in which storage, the storages' copies on the host, and those on the
    device while they are there.
    """

    views: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...], int]] = field(default_factory=list)
    host: list[torch.Tensor] = field(default_factory=list)
    device: list[torch.Tensor] = field(default_factory=list)
    tickets: list[object] = field(default_factory=list)


class Offload:
    """The parcels of one transformer, the last away being the first to come back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, copies_of(device)
        self._away: list[weakref.ref[Parcel]] = []
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def send(self, tensors: Sequence[torch.Tensor]) -> Parcel:
        """Begin to copy tensors to the host. Whoever calls forgets them: their memory is free once the next parcel
        is on its way.
        """
        parcel, numbers = Parcel(), dict[int, int]()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            number = numbers.setdefault(storage._cdata, len(numbers))
            where = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
            parcel.views.append((number, tensor.dtype, *where))
            if number == len(parcel.device):
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                parcel.device.append(whole)
                parcel.host.append(self._host(len(whole)))
                parcel.tickets.append(self.copies.start(parcel.host[-1], whole))
        if (last := self._last()) is not None:
            self._arrived(last)
        self._away.append(weakref.ref(parcel))
        return parcel

    def fetch(self, parcel: Parcel) -> list[torch.Tensor]:
        """The tensors as they were; those of the parcel that left before it set out."""
        self._back(parcel)
        for ticket in parcel.tickets:
            self.copies.wait(ticket)
        self._away = [own for own in self._away if own() is not parcel]
        if (last := self._last()) is not None:
            self._back(last)
        storages, views = parcel.device, parcel.views
        for host in parcel.host:  # it serves the next one, whose copies come after all that was asked for until now
            self._free[len(host)].append(host)
        return [_view(storages[number], dtype).as_strided(size, stride, offset)
                for number, dtype, size, stride, offset in views]

    def _last(self) -> Parcel | None:
        """The last parcel that is away, and whose pass is still to go backward."""
        return next((parcel for own in reversed(self._away) if (parcel := own()) is not None), None)

    def _host(self, num_bytes: int) -> torch.Tensor:
        return self._free[num_bytes].pop() if self._free[num_bytes] else self.copies.host(num_bytes)

    def _arrived(self, parcel: Parcel) -> None:
        """Wait for a parcel on its way to the host, and free its memory on the device."""
        for ticket in parcel.tickets:
            self.copies.wait(ticket)
        parcel.device, parcel.tickets = [], []

    def _back(self, parcel: Parcel) -> None:
        """Begin to copy a parcel to the device, unless it is there still."""
        if parcel.device:
            return
        parcel.device = [torch.empty_like(host, device=self.device) for host in parcel.host]
        parcel.tickets = [self.copies.start(*pair) for pair in zip(parcel.device, parcel.host, strict=True)]


def _view(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
