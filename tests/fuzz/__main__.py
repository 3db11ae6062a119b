"""`python -m tests.fuzz KIND [--seconds 600] [--seed 0]`: mutated inputs of a kind until the time is up.

Each case has a seed; one that fails is named, and repeated by `--seed N --seconds 0`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import resource
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

KINDS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if not path.stem.startswith("test_"))
MEMORY_BYTES = 12 << 30
SLOW_S = 30.0


def run(kind: str, seconds: float, seed: int) -> list[str]:
    """The faults found from `seed` on, at least one case, each with the seed that repeats it."""
    one = importlib.import_module(f"tests.fuzz.{kind}").one
    faults: list[str] = []
    number, end = 0, time.monotonic() + seconds
    while number == 0 or time.monotonic() < end:
        began, shown = time.monotonic(), io.StringIO()
        with ThreadPoolExecutor(1) as pool, tempfile.TemporaryDirectory() as folder, \
                contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            fault = pool.submit(one, Random(seed + number), Path(folder)).exception()
        if fault is not None:
            faults.append(f"{kind} --seed {seed + number}:\n{''.join(traceback.format_exception(fault))}")
        if (took_s := time.monotonic() - began) > SLOW_S:
            faults.append(f"{kind} --seed {seed + number}: took {took_s:.0f} s")
        number += 1
    print(f"{kind}: {number} cases from seed {seed}, {len(faults)} faults")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for fault in run(given.kind, given.seconds, given.seed):
        print(fault)


if __name__ == "__main__":
    main()
