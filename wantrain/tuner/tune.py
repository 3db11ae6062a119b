"""`wantrain tune`: settings of a recipe compared by held-out losses, within a budget; the best becomes a recipe."""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from wantrain import config as schema
from wantrain import lock
from wantrain.config import Config, DataMode
from wantrain.data.cache import missing
from wantrain.engine import launch
from wantrain.files import write_json, write_text
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import open_recipe, training_faults
from wantrain.stages import cache
from wantrain.terms import UserError
from wantrain.tuner import search, told
from wantrain.tuner.search import Round, Speed
from wantrain.tuner.settings import DEFAULT
from wantrain.tuner.told import Row
from wantrain.tuner.trainings import STOPPED, Arm, Outcome, Planned, Trainings, num_processes

MARK = "Written by wantrain tune"
OPENING_STEPS = 5
"""Of the training that measures the base for all others, and how fast this machine is."""

RESERVE_STEPS = 2
"""So long before a budget's end trainings are asked to stop: they finish the step at hand, and save."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command asks for: the settings' names, steps and seeds of a whole training, and when it began and must
    have ended (seconds of the epoch).
    """

    settings: list[str]
    num_steps: int
    seeds: list[int]
    until_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """What the last round has measured, by arm and seed."""

    outcomes: dict[str, dict[int, Outcome]]
    num_steps: int

    @property
    def is_whole(self) -> bool:
        """Whether the budget has let every training end."""
        return all(one.fault != STOPPED for of_seed in self.outcomes.values() for one in of_seed.values())


def run(configs: Mapping[str, Config], arguments: Sequence[str], given: argparse.Namespace, overrides: Sequence[str],
        config_dir: Path | None) -> None:
    """Search among the settings (`settings.configs_of`), and write what was found. Everything that can be wrong is told
    before anything heavy begins.
    """
    config = configs[DEFAULT]
    until_s = time.time() + given.minutes * 60 if given.minutes else math.inf
    words = [*overrides, *(["--config-dir", str(config_dir)] if config_dir else [])]
    refuse(config)
    parent, path = recipe_path(config, overrides)
    arms = open_arms(configs, overrides)
    num_steps = given.steps or config.train.num_steps
    asked = Asked([name for name in arms if name != DEFAULT], num_steps,
                  [config.train.seed + number for number in range(given.seeds)], until_s)
    folder, command = Path(config.run.dir) / "tune", ["wantrain", "tune", *arguments]
    with lock.held(folder, command):
        write_caches(arms, words)
        trainings = Trainings(arms, folder, tuple(words), until_s, num_processes(config))
        found = searched(trainings, asked)
    clips = clips_of(arms[DEFAULT])
    rows = rows_of(found, clips)
    notes = sentences(found, rows, clips, asked)
    write_json(folder / "tune.json", {"command": command, "num_steps": found.num_steps,
                                      "rows": [asdict(row) for row in rows], "notes": notes})
    write_text(folder / "tune.html", told.page(f"{config.run.name}: what was tuned", rows, notes, shlex.join(command)))
    print(told.table(rows), *notes, f"page: {folder / 'tune.html'}", sep="\n")
    best = min(rows, key=lambda row: row.loss)
    if best.fault:
        raise UserError(f"no training came to a result: {best.fault}", f"look into {folder / 'trainings'}/*/logs")
    if not found.is_whole:
        print(f"not all is done, and no recipe is written\n  next: {shlex.join(command)}    goes on from there")
    elif best.name == DEFAULT:
        print(f"the recipe stays as it is\n  next: {shlex.join(['wantrain', 'run', *words])}")
    else:
        head = [f"{MARK} for {best.name}: {', '.join(best.cells[:2])}.", *notes]
        both = schema.load([recipe_word(overrides)], config_dir), arms[best.name].recipe.config
        write_text(path, told.recipe_text(path.stem, parent, both, overrides, head))
        print(f"wrote {path}\n  next: wantrain run {path.stem}")


