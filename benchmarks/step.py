"""What a training step costs beyond the model: ratios in one run, on the embedded base.

    python -m benchmarks.step [--steps 12] [--batch 8]

Reference (1.00): forward and backward of the adapted transformer on tensors at hand, nothing else. Against it: the
whole `train_step` with drawing, clipping and AdamW; the same with activation checkpointing and with each kind of
adapter; and reading a batch from the cache. Rounds are interleaved and medians compared, because the speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.conftest import opened, write_clips
from wantrain import cli, flow
from wantrain.lora import KINDS
from wantrain.models.encode import predict_velocity
from wantrain.recipe.samples import Cached
from wantrain.recipe.training import Training, prepare
from wantrain.stages import train
from wantrain.terms import Batch


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare(training: Training, batch: Batch) -> None:
    """Forward and backward on the batch's own latents as noisy input."""
    training.model.disable_gradient_checkpointing()
    sigma_B = torch.full((len(batch.ids),), 0.5)
    predicted = predict_velocity(training.model, batch.latents_BCTHW, sigma_B, batch.text_BLD)
    flow.loss_per_sample(predicted, batch.latents_BCTHW).mean().backward()
    training.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="rounds")
    parser.add_argument("--batch", type=int, default=8, help="samples in a step")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    for name in ("style", "plain", "heldout"):
        write_clips(folder / name, 4, "a square {}")
    arguments = ["recipe=demo_anime", "tracker=none", f"run.dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}",
                 f"data.sources.style.path={folder / 'style'}", f"data.heldout={folder / 'heldout'}",
                 f"data.sources.regularisation.path={folder / 'plain'}", f"data.batch_size={given.batch}",
                 f"train.micro_batch_size={given.batch}"]
    if cli.main(["cache", *arguments]) != 0:
        raise SystemExit(1)
    training = prepare(*opened(arguments))
    make = train.batch_maker(training, Cached(training.recipe), 0)
    batch, = make(0)

    def step(checkpointing: bool) -> None:
        (training.model.enable_gradient_checkpointing if checkpointing
         else training.model.disable_gradient_checkpointing)()
        train.train_step(training, 0, [batch])

    work: dict[str, Callable[[], object]] = {
        "forward and backward (reference)": lambda: bare(training, batch),
        "train_step": lambda: step(False),
        "train_step, activation checkpointing": lambda: step(True),
        "a batch from the cache": lambda: make(0),
    }
    for kind in KINDS:
        other = prepare(*opened([*arguments, f"lora.kind={kind}"]))
        work[f"train_step, lora.kind={kind}"] = partial(train.train_step, other, 0, [batch])
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(given.steps + 1):
        for name, call in work.items():
            seconds = timed(call)
            if round_number:
                times[name].append(seconds)
    reference = statistics.median(times["forward and backward (reference)"])
    for name, found in times.items():
        print(f"{statistics.median(found) / reference:7.3f}  {name}")


if __name__ == "__main__":
    main()
