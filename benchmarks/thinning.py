"""What a training step takes when half of the tokens are left out: `python -m benchmarks.thinning --out runs/recipes`.

CPU seconds of single steps on the style of benchmarks.recipes, with and without in turn, so that others on the machine
disturb both alike; the ratio of the medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

from benchmarks.patches import PATCHES
from benchmarks.recipes import DEFAULT, Bench, World
from wantrain.recipe.samples import Cached
from wantrain.recipe.training import prepare
from wantrain.stages.train import batch_maker, train_step

UNCOUNTED = 3


def step_seconds(out: Path, num_rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step, by patch."""
    recipe, clips = World(Bench(out, num_rounds, 1, math.inf), "style", {}).arm(DEFAULT)
    training = prepare(recipe, clips)
    make = batch_maker(training, Cached(clips), 0)
    found: dict[str, list[float]] = {"": [], "thinned": []}
    for step in range(num_rounds):
        micro_batches = make(step)
        for name, own in found.items():
            with PATCHES[name]():
                began = time.process_time()
                train_step(training, step, micro_batches)
                own.append(time.process_time() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of benchmarks.recipes, with its world of style")
    parser.add_argument("--rounds", type=int, default=23)
    given = parser.parse_args()
    found = step_seconds(given.out, given.rounds)
    whole, thin = (statistics.median(found[name][UNCOUNTED:]) for name in ("", "thinned"))
    print(f"whole {whole:.3f} s, thinned {thin:.3f} s, ratio {thin / whole:.2f}, of {given.rounds - UNCOUNTED} steps")


if __name__ == "__main__":
    main()
