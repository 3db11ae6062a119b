"""Loss on held-out clips at fixed noise and fixed sigmas: comparable between steps, runs and machines.

Everything random comes from generators keyed by the clip's content, the sigma and the draw, so that validating never
moves training, and no clip and no sigma moves the numbers of the others.
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
FEWEST_CLIPS, MOST_DRAWS = 2, 8
CONFIDENCE = 0.95

Row = tuple[int, int, int]
"""(place of the clip, place of the sigma, number of the draw of noise)."""

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Values [N] of each process -> [number of processes, N]."""


@dataclass(frozen=True, slots=True)
class Share:
    """This process's part of the work: of `num_processes`, which all must call `losses` with the same rows."""

    num_processes: int = 1
    process_index: int = 0
    gather: Gather = lambda values_N: values_N[None]

    def of(self, chunks: Sequence[list[Row]]) -> list[list[Row]]:
        """Its chunks, as many as each other process has: those that lack one repeat the first, which does not count.

        Under ZeRO-3 and FSDP2 every process must call the transformer equally often.
        """
        own = list(chunks[self.process_index::self.num_processes])
        return own + list(chunks[:1]) * (math.ceil(len(chunks) / self.num_processes) - len(own))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out clips and the sigmas to measure them at, `size` rows of them in one forward. `sample` gives the tensors
    of a clip by its place; a process asks for those of its share alone.
    """

    clips: Sequence[PlannedClip]
    sigmas: Sequence[float]
    sample: Callable[[int], Sample]
    size: int
    share: Share = field(default_factory=Share)

    def chunks(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows, at most `size` at a time and of clips of one kind; the same in every process."""
        found = []
        for kind in dict.fromkeys(p.kind for p in self.clips):
            own = [row for row in rows if self.clips[row[0]].kind == kind]
            found += [own[first : first + self.size] for first in range(0, len(own), self.size)]
        return found

    def read(self, rows: Sequence[Row]) -> None:
        """Ask for all that `losses` of these rows will need in this process."""
        for place in sorted({place for chunk in self.share.of(self.chunks(rows)) for place, _, _ in chunk}):
            self.sample(place)


