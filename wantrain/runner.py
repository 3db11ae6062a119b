"""`wantrain run`: the stages of a recipe in order, in one process, each left out where its result is still right.

`check`, `cache` and `train` know themselves what is done. Of the others the run folder notes what their files were made
from and what they were, in `stages.json`, with the time that each stage took.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from wantrain import config as schema
from wantrain import costs, metrics
from wantrain.config import BaseForm, Config, DataMode, Dtype, variant_of
from wantrain.data import cache
from wantrain.engine import launch
from wantrain.engine.rendezvous import LONGEST_S, Rendezvous
from wantrain.engine.saved import step_of
from wantrain.files import digest_file, digest_text, read_object, write_json
from wantrain.recipe.clips import Clips, asks_evaluation, evaluation_faults, open_clips
from wantrain.recipe.costing import Room, job_of, largest_bucket, policy_of
from wantrain.recipe.draft import evaluation_prompts, is_tiny, tokens_that_fit
from wantrain.recipe.grid import steps_on_disk
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.recipe.sampler import lora_files, sampler_settings
from wantrain.terms import UserError

NOTES = "stages.json"


@dataclass(frozen=True, slots=True)
class Job:
    """What the stages work on."""

    config: Config
    arguments: Sequence[str]
    recipe: Recipe
    clips: Clips

    @property
    def notes(self) -> Path:
        return self.recipe.run_dir / NOTES


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage. `files` are what it leaves in the run folder, `made_from` what these hang on; without `files` the stage
    itself knows what is done. `amount` is how much there is to do now, `like` what its speed hangs on. Processes
    of one launch share it where it `is_shared`.
    """

    name: str
    amount: Callable[[Job], float]
    like: Callable[[Job], str]
    files: str = ""
    made_from: Callable[[Job], str] = lambda job: ""
    is_shared: bool = False


def run(config: Config, arguments: Sequence[str]) -> None:
    """Run every stage. Of several processes all take part in those that can be shared, and wait while the first does
    the others.
    """
    accelerator = launch.start(launch.world_size(), 1, max_grad_norm=1.0, timeout_s=config.train.stall_timeout_s)
    meeting = Rendezvous(LONGEST_S)
    stages = [stage for stage in STAGES if is_asked(stage, config)]
    with launch.lasting(accelerator):
        if launch.is_first():
            lead(config, arguments, stages, meeting)
        else:
            for stage in stages:
                if stage.is_shared and not meeting.first(""):
                    call(stage, config, arguments)


def lead(config: Config, arguments: Sequence[str], stages: Sequence[Stage], meeting: Rendezvous) -> None:
    """The first process's part: it knows what is done, tells the others of each shared stage, and keeps the notes."""
    job = open_job(config, arguments)
    print("\n".join(forecast(job, stages)))
    for number, stage in enumerate(stages, 1):
        why = done(job, stage)
        print(f"[{number}/{len(stages)}] {stage.name}{why and f': {why}'}", flush=True)
        if stage.is_shared:
            meeting.first(why)
        if not why:
            amount, began = stage.amount(job), time.perf_counter()
            call(stage, config, arguments)
            note(job, stage, amount, time.perf_counter() - began)
    print(f"done: {told_results(job)}")


def launch_over(config: Config, num_processes: int, arguments: Sequence[str]) -> NoReturn:
    """Become `accelerate launch` of the same command over so many processes. UserError inside of a launch."""
    if "MASTER_ADDR" in os.environ:
        raise UserError("--gpus starts processes, and this is one that a launcher started",
                        shlex.join(["wantrain", "run", *arguments]) + "    without --gpus; or without the launcher")
    os.execv(sys.executable, [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch_file(config)),
        "--num_processes", str(num_processes), "--main_process_port", "0", "-m", "wantrain", "run", *arguments])


def launch_file(config: Config) -> Path:
    """The file of launch/ for one machine: each process holds the whole base, or a share where a card cannot."""
    package = Path(__file__).parent
    folder = package / "launch" if (package / "launch").is_dir() else package.parent / "launch"
    variant, is_whole = variant_of(config), True
    if torch.cuda.is_available() and config.memory.base is BaseForm.dtype and not is_tiny(variant):
        card_gib = torch.cuda.get_device_properties(0).total_memory / costs.GIB
        is_whole = tokens_that_fit(variant, card_gib, "dtype",
                                   itemsize=2 if config.model.dtype is Dtype.bfloat16 else 4) > 0
    return folder / ("ddp.yaml" if is_whole else "zero3.yaml")


