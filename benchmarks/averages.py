"""What an average of the adapter is worth by its mean age, all ages of the same trainings.

    python -m benchmarks.averages --out runs/recipes [--worlds style motion subject] [--steps 96]

Worlds and clips are those of benchmarks.recipes, with seeds of its own, so that the age of `optim.ema` is not chosen by
the trainings that it is then judged by. A training is followed by averages of all ages and measured with each at its
end. Told is the mean loss of held-out clips by age (0: the last values) and learning rate, over the seeds. OUT has each
training in averages.json; what is there is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import patches, recipes
from benchmarks.recipes import LAST, Bench, Kind, World
from tools.tiny_world.worlds import WORLDS
from wantrain import validation
from wantrain.engine.ema import Ema
from wantrain.engine.optimizers import at_average
from wantrain.files import write_json
from wantrain.recipe import heldout
from wantrain.recipe.training import Training
from wantrain.stages import train

AGES = (0.05, 0.1, 0.15, 0.2, 0.3)
LRS = (1e-3, 2e-3, 4e-3)
SEEDS = (50, 51, 52, 53)
NAME = "followed"


@contextlib.contextmanager
def followed(found: dict[str, list[float]]) -> Iterator[None]:
    """In the block, a training is followed by an average of each age. `found` gets, by age, the losses of its held-out
    clips at the end, in their order.
    """
    one_step, measured = train.train_step, heldout.measured
    followers: dict[float, Ema] = {}

    def step(training: Training, number: int, micro_batches: Sequence[Any]) -> dict[str, float]:
        told = one_step(training, number, micro_batches)
        for age in AGES:
            followers.setdefault(age, Ema(training.accelerator, training.model, age)).update(number + 1)
        return told

    def with_each(training: Training, sets: Any, rows: heldout.Rows, with_adapter: bool = True) -> heldout.Losses:
        last = measured(training, sets, rows, with_adapter)
        if with_adapter:
            found["0"] = by_clip(rows, last)
            for age, ema in followers.items():
                with at_average(training.accelerator, training.model, training.optimizer, training.kind, ema):
                    found[f"{age:g}"] = by_clip(rows, measured(training, sets, rows))
        return last

    with mock.patch.object(train, "train_step", step), mock.patch.object(heldout, "measured", with_each):
        yield


def by_clip(rows: heldout.Rows, losses: heldout.Losses) -> list[float]:
    return [round(loss, 6) for loss in
            validation.by_clip(rows[heldout.HELDOUT], torch.tensor(losses[heldout.HELDOUT])).tolist()]


def follow(bench: Bench, name: str) -> dict[str, dict[str, float]]:
    """"LR/SEED" -> by age the mean loss of the world's held-out clips that hold its trigger."""
    path = bench.out / "averages.json"
    found: dict[str, list[float]] = {}
    ours = {NAME: Kind((LAST,), patch=NAME)}
    with mock.patch.dict(patches.PATCHES, {NAME: lambda: followed(found)}), mock.patch.dict(recipes.ARMS, ours):
        world = World(bench, name, {})
        _, clips = world.arm(NAME)
        learnt = [i for i, planned in enumerate(clips.heldout) if WORLDS[name].trigger in planned.clip.caption]
        for seed in SEEDS:
            for lr in LRS:
                known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                own = known.setdefault(name, {})
                if f"{lr:g}/{seed}" not in own:
                    found.clear()
                    world.train(NAME, lr, seed)
                    assert found, f"it was trained and not told: remove {bench.out / name / NAME}"
                    own[f"{lr:g}/{seed}"] = {age: statistics.mean(losses[i] for i in learnt)
                                             for age, losses in found.items()}
                    write_json(path, known)
    return own


def table(name: str, found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Lines of Markdown: a row for each age, a column for each learning rate."""
    yield from (f"| {name}, mean age | {' | '.join(f'{lr:g}' for lr in LRS)} |", f"|---|{'---|' * len(LRS)}")
    for age in ("0", *(f"{age:g}" for age in AGES)):
        means = (statistics.mean(found[f"{lr:g}/{seed}"][age] for seed in SEEDS) for lr in LRS)
        yield f"| {'last values' if age == '0' else age} | {' | '.join(f'{mean:.4f}' for mean in means)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of benchmarks.recipes, or a new one")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=WORLDS)
    parser.add_argument("--steps", type=int, default=96)
    given = parser.parse_args()
    for world in given.worlds:
        found = follow(Bench(given.out, given.steps, len(SEEDS), math.inf), world)
        print("\n".join(("", *table(world, found))), flush=True)


if __name__ == "__main__":
    main()
