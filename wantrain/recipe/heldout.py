"""What a training measures of itself: held-out clips and as many of its own, against the frozen base and its best.

The base is measured once, and all measurements are kept, in RUN/validation.json; so a resumed run compares with the
same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from wantrain import config as schema
from wantrain import lora, objective, validation
from wantrain.files import digest_text, write_json
from wantrain.recipe import drifting
from wantrain.recipe.drifting import Drift, Squares, open_drift
from wantrain.recipe.samples import Encode, samples_of
from wantrain.recipe.training import Training
from wantrain.terms import Batch, PlannedClip
from wantrain.validation import Extent, HeldOut, Share

HELDOUT, TRAINED = "heldout", "trained"
NAME = "validation.json"

PRECISION = 0.005
"""Draws of noise are added until they leave the base's mean loss no more than this share of it as standard error."""

FORWARDS = 2
"""What a training sample costs at the least, in forward passes: one, and the gradient of its activations."""

Losses = dict[str, list[float]]
"""Of every row, by set (HELDOUT, TRAINED)."""

Rows = Mapping[str, Sequence[validation.Row]]
"""What is measured, by set."""


def rows_of(extent: Extent, sets: Mapping[str, HeldOut]) -> Rows:
    """The rows of an extent of held-out clips, and of other sets about as many, where those have fewer clips."""
    return {name: extent.rows if name == HELDOUT else
            validation.extent_within(len(own.clips), extent.num_sigmas, len(extent.rows)).rows
            for name, own in sets.items()}