def open_job(config: Config, arguments: Sequence[str]) -> Job:
    """The recipe and its clips. UserError for what would keep the last stage from its end, not after hours of others.
    """
    recipe = open_recipe(config)
    clips = open_clips(recipe, arguments)
    if asks_evaluation(config):
        for fault in evaluation_faults(clips):
            raise fault
    return Job(config, arguments, recipe, clips)


def call(stage: Stage, config: Config, arguments: Sequence[str]) -> None:
    """Run one stage, and let go of what it held."""
    importlib.import_module(f"wantrain.stages.{stage.name}").run(config, arguments)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_asked(stage: Stage, config: Config) -> bool:
    """Whether the recipe has anything for the stage to do."""
    return {"cache": config.data.mode is DataMode.cache, "sample": bool(config.sampler.prompts),
            "evaluate": asks_evaluation(config)}.get(stage.name, True)


def told_results(job: Job) -> str:
    """Where the LoRA and the page are."""
    paths = [str(one.export_path) for one in job.recipe.trainings()]
    page = job.recipe.run_dir / "report" / "report.html"
    return ", ".join([*paths, *([str(page)] if page.exists() else [])])


# What is done


def done(job: Job, stage: Stage) -> str:
    """Why the stage may be left out, '' where it may not: its files are there as it left them, made from the same."""
    noted = read_object(job.notes).get(stage.name, {})
    if not stage.files or not noted or noted["made_from"] != made_from(job, stage):
        return ""
    return "done already, its files are as it left them" if noted["files"] == digests(job, stage) else ""


def made_from(job: Job, stage: Stage) -> str:
    """A digest of all that the stage's files hang on; '' where that is not there yet."""
    try:
        return stage.made_from(job)
    except UserError:  # such as a LoRA that is yet to be exported
        return ""


def digests(job: Job, stage: Stage) -> dict[str, str]:
    """The stage's files in the run folder, by content."""
    folder = job.recipe.run_dir
    return {str(path.relative_to(folder)): digest_file(path) for path in sorted(folder.glob(stage.files))
            if path.is_file() and path.name != "data.html"}


def note(job: Job, stage: Stage, amount: float, seconds: float) -> None:
    """Remember what the stage made of what, and how long it took."""
    own = {"made_from": made_from(job, stage), "files": digests(job, stage)} if stage.files else {}
    timed = {"seconds": seconds, "amount": amount, "like": stage.like(job)} if amount else read_object(job.notes).get(
        stage.name, {})
    write_json(job.notes, read_object(job.notes) | {stage.name: timed | own})


def of_checkpoints(job: Job) -> str:
    """What an export is made from: the newest checkpoints, and how the file is to be written."""
    newest = [path for own in job.recipe.trainings() for path in own.checkpoints.on_disk()[-1:]]
    return digest_text(keys(job.config, "export", "run"), *((path / "checksums").read_text("utf-8") for path in newest))


