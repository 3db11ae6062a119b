"""Trainings side by side, each in a process that stays for the next one, and each remembered when it is done."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch

from wantrain import config as schema
from wantrain import lock, logs, metrics, validation
from wantrain.config import Config, Resume
from wantrain.engine import peak_memory_gib
from wantrain.files import digest_text, write_json
from wantrain.jobs import Failure
from wantrain.journal import Journal, by_workers
from wantrain.recipe import heldout
from wantrain.recipe.clips import Clips, num_workers
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.run import run_fingerprint
from wantrain.stages import train
from wantrain.terms import Interrupted, UserError
from wantrain.validation import Extent

MOST_CLIPS = 16
"""As many rows are measured of each training as these have sigmas: so many held-out clips, or fewer, at every sigma;
more at some each. The same noise for all trainings, so that it cancels where two are compared.
"""

STOPPED = "stopped where the budget ends"
LONGEST_S = 7 * 86_400.0
"""Of one training without a budget."""
PATIENCE_S = 60.0
"""What a training may take to save after the budget's end, before its process is ended."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A recipe among those compared, and its clips."""

    recipe: Recipe
    clips: Clips


@dataclass(frozen=True, slots=True)
class Planned:
    """A training: of which arm, for how many steps, with which seed."""

    arm: str
    num_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training came to: losses of held-out clips with its adapter and of the frozen base, seconds of a step and
    of all, peak of a GPU's memory. `fault` says why it has none of that.
    """

    losses: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    step_s: float = 0.0
    seconds: float = 0.0
    memory_gib: float | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What a process is given: a config as YAML, the command for messages, when to stop (seconds of the epoch), the
    folder with the base's numbers, and the folder and number of the processes.
    """

    config: str
    command: tuple[str, ...]
    until_s: float
    opening: Path | None
    places: Path
    num_processes: int


@dataclass(frozen=True, slots=True)
class Trainings:
    """The arms by name, and the folder where their trainings are and are remembered. All end at `until_s`."""

    arms: Mapping[str, Arm]
    folder: Path
    command: tuple[str, ...]
    until_s: float
    num_processes: int
    told: str = "trainings"

    @property
    def journal(self) -> Journal[Outcome]:
        return Journal(self.folder / "trainings.jsonl", lambda row: Outcome(**row))

    def outcomes(self, todo: Sequence[Planned], opening: Planned | None = None) -> dict[Planned, Outcome]:
        """Train what is not remembered. With `opening`, the base's numbers are those that it has measured."""
        keys = {one: self.key(one) for one in todo}
        from_folder = None if opening is None else self.run_dir(opening)
        jobs = {keys[one]: Job(schema.to_yaml(self.config(one)), self.command, self.until_s, from_folder,
                               self.folder / "places", self.num_processes) for one in todo}
        limit_s = min(LONGEST_S, max(0.0, self.until_s - time.time()) + PATIENCE_S)
        work = by_workers(train_one, jobs, ended, min(self.num_processes, len(jobs)), limit_s, limit="--minutes")
        found = self.journal.filled(self.journal.read(), list(jobs), work, "training", self.told)
        return {one: found[key] for one, key in keys.items()}

    def config(self, one: Planned) -> Config:
        """The arm's config for one training: its own folder, steps and seed, no tracker, measured at its end alone."""
        own = self.arms[one.arm].recipe.config
        own = of_length(replace(own, run=replace(own.run, dir=str(self.run_dir(one)))), one.num_steps, one.seed)
        pct = heldout.budget_of(self.num_rows(one), own.data.batch_size, one.num_steps)
        return replace(own, sampler=replace(own.sampler, every_steps=0), validation=replace(
            own.validation, every_steps=one.num_steps, budget_pct=pct, unrelated=[]))

    def num_rows(self, one: Planned) -> int:
        """Rows of held-out clips that the training is measured by."""
        arm = self.arms[one.arm]
        return min(MOST_CLIPS, len(arm.clips.heldout)) * len(arm.recipe.trainings()[0].validation_sigmas)

    def run_dir(self, one: Planned) -> Path:
        """Its folder, by all that fixes its numbers."""
        return self.folder / "trainings" / self.key(one)[:16]

    def key(self, one: Planned) -> str:
        """A digest of all that fixes the training's numbers and how it is measured."""
        arm = self.arms[one.arm]
        recipe = replace(arm.recipe, config=of_length(arm.recipe.config, one.num_steps, one.seed))
        measured = [(p.found.digest, p.start_s, str(p.bucket), p.clip.caption) for p in arm.clips.heldout]
        return digest_text(self.num_rows(one), measured, *(
            (sorted(run_fingerprint(own, arm.clips, own.known_form or "").items(), key=str), own.config.train.num_steps,
             own.validation_sigmas) for own in recipe.trainings()))


