"""`python -m tests.distributed.engine_table` writes docs/engines.md: what was tested under each engine, by testing it.

Every run is of real processes over gloo, forked (see `forked`), with all of wantrain that a step depends on at once:
accumulation, an average, warm-up and cosine, gradients that are clipped, two learning rates.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import arguments_for, write_style
from tests.distributed.forked import Forker, forking
from tests.tiny_tasks import write_a14b
from wantrain.engine import checkpoint, saved

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
COMMAND = "python -m tests.distributed.engine_table"

STEPS, BATCH = 4, 12
MICRO = {1: 3, 2: 3, 3: 2, 4: 3}
"""Samples of a micro-batch by number of processes; with two, three and one there is accumulation."""
MAX_NORM = 0.01

COMMON = ["model.variant=tiny_wan_a14b", "model.experts=high", f"data.batch_size={BATCH}", f"train.num_steps={STEPS}",
          "train.save_every=1", f"train.keep_checkpoints={STEPS}", f"optim.max_grad_norm={MAX_NORM}",
          "optim.warmup_steps=2"]
RATES = ["optim.lora_plus=16", "optim.lr_factors={attn: 0.5}"]
AVERAGED = ["optim.ema=0.3", "optim.schedule=cosine", "validation.every_steps=2"]
OPTIMIZERS: dict[str, list[str]] = {
    "adamw": [*RATES, *AVERAGED],
    "adamw_8bit": ["optim.name=adamw_8bit", *RATES, *AVERAGED, "lora.rank=48"],
    "prodigy": ["optim.name=prodigy", "optim.lr=1", *AVERAGED],
    "schedule_free": ["optim.name=schedule_free", *RATES, "validation.every_steps=1"],
}
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


@dataclass(frozen=True)
class Row:
    """One line of the table: an engine with an optimizer, and how closely it must agree where sums are ordered anew."""

    engine: str
    optimizer: str = "adamw"
    tolerance: float = 2e-5
    refused: bool = False
    in_full: bool = False
    """Whether all columns are tested; the other rows leave out what only the engine decides."""

    def __str__(self) -> str:
        return f"{self.engine} {self.optimizer}"


ROWS = [
    Row("DDP", in_full=True), Row("DDP", "adamw_8bit"), Row("DDP", "prodigy"), Row("DDP", "schedule_free"),
    Row("ZeRO-1", in_full=True), Row("ZeRO-1", "adamw_8bit", refused=True), Row("ZeRO-1", "prodigy", refused=True),
    Row("ZeRO-1", "schedule_free"),
    Row("ZeRO-2", in_full=True), Row("ZeRO-2", "adamw_8bit", refused=True), Row("ZeRO-2", "prodigy", refused=True),
    Row("ZeRO-2", "schedule_free"),
    Row("ZeRO-3", tolerance=2e-4, in_full=True), Row("ZeRO-3", "adamw_8bit", refused=True),
    Row("ZeRO-3", "prodigy", refused=True), Row("ZeRO-3", "schedule_free", refused=True),
    Row("ZeRO-3 offload", tolerance=2e-4), Row("ZeRO-3 offload", "adamw_8bit", refused=True),
    Row("ZeRO-3 offload", "prodigy", refused=True), Row("ZeRO-3 offload", "schedule_free", refused=True),
    Row("FSDP2", in_full=True), Row("FSDP2", "adamw_8bit", refused=True), Row("FSDP2", "prodigy", refused=True),
    Row("FSDP2", "schedule_free", refused=True),
]


# Runs and what they are compared by


class Bench:
    """A folder of clips, a base, a cache of both, and the runs over them."""

    def __init__(self, forker: Forker, root: Path) -> None:
        self.forker, self.root = forker, root
        write_style(root / "clips")
        (root / "base").mkdir()
        write_a14b(root / "base")
        self._run("cache", root / "cached", [], 1, None)

    def _run(self, verb: str, run: Path, overrides: Sequence[str], num_processes: int, engine: str | None) -> None:
        self.forker.run([verb, *self.arguments(run, overrides, num_processes)], run.with_suffix(".log"),
                        num_processes, engine)

    def arguments(self, run: Path, overrides: Sequence[str], num_processes: int) -> list[str]:
        return [*arguments_for(self.root / "clips", self.root / "cache", run), f"model.path={self.root / 'base'}",
                *COMMON, f"train.micro_batch_size={MICRO[num_processes]}", *overrides]

    def train(self, row: Row, num_processes: int = 2, *, engine: str | None = "", start: Path | None = None,
              step: int = 0, more: Sequence[str] = ()) -> Path:
        """The run folder of a whole training, or of one that goes on after step `step` of the run `start`."""
        run = self.root / f"run_{len(list(self.root.glob('run_*.log')))}"
        if start is not None:
            shutil.copytree(start, run)
            for path in checkpoints_of(run)[step:]:
                shutil.rmtree(path)
        self._run("train", run, [*OPTIMIZERS[row.optimizer], *more], num_processes,
                  row.engine if engine == "" else engine)
        began = json.loads((run / "high" / "run.json").read_text())["start_step"]
        assert began == step, f"{run} went on from step {began}, not {step}"
        return run


def checkpoints_of(run: Path) -> list[Path]:
    return saved.steps_on_disk(run / "high" / "checkpoints")


def final(run: Path) -> dict[str, torch.Tensor]:
    progress, tensors = checkpoint.load(checkpoints_of(run)[-1], None)
    assert progress.step == STEPS
    return tensors


def numbers(run: Path, key: str) -> torch.Tensor:
    lines = (run / "high" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([json.loads(line)[key] for line in lines], dtype=torch.float64)


def are_same(one: Path, two: Path) -> bool:
    """Whether losses, gradient norms and all that the next step would depend on are equal to the bit."""
    a, b = final(one), final(two)
    return (all(torch.equal(numbers(one, key), numbers(two, key)) for key in ("loss", "grad_norm"))
            and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a))


def agree(one: Path, two: Path, tolerance: float) -> bool:
    """Whether losses and gradient norms agree to `tolerance`, and the first moments, where there are any, to a hundred
    times that of each tensor's largest: these are sums of gradients (values are not: Adam divides by them).
    """
    a, b = final(one), final(two)
    assert a.keys() == b.keys()
    return (all(torch.allclose(numbers(one, key), numbers(two, key), rtol=tolerance, atol=0)
                for key in ("loss", "grad_norm"))
            and all(float((a[name] - b[name]).abs().max()) <= 100 * tolerance * float(a[name].abs().max()) + 1e-9
                    for name in a if name.endswith("|exp_avg")))


def check_that_all_is_in_play(run: Path) -> None:
    """The settings do what they are there for: gradients are clipped, the average is one, rates differ by step."""
    assert float(numbers(run, "grad_norm").min()) > MAX_NORM
    assert len(set(numbers(run, "lr").tolist())) >= 2
    tensors = final(run)
    kept = {name.rpartition("|")[2] for name in tensors}
    assert {"value", "y"} < kept
    assert any(not torch.equal(tensor, tensors[name.replace("|y", "|value")])
               for name, tensor in tensors.items() if name.endswith("|y"))


# The table


def resumed(bench: Bench, row: Row, whole: Path) -> str:
    """N steps against k, stop, N - k, for every k."""
    return bitwise(whole, (bench.train(row, start=whole, step=k) for k in range(1, STEPS)))


def streamed(bench: Bench, row: Row, whole: Path) -> str:
    """The same for one k, with worker processes that decode in place of the cache."""
    return bitwise(whole, [bench.train(row, start=whole, step=2, more=["data.mode=stream", "data.num_workers=1"])])


def in_processes(bench: Bench, row: Row, whole: Path) -> str:
    """One and four processes of the engine against two."""
    return near(whole, (bench.train(row, num) for num in (1, 4)), row.tolerance)


def as_alone(bench: Bench, row: Row, whole: Path) -> str:
    """Against one process that no launcher started."""
    return near(bench.train(row, 1, engine=None), [whole], row.tolerance)


def moved(bench: Bench, row: Row, whole: Path) -> str:
    """Half by two processes, half by one, three and four."""
    return near(whole, (bench.train(row, num, start=whole, step=2) for num in (1, 3, 4)), row.tolerance)


def bitwise(whole: Path, others: Iterable[Path]) -> str:
    return "bitwise" if all([are_same(whole, other) for other in others]) else "NOT bitwise"


def near(whole: Path, others: Iterable[Path], tolerance: float) -> str:
    said = f"to {tolerance:.0e}".replace("e-0", "e-")
    return said if all([agree(whole, other, tolerance) for other in others]) else f"NOT {said}"


COLUMNS: dict[str, Callable[[Bench, Row, Path], str]] = {
    "N = k + resume + (N - k)": resumed, "the same, streamed": streamed, "as without launcher": as_alone,
    "1 = 2 = 4 processes": in_processes, "2 → 1, 3, 4 processes": moved,
}
BRIEFLY = (resumed, as_alone)
"""What is tested of the rows that are not `in_full`."""


def find(bench: Bench, row: Row) -> list[str]:
    """The row's cells."""
    if row.refused:
        try:
            bench.train(row)
        except RuntimeError as error:
            engine = row.engine.removesuffix(" offload")
            if re.search(f"optim.name = {row.optimizer} does not work under (DeepSpeed )?{engine}", str(error)):
                return ["refused"] * len(COLUMNS)
        return ["NOT refused"] * len(COLUMNS)
    whole = bench.train(row)
    check_that_all_is_in_play(whole)
    if row.optimizer == "adamw_8bit":
        assert any(tensor.dtype == torch.uint8 for tensor in final(whole).values())
    return [column(bench, row, whole) if row.in_full or column in BRIEFLY else "-" for column in COLUMNS.values()]


