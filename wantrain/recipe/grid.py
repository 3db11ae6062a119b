"""Grids of videos: columns (base, LoRAs at their strengths) by rows (prompts with their seeds), made once.

What is in the folder with the same record is not made again, so an interrupted grid goes on; the processes of a launch
share what is missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wantrain import pictures, results
from wantrain.config import Config
from wantrain.engine import launch
from wantrain.engine.rendezvous import LONGEST_S, Rendezvous
from wantrain.engine.saved import step_of
from wantrain.files import read_object, write_json
from wantrain.jobs import progress
from wantrain.models import sampling
from wantrain.models.lora_formats import read_lora
from wantrain.recipe import records
from wantrain.recipe.exporting import checkpoint_lora
from wantrain.recipe.folders import checkpoints_of
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.records import Shot
from wantrain.recipe.sampler import LoraFiles, Studio, lora_files, lora_uses, sampled, sampler_settings
from wantrain.results import Column, Prompt

BASE = Column("base", "base")

CACHE = "first_block_cache.json"


@dataclass(frozen=True, slots=True)
class Stack:
    """LoRA files that are sampled together: `name` in the names of files ('' for the recipe's own), `label` for people,
    the training step where they are a checkpoint's.
    """

    name: str
    label: str
    loras: LoraFiles
    step: int | None = None

    def column(self, strength: float, trigger: bool = False) -> Column:
        """It at a strength; `trigger` where one is put before its prompts."""
        words = [self.name, f"strength_{strength:g}"]
        label = self.label if strength == 1 else f"{self.label} at {strength:g}"
        named = " + ".join(str(path) for uses in self.loras.values() for path, _ in uses)
        return Column("_".join(filter(None, words)), label, named, self.step, strength, trigger)


def meeting_of(config: Config) -> Rendezvous:
    """Where the processes of this launch meet; one alone meets nobody."""
    if launch.world_size() > 1:
        launch.start(launch.world_size(), 1, max_grad_norm=1.0, timeout_s=config.train.stall_timeout_s)
    return Rendezvous(LONGEST_S)


def stacks_of(recipe: Recipe, arguments: Sequence[str]) -> list[Stack]:
    """The recipe's LoRA (`sampler.loras`, else the run's own export), and those of `sampler.compare`."""
    config, own = recipe.config, lora_files(recipe, arguments)
    step = None if config.sampler.loras else _step_in(own)
    stacks = [Stack("", "LoRA" if step is None else f"LoRA, step {step}", own, step)]
    for word in config.sampler.compare:
        if word == "all" or word.isdecimal():
            steps = [int(word)] if word != "all" else [one for one in steps_on_disk(recipe) if one != step]
            stacks += [Stack(f"step_{one:06d}", f"step {one}", {
                each.base.expert: [(checkpoint_lora(config, each.base.expert, one), 1.0)]
                for each in recipe.trainings()}, one) for one in steps]
        else:
            stem = Path(word.partition("=")[0]).stem.replace("{expert}", "")
            stacks.append(Stack(stem, Path(word).name, {each.base.expert: lora_uses(word, each.base.expert)
                                                        for each in recipe.trainings()}))
    names = [stack.name for stack in stacks]
    return [stack if names.count(stack.name) == 1 else
            Stack(f"{place}_{stack.name}", stack.label, stack.loras, stack.step) for place, stack in enumerate(stacks)]


def steps_on_disk(recipe: Recipe) -> list[int]:
    """The steps of which every training of the run has a checkpoint."""
    each = [{step_of(path.name) for path in checkpoints_of(recipe.config, one.base.expert).on_disk()}
            for one in recipe.trainings()]
    return sorted(set.intersection(*each))


def _step_in(loras: LoraFiles) -> int | None:
    """The step that LoRA files say they are of."""
    found = {read_lora(path).metadata.get("wantrain.steps", "") for uses in loras.values() for path, _ in uses}
    told = found.pop() if len(found) == 1 else ""
    return int(told) if told.isdecimal() else None


def make(recipe: Recipe, shots: Sequence[Shot], folder: Path, meeting: Rendezvous) -> Studio:
    """Make what is missing of the videos, this process its share, column by column; with all of them there, what holds
    the pipeline is returned, to go on with.
    """
    number, process = len(meeting.processes), launch.rank()
    missing = [shot for shot in shots if not records.is_there(recipe, shot, folder)]
    meeting.flags(0)  # all have looked before any video appears
    mine = missing[process::number]
    if number > 1:
        print(f"process {process} makes {len(mine)} of {len(missing)} videos")
    studio = Studio(recipe, [shot.caption for shot in mine])
    with progress(len(mine), 0, "video", "samples", process == 0) as bar:
        for shot in mine:
            frames_FCHW = sample_shot(recipe, studio, shot)
            records.write(folder / shot.name, recipe, frames_FCHW, records.record_of(recipe, shot, frames_FCHW))
            bar.update()
    if process == 0 and mine and recipe.config.sampler.first_block_cache:
        measure_cache(recipe, studio, mine[-1], folder)
    meeting.flags(0)
    if len(missing) < len(shots) and process == 0:
        print(f"{len(shots) - len(missing)} of {len(shots)} videos in {folder} were there already")
    return studio


def measure_cache(recipe: Recipe, studio: Studio, shot: Shot, folder: Path) -> None:
    """Sample one of the videos with the first-block cache and without; say what it costs and saves, and keep that."""
    settings, pipeline = sampler_settings(recipe), studio.pipeline(shot.loras)
    sampling.set_strength(pipeline, shot.column.strength)
    error, saved = sampling.cache_error(pipeline, shot.caption, shot.seed, settings, shot.inputs)
    print(f"sampler.first_block_cache={settings.first_block_cache:g}: {shot.name} has latents {100 * error:.1f} % from "
          f"those without it, and {100 * saved:.0f} % of its passes went through the first block alone")
    write_json(folder / CACHE, {"sampler.first_block_cache": settings.first_block_cache, "video": shot.name,
                                "error": error, "passes saved": saved})


def cache_measured(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What `measure_cache` found of the videos in the folder, as a part of their provenance."""
    return {"first-block cache": read_object(folder / CACHE)} if recipe.config.sampler.first_block_cache else {}


