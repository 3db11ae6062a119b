"""After how many passes over its clips a training knows them by heart: three sizes of data set, on the embedded base.

    python -m benchmarks.memorising --out runs/memorising [--sizes 2 4 8] [--steps-each 60]

Trains the demo's cel shading on so many of its clips, each run for as many passes over them, and measures every few
passes the loss of held-out clips over that of trained ones, both as shares of the base's. Time to memorise is the first
step at which that is TWICE, between two measurements by a straight line. It prints that step for each size, and the
passes: where these are equal, the time grows with the number of clips (Bonnaire et al. 2025). What is trained there
already is not trained again.
"""

from __future__ import annotations

import argparse
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


def trained(out: Path, size: int, steps_each: int) -> Path:
    """A run on so many clips, of `steps_each` steps a clip; its folder."""
    run, clips = out / f"{size}_clips", out / "clips" / str(size)
    shutil.rmtree(clips, ignore_errors=True)
    clips.mkdir(parents=True)
    for path in sorted(asset("demo/anime").glob("*.mp4"))[:size]:
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, clips)
    steps = size * steps_each
    own = ["recipe=demo_anime", "tracker=none", f"run.dir={run}", f"data.cache_dir={out / 'cache'}",
           f"data.sources.style.path={clips}", "~data.sources.regularisation", "data.num_frames=[5]",
           "data.resolutions=[[32,48]]", f"data.batch_size={BATCH}", f"train.micro_batch_size={BATCH}",
           f"train.num_steps={steps}", f"train.save_every={steps}", f"validation.every_steps={steps // NUM_MEASURED}",
           "validation.budget_pct=20", "sampler.prompts=[]", "sampler.every_steps=0"]
    for verb in ("cache", "train"):
        if cli.main([verb, *own]):
            raise SystemExit(f"{verb} failed")
    return run


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
    options = given.parse_args()
    for size in options.sizes:
        found = json.loads((trained(options.out, size, options.steps_each) / "judgement.json").read_text())
        of = {name: [loss / found[name]["base"] for loss in found[name]["loss"]] for name in ("heldout", "trained")}
        ratios = [held / own for held, own in zip(of["heldout"], of["trained"], strict=True)]
        print(f"{size} clips, held out over trained:", " ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)
        step = crossing(found["steps"], ratios, TWICE)
        print(f"  {TWICE:g} at step " + ("- (never)" if step is None else
                                         f"{step:.1f}: {step * BATCH / size:.0f} passes over each clip"), flush=True)


if __name__ == "__main__":
    main()
