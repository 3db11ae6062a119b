"""What the way of the data costs beyond the model: ratios in one run, on the embedded base.

    python -m benchmarks.data [--rounds 3] [--clips 12]

Encoding: `wantrain cache`'s loop (decode in 1 and in 2 worker processes, encode, write), from the moment when the first
clip comes back (what workers import is not counted), against the time that it spends in the VAE: at 1.00 decoding and
writing cost nothing. Beside it, decoding in this process. Reading (reference 1.00): a training step of the embedded
base. Against it: its batch from the cache. Then an entry as large as a real one (81 frames of 480p) from the warm
cache, its checksum, and the frames of such a clip through a worker's pipe. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.step import timed
from tests import odd_files
from tests.conftest import opened
from wantrain import cli
from wantrain.data import decode
from wantrain.data.cache import LATENTS
from wantrain.jobs import in_workers
from wantrain.recipe.clips import Clips
from wantrain.recipe.samples import Cached, Encoder
from wantrain.recipe.training import prepare
from wantrain.stages import train
from wantrain.tensors import digest_tensors
from wantrain.terms import WINDOW

REAL_LATENTS_CTHW = (16, 21, 60, 104)
REAL_FRAMES_FCHW = (81, 3, 480, 832)


def real_frames(number: int) -> np.ndarray:
    """What a worker sends for a clip of 480p."""
    return np.full(REAL_FRAMES_FCHW, number % 256, np.uint8)


def encode_loop(clips: Clips, encoder: Encoder, jobs: int) -> float:
    """How long `wantrain cache` takes to decode, encode and write every window but the first, of its time in the VAE.

    A ratio within one loop, because the speed drifts from one to the next.
    """
    began = encoding_s = 0.0
    wanted = [(planned, (WINDOW,)) for planned in clips.planned]
    for (planned, _), result, why in in_workers(decode.frames_in_worker, wanted, jobs, 300):
        if result is None or not result[0]:
            raise SystemExit(why or "a clip does not decode")
        before = time.perf_counter()
        entry = encoder.encode(LATENTS, planned, {WINDOW: torch.from_numpy(result[0][WINDOW])})
        encoding_s += (time.perf_counter() - before) * bool(began)
        clips.cache.write((LATENTS, planned), entry)
        began = began or time.perf_counter()
    return (time.perf_counter() - began) / encoding_s


def decode_alone(clips: Clips, encoder: Encoder) -> float:
    """The same with no worker."""
    began, encoding_s = time.perf_counter(), 0.0
    for planned in clips.planned[1:]:
        frames = {WINDOW: decode.read_window(planned)}
        encoding_s += timed(lambda planned=planned, frames=frames: encoder.encode(LATENTS, planned, frames))
    return (time.perf_counter() - began) / encoding_s


def pipe_s(number: int) -> float:
    """Seconds a clip for frames of 480p to come from one worker, which only fills them."""
    results = in_workers(real_frames, range(number + 2), 1, 300)
    next(results)  # imports
    began = time.perf_counter()
    for _ in range(number):
        next(results)
    return (time.perf_counter() - began) / number


def write_recipe(folder: Path, num_clips: int) -> list[str]:
    """Overrides of a recipe over films of 17 frames of 128x192 px."""
    (folder / "clips").mkdir(parents=True)
    for i in range(num_clips):
        odd_files.write_film(folder / "clips" / f"{i}.mp4", odd_files.frames(i, 17, 256, 384), 16, crf="20")
        (folder / "clips" / f"{i}.txt").write_text(f"square {i % 4}")
    return ["recipe=demo_anime", "tracker=none", f"run.dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}",
            f"data.sources.style.path={folder / 'clips'}", "~data.sources.regularisation", "data.heldout=null",
            "validation.every_steps=0", "data.num_frames=[17]", "data.resolutions=[[128,192]]"]


def medians(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each, all of them in turn; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            value = call()
            if number:
                times[name].append(value)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=12)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    arguments = write_recipe(folder, given.clips)
    if cli.main(["cache", *arguments]) != 0:
        raise SystemExit(1)
    recipe, clips = opened(arguments)
    encoder = Encoder(recipe, clips.cache, torch.device("cpu"))
    for name, ratio in medians({
        "the cache's loop, 1 worker": lambda: encode_loop(clips, encoder, 1),
        "the cache's loop, 2 workers": lambda: encode_loop(clips, encoder, 2),
        "decoding in this process, without writing": lambda: decode_alone(clips, encoder),
    }, given.rounds).items():
        print(f"{ratio:7.3f}  {name}")

    training = prepare(recipe, clips)
    make = train.batch_maker(training, Cached(clips), 0)
    batch, = make(0)
    real = torch.randn(REAL_LATENTS_CTHW)
    large = dataclasses.replace(clips.planned[0], start_s=99.0)
    recipe.cache.write((LATENTS, large), {"x": real})
    found = medians({
        "a training step (reference)": lambda: timed(lambda: train.train_step(training, 0, [batch])),
        "its batch from the cache": lambda: timed(lambda: make(0)),
        f"an entry of {real.nbytes / 2**20:.1f} MiB": lambda: timed(lambda: recipe.cache.read((LATENTS, large))),
        "its checksum": lambda: timed(lambda: digest_tensors({"x": real})),
        "81x3x480x832 frames from a worker": lambda: pipe_s(5),
    }, given.rounds)
    for name, seconds in found.items():
        print(f"{seconds / found['a training step (reference)']:7.3f}  {seconds * 1e3:9.2f} ms  {name}")
    entry_s = next(seconds for name, seconds in found.items() if name.startswith("an entry"))
    print(f"an entry reads at {real.nbytes / entry_s / 1e9:.2f} GB/s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
