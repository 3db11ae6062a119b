"""python -m tests.fuzz KIND --seconds 600 --seed N: exit code 1 where something was found."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.harness import hunt
from tests.fuzz.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    number, found = hunt(KINDS[args.kind](), args.kind, args.seed, args.seconds)
    for finding in found:
        print(f"--- ({finding.seed}, {finding.number}) {finding.what}")
    print(f"{args.kind}: {number} cases from seed {args.seed}, {len(found)} found")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
