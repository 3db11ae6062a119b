"""After how many passes over its clips a training knows them by heart: three sizes of data set, on the embedded base.

    python -m benchmarks.memorising --out runs/memorising [--sizes 2 4 8] [--steps-each 60] [--seeds 0]

Trains the demo's cel shading on so many of its clips, each run for as many passes over them, and measures every few
passes the loss of held-out clips over that of trained ones, both as shares of the base's. Time to memorise is the first
step at which that is TWICE, between two measurements by a straight line. It prints that step for each size and
seed, and the passes: where these are equal, the time grows with the number of clips (Bonnaire et al. 2025). The factor
is the passes of the line through 0 that fits all steps best. What is trained there already is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from wantrain import cli
from wantrain.config import asset

TWICE = 2.0
BATCH = 4
NUM_MEASURED = 12
"""Validations of a run."""


def arguments(out: Path, size: int, steps_each: int, *more: str) -> list[str]:
    """The command line of a run on so many clips, of `steps_each` steps a clip, with `more` of the config."""
    run, clips = out / f"{size}_clips", out / "clips" / str(size)
    shutil.rmtree(clips, ignore_errors=True)
    clips.mkdir(parents=True)
    for path in sorted(asset("demo/anime").glob("*.mp4"))[:size]:
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, clips)
    steps = size * steps_each
    return ["recipe=demo_anime", "tracker=none", f"run.dir={run}", f"data.cache_dir={out / 'cache'}",
            f"data.sources.style.path={clips}", "~data.sources.regularisation", "data.num_frames=[5]",
            "data.resolutions=[[32,48]]", f"data.batch_size={BATCH}", f"train.micro_batch_size={BATCH}",
            f"train.num_steps={steps}", f"train.save_every={steps}", f"validation.every_steps={steps // NUM_MEASURED}",
            "validation.budget_pct=20", "sampler.prompts=[]", "sampler.every_steps=0", *more]


def trained(own: Sequence[str]) -> None:
    """Train so."""
    for verb in ("cache", "train"):
        if cli.main([verb, *own]):
            raise SystemExit(f"{verb} failed")


def crossing(steps: Sequence[int], ratios: Sequence[float], threshold: float) -> float | None:
    """The step at which a curve from (0, 1) first passes the threshold; None where it never does."""
    points = [(0.0, 1.0), *zip(map(float, steps), ratios, strict=True)]
    for (before, low), (after, high) in pairwise(points):
        if low < threshold <= high:
            return before + (threshold - low) / (high - low) * (after - before)
    return None


def main() -> None:
    """Train and print."""
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--out", type=Path, required=True)
    given.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    given.add_argument("--steps-each", type=int, default=60)
    given.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = given.parse_args()
    times: list[tuple[int, float]] = []
    for seed, size in itertools.product(options.seeds, options.sizes):
        run = options.out / f"seed_{seed}" / f"{size}_clips"
        trained(arguments(run.parent, size, options.steps_each, f"train.seed={seed}"))
        found = json.loads((run / "judgement.json").read_text())
        of = {name: [loss / found[name]["base"] for loss in found[name]["loss"]] for name in ("heldout", "trained")}
        ratios = [held / own for held, own in zip(of["heldout"], of["trained"], strict=True)]
        print(f"seed {seed}, {size} clips, held out over trained:", *(f"{ratio:.2f}" for ratio in ratios), flush=True)
        step = crossing(found["steps"], ratios, TWICE)
        print(f"  {TWICE:g} at step " + ("- (never)" if step is None else
                                         f"{step:.1f}: {step * BATCH / size:.0f} passes over each clip"), flush=True)
        times += [] if step is None else [(size, step)]
    if times:
        slope = sum(size * step for size, step in times) / sum(size ** 2 for size, _ in times)
        print(f"{slope:.2f} steps a clip over all: {slope * BATCH:.0f} passes")


if __name__ == "__main__":
    main()