def of_length(config: Config, num_steps: int, seed: int) -> Config:
    """The config of so many steps with this seed; an expert's own steps keep their share."""
    share = num_steps / config.train.num_steps
    high, low = (replace(own, num_steps=own.num_steps and max(1, round(own.num_steps * share)))
                 for own in (config.high, config.low))
    return replace(
        config, high=high, low=low, tracker=replace(config.tracker, names=[]),
        train=replace(config.train, num_steps=num_steps, seed=seed, resume=Resume.auto, keep_checkpoints=1,
                      keep_every=None, mirror=None, log_every=1))


def num_processes(config: Config) -> int:
    """How many trainings run side by side: one a GPU; without one, data.num_workers or one a core."""
    return torch.cuda.device_count() or num_workers(config)


# In a worker process

_places: list[TextIO] = []
"""The locked file that is this process's place, while it lives."""


def train_one(job: Job) -> Outcome:
    """Do one training, or go on with it, and read what it measured. No fault of one ends the others."""
    config = schema.load_yaml(job.config)
    began = time.perf_counter()
    place = take_place(job.places, job.num_processes)
    try:
        with logs.kept(Path(config.run.dir), place + 1, ["wantrain", "tune", *job.command]):
            share_base(config, job.opening)
            with stopping_at(job.until_s):
                train.run(config, job.command)
            found = read_outcome(config)
    except Interrupted:
        return Outcome(fault=STOPPED)
    except UserError as error:
        return Outcome(fault=error.message)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return replace(found, seconds=time.perf_counter() - began)


def take_place(folder: Path, number: int) -> int:
    """Which of so many processes this one is, for its whole life; the place of one that died is free. With GPUs, it
    gets the one of that number, before CUDA begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while not _places:
        for place in range(number):
            file = (folder / str(place)).open("a", encoding="utf-8")
            try:
                lock.take(file)
            except OSError as error:
                file.close()
                if error.errno in lock.NO_LOCKS:
                    raise  # no place is ever taken there
                continue
            _places.append(file)
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[place] if given else str(place)
            torch.set_num_threads(max(1, torch.get_num_threads() // number))
            break
        else:
            time.sleep(0.1)
    return int(Path(_places[0].name).name)


def share_base(config: Config, opening: Path | None) -> None:
    """Lay the base's numbers of another training into the folders of this one, which measures them again only where it
    is measured by other clips or sigmas (wantrain.recipe.heldout).
    """
    if opening is None:
        return
    for found in sorted(opening.glob(f"**/{heldout.NAME}")):
        path = Path(config.run.dir) / found.relative_to(opening)
        if not path.exists():
            write_json(path, json.loads(found.read_text(encoding="utf-8")) | {"steps": {}})


@contextlib.contextmanager
def stopping_at(until_s: float) -> Iterator[None]:
    """In the block, the training is asked to stop at that time, as by Ctrl-C: once it steps, it saves first."""
    left_s = until_s - time.time()
    if left_s <= 0:
        raise Interrupted
    before = signal.signal(signal.SIGTERM, interrupted)
    timer = threading.Timer(min(left_s, LONGEST_S), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def interrupted(number: int, frame: FrameType | None) -> None:
    """The signal's handler while nothing is there to be saved."""
    raise Interrupted


def read_outcome(config: Config) -> Outcome:
    """What the training's folders say, means over both experts where there are two; its checkpoints are deleted."""
    losses: list[dict[str, float]] = []
    bases: list[dict[str, float]] = []
    steps: list[float] = []
    for folder, num_steps in trained_folders(config):
        found = json.loads((folder / heldout.NAME).read_text(encoding="utf-8"))
        names = found["clips"][heldout.HELDOUT]
        rows = Extent(len(names), len(found["sigmas"]), found["passes"]).rows
        for into, values in ((losses, found["steps"][str(num_steps)]), (bases, found["base"])):
            by_clip = validation.by_clip(rows, torch.tensor(values[heldout.HELDOUT], dtype=torch.float64))
            into.append(dict(zip(names, by_clip.tolist(), strict=True)))
        steps += [line["step_s"] for line in metrics.read(folder / "metrics.jsonl")]
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    on_gpu = torch.cuda.is_available()
    memory = peak_memory_gib(torch.device("cuda")) if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    return Outcome(averaged(losses), averaged(bases), statistics.median(steps), memory_gib=memory)


def trained_folders(config: Config) -> list[tuple[Path, int]]:
    """The folder of each expert's training, or the one there is, with its steps."""
    experts = schema.experts_of(config)
    return [(Path(config.run.dir) / (expert or ""), schema.expert_config(config, expert).train.num_steps)
            for expert in experts]


def averaged(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each clip over the experts."""
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def ended(job: Job, failure: Failure) -> Outcome:
    """Of a training whose process took too long or died."""
    return Outcome(fault=f"its process ended ({failure}): {schema.load_yaml(job.config).run.dir}/logs says more")
