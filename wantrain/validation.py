"""Loss on held-out clips at fixed noise and fixed sigmas: comparable between steps, runs and machines.

Everything random comes from generators keyed by the clip's content and the sigma, so that validating never moves
training, and no clip and no sigma moves the numbers of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from wantrain import flow
from wantrain.data.batches import stack
from wantrain.terms import Batch, PlannedClip, Sample

SEED = "validation"

ClipSigma = tuple[int, int]
"""(place of the clip, place of the sigma)."""

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Values [N] of each process -> [number of processes, N]."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work this process does. All `num_processes` must call `losses` with the same clips."""

    num_processes: int = 1
    process_index: int = 0
    gather: Gather = lambda values_N: values_N[None]

    def of(self, chunks: Sequence[list[ClipSigma]]) -> list[list[ClipSigma]]:
        """This process's chunks. Every process gets equally many: what lacks is the first one again, not counted.

        Under ZeRO-3 and FSDP2 every process must call the transformer equally often.
        """
        own = list(chunks[self.process_index::self.num_processes])
        return own + list(chunks[:1]) * (math.ceil(len(chunks) / self.num_processes) - len(own))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out clips and the sigmas to measure each at, `size` rows of them in one forward. `sample` gives the tensors
    of a clip by its place; a process asks for those of its share alone.
    """

    clips: Sequence[PlannedClip]
    sigmas: Sequence[float]
    sample: Callable[[int], Sample]
    size: int
    share: Share = field(default_factory=Share)

    @property
    def chunks(self) -> list[list[ClipSigma]]:
        """Every clip at every sigma, at most `size` rows at a time and of one kind; the same in every process."""
        found = []
        for kind in dict.fromkeys(p.kind for p in self.clips):
            rows = [(place, s) for place, p in enumerate(self.clips) if p.kind == kind for s in range(len(self.sigmas))]
            found += [rows[first : first + self.size] for first in range(0, len(rows), self.size)]
        return found

    def read(self) -> None:
        """Read all clips that `losses` will need in this process, so that faults show at once."""
        for place in sorted({place for rows in self.share.of(self.chunks) for place, _ in rows}):
            self.sample(place)


@torch.no_grad()
def losses(heldout: HeldOut, loss_of: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """Loss of every held-out clip at every sigma, float32 [clips, sigmas], the same in every process.

    `loss_of` gives loss_B of a batch (wantrain.objective.losses of a model). Latent frames that are given clean do not
    count.
    """
    share, chunks = heldout.share, heldout.chunks
    own = torch.zeros(len(share.of(chunks)), heldout.size)
    for number, rows in enumerate(share.of(chunks)):
        own[number, :len(rows)] = loss_of(_batch(heldout, rows)).cpu()
    gathered = share.gather(own.flatten()).view(share.num_processes, *own.shape)
    table = torch.empty(len(heldout.clips), len(heldout.sigmas))
    for number, rows in enumerate(chunks):
        round_number, process = divmod(number, share.num_processes)
        for k, (place, s) in enumerate(rows):
            table[place, s] = gathered[process, round_number, k]
    return table


def _batch(heldout: HeldOut, rows: Sequence[ClipSigma]) -> Batch:
    """Rows of one kind as a batch, with the noise of each."""
    planned = [heldout.clips[place] for place, _ in rows]
    samples, sigmas = [heldout.sample(place) for place, _ in rows], [heldout.sigmas[s] for _, s in rows]
    noise = torch.stack([noise_of(p, sigma, sample.latents_CTHW.shape)
                         for p, sample, sigma in zip(planned, samples, sigmas, strict=True)])
    return stack(samples, planned, noise, torch.tensor(sigmas), [place for place, _ in rows])


def noise_of(planned: PlannedClip, sigma: float, shape_CTHW: Sequence[int]) -> torch.Tensor:
    """The noise of a held-out window at a sigma: a function of its file's content, its place in it, and the sigma."""
    generator = flow.generator_for(SEED, planned.found.digest, str(planned.start_s), str(sigma))
    return torch.randn(*shape_CTHW, generator=generator)