def sample_shot(recipe: Recipe, studio: Studio, shot: Shot) -> torch.Tensor:
    """The frames_FCHW uint8 of one video."""
    return sampled(recipe, studio.pipeline(shot.loras), shot.caption, seed=shot.seed, strength=shot.column.strength,
                   inputs=shot.inputs)


def shots_of(columns: Sequence[tuple[Column, LoraFiles | None]], prompts: Sequence[Prompt], seeds: Sequence[int],
             inputs: Sequence[sampling.Inputs], trigger: str = "") -> list[Shot]:
    """Every prompt with every seed in every column, the columns one after the other; those that ask for it have the
    trigger before the prompt.
    """
    rows = [(place, seed) for place in range(len(prompts)) for seed in seeds]
    return [Shot(row, (place, len(prompts)), f"{trigger}, {prompts[place].text}" if column.trigger else
                 prompts[place].text, seed, column, loras, inputs[place])
            for column, loras in columns for row, (place, seed) in enumerate(rows)]


def videos_of(shots: Sequence[Shot], folder: Path, numbers: Mapping[str, Mapping[str, float]]) -> list[results.Video]:
    """The shots as results have them; `numbers` are their metrics by the shot's name."""
    return [results.Video(f"{shot.name}.mp4", shot.column.id, shot.place[0], shot.seed, shot.caption,
                          dict(numbers.get(shot.name, {})),
                          shlex.join(["wantrain", "sample", "--like", str(folder / f"{shot.name}.mp4")]))
            for shot in shots]


def contact_sheet(path: Path, shots: Sequence[Shot], folder: Path, trigger: str = "") -> None:
    """A PNG of the middle frame of every video, columns by rows."""
    def rows() -> Iterator[list[torch.Tensor]]:
        for row in range(max(shot.row for shot in shots) + 1):
            yield [pictures.middle_frame(folder / f"{shot.name}.mp4") for shot in shots if shot.row == row]

    first = shots[0].column.id
    pictures.contact_sheet(path, list(rows()), list(dict.fromkeys(_title(shot.column, trigger) for shot in shots)),
                           [f"{shot.caption} (seed {shot.seed})" for shot in shots if shot.column.id == first])


def _title(column: Column, trigger: str) -> str:
    return f"{column.label}, {trigger!r}" if column.trigger else column.label
