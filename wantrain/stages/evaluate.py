"""`wantrain evaluate`: base against LoRAs on fixed prompts, seeds and held-out clips -> videos, numbers and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wantrain import config as schema
from wantrain import results
from wantrain.config import Config
from wantrain.engine import launch
from wantrain.files import read_object
from wantrain.models.lora_formats import read_lora
from wantrain.pages import run_page
from wantrain.recipe import extending, grid, judged
from wantrain.recipe.clips import evaluation_faults, open_clips
from wantrain.recipe.draft import evaluation_prompts
from wantrain.recipe.grid import Stack
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import LoraFiles, inputs_of, open_sampling
from wantrain.recipe.samples import Cached, samples_of
from wantrain.results import Column, Metric, Prompt
from wantrain.validation import HeldOut, Share


def run(config: Config, arguments: Sequence[str]) -> None:
    """Show and measure what LoRAs do: with the trigger, the recipe's own without it, and the base."""
    meeting = grid.meeting_of(config)
    with meeting.first_alone():  # it looks into new files and writes the LoRAs of checkpoints, the others find them
        recipe = open_sampling(config)
        clips = open_clips(recipe, arguments)
        for fault in evaluation_faults(clips):
            raise fault
        prompts = evaluation_prompts(clips)
        inputs = inputs_of(recipe, len(prompts), lambda: clips)
        cached = Cached(clips)
        columns = columns_of(config, grid.stacks_of(recipe, arguments))
        folder = recipe.run_dir / "report"
        texts = extending.captions(recipe, [prompt.text for prompt in prompts], folder)
    shots = grid.shots_of(columns, list(map(Prompt, texts)), config.evaluate.seeds, inputs, config.data.trigger)
    studio = grid.make(recipe, shots, folder, meeting)
    losses: judged.Losses = {}
    if not config.sampler.fast_lora:  # with one the base is no longer what was trained on
        heldout = HeldOut(clips.heldout, recipe.validation_sigmas, samples_of(clips, cached, clips.heldout),
                          config.train.micro_batch_size, Share(len(meeting.processes), launch.rank(), meeting.gather))
        losses = judged.heldout_losses(studio, heldout, [one for one in columns if one[0].trigger or not one[0].lora])
    if not launch.is_first():
        return
    videos, metrics = judged.judge(clips, shots, folder, recipe.variant.fps)
    metrics += judged.loss_metrics(losses)
    grid.contact_sheet(folder / "before_after.png", shots, folder, config.data.trigger)
    results.write(folder, results.Results(
        config.run.name, config.data.trigger, recipe.variant.fps, [column for column, _ in columns], prompts,
        grid.videos_of(shots, folder, {name: one.numbers for name, one in videos.items()}), metrics,
        schema.flat(config), provenance(recipe, columns, losses) | grid.cache_measured(recipe, folder)))
    print(*told([column for column, _ in columns], metrics), sep="\n")
    print(f"report: {run_page.write(recipe.run_dir)} and {folder / results.NAME}")


def columns_of(config: Config, stacks: Sequence[Stack]) -> list[tuple[Column, LoraFiles | None]]:
    """The base; the recipe's LoRA at every strength with the trigger, and at the last without it; then the others."""
    strengths = [strength for strength in config.sampler.strengths if strength] or [1.0]
    own, *others = [[(stack.column(strength, trigger=True), stack.loras) for strength in strengths] for stack in stacks]
    column, loras = own[-1]
    without = replace(column, id=f"{column.id}_no_trigger", label=f"{column.label}, no trigger", trigger=False)
    return [(grid.BASE, None), *own, (without, loras), *(one for other in others for one in other)]


def provenance(recipe: Recipe, columns: Sequence[tuple[Column, LoraFiles | None]], losses: judged.Losses
               ) -> dict[str, Any]:
    """Where the results come from: what trainings said of themselves, what LoRA files do, losses at each sigma."""
    found: dict[str, Any] = {}
    for one in recipe.trainings():
        if header := read_object(one.run_dir / "run.json"):
            found[f"run {one.base.expert or ''}".strip()] = header
    for _, loras in columns:
        for path, _ in [use for uses in (loras or {}).values() for use in uses]:
            found[f"LoRA file {path}"] = read_lora(path).metadata
    if losses:
        found["held-out loss by sigma"] = {
            f"{sigma:.4f}": {column: float(table[:, place].mean()) for column, table in losses.items()}
            for place, sigma in enumerate(recipe.validation_sigmas)}
    return found


def told(columns: Sequence[Column], metrics: Sequence[Metric]) -> list[str]:
    """The numbers that matter most, a line each."""
    labels = {column.id: column.label for column in columns}
    lines = []
    for metric in metrics:
        if metric.name in ("style", "selectivity", "heldout_minus_base"):
            parts = [f"{labels[column]} {mean:.3f}" + ("" if half is None else f" +- {half:.3f}")
                     for column, (mean, half) in metric.columns.items()]
            floor = [] if metric.reference is None else [f"held-out clips {metric.reference:.3f}"]
            lines.append(f"{metric.label}: {', '.join(parts + floor)}")
    return lines
