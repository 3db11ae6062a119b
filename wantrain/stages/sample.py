"""`wantrain sample`: prompts x seeds x LoRA strengths -> mp4 files and a contact sheet, through diffusers."""

from __future__ import annotations

from collections.abc import Sequence

from wantrain import pictures
from wantrain.config import Config
from wantrain.files import write_json
from wantrain.jobs import progress
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.recipe.sampler import LoraFiles, inputs_of, load_pipeline, lora_files, sampled, sampler_settings
from wantrain.terms import UserError


def run(config: Config, arguments: Sequence[str]) -> None:
    """Sample every prompt, seed and strength; what exists already with these settings is made again."""
    recipe = open_recipe(config)
    if not config.sampler.prompts:
        raise UserError("sampler.prompts is empty", "sampler.prompts='[a red house, a blue boat]'")
    loras = lora_files(recipe, arguments) if any(config.sampler.strengths) else {}
    inputs = inputs_of(recipe, len(config.sampler.prompts), lambda: open_clips(recipe, arguments))
    pipeline = load_pipeline(recipe, loras, config.sampler.prompts)
    folder = recipe.run_dir / "samples"
    jobs = [(prompt, seed, given) for prompt, given in zip(config.sampler.prompts, inputs, strict=True)
            for seed in config.sampler.seeds]
    rows = []
    with progress(len(jobs) * len(config.sampler.strengths), 0, "video", "samples") as bar:
        for number, (prompt, seed, given) in enumerate(jobs):
            row = []
            for strength in config.sampler.strengths:
                frames_FCHW = sampled(recipe, pipeline, prompt, seed=seed, strength=strength, inputs=given)
                pictures.write_mp4(folder / f"{number:03d}_strength_{strength:g}.mp4", frames_FCHW, recipe.variant.fps)
                row.append(frames_FCHW[len(frames_FCHW) // 2])
                bar.update()
            rows.append(row)
    columns = [f"strength {s:g}" if s else "base" for s in config.sampler.strengths]
    pictures.contact_sheet(folder / "contact_sheet.png", rows, columns, [f"{p} (seed {s})" for p, s, _ in jobs])
    write_json(folder / "samples.json", _index(recipe, [job[:2] for job in jobs], loras))
    print(f"{len(jobs) * len(columns)} videos and contact_sheet.png in {folder}")


def _index(recipe: Recipe, jobs: Sequence[tuple[str, int]], loras: LoraFiles) -> dict[str, object]:
    settings = sampler_settings(recipe)
    return {"loras": list(map(str, loras.values())), "num_steps": settings.num_steps, "guidance": settings.guidance,
            "shift": settings.shift, "bucket": str(settings.bucket),
            "samples": [{"number": n, "prompt": p, "seed": s} for n, (p, s) in enumerate(jobs)]}