def refuse(config: Config) -> None:
    """Raise UserError for a recipe that cannot be tuned."""
    if launch.world_size() > 1:
        raise UserError("tune starts its own processes, one training on each GPU, and this is one that a launcher "
                        "started", "wantrain tune ...    without the launcher")
    if not config.data.heldout:
        raise UserError("tune compares losses on held-out clips, and data.heldout is not set",
                        "data.heldout=FOLDER, with a few clips that are never trained on")
    if config.data.mode is not DataMode.cache:
        raise UserError(f"data.mode = {config.data.mode.name}: tune trains from one cache", "data.mode=cache")


def recipe_word(overrides: Sequence[str]) -> str:
    """The word of the command line that chooses the recipe."""
    return next(word for word in overrides if word.startswith("recipe=") or ("=" not in word and word[0] not in "~-"))


def recipe_path(config: Config, overrides: Sequence[str]) -> tuple[str, Path]:
    """(the recipe's name, the file for the best of it). Raises UserError where a file is there that tune did not write.
    """
    parent = Path(recipe_word(overrides).removeprefix("recipe="))
    folder = parent.parent if parent.suffix == ".yaml" else Path("recipes")
    path = folder / f"{config.run.name}_tuned.yaml"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path} is there, and is not overwritten", "run.name=ANOTHER, or move that file")
    return parent.stem if parent.suffix == ".yaml" else str(parent), path


def open_arms(configs: Mapping[str, Config], overrides: Sequence[str]) -> dict[str, Arm]:
    """Each setting looked into. Raises UserError for what cannot be trained, or not be compared."""
    arms = {name: arm_of(name, own, overrides) for name, own in configs.items()}
    for name, arm in arms.items():
        if measured_at(arm) != measured_at(arms[DEFAULT]):
            raise UserError(f"{name}: its held-out losses are measured at other sigmas or sizes than the default's, "
                            "and say nothing beside them", "compare settings that leave data.num_frames, "
                            "data.resolutions and sigma.range as they are")
    return arms


def measured_at(arm: Arm) -> tuple[object, ...]:
    """The sigmas and sizes at which held-out clips are measured."""
    return [own.validation_sigmas for own in arm.recipe.trainings()], [p.bucket for p in arm.clips.heldout]


def arm_of(name: str, config: Config, overrides: Sequence[str]) -> Arm:
    """A setting's recipe and clips. Raises UserError where it could not be trained."""
    recipe = open_recipe(config)
    for fault in (fault for own in recipe.trainings() for fault in training_faults(own)):
        raise UserError(f"{name}: {fault.message}", fault.next_step)
    return Arm(recipe, open_clips(recipe, overrides))


def write_caches(arms: Mapping[str, Arm], arguments: Sequence[str]) -> None:
    """Build what is missing of the one cache for all arms."""
    for arm in arms.values():
        if missing(arm.clips.entries):
            cache.run(arm.recipe.config, arguments)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the card is the first training's


def searched(trainings: Trainings, asked: Asked) -> Found:
    """Measure base and speed, choose the rounds that the budget holds, and do them."""
    opening = Planned(DEFAULT, OPENING_STEPS, asked.seeds[0])
    first = trainings.outcomes([opening])[opening]
    if first.fault:
        raise UserError(f"the opening training of {OPENING_STEPS} steps has no result: {first.fault}",
                        f"{trainings.run_dir(opening)}/logs says more" if first.fault != STOPPED else
                        "a larger --minutes")
    speed = Speed(max(0.0, first.seconds - OPENING_STEPS * first.step_s), first.step_s, trainings.num_processes)
    plan = search.rounds(len(asked.settings), asked.num_steps, len(asked.seeds), 0)
    if asked.until_s < math.inf:
        trainings = replace(trainings, until_s=asked.until_s - RESERVE_STEPS * first.step_s)
        plan = search.fitting(len(asked.settings), asked.num_steps, len(asked.seeds), speed,
                              trainings.until_s - time.time())
    print("\n".join(forecast(plan, speed)), flush=True)
    names, learnt = asked.settings, clips_of(trainings.arms[DEFAULT])
    for own, following in itertools.pairwise(plan):
        found = Found(outcomes(trainings, names, own, asked.seeds, opening), own.num_steps)
        if not found.is_whole:
            return found
        names = search.better_half({row.name: row.loss for row in rows_of(found, learnt)}, following.num_settings)
    return Found(outcomes(trainings, [DEFAULT, *names], plan[-1], asked.seeds, opening), plan[-1].num_steps)


