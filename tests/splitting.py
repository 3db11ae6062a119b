"""Films of the demo, and their cutting as the tests of it ask for it."""

import json
from pathlib import Path

from data_tools import shots, split

RULES = shots.Rules(threshold=3.0, min_s=0.1, max_s=100.0, drop_static=None)
DEMO = sorted((Path(__file__).parents[1] / "wantrain/assets/demo/footage").glob("0*.mp4"))


def run(paths, out, rules=RULES, cut_to=None):
    return split.run(paths, out, rules, cut_to, jobs=1, timeout_s=60)[0]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
