"""benchmarks/gpu.py without a GPU: the same code at a small size, row by row, and on again where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Row

ROWS = [Row("wan21_t2v_14b", "floor"), Row("wan21_t2v_14b", "wantrain", "attention"),
        Row("wan21_t2v_14b", "wantrain", "inputs", "int8", 20, offload=True), Row("wan22_ti2v_5b", "peft", "inputs")]
SMALL = ["--device", "cpu", "--tiny", "--steps", "1"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_measured_once_and_those_that_are_left_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    out, done = tmp_path / "gpu.jsonl", list[str]()
    own = gpu.measured
    monkeypatch.setattr(gpu, "rows", lambda: iter(ROWS))
    monkeypatch.setattr(gpu, "measured", lambda row, *given: (done.append(row.name), own(row, *given))[1])
    gpu.main([*SMALL, "--out", str(out), "--seconds", "0"])
    assert "4 rows are left" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "rows", lambda: iter(ROWS[:3]))
    gpu.main([*SMALL, "--out", str(out)])
    monkeypatch.setattr(gpu, "rows", lambda: iter(ROWS))
    gpu.main([*SMALL, "--out", str(out)])
    assert done == [one["row"] for one in lines(out)] == [gpu.tiny(row).name for row in ROWS]
    assert [one["tokens"] for one in lines(out)] == [8, 8, 8, 2]
    assert all(one["seconds"] > 0 for one in lines(out))
    floor, spared = lines(out)[0]["seconds"], lines(out)[1]["seconds"]
    assert f" {spared / floor:.3f} |" in capsys.readouterr().out
    gpu.main([*SMALL, "--out", str(out), "--rank", "4", "--seconds", "0"])  # another rank is another table
    assert "4 rows are left" in capsys.readouterr().out


def test_what_does_not_fit_is_a_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(gpu, "rows", lambda: iter(ROWS[:1]))
    monkeypatch.setattr(gpu, "measured", full)
    gpu.main([*SMALL, "--out", str(tmp_path / "gpu.jsonl")])
    assert lines(tmp_path / "gpu.jsonl")[0]["fault"] == "out of memory: CUDA out of memory."


def test_the_table_has_every_row_once_and_is_predicted_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    names = [row.name for row in gpu.rows()]
    assert len(set(names)) == len(names)
    gpu.main(["--predict", "h100"])
    told = capsys.readouterr().out
    assert [name in told for name in names] == [" wantrain " in name for name in names]
    row = next(line for line in told.splitlines() if line.startswith("| wan21_t2v_1b3 81f 480x480 wantrain keep=all"))
    assert " 18,900 | " in row  # 21 latent frames of 30 x 30 patches
    assert row.endswith("| 1.407, 71.9 |")
