"""`wantrain sample`: prompts x seeds x LoRAs x strengths -> videos and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wantrain import config as schema
from wantrain import results
from wantrain.config import Config
from wantrain.engine import launch
from wantrain.recipe import extending, grid, records
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.records import Record, Shot
from wantrain.recipe.sampler import LoraFiles, Studio, inputs_of, open_sampling
from wantrain.results import Column, Prompt
from wantrain.terms import UserError


def run(config: Config, arguments: Sequence[str]) -> None:
    """Sample every prompt, seed, LoRA and strength; what is there already with these settings stays."""
    meeting = grid.meeting_of(config)
    with meeting.first_alone():  # it writes the LoRA files of checkpoints, the others find them
        recipe = open_sampling(config)
        shots = shots_of(recipe, arguments)
    folder = recipe.run_dir / "samples"
    grid.make(recipe, shots, folder, meeting)
    if not launch.is_first():
        return
    columns = list(dict.fromkeys(shot.column for shot in shots))
    grid.contact_sheet(folder / "contact_sheet.png", shots, folder)
    results.write(folder, results.Results(
        config.run.name, config.data.trigger, recipe.variant.fps, columns, list(map(Prompt, config.sampler.prompts)),
        grid.videos_of(shots, folder, {}), settings=schema.flat(config),
        provenance=grid.cache_measured(recipe, folder)))
    print(f"{len(shots)} videos and contact_sheet.png in {folder}")


def repeat(path: Path) -> None:
    """Make a video again from what it says of itself, beside it, and say whether it is the same."""
    like = records.read(path)
    records.refuse_other_files(like)
    recipe = open_sampling(schema.load_yaml(like.config))
    shot = shot_of(recipe, like)
    frames_FCHW = grid.sample_shot(recipe, Studio(recipe, [shot.caption]), shot)
    record = records.record_of(recipe, shot, frames_FCHW)
    again = path.with_name(f"{path.stem}_again")
    records.write(again, recipe, frames_FCHW, record)
    if record.frames == like.frames:
        print(f"{again}: the same frames as {path}, to the bit")
        return
    other = {name: (value, record.made_by.get(name)) for name, value in like.made_by.items()
             if value != record.made_by.get(name)}
    told = ", ".join(f"{name} {was} and now {now}" for name, (was, now) in other.items())
    print(f"{again}: not the same bits as {path}, which was made with {told or 'what is here too'}")


def shot_of(recipe: Recipe, like: Record) -> Shot:
    """The video of a record."""
    loras: LoraFiles = {expert: [(Path(path), own) for name, path, own, _ in like.loras if name == (expert or "")]
                        for expert in (one.base.expert for one in recipe.trainings())}
    place, number = like.place
    inputs = inputs_of(recipe, number, lambda: open_clips(recipe, ()))[place]
    return Shot(0, (place, number), like.prompt, like.seed, Column("again", "again", strength=like.strength),
                loras if like.strength else None, inputs)


def shots_of(recipe: Recipe, arguments: Sequence[str]) -> list[Shot]:
    """Every video of the config. Without LoRAs where only the base is sampled."""
    own = recipe.config.sampler
    if not own.prompts:
        raise UserError("sampler.prompts is empty", "sampler.prompts='[a red house, a blue boat]'")
    inputs = inputs_of(recipe, len(own.prompts), lambda: open_clips(recipe, arguments))
    strengths = [strength for strength in own.strengths if strength]
    columns: list[tuple[Column, LoraFiles | None]] = [(grid.BASE, None)] if 0 in own.strengths else []
    columns += [(stack.column(strength), stack.loras) for stack in (grid.stacks_of(recipe, arguments) if strengths
                                                                    else ()) for strength in strengths]
    texts = extending.captions(recipe, own.prompts, recipe.run_dir / "samples")
    return grid.shots_of(columns, list(map(Prompt, texts)), own.seeds, inputs)
