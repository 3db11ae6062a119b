"""Copies between host memory and a device that run beside the computation: what only a GPU has, behind one seam.

On the CPU LateCopies takes the place: a copy arrives when it is waited for, and until then its target holds what no
number is. So tests see a tensor that is read too early.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Copies between host and device, beside the computation."""

    def host(self, num_bytes: int) -> torch.Tensor:
        """Host memory, uint8 [num_bytes], from which copies can run beside the computation."""

    def start(self, target: torch.Tensor, source: torch.Tensor) -> object:
        """Begin a copy, after all computation that was asked for until now; what to wait for."""

    def wait(self, ticket: object) -> None:
        """All computation that is asked for from now on comes after this copy."""

    def finish(self, ticket: object) -> None:
        """Return when this copy has left the host, whose memory may then be written anew."""


class CudaCopies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.Stream(device)

    def host(self, num_bytes: int) -> torch.Tensor:
        """Page-locked as it is: torch's own pinned memory takes up to twice as much, the next power of two."""
        arena = torch.empty(num_bytes, dtype=torch.uint8)
        runtime: Any = torch.cuda
        code = runtime.cudart().cudaHostRegister(arena.data_ptr(), num_bytes, 0)
        if int(code) != 0:
            raise MemoryError(f"{num_bytes / 2**30:.1f} GiB of host memory cannot be page-locked: {code}")
        return arena

    def start(self, target: torch.Tensor, source: torch.Tensor) -> torch.Event:
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, ticket: Any) -> None:
        torch.accelerator.current_stream(self.device).wait_event(ticket)

    def finish(self, ticket: Any) -> None:
        ticket.synchronize()


class LateCopies:
    """The stand-in: each copy arrives when it is waited for, and not before."""

    def host(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> list[torch.Tensor]:
        target.fill_(255)  # in every float format no number
        return [target, source]

    def wait(self, ticket: Any) -> None:
        if ticket:
            target, source = ticket
            target.copy_(source)
            ticket.clear()

    def finish(self, ticket: Any) -> None:
        self.wait(ticket)


def copies_of(device: torch.device) -> Copies:
    """The copies of a device."""
    return CudaCopies(device) if device.type == "cuda" else LateCopies()