def clips_of(arm: Arm) -> tuple[list[str], list[str]]:
    """The held-out clips to learn, and the plain ones."""
    return search.scored({p.name: p.clip.caption for p in arm.clips.heldout}, arm.recipe.config.data.trigger)


def outcomes(trainings: Trainings, names: Sequence[str], own: Round, seeds: Sequence[int], opening: Planned
             ) -> dict[str, dict[int, Outcome]]:
    """One round's, by arm and seed: all arms with one seed before the next, so that what a budget ends is whole."""
    todo = [Planned(name, own.num_steps, seed) for seed in seeds[:own.num_seeds] for name in names]
    done = trainings.outcomes(todo, opening)
    return {name: {one.seed: outcome for one, outcome in done.items() if one.arm == name} for name in names}


def forecast(plan: Sequence[Round], speed: Speed) -> list[str]:
    """What will be trained, and how long that takes by the opening's speed."""
    lines = [f"{own.num_settings}{' and the default' * (own is plan[-1])}: {own.num_steps} steps, {own.num_seeds} "
             f"seed{'s' * (own.num_seeds > 1)}" for own in plan]
    return [*lines, f"about {speed.seconds(plan) / 60:.1f} minutes, {speed.num_processes} side by side at "
            f"{speed.step_s:.2f} s a step"]


def rows_of(found: Found, clips: tuple[list[str], list[str]]) -> list[Row]:
    """The arms, compared with the default where it was trained as long, over the seeds that the budget let all end."""
    seeds = [seed for seed in next(iter(found.outcomes.values()))
             if all(own[seed].fault != STOPPED for own in found.outcomes.values())]
    ended = {name: {seed: own[seed] for seed in seeds or own} for name, own in found.outcomes.items()}
    default = ended.get(DEFAULT)
    return [told.row_of(name, own, None if name == DEFAULT else default, clips) for name, own in ended.items()]


def sentences(found: Found, rows: Sequence[Row], clips: tuple[list[str], list[str]], asked: Asked) -> list[str]:
    """What the numbers say, and what they do not."""
    learnt, plain = clips
    best, default = min(rows, key=lambda row: row.loss), found.outcomes.get(DEFAULT)
    said = []
    if default is not None and best.name != DEFAULT and best.seeds:
        now, before = ({seed: one.losses for seed, one in own.items() if not one.fault}
                       for own in (found.outcomes[best.name], default))
        if now.keys() & before.keys():
            change = search.change(now, before, learnt, len(asked.settings))
            shown = "is better than" if change.mean + change.half < 0 else "is not shown to differ from"
            said.append(f"{best.name} {shown} the default: {told.told(change)} with 95 % confidence for the best of "
                        f"{len(asked.settings)} (Bonferroni).")
    elif default is not None and best.seeds:
        said.append("No setting has a lower held-out loss than the default.")
    said.append(f"Measured on {len(learnt)} held-out clips, {found.num_steps} steps, {len(best.seeds)} of "
                f"{len(asked.seeds)} seeds{'' if len(best.seeds) > 1 else ': what another seed changes is not known'}.")
    if not set(asked.settings) <= found.outcomes.keys():
        said.append("Settings that are not in the table fell out after fewer steps, where high learning rates look "
                    "better than they end.")
    said.append("Not known: what longer trainings would say, whether people prefer these samples"
                + ("." if plain else ", and the drift where the trigger is absent, for data.heldout has no clip "
                   "without it."))
    return said