def travelled(bench: Bench) -> str:
    """One training whose every step is under another engine, against one process."""
    row = Row("DDP", tolerance=2e-4)
    run = bench.train(row)
    for step, engine in enumerate(("ZeRO-3", "FSDP2", "ZeRO-2"), start=1):
        run = bench.train(row, engine=engine, start=run, step=step)
    return near(bench.train(row, 1, engine=None), [run], row.tolerance)


def line(row: Row, cells: Sequence[str]) -> str:
    """The row's line of the page."""
    return f"| {' | '.join([row.engine, f'`{row.optimizer}`', *cells])} |"


def page(lines: Sequence[str], travel: str) -> str:
    """The whole of docs/engines.md."""
    head = ["engine", "optimizer", *COLUMNS]
    return f"""\
# Engines

What was tested under each engine, and what came of it. `{COMMAND}` makes this page by
running all of it, and the slow tests fail where it says something else than they find.

{chr(10).join([f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |", *lines])}

A run whose every step is under another engine (DDP, ZeRO-3, FSDP2, ZeRO-2), against one process: {travel}.

The columns, with N = {STEPS} steps of {BATCH} samples:

- **N = k + resume + (N - k)**: the run that stopped after step k and went on, for every k, against the run that did not
  stop; two processes.
- **the same, streamed**: k = 2, and the rest with `data.mode=stream` and decoding workers, against the run from the
  cache that did not stop.
- **as without launcher**: two processes against one that no launcher started, which is neither DDP nor ZeRO: so all
  engines agree.
- **1 = 2 = 4 processes**: the whole run by each number.
- **2 → 1, 3, 4 processes**: two steps by two processes, two steps by another number.

The words:

- *bitwise*: losses, gradient norms, and everything in the last checkpoint (values, averages, the optimizer's states)
  are equal to the bit.
- *to 2e-5*: sums are made in another order, so losses and gradient norms agree to that relative difference, and first
  moments to a hundred times it of each tensor's largest.
- *refused*: wantrain stops at the start and says why ([optimizers](optimizers.md)).
- *-*: not tested; another optimizer, or where the base lies, changes nothing in how the engine deals the samples.

All at once: gradient accumulation, two learning rates (but for `prodigy`, which finds its own), warm-up and cosine,
gradients above `optim.max_grad_norm`, an average, and validation in between; for `schedule_free` its own
average and no cosine.

## Where

Forked processes over gloo on a CPU, in float32, on a random base of two layers with the real Wan classes. Each launch
file is started as well by `accelerate launch` (`tests/distributed`), but for FSDP2: accelerate has it with GPUs alone,
and the tests change that one answer of accelerate's.

## Not run

- A GPU, and with it NCCL, bfloat16 sums in another order, and more than one machine.
- What offload is for: here the base's shares are copied from one place in the host's memory to another.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, forking() as forker:
        bench = Bench(forker, Path(folder))
        lines = []
        for row in ROWS:
            lines.append(line(row, find(bench, row)))
            print(lines[-1], flush=True)
        PAGE.write_text(page(lines, travelled(bench)))


if __name__ == "__main__":
    main()
