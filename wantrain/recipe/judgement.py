"""RUN/judgement.json: what a training has measured of itself, ready for a page, and which of its steps can be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wantrain import validation
from wantrain.files import write_json
from wantrain.recipe import drifting, live
from wantrain.recipe.heldout import HELDOUT, TRAINED, Losses, Validation
from wantrain.terms import PlannedClip
from wantrain.verdict import Measured, Verdict, memorised_from, verdict

NAME = "judgement.json"


def write(made: Validation) -> Verdict | None:
    """Write it, in the first process, and give the verdict; None where no loss is a number yet."""
    steps = sorted(step for step, losses in made.steps.items()
                   if all(map(math.isfinite, (loss for own in losses.values() for loss in own))))
    if not steps:
        return None
    found, judged = judgement(made, steps)
    if made.training.accelerator.is_main_process:
        write_json(made.training.recipe.run_dir / NAME, found)
    return judged


def judgement(made: Validation, steps: Sequence[int]) -> tuple[dict[str, Any], Verdict]:
    """All that was measured after these steps, and the verdict in it."""
    rows = made.rows

    def by_clip(losses: Losses, name: str) -> torch.Tensor:
        return validation.by_clip(rows[name], torch.tensor(losses[name], dtype=torch.float64))

    base = {name: by_clip(made.base, name) for name in made.sets}
    now = {name: [by_clip(made.steps[step], name) for step in steps] for name in made.sets}
    gained = {name: [own - base[name] for own in now[name]] for name in made.sets}
    best = min(now[HELDOUT], key=lambda own: float(own.mean()))
    drift, diversity = drift_of(made, steps), live.diversity_shares(made.training.recipe.run_dir, steps)
    measured = Measured(
        steps, [float(own.mean()) for own in now[HELDOUT]],
        [validation.interval(own - best).told for own in now[HELDOUT]],
        [validation.interval(own).told for own in gained[HELDOUT]],
        [validation.difference(*pair).told for pair in zip(gained[HELDOUT], gained[TRAINED], strict=True)]
        if TRAINED in made.sets else [], drift["mean"] if drift else [], diversity)
    judged = verdict(measured, expected_memorising(made))

    def of_set(name: str) -> dict[str, Any]:
        return {"loss": [float(own.mean()) for own in now[name]], "base": float(base[name].mean()),
                "minus_base": [validation.interval(own).told for own in gained[name]]}

    return {"steps": steps, "heldout": of_set(HELDOUT), "trained": of_set(TRAINED) if TRAINED in made.sets else None,
            "gap": measured.gap, "by_sigma": by_sigma(made, steps), "drift": drift, "diversity": diversity,
            "clips": [of_clip(planned, name, float(base[name][place]), [float(own[place]) for own in now[name]])
                      for name, own_set in made.sets.items() for place, planned in enumerate(own_set.clips)],
            "verdict": {"best": judged.best, "from": judged.first, "to": judged.last,
                        "memorised_from": judged.memorised_from, "sentences": judged.sentences}}, judged


def expected_memorising(made: Validation) -> int:
    """The step from which the clips are expected to be known by heart; those that are preserved are not learnt."""
    clips = made.training.clips
    learnt = [p for p in clips.planned if not p.clip.preserve]
    share = sum(p.clip.repeats for p in learnt) / sum(p.clip.repeats for p in clips.planned)
    return memorised_from(len(learnt), share * made.training.config.data.batch_size)


def by_sigma(made: Validation, steps: Sequence[int]) -> dict[str, Any]:
    """The held-out losses at each sigma."""
    def at(losses: Losses) -> dict[int, float]:
        return validation.by_sigma(made.extent.rows, torch.tensor(losses[HELDOUT]))

    base, now = at(made.base), [at(made.steps[step]) for step in steps]
    return {f"{made.sets[HELDOUT].sigmas[place]:.4f}": {"base": value, "loss": [own[place] for own in now]}
            for place, value in base.items()}


def drift_of(made: Validation, steps: Sequence[int]) -> dict[str, Any] | None:
    """Drift at each sigma and over all."""
    if made.drift is None:
        return None
    found = [drifting.shares(made.moved[step], made.drift.scale) for step in steps]
    return {"by_sigma": {f"{sigma:.4f}": [own[place] for own, _ in found]
                         for place, sigma in enumerate(made.drift.sigmas)}, "mean": [mean for _, mean in found]}


def of_clip(planned: PlannedClip, name: str, base: float, losses: list[float]) -> dict[str, Any]:
    """One clip, and the span of its file that the model sees."""
    path, length_s = planned.clip.path, planned.bucket.num_frames / planned.fps
    return {"name": planned.name, "file": str(path.absolute() if isinstance(path, Path) else path),
            "start_s": planned.start_s, "end_s": planned.start_s + length_s if planned.found.duration_s else None,
            "set": name, "base": base, "loss": losses}