def spread(windows: Sequence[PlannedClip], number: int) -> list[PlannedClip]:
    """So many of the windows, evenly over the list."""
    return [windows[i * len(windows) // number] for i in range(min(number, len(windows)))]


def max_rows(config: schema.Config) -> int:
    """The rows of one set that a validation may measure: validation.budget_pct of the run's forward passes, dealt to
    all validations, that of the base included, to both sets, and as much to drift.
    """
    own, num_steps = config.validation, config.train.num_steps
    forwards = FORWARDS * config.data.batch_size * num_steps * own.budget_pct / 100
    times = 1 + math.ceil(num_steps / own.every_steps)
    return int(forwards / (2 * times + (times + 1 if own.unrelated else 0)))  # drift asks the base twice


def budget_of(num_rows: int, batch_size: int, num_steps: int) -> float:
    """The validation.budget_pct with which a training that is measured at its end alone measures so many rows a set."""
    return (num_rows + 0.5) * 2 * 2 * 100 / (FORWARDS * batch_size * num_steps)


@dataclass(slots=True)
class Validation:
    """The sets of clips of one training, how much of them is measured, and what was: of the base, and after steps;
    `moved` is what `drift` measured after steps. `key` stands for the clips, sigmas and budget that the numbers belong
    to.
    """

    training: Training
    key: str
    sets: Mapping[str, HeldOut]
    extent: Extent
    base: Losses
    steps: dict[int, Losses]
    moved: dict[int, Squares] = field(default_factory=dict)
    drift: Drift | None = None

    @property
    def rows(self) -> Rows:
        return rows_of(self.extent, self.sets)

    def numbers(self, step: int) -> dict[str, float]:
        """Measure now, after `step`, and say it in numbers; every process must call it."""
        began = time.perf_counter()
        with self.training.at_average():
            now = measured(self.training, self.sets, self.rows)
            if self.drift is not None:
                self.moved[step] = self.drift.measure()
        earlier = [losses for of, losses in self.steps.items() if of < step]
        self.steps[step] = now
        keep(self)
        found = drift_in(self.drift, self.moved[step]) if self.drift else {}
        found |= compared(self.rows, now, self.base, earlier)
        at_sigma = validation.by_sigma(self.extent.rows, torch.tensor(now[HELDOUT]))
        base_at_sigma = validation.by_sigma(self.extent.rows, torch.tensor(self.base[HELDOUT]))
        for place, loss in at_sigma.items():
            sigma = self.sets[HELDOUT].sigmas[place]
            found |= {f"validation_sigma_{sigma:.4f}": loss,
                      f"validation_sigma_{sigma:.4f}_minus_base": loss - base_at_sigma[place]}
        return dict(sorted((found | {"validation_s": time.perf_counter() - began}).items()))


def drift_in(drift: Drift, moved: Squares) -> dict[str, float]:
    """The numbers of drift, of all sigmas and of each."""
    by_sigma, mean = drifting.shares(moved, drift.scale)
    return {"validation_drift": mean} | {f"validation_drift_sigma_{sigma:.4f}": own
                                         for sigma, own in zip(drift.sigmas, by_sigma, strict=True)}


def compared(rows: Rows, now: Losses, base: Losses, earlier: Sequence[Losses]) -> dict[str, float]:
    """The means of all rows, and paired intervals over clips: of the adapter against the base, and against the best
    of the `earlier` measurements; the gap is how much more it gained on what it is trained on.
    """
    def means(losses: Losses, name: str) -> torch.Tensor:
        return validation.by_clip(rows[name], torch.tensor(losses[name], dtype=torch.float64))

    found = {"validation_loss": float(means(now, HELDOUT).mean()),
             "validation_base": float(means(base, HELDOUT).mean())}

    def add(name: str, told: validation.Interval) -> None:
        found.update({name: told.mean, f"{name}_ci95": told.half})

    changes = {name: means(now, name) - means(base, name) for name in now}
    add("validation_minus_base", validation.interval(changes[HELDOUT]))
    if earlier:
        best = min((means(losses, HELDOUT) for losses in earlier), key=lambda values: float(values.mean()))
        add("validation_minus_best", validation.interval(means(now, HELDOUT) - best))
    if TRAINED in now:
        found["validation_trained_loss"] = float(means(now, TRAINED).mean())
        add("validation_trained_minus_base", validation.interval(changes[TRAINED]))
        add("validation_gap", validation.difference(changes[HELDOUT], changes[TRAINED]))
    return found


def measured(training: Training, sets: Mapping[str, HeldOut], rows: Rows, with_adapter: bool = True) -> Losses:
    """The plain squared error of these rows, whatever is trained on; of the frozen base without adapter."""
    unwrapped = training.accelerator.unwrap_model(training.model)

    def loss_of(batch: Batch) -> torch.Tensor:
        return objective.losses(training.model if with_adapter else unwrapped, batch, objective.Objective(),
                                device=training.device, dtype=training.recipe.dtype)

    with contextlib.nullcontext() if with_adapter else lora.switched_off(unwrapped):
        return {name: validation.losses(sets[name], own, loss_of).tolist() for name, own in rows.items()}


def open_validation(training: Training, source: Encode) -> Validation | None:
    """Ready to measure, with the base's numbers: those kept by an earlier part of the run, or measured now. None where
    nothing is to be validated.

    What this process needs of the clips is read at once: a fault in a later step would keep the others waiting.
    """
    config, clips, accelerator = training.config, training.clips, training.accelerator
    if not config.validation.every_steps or not clips.heldout:
        return None
    sigmas = training.recipe.validation_sigmas
    extent = validation.extent_within(len(clips.heldout), len(sigmas), max_rows(config))
    windows = {HELDOUT: spread(clips.heldout, extent.num_clips),
               TRAINED: spread([p for p in clips.planned if not p.clip.preserve], extent.num_clips)}
    if not windows[TRAINED]:
        del windows[TRAINED]
    num_parts = config.train.sequence_parallel
    share = Share(accelerator.num_processes // num_parts, accelerator.process_index // num_parts,
                  lambda values_N: training.rendezvous.gather(values_N)[::num_parts])
    sets = {name: HeldOut(own, sigmas, samples_of(clips, source, own), config.train.micro_batch_size, share)
            for name, own in windows.items()}
    for name, rows in rows_of(extent, sets).items():
        sets[name].read(rows)
    key = digest_text(extent, *sigmas, *config.validation.unrelated,
                      *(f"{name} {p.found.digest} {p.start_s} {p.bucket} {p.clip.caption}"
                        for name, own in windows.items() for p in own),
                      *([training.memory.base] if training.memory.base != "dtype" else []))
    made = kept(training, key, sets, extent) or begun(training, key, sets, extent)
    made.drift = open_drift(training, source, sets[HELDOUT], max_rows(config))
    if accelerator.is_main_process:
        print(f"validation: {made.extent.num_clips} of {len(clips.heldout)} held-out clips"
              + (f" and {len(sets[TRAINED].clips)} of those trained on" if TRAINED in sets else "")
              + f", {len(made.extent.rows)} rows each, over {len(sigmas)} sigmas"
              f"{f', drift with {made.drift.num_captions} captions' if made.drift else ''} "
              f"(validation.budget_pct={config.validation.budget_pct:g})")
    return made


def begun(training: Training, key: str, sets: Mapping[str, HeldOut], most: Extent) -> Validation:
    """The base measured, with one draw of noise after the other until they are enough, or the budget ends."""
    whole = 2 * most.num_sigmas
    choices = range(whole, most.num_passes + 1, most.num_sigmas) if whole <= most.num_passes else [most.num_passes]
    found: list[float] = []
    for passes in choices:
        extent = replace(most, num_passes=passes)
        found += measured(training, sets, {HELDOUT: extent.rows[len(found):]}, with_adapter=False)[HELDOUT]
        values = torch.tensor(found)
        if passes >= whole and validation.noise_error(extent.rows, values) <= PRECISION * float(values.mean()):
            break
    others = {name: rows for name, rows in rows_of(extent, sets).items() if name != HELDOUT}
    base = {HELDOUT: found, **measured(training, sets, others, with_adapter=False)}
    made = Validation(training, key, sets, extent, base, {})
    keep(made)
    return made


def kept(training: Training, key: str, sets: Mapping[str, HeldOut], most: Extent) -> Validation | None:
    """What an earlier part of the run has measured of the same rows, up to where the run goes on; None without that."""
    path, found = training.recipe.run_dir / NAME, None
    if training.accelerator.is_main_process and path.exists():
        with contextlib.suppress(ValueError):  # a file that someone edited: the base can be measured again
            found = json.loads(path.read_text(encoding="utf-8"))
    found = training.rendezvous.first(found)
    if found is None or found.get("key") != key:
        return None
    def until_now(of: dict[str, Any]) -> dict[int, Any]:
        return {int(step): own for step, own in of.items() if int(step) <= training.progress.step}

    return Validation(training, key, sets, replace(most, num_passes=found["passes"]), found["base"],
                      until_now(found["steps"]), moved=until_now(found["moved"]))


def keep(made: Validation) -> None:
    """Write all that was measured, in the first process."""
    if made.training.accelerator.is_main_process:
        write_json(made.training.recipe.run_dir / NAME, {
            "key": made.key, "passes": made.extent.num_passes, "sigmas": list(made.sets[HELDOUT].sigmas),
            "clips": {name: [p.name for p in own.clips] for name, own in made.sets.items()},
            "base": made.base, "steps": made.steps, "moved": made.moved})
