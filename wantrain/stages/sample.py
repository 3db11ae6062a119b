"""`wantrain sample`: prompts x seeds x LoRA strengths -> videos and a contact sheet, through diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from wantrain import config as schema
from wantrain import pictures
from wantrain.config import Config
from wantrain.files import write_json
from wantrain.jobs import progress
from wantrain.recipe import records
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.recipe.records import Job
from wantrain.recipe.sampler import LoraFiles, inputs_of, load_pipeline, lora_files, sampled, sampler_settings
from wantrain.terms import UserError


def run(config: Config, arguments: Sequence[str]) -> None:
    """Sample every prompt, seed and strength; what exists already with these settings is made again."""
    recipe = open_recipe(config)
    jobs, strengths = jobs_of(recipe, arguments), config.sampler.strengths
    loras = loras_of(recipe, arguments)
    folder = recipe.run_dir / "samples"
    rows: list[list[torch.Tensor]] = [[] for _ in jobs]
    with progress(len(jobs) * len(strengths), 0, "video", "samples") as bar:
        for job, strength, frames_FCHW in videos(recipe, loras, [(job, s) for job in jobs for s in strengths]):
            records.write(folder / f"{job.number:03d}_strength_{strength:g}", recipe, frames_FCHW,
                          records.record_of(recipe, loras, job, strength, frames_FCHW))
            rows[job.number].append(frames_FCHW[len(frames_FCHW) // 2])
            bar.update()
    columns = [f"strength {s:g}" if s else "base" for s in strengths]
    pictures.contact_sheet(folder / "contact_sheet.png", rows, columns, [f"{j.prompt} (seed {j.seed})" for j in jobs])
    write_json(folder / "samples.json", _index(recipe, jobs, loras))
    print(f"{len(jobs) * len(columns)} videos and contact_sheet.png in {folder}")


def repeat(path: Path) -> None:
    """Make a video again from what it says of itself, beside it, and say whether it is the same."""
    like = records.read(path)
    records.refuse_other_files(like)
    recipe = open_recipe(schema.load_yaml(like.config))
    job = jobs_of(recipe, ())[like.number]
    loras = loras_of(recipe, ())
    (_, strength, frames_FCHW), = videos(recipe, loras, [(job, like.strength)])
    record = records.record_of(recipe, loras, job, strength, frames_FCHW)
    again = path.with_name(f"{path.stem}_again")
    records.write(again, recipe, frames_FCHW, record)
    if record.frames == like.frames:
        print(f"{again}: the same frames as {path}, to the bit")
        return
    other = {name: (value, record.made_by.get(name)) for name, value in like.made_by.items()
             if value != record.made_by.get(name)}
    told = ", ".join(f"{name} {was} and now {now}" for name, (was, now) in other.items())
    print(f"{again}: not the same bits as {path}, which was made with {told or 'what is here too'}")


def jobs_of(recipe: Recipe, arguments: Sequence[str]) -> list[Job]:
    """Every prompt with every seed, and what it is sampled from besides."""
    own = recipe.config.sampler
    if not own.prompts:
        raise UserError("sampler.prompts is empty", "sampler.prompts='[a red house, a blue boat]'")
    inputs = inputs_of(recipe, len(own.prompts), lambda: open_clips(recipe, arguments))
    pairs = [(prompt, seed, given) for prompt, given in zip(own.prompts, inputs, strict=True) for seed in own.seeds]
    return [Job(number, *pair) for number, pair in enumerate(pairs)]


def loras_of(recipe: Recipe, arguments: Sequence[str]) -> LoraFiles:
    """The LoRAs to load: none where only the base is sampled."""
    return lora_files(recipe, arguments) if any(recipe.config.sampler.strengths) else {}


def videos(recipe: Recipe, loras: LoraFiles, wanted: Sequence[tuple[Job, float]]
           ) -> Iterator[tuple[Job, float, torch.Tensor]]:
    """Each job at its strength with its frames_FCHW, one after the other."""
    pipeline = load_pipeline(recipe, loras, [job.prompt for job, _ in wanted])
    for job, strength in wanted:
        yield job, strength, sampled(recipe, pipeline, job.prompt, seed=job.seed, strength=strength, inputs=job.inputs)


def _index(recipe: Recipe, jobs: Sequence[Job], loras: LoraFiles) -> dict[str, object]:
    settings = sampler_settings(recipe)
    used = {expert or "": [f"{path}={strength:g}" for path, strength in uses] for expert, uses in loras.items()}
    return {"loras": used, "num_steps": settings.num_steps, "guidance": settings.guidance, "shift": settings.shift,
            "profile": settings.profile, "bucket": str(settings.bucket),
            "samples": [{"number": j.number, "prompt": j.prompt, "seed": j.seed} for j in jobs]}
