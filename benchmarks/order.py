"""What the order of clips costs: the first batch at any step, and each one after it.

    python -m benchmarks.order [--windows 10000 1000000] [--steps 0 100000]

Windows in 12 buckets, some of a source of 0.3 repeats; batches of 4. `made`: milliseconds to make the order, once a
training; `first`: to the first batch, a permutation of its bucket included; `each`: the mean of the 1,000 steps after
it, in which further buckets get theirs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

from wantrain.data.batches import Order
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip

BUCKETS = [Bucket(frames, 16 * height, 16 * width) for frames in (17, 49, 81)
           for height, width in ((20, 36), (36, 20), (28, 28), (24, 32))]
NUM_STEPS = 1000


def windows(number: int) -> list[PlannedClip]:
    """So many windows, dealt to the buckets unevenly; every third is of a source of 0.3 repeats."""
    found = MediaInfo("digest", 9.0)
    sources = [Clip("clip", Path("x"), "caption", "s", repeats) for repeats in (1.0, 1.0, 0.3)]
    return [PlannedClip(sources[i % 3], BUCKETS[i * i % 13 % len(BUCKETS)], found, 16.0) for i in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100_000])
    options = parser.parse_args()
    sys.stdout.write(f"{'windows':>9} {'step':>7} {'made ms':>8} {'first ms':>9} {'each ms':>8}\n")
    for number in options.windows:
        planned = windows(number)
        for step in options.steps:
            times = [time.perf_counter()]
            order = Order(planned, 4, seed=0)
            times.append(time.perf_counter())
            order.samples(step)
            times.append(time.perf_counter())
            for following in range(step + 1, step + 1 + NUM_STEPS):
                order.samples(following)
            times.append(time.perf_counter())
            made, first, rest = (1000 * (b - a) for a, b in itertools.pairwise(times))
            sys.stdout.write(f"{number:9} {step:7} {made:8.1f} {first:9.2f} {rest / NUM_STEPS:8.3f}\n")


if __name__ == "__main__":
    main()
