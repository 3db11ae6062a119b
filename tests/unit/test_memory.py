"""Decoding for days keeps no memory: every reader, fine files and faulty ones."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
from pathlib import Path

import pytest

from tests import odd_files
from wantrain.data import decode
from wantrain.terms import Bucket, UserError

FILES = ("24 fps.mp4", "25 fps.mkv", "60 fps.mov", "old jpegs.avi",  # decord
         "edit list.mp4", "open gop.ts", "narrow.mp4", "moving.gif",  # PyAV
         "still.png", "turned.jpeg", "clear.webp",  # Pillow
         "cut off.jpg", "notes.mp4", "no index.mp4")  # faults
WARM = 500
MOST_MIB = 6.0
"""A 64x96 frame kept by each call for only one of the files would be 5.6 MiB more after five thousand, and for every
file 18 MiB after fifteen hundred; measured: 2 MiB.
"""

libc = ctypes.CDLL(None)


def resident_mib() -> float:
    """Without what is freed and only kept by the allocator: decord's threads leave that behind in changing amounts."""
    gc.collect()
    libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def read(path: Path) -> None:
    try:
        decode.read_clip(path, 0, None, 16, Bucket(1, 32, 48))
    except UserError:
        assert path.name in odd_files.FAULTY


@pytest.mark.slow
@pytest.mark.parametrize("total", [1500, pytest.param(5000, marks=pytest.mark.long)])
def test_memory_stays_flat_over_thousands_of_decodes(tmp_path, total):
    odd_files.make(tmp_path, FILES)
    after = []
    for number, name in enumerate(itertools.islice(itertools.cycle(FILES), total + 1)):
        if number % WARM == 0:
            after.append(resident_mib())
        read(tmp_path / name)
    print("resident MiB:", *(round(value, 1) for value in after))
    assert after[-1] - after[1] < MOST_MIB
