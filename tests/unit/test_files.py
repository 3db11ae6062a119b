"""Writing: whole or not at all, readable by others, one tensor in memory at a time."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wantrain import files
from wantrain.tensors import stream_tensors, write_tensors
from wantrain.terms import UserError

TENSORS = {"b.weight": torch.randn(3, 5), "a": torch.randn(2, 1, 7), "scalar": torch.randn(())}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_tensors_are_read_by_the_library(dtype, tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    stream_tensors(path, SHAPES, dtype, iter(TENSORS.values()), {"key": "é"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor.to(dtype)) for name, tensor in TENSORS.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "key": "é"}


def test_a_write_that_reads_back_otherwise_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    real = files.hashlib.blake2b
    seen = iter(range(100))
    monkeypatch.setattr(files.hashlib, "blake2b", lambda data: real(bytes(data) + bytes([next(seen)])))
    with pytest.raises(UserError, match="reads back differently"):
        stream_tensors(path, SHAPES, torch.float32, iter(TENSORS.values()), {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "old"


def test_an_interrupted_stream_leaves_nothing(tmp_path):
    def broken():
        yield TENSORS["b.weight"]
        raise UserError("stop", "")

    with pytest.raises(UserError, match="stop"):
        stream_tensors(tmp_path / "x.safetensors", SHAPES, torch.float32, broken(), {})
    assert not list(tmp_path.iterdir())


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "x.safetensors", TENSORS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644
