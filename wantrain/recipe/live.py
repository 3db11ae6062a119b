"""Samples of a training while it trains: the same prompts from the same noise, of the base and after steps.

They are RUN/live, a folder of results, so a resumed run goes on with the same columns.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from wantrain import config as schema
from wantrain import costs, engine, judging, lora, pictures, results
from wantrain.files import digest_text
from wantrain.models import sampling, sequence
from wantrain.models.base import Base
from wantrain.models.loading import let_go
from wantrain.models.sampling import Inputs, Pipeline
from wantrain.recipe import judged, passing
from wantrain.recipe.grid import BASE
from wantrain.recipe.sampler import inputs_of, open_sampling, sampler_settings
from wantrain.recipe.samples import Encode
from wantrain.recipe.training import Training
from wantrain.results import Column, Metric, Prompt, Results, Video
from wantrain.terms import UserError

NAME, DIVERSITY = "live", "diversity"


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, by its place, with one seed, and what it is sampled from besides."""

    number: int
    place: int
    prompt: str
    seed: int
    inputs: Inputs


@dataclass(slots=True)
class Live:
    """What samples a training. `bases` are its transformers, with sampler.fast_lora in them where there is one; they
    and the `jobs` are opened when they are first asked for.
    """

    training: Training
    source: Encode
    jobs: list[Job] = field(default_factory=list)
    bases: list[Base] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.training.recipe.run_dir / NAME

    def is_due(self, step: int) -> bool:
        every = self.training.config.sampler.every_steps
        return bool(every) and step % every == 0

    def check(self) -> list[Job]:
        """All that is sampled. Raises UserError for what would keep it from being sampled under this engine."""
        recipe, settings = self.training.recipe, sampler_settings(self.training.recipe)
        prompts, num_parts = recipe.config.sampler.prompts, recipe.config.train.sequence_parallel
        if not prompts:
            raise UserError("sampler.prompts is empty", "sampler.prompts='[a red house, a blue boat]'")
        fast, divides = recipe.config.sampler.fast_lora, engine.divides(self.training.accelerator)
        if divides and (fast or recipe.base.expert):
            what = "that with sampler.fast_lora in it" if fast else "the other expert"
            raise UserError(f"{divides} divides the transformer that trains among processes, and samples need {what} "
                            "whole beside it", "sampler.every_steps=0, or train with launch/ddp.yaml or zero2.yaml")
        if num_parts > 1:
            length = costs.sequence_length(recipe.variant.latent_THW(settings.bucket), False)
            sequence.check(recipe.variant, num_parts, {length})
        if not self.jobs:
            self.bases = open_sampling(recipe.config).base.each()
            inputs = inputs_of(recipe, len(prompts), lambda: self.training.clips)
            rows = [(place, prompts[place], seed, inputs[place]) for place in range(len(prompts))
                    for seed in recipe.config.sampler.seeds]
            self.jobs = [Job(number, *row) for number, row in enumerate(rows)]
        return self.jobs

    def sample(self, step: int) -> str:
        """Sample now, after `step`, and say where; every process must call it. What goes wrong is said as well: a
        picture is not worth a training.
        """
        began, training = time.perf_counter(), self.training
        found: list[torch.Tensor] = []
        fault = ""
        try:
            with torch.no_grad(), training.at_average():
                self.check()
                done = training.rendezvous.first(self.begun() if training.accelerator.is_main_process else None)
                wanted = [*([] if BASE in done.columns else [BASE]), column_of(training, step)]
                pipeline = Pipeline(training.recipe.variant, [], self.source.text,
                                    training.recipe.load_encoders(training.device), training.recipe.dtype)
                found = [self.latents(column, pipeline) for column in wanted]
        except (UserError, FloatingPointError, torch.OutOfMemoryError) as error:
            fault = str(error)
        faults = [text for text in training.rendezvous.all(fault) if text]
        if faults:
            return f"step {step}: no samples: {faults[0]}"
        jobs = self.check()
        for column, own in zip(wanted, found, strict=True):
            gathered = self.gathered(own)
            if training.accelerator.is_main_process and not fault:
                try:
                    done = self.written(done, column, jobs, gathered, pipeline)
                except (UserError, OSError) as error:  # a full disk, such as the next checkpoint may find as well
                    fault = str(error)
        del pipeline
        let_go()
        return f"step {step}: no samples: {fault}" if fault else \
            f"step {step}: {len(jobs)} samples in {self.folder} ({time.perf_counter() - began:.1f} s)"

    def shares(self) -> tuple[int, int]:
        """(how many share the samples, which of them this is): processes, or groups that compute a sample together."""
        num_parts, accelerator = self.training.config.train.sequence_parallel, self.training.accelerator
        return accelerator.num_processes // num_parts, accelerator.process_index // num_parts

    def latents(self, column: Column, pipeline: Pipeline) -> torch.Tensor:
        """The latents [number, C, T, H, W] of this process's jobs. All have equally many, so that they call the
        transformer equally often, as ZeRO-3 and FSDP2 need it: those that lack one repeat one, which does not count.
        """
        training, jobs = self.training, self.check()
        num_shares, own = self.shares()
        rounds = math.ceil(len(jobs) / num_shares)
        mine = [jobs[number % len(jobs)] for number in range(own, rounds * num_shares, num_shares)]
        settings, transformers = sampler_settings(training.recipe), passing.InTurn(self.transformers(column))
        pipeline = replace(pipeline, transformers=transformers)
        unwrapped = training.accelerator.unwrap_model(training.model)
        with lora.switched_off(unwrapped) if column == BASE else contextlib.nullcontext(), \
                contextlib.closing(transformers):
            running = [sampling.denoising(pipeline, settings, *sampling.begin(
                pipeline, job.prompt, job.seed, settings, job.inputs)) for job in mine]
            found: tuple[torch.Tensor, ...] = ()
            for latents in zip(*running, strict=True):  # all of a step, so that experts take turns once
                found = latents
        return torch.cat(found).float().cpu()

    def transformers(self, column: Column) -> list[Callable[[], AbstractContextManager[torch.nn.Module]]]:
        """How to come by each transformer of the variant: the one that trains, or another like it where a few-step LoRA
        is to be in it; and of the other expert the base with its newest LoRA.
        """
        training, fast = self.training, self.training.config.sampler.fast_lora
        opened: list[Callable[[], AbstractContextManager[torch.nn.Module]]] = []
        for base in self.bases:
            adapter = None
            if base.expert != training.recipe.base.expert:
                adapter = None if column == BASE else passing.finished_adapter(training, base.expert)
            elif fast and column != BASE:
                adapter = passing.adapter_of(training)
            if base.expert == training.recipe.base.expert and not fast:
                opened.append(lambda: contextlib.nullcontext(training.model))
            else:
                opened.append(partial(passing.loaded, training, base, adapter))
        return opened

    def gathered(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The latents of all jobs, by number, from those of each share."""
        num_shares, _ = self.shares()
        values = self.training.rendezvous.gather(own.flatten())[::self.training.config.train.sequence_parallel]
        return list(values.view(num_shares, *own.shape).transpose(0, 1).flatten(0, 1))

    def begun(self) -> Results:
        """What an earlier part of the run has sampled of the same, up to where it goes on; without videos otherwise."""
        training, recipe = self.training, self.training.recipe
        config, settings = recipe.config, sampler_settings(recipe)
        trigger = config.data.trigger
        prompts = [Prompt(prompt.replace(f"{trigger}, ", "").replace(trigger, "").strip() if trigger else prompt)
                   for prompt in config.sampler.prompts]
        key = digest_text(*config.sampler.prompts, config.sampler.seeds, config.sampler.inputs, settings, trigger,
                          *(base.digest("transformer", recipe.memo) for base in self.bases))
        with contextlib.suppress(UserError):
            found = results.read(self.folder)
            if found.provenance.get("key") == key:
                kept = [own for own in found.columns if own.step is None or own.step <= training.progress.step]
                ids = {own.id for own in kept}
                return replace(found, columns=kept, videos=[one for one in found.videos if one.column in ids])
        provenance = {"key": key, "sampler": {name: str(value) for name, value in asdict(settings).items()}}
        return Results(config.run.name, trigger, recipe.variant.fps, [], prompts, [], settings=schema.flat(config),
                       provenance=provenance)

    def written(self, done: Results, column: Column, jobs: list[Job], latents: list[torch.Tensor], pipeline: Pipeline
                ) -> Results:
        """Decode and write the videos of a column, each with a picture to show before it plays."""
        recipe, settings = self.training.recipe, sampler_settings(self.training.recipe)
        videos, middles = [], []
        for job, own in zip(jobs, latents[: len(jobs)], strict=True):
            frames_FCHW = sampling.finish(pipeline, settings, own[None])
            path = self.folder / f"{column.id}_{job.number:03d}.mp4"
            pictures.write_mp4(path, frames_FCHW, recipe.variant.fps)
            middles.append((job.place, frames_FCHW[len(frames_FCHW) // 2].clone()))  # a view would keep the video
            pictures.write_png(path.with_suffix(".png"), middles[-1][1])
            videos.append(Video(path.name, column.id, job.place, job.seed, job.prompt))
        others = [one for one in done.columns if one.id != column.id]
        made = replace(done, columns=[*others, column], metrics=with_diversity(done, column, middles),
                       videos=[*(one for one in done.videos if one.column != column.id), *videos])
        results.write(self.folder, made)
        name = "samples_base" if column == BASE else "samples"
        self.training.trackers.show({f"{name}/{job.number:03d}": self.folder / video.file
                                     for job, video in zip(jobs, videos, strict=True)}, self.training.progress.step)
        return made


def with_diversity(done: Results, column: Column, middles: Sequence[tuple[int, torch.Tensor]]) -> list[Metric]:
    """The metrics of what is done, and how much the column's seeds differ, where a prompt has several."""
    found, about = judged.diversity(middles), judging.METRICS[DIVERSITY]
    ids = {own.id for own in done.columns}
    columns = {name: told for metric in done.metrics for name, told in metric.columns.items() if name in ids}
    if found:
        columns[column.id] = found
    return [Metric(DIVERSITY, about.label, about.tells, about.better, columns)] if columns else []


def diversity_shares(run_dir: Path, steps: Sequence[int]) -> list[float | None]:
    """How much the seeds of a training's samples differ, as a share of the base's: what the newest samples until each
    step have, None where there are none; [] where no step has any.
    """
    with contextlib.suppress(UserError):
        made = results.read(run_dir / NAME)
        means = {name: mean for metric in made.metrics for name, (mean, _) in metric.columns.items()}
        sampled = {one.step: means[one.id] for one in made.columns if one.step is not None and one.id in means}
        if sampled and means.get(BASE.id):
            newest = [max((step for step in sampled if step <= until), default=None) for until in steps]
            return [None if step is None else sampled[step] / means[BASE.id] for step in newest]
    return []


def column_of(training: Training, step: int) -> Column:
    """The column of a step."""
    trigger = training.config.data.trigger
    has_trigger = bool(trigger) and any(trigger in prompt for prompt in training.config.sampler.prompts)
    return Column(f"step_{step:06d}", f"step {step}", str(training.recipe.run_dir / "checkpoints"), step, 1.0,
                  has_trigger)


def open_live(training: Training, source: Encode) -> Live:
    """Ready to sample. Where the recipe wants samples, raises UserError for what would keep them from it."""
    live = Live(training, source)
    if training.config.sampler.every_steps:
        live.check()
    return live