def of_loras(job: Job, *sections: str) -> str:
    """What samples are made from: LoRA files, base, clips, and sections of the config."""
    loras = [use for uses in lora_files(job.recipe, job.arguments).values() for use in uses]
    inputs = [Path(file) for given in job.config.sampler.inputs for file in given.values()]
    files = [file for path in (*(path for path, _ in loras), *inputs)
             for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    bases = [one.digest("transformer", job.recipe.memo) for one in job.recipe.base.each()]
    data = job.config.data
    return digest_text(keys(job.config, "model", "sampler", "validation", *sections), *bases,
                       job.recipe.known_form, data.resolutions, data.num_frames, data.trigger,
                       *sorted(path.name for path in job.clips.entries), *map(digest_file, files))


def keys(config: Config, *sections: str) -> str:
    """The config's keys of these sections, as text."""
    return str({key: value for key, value in schema.flat(config).items() if key.partition(".")[0] in sections})


# How long it will take


def forecast(job: Job, stages: Sequence[Stage]) -> list[str]:
    """A line for each stage: how long it will take, where that was measured before or `wantrain plan` knows it."""
    lines = [f"run {job.config.run.name}: {len(stages)} stages; Ctrl-C stops, the same command goes on"]
    for stage in stages:
        amount, rate, source = stage.amount(job), seconds_each(job, stage), "as measured before"
        if rate is None and stage.name == "train":
            rate, source = planned_step_s(job), "by the arithmetic of wantrain plan"
        what = "done already" if done(job, stage) or not amount else "not known yet" if rate is None else \
            f"about {told_time(rate * amount)}, {source}"
        lines.append(f"  {stage.name:10}{what}")
    return lines


def seconds_each(job: Job, stage: Stage) -> float | None:
    """Seconds for each of the stage's amount, by the steps of this run, else by the newest notes of runs beside it."""
    if stage.name == "train":
        steps = [line["step_s"] for own in job.recipe.trainings()
                 for line in metrics.read(own.run_dir / "metrics.jsonl")[-50:] if "step_s" in line]
        if steps:
            return statistics.median(steps)
    folders = sorted(job.recipe.run_dir.parent.glob(f"*/{NOTES}"), key=lambda path: path.stat().st_mtime)
    found = [read_object(path).get(stage.name, {}) for path in [*folders, job.notes]]
    rates = [one["seconds"] / one["amount"] for one in found if one.get("like") == stage.like(job)]
    return rates[-1] if rates else None


def planned_step_s(job: Job) -> float | None:
    """Seconds of a step at the largest clips, where the card is one that `wantrain plan` knows."""
    own, num_processes = job.recipe.trainings()[0].config, launch.world_size()
    try:
        card = costs.card_of(machine())
    except UserError:
        return None
    planned = job_of(own, largest_bucket(own), num_processes)
    at_once = own.train.micro_batch_size * max(1, num_processes // own.train.sequence_parallel)
    policy = policy_of(own, planned, Room(card, card.memory_gib * costs.GIB))
    return costs.step(planned, policy, card, max(1, own.data.batch_size // at_once)).seconds


def told_time(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"


def machine() -> str:
    """What computes."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def sizes(job: Job) -> str:
    return " ".join(sorted({str(p.bucket) for p in job.clips.everything}))


def to_encode(job: Job) -> float:
    return len(cache.missing(job.clips.entries))


def steps_left(job: Job) -> float:
    """Optimizer steps that are still to be done, of all experts."""
    done_steps = {own.run_dir: [step_of(path.name) for path in own.checkpoints.on_disk()[-1:]]
                  for own in job.recipe.trainings()}
    return sum(max(0, own.config.train.num_steps - max(done_steps[own.run_dir], default=0))
               for own in job.recipe.trainings())


def of_training(job: Job) -> str:
    own, train = job.config, job.config.train
    return (f"{own.model.variant} {sizes(job)}, {own.data.batch_size} by {train.micro_batch_size} on "
            f"{launch.world_size()} x {machine()}, {own.lora.kind.name} {own.lora.rank}, {own.memory.base.name}, "
            f"keeps {own.memory.keep.name}")


def of_sampling(job: Job) -> str:
    settings = sampler_settings(job.recipe)
    return (f"{job.config.model.variant} {settings.bucket}, {settings.num_steps} steps on {launch.world_size()} x "
            f"{machine()}")


def num_samples(job: Job) -> float:
    own = job.config.sampler
    columns = (0 in own.strengths) + num_loras(job) * sum(strength != 0 for strength in own.strengths)
    return len(own.prompts) * len(own.seeds) * columns


def num_compared(job: Job) -> float:
    columns = 2 + num_loras(job) * max(1, sum(strength != 0 for strength in job.config.sampler.strengths))
    return len(evaluation_prompts(job.clips)) * len(job.config.evaluate.seeds) * columns


def num_loras(job: Job) -> int:
    """The recipe's own LoRA and those that it is compared with; `all` counts the checkpoints that are there now."""
    compared = job.config.sampler.compare
    return 1 + sum(len(steps_on_disk(job.recipe)) if word == "all" else 1 for word in compared)


STAGES = (
    Stage("check", lambda job: 1, lambda job: f"{job.config.model.variant} on {machine()}"),
    Stage("cache", to_encode, lambda job: f"{job.config.model.variant} {sizes(job)} on {machine()}", is_shared=True),
    Stage("train", steps_left, of_training, is_shared=True),
    Stage("export", lambda job: 1, lambda job: f"{job.config.model.variant} {job.config.lora.rank}", "export/**/*",
          of_checkpoints),
    Stage("sample", num_samples, of_sampling, "samples/*", of_loras, is_shared=True),
    Stage("evaluate", num_compared, of_sampling, "report/*", lambda job: of_loras(job, "evaluate"), is_shared=True),
)
"""In order."""
