"""Blocks whose frozen weights wait in host memory, and come to the device one ahead of their turn.

The weights of the Linears of `num_swapped` blocks lie in one host arena, or stay in the memory-mapped file that they
were read from, which takes no memory that the system could not have back. Two slots of the device take turns: while one
block computes from its slot, the next one's weights are copied into the other, forward and backward. Only the weights
go, and only towards the device, for they never change. With `wantrain.models.block`, which says when a block begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from wantrain.models.copies import copies_of

NUM_SLOTS = 2
_ALIGNMENT = 256


@dataclass(slots=True)
class Tensors:
    """The weights of one block: where each belongs, its place among the block's bytes, and where it is on the host."""

    num_bytes: int
    owners: list[tuple[torch.Tensor, int, torch.Tensor]] = field(default_factory=list)

    def point_into(self, memory: torch.Tensor) -> None:
        """From now on the weights are read from these bytes."""
        for tensor, offset, _ in self.owners:
            tensor.data = _placed(tensor, memory, offset)

    def point_home(self) -> None:
        """From now on the weights are read from the host."""
        for tensor, _, home in self.owners:
            tensor.data = home

    def copy_into(self, memory: torch.Tensor) -> torch.Tensor:
        """The weights' bytes in this memory."""
        for tensor, offset, home in self.owners:
            _placed(tensor, memory, offset).copy_(home)
        return memory[: self.num_bytes]


@dataclass(slots=True)
class Slot:
    """Memory of the device for one block: whose weights it holds, and the copy on its way. Where they come from a file,
    `staged` is the host memory that they come through.
    """

    memory: torch.Tensor
    staged: torch.Tensor | None = None
    block: int | None = None
    ticket: object = None
    last: object = None


def spread(num_blocks: int, num_swapped: int) -> list[int]:
    """Which blocks are swapped: evenly spread, so that each copy has as long as can be."""
    return [i for i in range(num_blocks) if (i + 1) * num_swapped // num_blocks != i * num_swapped // num_blocks]


class Swap:
    """The swapped blocks of a transformer. `weights` are, for each, the tensors that are to lie in host memory; where
    they are `mapped`, they stay where they are.

    `num_copies` counts the copies, `most_resident` the most blocks that were on the device at once.
    """

    def __init__(self, weights: Sequence[Sequence[torch.Tensor]], device: torch.device, *, mapped: bool = False
                 ) -> None:
        self.copies = copies_of(device)
        self.num_copies = self.most_resident = 0
        sizes = [sum(_aligned(tensor.nbytes) for tensor in own) for own in weights]
        self.arena = None if mapped else self.copies.host(sum(sizes))
        self.blocks: list[Tensors] = []
        for own, end, size in zip(weights, itertools.accumulate(sizes), sizes, strict=True):
            block, offset = Tensors(size), 0
            for tensor in own:
                home = tensor.detach()
                if self.arena is not None:
                    home = _placed(tensor, self.arena, end - size + offset)
                    home.copy_(tensor.detach())
                block.owners.append((tensor, offset, home))
                offset += _aligned(tensor.nbytes)
            block.point_home()
            self.blocks.append(block)
        self.starts = [end - size for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
        self.slots = [Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device),
                           self.copies.host(max(sizes)) if mapped else None)
                      for _ in range(min(NUM_SLOTS, len(sizes)))]

    def acquire(self, number: int, step: int) -> None:
        """The weights of swapped block `number` are there when the computation that follows runs; those of the next
        (step 1 going forward, -1 going backward) set out.
        """
        slot = self._slot_of(number) or self._send(number, None)
        if slot.ticket is not None:
            self.copies.wait(slot.ticket)
            slot.ticket = None
            self.blocks[number].point_into(slot.memory)
        if 0 <= number + step < len(self.blocks) and self._slot_of(number + step) is None:
            self._send(number + step, slot)
        self.most_resident = max(self.most_resident, sum(slot.block is not None for slot in self.slots))

    def _slot_of(self, number: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.block == number), None)

    def _send(self, number: int, in_use: Slot | None) -> Slot:
        """Begin to copy a block into a slot that is not in use, whose weights are then read from the host again."""
        slot = next(slot for slot in self.slots if slot is not in_use)
        if slot.block is not None:
            self.blocks[slot.block].point_home()
        if slot.ticket is not None:
            self.copies.wait(slot.ticket)
        host = self._host(number, slot)
        slot.block, slot.ticket = number, self.copies.start(slot.memory[: len(host)], host)
        slot.last = slot.ticket
        self.num_copies += 1
        return slot

    def _host(self, number: int, slot: Slot) -> torch.Tensor:
        """The bytes of a block, ready to be copied beside the computation."""
        block = self.blocks[number]
        if self.arena is not None:
            return self.arena[self.starts[number]: self.starts[number] + block.num_bytes]
        assert slot.staged is not None, "what is mapped comes through staged memory"
        if slot.last is not None:
            self.copies.finish(slot.last)  # else it would be overwritten while it is copied
        return block.copy_into(slot.staged)


def _placed(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor like this one in these bytes."""
    return memory[offset: offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