@dataclass(frozen=True, slots=True)
class Extent:
    """How many clips are measured, and in how many passes: each pass measures every clip at one more sigma. After as
    many passes as there are sigmas every clip has met all of them, and the next draw of noise begins.
    """

    num_clips: int
    num_sigmas: int
    num_passes: int

    @property
    def rows(self) -> list[Row]:
        """In the order of the passes. Clips begin at sigmas far from each other, so that few passes meet them all."""
        step = math.ceil(self.num_sigmas / self.num_clips)
        return [(place, (place * step + number) % self.num_sigmas, number // self.num_sigmas)
                for number in range(self.num_passes) for place in range(self.num_clips)]


def extent_within(num_clips: int, num_sigmas: int, max_rows: int) -> Extent:
    """The largest extent of at most `max_rows` rows: all clips before more sigmas, all sigmas before more draws.

    No fewer than two clips and one measurement at each sigma, whatever the rows.
    """
    used = min(num_clips, max(FEWEST_CLIPS, max_rows))
    passes = min(max_rows // used, num_sigmas * MOST_DRAWS)
    return Extent(used, num_sigmas, max(passes, math.ceil(num_sigmas / used)))


@torch.no_grad()
def losses(heldout: HeldOut, rows: Sequence[Row], loss_of: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """Loss of every row, float32 [rows], the same in every process.

    `loss_of` gives loss_B of a batch (wantrain.objective.losses of a model). Latent frames that are given clean do not
    count.
    """
    share, chunks = heldout.share, heldout.chunks(rows)
    own = torch.zeros(len(share.of(chunks)), heldout.size)
    for number, chunk in enumerate(share.of(chunks)):
        own[number, :len(chunk)] = loss_of(_batch(heldout, chunk)).cpu()
    gathered = share.gather(own.flatten()).view(share.num_processes, *own.shape)
    found: dict[Row, torch.Tensor] = {}
    for number, chunk in enumerate(chunks):
        round_number, process = divmod(number, share.num_processes)
        found |= dict(zip(chunk, gathered[process, round_number], strict=False))
    return torch.stack([found[row] for row in rows])


def _batch(heldout: HeldOut, rows: Sequence[Row]) -> Batch:
    """Rows of one kind as a batch, with the noise of each."""
    planned = [heldout.clips[place] for place, _, _ in rows]
    samples, sigmas = [heldout.sample(place) for place, _, _ in rows], [heldout.sigmas[s] for _, s, _ in rows]
    noise = torch.stack([noise_of(p, sigma, draw, sample.latents_CTHW.shape)
                         for p, sample, sigma, (_, _, draw) in zip(planned, samples, sigmas, rows, strict=True)])
    return stack(samples, planned, noise, torch.tensor(sigmas), [place for place, _, _ in rows])


def noise_of(planned: PlannedClip, sigma: float, draw: int, shape_CTHW: Sequence[int]) -> torch.Tensor:
    """A draw of the noise of a held-out window at a sigma: a function of its file's content, its place in it, the sigma
    and the draw's number.
    """
    later = [draw] if draw else []  # the first is that of the versions before
    return torch.randn(*shape_CTHW, generator=flow.generator_for(SEED, planned.found.digest, str(planned.start_s),
                                                                 str(sigma), *later))


def by_clip(rows: Sequence[Row], values: torch.Tensor) -> torch.Tensor:
    """The mean of each clip's values, float64 [clips]."""
    places = torch.tensor([place for place, _, _ in rows])
    return torch.stack([values[places == place].double().mean() for place in range(int(places.max()) + 1)])


def by_sigma(rows: Sequence[Row], values: torch.Tensor) -> dict[int, float]:
    """The mean of the values at each sigma, by its place."""
    places = torch.tensor([s for _, s, _ in rows])
    return {s: float(values[places == s].double().mean()) for s in sorted({s for _, s, _ in rows})}


def noise_error(rows: Sequence[Row], values: torch.Tensor) -> float:
    """The standard error that the draws of noise leave in the mean of all values; needs two draws or more of each."""
    cells: dict[tuple[int, int], list[float]] = {}
    for (place, s, _), value in zip(rows, values.tolist(), strict=True):
        cells.setdefault((place, s), []).append(value)
    variance = sum(float(torch.tensor(own, dtype=torch.float64).var()) / len(own) for own in cells.values())
    return math.sqrt(variance) / len(cells)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over clips, and how far on both sides the confidence interval goes; nan where there is one clip alone."""

    mean: float
    half: float

    @property
    def told(self) -> tuple[float, float | None]:
        """As JSON has it: None where it is not known how far it goes."""
        return self.mean, self.half if math.isfinite(self.half) else None


def interval(values_N: torch.Tensor) -> Interval:
    """Student's interval of 95 % for the mean of what the clips are drawn from, of one value a clip."""
    number = len(values_N)
    error = float(values_N.double().std()) / math.sqrt(number) if number > 1 else math.nan
    return Interval(float(values_N.double().mean()), t_quantile(max(1, number - 1)) * error)


def crossed(values_SN: torch.Tensor, num_compared: int = 1) -> Interval:
    """The interval of 95 % for the mean of one value for each seed and clip, where both are drawn from many: two
    crossed random effects, whose degrees of freedom are Satterthwaite's (Clark's quasi-F, 1973; Cornfield & Tukey,
    1956).

    The best of `num_compared` is in its interval as often as one alone would be (Bonferroni). Of one seed, what another
    seed would change is not in it.
    """
    values = values_SN.double()
    num_seeds, num_clips = values.shape
    mean = float(values.mean())
    by_seed, by_clip = values.mean(1), values.mean(0)
    rest_free = (num_seeds - 1) * (num_clips - 1)
    errors = [(_mean_square(by_seed, num_clips), num_seeds - 1), (_mean_square(by_clip, num_seeds), num_clips - 1)]
    if rest_free:
        rest = float((values - by_seed[:, None] - by_clip + mean).square().sum()) / rest_free
        (seeds, _), (clips, _) = errors
        within = seeds**2 / (num_seeds - 1) + clips**2 / (num_clips - 1) + rest**2 / rest_free
        total = seeds + clips - rest
        errors.append((total, max(1, int(total**2 / within)) if within else 1))
    square, num_free = max(errors)
    if num_free < 1:
        return Interval(mean, math.nan)
    error = math.sqrt(square / values.numel())
    return Interval(mean, t_quantile(num_free, 1 - (1 - CONFIDENCE) / num_compared) * error)


def _mean_square(means: torch.Tensor, repeats: int) -> float:
    """Of means of `repeats` values each: what the variance of one value would be; 0 of one mean alone."""
    return repeats * float(means.var()) if len(means) > 1 else 0.0


def difference(one_N: torch.Tensor, other_M: torch.Tensor) -> Interval:
    """The interval for the difference of two means over different clips (Welch's error, the smaller number's t)."""
    errors = [float(values.double().var()) / len(values) if len(values) > 1 else math.nan
              for values in (one_N, other_M)]
    half = t_quantile(max(1, min(len(one_N), len(other_M)) - 1)) * math.sqrt(sum(errors))
    return Interval(float(one_N.double().mean() - other_M.double().mean()), half)


def t_quantile(num_free: int, confidence: float = CONFIDENCE) -> float:
    """Between minus and plus this lies a share `confidence` of Student's t with so many degrees of freedom; bisection
    of the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 1e6
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, num_free) < confidence else (low, middle)
    return (low + high) / 2


def _t_within(t: float, num_free: int) -> float:
    """The share of Student's t between -t and t."""
    angle = math.atan(t / math.sqrt(num_free))
    odd = num_free % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, num_free - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if num_free > 1 else 0.0))
