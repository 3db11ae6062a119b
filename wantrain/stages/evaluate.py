"""`wantrain evaluate`: base against LoRA on fixed prompts, seeds and held-out clips -> report.json and report.html."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wantrain import config as schema
from wantrain import metrics, objective, pictures, style, validation
from wantrain.config import Config
from wantrain.data import decode
from wantrain.files import write_json, write_text
from wantrain.jobs import progress
from wantrain.models import sampling
from wantrain.models.lora_formats import read_lora
from wantrain.pages import html
from wantrain.recipe.clips import Clips, evaluation_faults, holding_trigger, open_clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.recipe.sampler import inputs_of, load_pipeline, lora_files, sampled
from wantrain.recipe.samples import Cached, samples_of
from wantrain.terms import NUM_TIMESTEPS, Batch

CONDITIONS = ("base", "lora_with_trigger", "lora_without_trigger")


@dataclass(slots=True)
class Trio:
    """One prompt and seed: frames_FCHW of each condition, and the mp4 files."""

    prompt: str
    seed: int
    videos: dict[str, torch.Tensor]
    files: dict[str, Path]


def run(config: Config, arguments: Sequence[str]) -> None:
    """Measure and show what the LoRA does: with its trigger, without it, and against the base."""
    recipe = open_recipe(config)
    clips = open_clips(recipe, arguments)
    for fault in evaluation_faults(clips):
        raise fault
    inputs = inputs_of(recipe, len(config.evaluate.prompts), lambda: clips)
    cached = Cached(clips)
    loras = lora_files(recipe, arguments)
    pipeline = load_pipeline(recipe, loras, [with_trigger(config, prompt, condition)
                                             for prompt in config.evaluate.prompts for condition in CONDITIONS])
    trainings = {one.base.expert or "": one.run_dir for one in recipe.trainings()}
    shown, rows = [], []
    styles: dict[str, list[style.Style]] = {c: [] for c in CONDITIONS}
    for trio in sample_trios(recipe, pipeline, inputs):  # of whose videos only one trio is held at once
        shown.append((trio.prompt, trio.seed, trio.files))
        rows.append([trio.videos[c][len(trio.videos[c]) // 2] for c in CONDITIONS])
        for c in CONDITIONS:
            styles[c].append(style.describe([trio.videos[c]]))
    distances = style_distances(clips, {c: style.mean(styles[c]) for c in CONDITIONS})
    numbers = {
        "style_distance": distances,
        "validation_loss": validation_losses(recipe, clips, pipeline, cached),
        "settings": schema.flat(config),
        "run": {expert: json.loads((run_dir / "run.json").read_text()) for expert, run_dir in trainings.items()
                if (run_dir / "run.json").exists()},
        "loras": [{"path": str(path), "strength": strength, "metadata": read_lora(path).metadata}
                  for uses in loras.values() for path, strength in uses],
    }
    folder = recipe.run_dir / "report"
    pictures.contact_sheet(folder / "before_after.png", rows, ["base", f"LoRA, {config.data.trigger!r}",
                                                               "LoRA, no trigger"],
                           [f"{prompt} (seed {seed})" for prompt, seed, _ in shown])
    write_json(recipe.run_dir / "report.json", numbers)
    page = html.evaluation_page(
        config.run.name, config.data.trigger, numbers,
        {expert: metrics.read(run_dir / "metrics.jsonl") for expert, run_dir in trainings.items()},
        shown)
    write_text(folder / "report.html", page)
    told = ", ".join(f"{k} {v:.3f}" for k, v in distances.items() if isinstance(v, float))
    print(f"style distance: {told}\nreport: {folder / 'report.html'} and {recipe.run_dir / 'report.json'}")


def with_trigger(config: Config, prompt: str, condition: str) -> str:
    """The prompt as a condition has it."""
    return f"{config.data.trigger}, {prompt}" if condition == "lora_with_trigger" else prompt


def sample_trios(recipe: Recipe, pipeline: sampling.Pipeline, inputs: Sequence[sampling.Inputs]) -> Iterator[Trio]:
    """Every evaluation prompt and seed in the three conditions, from the same noise and the same inputs."""
    config = recipe.config
    jobs = [(prompt, seed, given) for prompt, given in zip(config.evaluate.prompts, inputs, strict=True)
            for seed in config.evaluate.seeds]
    with progress(len(jobs) * len(CONDITIONS), 0, "video", "samples") as bar:
        for number, (prompt, seed, given) in enumerate(jobs):
            trio = Trio(prompt, seed, {}, {})
            for condition in CONDITIONS:
                text = with_trigger(config, prompt, condition)
                trio.videos[condition] = sampled(recipe, pipeline, text, seed=seed, inputs=given,
                                                 strength=0.0 if condition == "base" else 1.0)
                trio.files[condition] = recipe.run_dir / "report" / f"{number:03d}_{condition}.mp4"
                pictures.write_mp4(trio.files[condition], trio.videos[condition], recipe.variant.fps)
                bar.update()
            yield trio


def style_distances(clips: Clips, samples: Mapping[str, style.Style]) -> dict[str, object]:
    """Distance of each condition's samples to the style set, and the floor: held-out clips to the style set.

    The style set is the training clips whose caption holds the trigger. `nearer_to_base` compares the samples
    without trigger with the base's samples and with the style set.
    """
    wanted = style.describe(map(decode.read_window, holding_trigger(clips)))
    parts = {c: style.distance(described, wanted) for c, described in samples.items()}
    parts["floor"] = style.distance(style.describe(map(decode.read_window, clips.heldout)), wanted)
    to_base = style.distance(samples["lora_without_trigger"], samples["base"])
    return {
        **{name: part["style"] for name, part in parts.items()},
        "lora_without_trigger_to_base": to_base["style"],
        "lora_over_base": parts["lora_with_trigger"]["style"] / parts["base"]["style"],
        "parts": {**parts, "lora_without_trigger_to_base": to_base},
    }


def validation_losses(recipe: Recipe, clips: Clips, pipeline: sampling.Pipeline, cached: Cached) -> dict[str, object]:
    """Held-out loss of the base and of the LoRA, mean and at each sigma, and their difference with its interval."""
    sigmas = recipe.validation_sigmas
    heldout = validation.HeldOut(clips.heldout, sigmas, samples_of(clips, cached, clips.heldout),
                                 recipe.config.train.micro_batch_size)
    numbers: dict[str, object] = {"sigmas": sigmas}
    tables = {}
    for name, strength in (("base", 0.0), ("lora", 1.0)):
        sampling.set_strength(pipeline, strength)
        tables[name] = torch.stack([validation.losses(heldout, [(place, s, 0) for place in range(len(clips.heldout))],
                                                      loss_of(pipeline, sigma)) for s, sigma in enumerate(sigmas)], 1)
        numbers[name] = float(tables[name].mean())
        numbers[f"{name}_by_sigma"] = tables[name].mean(0).tolist()
    told = validation.interval((tables["lora"] - tables["base"]).mean(1))
    numbers |= {"lora_minus_base": told.mean, "lora_minus_base_ci95": None if math.isnan(told.half) else told.half}
    return numbers


def loss_of(pipeline: sampling.Pipeline, sigma: float) -> Callable[[Batch], torch.Tensor]:
    """The loss of the transformer that works at this sigma."""
    transformer, _ = pipeline.at(NUM_TIMESTEPS * sigma)
    pipeline.put_to_work(transformer)
    device = pipeline.device
    return lambda batch: objective.losses(transformer, batch, objective.Objective(), device=device,
                                          dtype=pipeline.dtype)
