"""Twenty steps of loss and gradient norm, as they were when last looked at.

Regenerate after a change that is meant to change them: `python -m tests.golden.test_golden`.
The numbers depend on the embedded base, whose digest is stored with them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import arguments_for, write_clips
from wantrain import cli
from wantrain.files import digest_folder
from wantrain.models import base

GOLDEN = Path(__file__).with_name("golden.json")


def run(folder: Path) -> dict[str, object]:
    """Train twenty steps on clips made here."""
    for name, number, seed in (("style", 6, 0), ("plain", 2, 50), ("heldout", 2, 100)):
        write_clips(folder / name, number, f"{name} square {{}}", seed)
    arguments = [*arguments_for(folder, folder / "cache", folder / "run"), "train.num_steps=20"]
    for verb in ("cache", "train"):
        if cli.main([verb, *arguments]) != 0:
            raise RuntimeError(f"{verb} failed")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"base": digest_folder(base.EMBEDDED), "loss": [line["loss"] for line in lines],
            "grad_norm": [line["grad_norm"] for line in lines]}


def test_twenty_steps_are_as_they_were(tmp_path):
    golden, now = json.loads(GOLDEN.read_text()), run(tmp_path)
    assert now["base"] == golden["base"], "another embedded base: regenerate the golden numbers"
    assert len(now["loss"]) == 20
    assert now["loss"] == pytest.approx(golden["loss"], rel=1e-5)
    assert now["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(run(Path(folder)), indent=1) + "\n")
    sys.stdout.write(f"wrote {GOLDEN}\n")
