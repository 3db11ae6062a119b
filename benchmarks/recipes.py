"""wantrain's defaults against those of seven other trainers, and single changes of its own, on the embedded base.

    python -m benchmarks.recipes --out runs/recipes [--worlds style motion subject] [--arms default musubi ...]
                                 [--steps 96] [--seeds 6] [--minutes 60]
    python -m benchmarks.recipes --tables benchmarks/recipes.json

Three worlds of tools.tiny_world.worlds: a style, a motion, a subject. In each of them every arm is trained with a seed
of the search's own at four learning rates a factor of 2 apart, and at more until the best has a worse one on both
sides. At its best it is trained with all seeds. All begin from the same weights of the base, see the clips in the same
order with the same noise, and are measured by the same rows of held-out clips. Told of each world are held-out losses
with intervals of 95 % against the default, over seeds and clips, and what became of plain clips.

Each training is a JSON line in OUT/WORLD/trainings.jsonl; what is there is not trained again. After --minutes all
stops, and the same command goes on. OUT/recipes.json has the losses of all commands of one OUT with as many steps;
--tables makes of it the tables of docs/recipes.md, which says what they mean for Wan.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import patches
from tools.tiny_world.worlds import WORLDS, write_world
from wantrain import config as schema
from wantrain import journal
from wantrain.data.cache import missing
from wantrain.files import write_json
from wantrain.jobs import Ending
from wantrain.recipe.clips import Clips, open_clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.stages import cache
from wantrain.tuner import search, told
from wantrain.tuner.told import Row
from wantrain.tuner.trainings import STOPPED, Arm, Job, Outcome, Planned, Trainings, train_one

FIRST_LR = 1e-3
"""Where the search begins, for an adapter that is not scaled down."""
LRS = (0.5, 1.0, 2.0, 4.0)
"""What is tried of that at least."""
MOST_LRS = 7
SEARCH_SEED = 100
"""Of the search alone: a seed that has chosen a learning rate would flatter it."""
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Kind:
    """What an arm differs in from the default, and where that is from.

    `times` is where the search for its learning rate begins, of where it does for the default; `lr` is the only one
    that is tried.
    It takes `share` of the others' steps. `patch` is one of benchmarks.patches.
    """

    words: tuple[str, ...] = ()
    times: float = 1.0
    source: str = ""
    lr: float | None = None
    share: float = 1.0
    patch: str = ""


LAST, UNIFORM, ALONE = "optim.ema=null", "sigma.distribution=uniform", "independent"

PEERS = {
    "musubi": Kind((
        LAST, "lora.alpha=1", "sigma.distribution=logit_normal", "sigma.shift=3", "optim.betas=[0.9,0.999]",
        "optim.warmup_steps=0"), math.sqrt(32), patch=ALONE,
        source="musubi-tuner, its page on Wan: rank 32, alpha 1, shift 3"),
    "diffusion_pipe": Kind(
        (LAST, "sigma.distribution=logit_normal", "sigma.shift=1"), patch=ALONE,
        source="diffusion-pipe examples/main_example.toml: alpha = rank 32, logit-normal without a shift, warm-up"),
    "diffsynth": Kind((
        LAST, UNIFORM, "sigma.shift=5", "loss.weighting=bell", "optim.betas=[0.9,0.999]", "optim.warmup_steps=0",
        "optim.max_grad_norm=1e9"), source="DiffSynth-Studio diffusion/loss.py, examples/wanvideo: uniform, shift 5, "
                                           "bell weight, no clipping", patch=ALONE),
    "ai_toolkit": Kind((
        LAST, UNIFORM, "sigma.shift=1", "optim.betas=[0.9,0.999]", "optim.weight_decay=1e-4", "optim.warmup_steps=0",
        "data.caption_dropout=0.05"), patch=ALONE,
        source="ai-toolkit config/examples/train_lora_wan22_14b_24gb.yaml: linear timesteps, adamw with 1e-4, dropout "
               "0.05, no average (that of wan21_1b has one)"),
    "simpletuner": Kind((
        LAST, "lora.targets=[attn]", "lora.rank=16", "lora.alpha=16", "sigma.distribution=logit_normal",
        "sigma.shift=3", "optim.betas=[0.9,0.999]", "optim.max_grad_norm=1e9", "data.caption_dropout=0.1"),
        source="SimpleTuner quickstart WAN: attention alone, rank 16, sigmoid with shift 3, dropout 0.1; AdamW for "
               "its Lion", patch=ALONE),
    "finetrainers": Kind(
        (LAST, "lora.targets=[attn]", "sigma.distribution=logit_normal", "sigma.shift=1"), patch=ALONE,
        source="finetrainers examples/training/sft/wan: attention alone, rank 32, logit-normal, warm-up"),
    "videox_fun": Kind((
        LAST, UNIFORM, "lora.rank=64", "lora.alpha=32", "sigma.shift=5", "optim.weight_decay=0.03",
        "optim.max_grad_norm=0.05", "optim.betas=[0.9,0.999]", "optim.eps=1e-10", "optim.warmup_steps=0"), math.sqrt(2),
        "VideoX-Fun scripts/wan2.1/train_lora.py: rank 64, alpha 32, uniform over the batch, clipped at 0.05"),
}
"""Rank 32 and alpha 32 on attention and feed-forward, AdamW with 0.9, 0.99 and 0.01, warm-up and a clip of 1 are
wantrain's own, and stand where nothing else does. Every warm-up is the same share of these short trainings. They export
the last values, not an average, and draw each sample's sigma by itself, but for VideoX-Fun (`--uniform_sampling`)."""

CHANGES = {
    "last": Kind((LAST,)),
    "ema_0.3": Kind(("optim.ema=0.3",)),
    "independent": Kind(patch=ALONE),
    "linear": Kind((LAST, "optim.schedule=linear")),
    "thinned": Kind(patch="thinned"),
    "moving": Kind(patch="moving"),
    "bell": Kind(("loss.weighting=bell",)),
    "task_shift": Kind(("sigma.distribution=logit_normal",)),
    "uniform": Kind((UNIFORM,)),
    "attention": Kind(("lora.targets=[attn]",)),
    "rank_8": Kind(("lora.rank=8", "lora.alpha=8")),
    "rank_128": Kind(("lora.rank=128", "lora.alpha=128")),
    "alpha_half": Kind(("lora.alpha=16",), math.sqrt(2)),
    "alpha_sqrt": Kind(("lora.alpha=5.657",), 32**0.25),
    "alpha_1": Kind(("lora.alpha=1",), math.sqrt(32)),
    "rslora": Kind(("lora.kind=rslora",), 32**-0.25),
    "dora": Kind(("lora.kind=dora", "export.format=diffusers")),
    "lokr": Kind(("lora.kind=lokr", "export.format=lycoris")),
    "lora_plus_4": Kind(("optim.lora_plus=4",), 0.5),
    "shift_5": Kind(("sigma.shift=5",)),
    "cosmap": Kind(("loss.weighting=cosmap",)),
    "min_snr": Kind(("loss.weighting=min_snr",)),
    "cosine": Kind(("optim.schedule=cosine",)),
    "batch_8": Kind(("data.batch_size=8", "train.micro_batch_size=8"), math.sqrt(2), share=0.5),
    "schedule_free": Kind(("optim.name=schedule_free",)),
    "prodigy": Kind(("optim.name=prodigy", "optim.lr=1", "optim.weight_decay=0"), lr=1.0),
    "dropout": Kind(("data.caption_dropout=0.1",)),
    "no_plain": Kind(("data.sources.regularisation.weight=0.001",)),
    "twice_plain": Kind(("data.sources.regularisation.weight=2",)),
}
"""Single changes of the default, those that are asked for most first. Where a divisor scales the adapter down, its
learning rate is the root of that divisor higher; a root of the batch is as usual."""

ARMS = {DEFAULT: Kind(), **PEERS, **CHANGES}
WARM_UP = 1 / 30
"""Share of the steps, as in the demo's recipe."""


class Stopped(Exception):
    """The minutes are over."""


@dataclass(slots=True)
class Results:
    """What was trained in one world: `rates` are the losses of the search by arm and learning rate, `outcomes` those of
    the arms at their best one, by seed.
    """

    learnt: list[str]
    plain: list[str]
    rates: dict[str, dict[float, float]]
    outcomes: dict[str, dict[int, Outcome]]

    def row(self, name: str) -> Row:
        """An arm's numbers."""
        default = None if name == DEFAULT else self.outcomes.get(DEFAULT)
        return told.row_of(name, self.outcomes[name], default, (self.learnt, self.plain))


@dataclass(frozen=True, slots=True)
class Bench:
    """Where all goes, how long trainings are, with how many seeds, and when all ends (seconds of the epoch)."""

    out: Path
    steps: int
    num_seeds: int
    until_s: float

    def words(self, world: str, kind: Kind) -> list[str]:
        """The recipe of an arm."""
        folder = self.out / "worlds" / world
        return ["recipe=demo_anime", "tracker=none", f"run.name={world}", f"run.dir={self.out / world}",
                f"data.cache_dir={self.out / 'cache'}", f"data.sources.style.path={folder / 'set'}",
                "data.sources.style.weight=2", f"data.sources.regularisation.path={folder / 'plain'}",
                "data.sources.regularisation.weight=1", f"data.heldout={folder / 'heldout'}",
                f"data.trigger={WORLDS[world].trigger}", "sigma.distribution=null",
                "data.batch_size=4", "train.micro_batch_size=4",
                f"optim.warmup_steps={max(1, round(WARM_UP * self.steps))}", *kind.words]


@dataclass(slots=True)
class World:
    """Trains arms on one world, in this process: libraries are loaded once, and patches reach what they change."""

    bench: Bench
    name: str
    opened: dict[str, tuple[Recipe, Clips]]
    opening: Path | None = None
    """The folder of its first training, which has measured the base for all others."""

    def arm(self, name: str) -> tuple[Recipe, Clips]:
        """The arm's recipe and clips, which are drawn where they are not there, with all that is missing in the cache.
        """
        folder = self.bench.out / "worlds" / self.name
        if not folder.exists():
            write_world(folder, WORLDS[self.name])
        if name not in self.opened:
            words = self.bench.words(self.name, ARMS[name])
            recipe = open_recipe(schema.load(words))
            clips = open_clips(recipe, words)
            if missing(clips.entries):
                cache.run(recipe.config, words)
            self.opened[name] = recipe, clips
        return self.opened[name]

    def train(self, name: str, lr: float, seed: int) -> Outcome:
        """What this training came to, now or before. Raises Stopped where the minutes are over."""
        kind, (recipe, clips) = ARMS[name], self.arm(name)
        config = replace(recipe.config, optim=replace(recipe.config.optim, lr=lr))
        folder = self.bench.out / self.name / kind.patch
        trainings = Trainings({name: Arm(replace(recipe, config=config), replace(clips, config=config))}, folder,
                              tuple(self.bench.words(self.name, kind)), self.bench.until_s, 1)
        one = Planned(name, round(kind.share * self.bench.steps), seed)
        job = Job(schema.to_yaml(trainings.config(one)), trainings.command, self.bench.until_s, self.opening,
                  folder / "places", 1)

        def work(keys: Sequence[str]) -> Generator[journal.Outcomes[str, Outcome]]:
            with patches.bare(), patches.PATCHES[kind.patch]():
                came = train_one(job)
            yield {keys[0]: journal.Outcome(came, Ending.FAULT if came.fault == STOPPED else Ending.DONE)}

        key = trainings.key(one)
        came = trainings.journal.filled(trainings.journal.read(), [key], work, "training", f"{self.name} {name}")[key]
        if came.fault == STOPPED:
            raise Stopped
        self.opening = self.opening or trainings.run_dir(one)
        return came


def searched(loss_of: Callable[[float], float], first: float) -> dict[float, float]:
    """Losses by learning rate: four, and on in steps of 2 until the best has a worse neighbour on both sides."""
    losses = {first * times: loss_of(first * times) for times in LRS}
    while len(losses) < MOST_LRS:
        best = min(losses, key=losses.__getitem__)
        following = {min(losses): best / 2, max(losses): best * 2}.get(best)
        if following is None:
            break
        losses[following] = loss_of(following)
    return losses


def best_of(losses: Mapping[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def measure(bench: Bench, name: str, arms: Sequence[str]) -> Iterator[Results]:
    """One world: its results after each arm."""
    world = World(bench, name, {})
    _, clips = world.arm(DEFAULT)
    learnt, plain = search.scored({p.name: p.clip.caption for p in clips.heldout}, WORLDS[name].trigger)
    found = Results(learnt, plain, {}, {})

    def loss_of(arm: str, lr: float) -> float:
        came = world.train(arm, lr, SEARCH_SEED)
        return math.inf if came.fault else search.mean(came.losses, learnt)

    for arm in arms:
        kind = ARMS[arm]
        if kind.lr is None:
            found.rates[arm] = searched(partial(loss_of, arm), FIRST_LR * kind.times)
        lr = kind.lr or best_of(found.rates[arm])
        for seed in range(bench.num_seeds):
            found.outcomes.setdefault(arm, {})[seed] = world.train(arm, lr, seed)
        yield found


def as_json(found: Results) -> dict[str, Any]:
    """What a test and `--tables` read; losses to six digits. Left out are arms that no training of came to a result."""
    def rounded(losses: Mapping[str, float]) -> dict[str, float]:
        return {name: round(loss, 6) for name, loss in losses.items()}

    base = found.outcomes[DEFAULT][0].base
    return {"learnt": found.learnt, "plain": found.plain, "base": rounded(base),
            "rates": {arm: {f"{lr:.6g}": round(loss, 6) for lr, loss in own.items()}
                      for arm, own in found.rates.items()},
            "losses": {arm: {str(seed): rounded(one.losses) for seed, one in own.items() if not one.fault}
                       for arm, own in found.outcomes.items() if not all(one.fault for one in own.values())}}


def from_json(told_of: Mapping[str, Any]) -> Results:
    """The inverse of `as_json`."""
    outcomes = {arm: {int(seed): Outcome(losses, told_of["base"]) for seed, losses in own.items()}
                for arm, own in told_of["losses"].items()}
    rates = {arm: {float(lr): loss for lr, loss in own.items()} for arm, own in told_of["rates"].items()}
    return Results(told_of["learnt"], told_of["plain"], rates, outcomes)


def add(path: Path, steps: int, world: str, found: Results) -> None:
    """Put results into the file beside those of other worlds and arms, if these are as long."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("steps") != steps:
        known = {"steps": steps, "worlds": {}}
    own = known["worlds"].setdefault(world, {"rates": {}, "losses": {}})
    now = as_json(found)
    known["worlds"][world] = now | {part: own[part] | now[part] for part in ("rates", "losses")}
    write_json(path, known)


def tables(known: Mapping[str, Any]) -> Iterator[str]:
    """The lines of docs/recipes.md: of each world what was searched, how arms end, and which peers are better or worse.
    """
    for name, own in known["worlds"].items():
        found = from_json(own)
        if found.rates:
            yield from ("", f"{name}: held-out loss after {known['steps']} steps, by learning rate", "", "| arm | |",
                        "|---|---|")
            yield from (f"| {arm} | {', '.join(f'{lr:.4g}: {loss:.4f}' for lr, loss in sorted(losses.items()))} |"
                        for arm, losses in found.rates.items())
        rows = [found.row(arm) for arm, outcomes in found.outcomes.items() if outcomes]
        yield from ("", f"{name}: after {known['steps']} steps, at the best learning rate", "",
                    "| arm | seeds | held-out loss | against the default | against the base | plain clips, against the "
                    "base |", "|---|---|---|---|---|---|")
        yield from (f"| {row.name} | {len(row.seeds)} | {' | '.join(row.cells[:4])} |"
                    for row in sorted(rows, key=lambda row: row.loss))
        yield from ("", verdict(name, rows))
    yield from ("", together({name: from_json(own) for name, own in known["worlds"].items()}))


def verdict(world: str, rows: Sequence[Row]) -> str:
    """Which arms are better or worse than the default with 95 % confidence, each by itself."""
    changes = {row.name: row.change for row in rows if row.change is not None and not math.isnan(row.change.half)}
    better = [name for name, own in changes.items() if own.mean + own.half < 0]
    worse = [name for name, own in changes.items() if own.mean - own.half > 0]
    rest = [name for name in changes if name not in (*better, *worse)]
    return (f"{world}: shown better than the default: {', '.join(better) or 'none'}; shown worse: "
            f"{', '.join(worse) or 'none'}; not shown to differ: {', '.join(rest) or 'none'}.")


def together(worlds: Mapping[str, Results]) -> str:
    """The same of all arms in all worlds, each interval widened so that all hold at once (Bonferroni)."""
    pairs = [(name, found, arm) for name, found in worlds.items() for arm in found.outcomes if arm != DEFAULT]
    better, worse = [], []
    for name, found, arm in pairs:
        losses = [{seed: one.losses for seed, one in found.outcomes[which].items()} for which in (arm, DEFAULT)]
        change = search.change(losses[0], losses[1], found.learnt, len(pairs))
        better += [f"{arm} ({name})"] if change.mean + change.half < 0 else []
        worse += [f"{arm} ({name})"] if change.mean - change.half > 0 else []
    return (f"Of all {len(pairs)} comparisons at once (Bonferroni): shown better than the default: "
            f"{', '.join(better) or 'none'}; shown worse: {', '.join(worse) or 'none'}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for everything")
    parser.add_argument("--tables", type=Path, help="only print the tables of this file")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=WORLDS)
    parser.add_argument("--arms", nargs="*", default=list(PEERS), choices=[*PEERS, *CHANGES], help="beside the default")
    parser.add_argument("--steps", type=int, default=96, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=6, help="trainings of each arm at its learning rate")
    parser.add_argument("--minutes", type=float, default=math.inf, help="when to stop")
    given = parser.parse_args(arguments)
    if given.tables:
        print("\n".join(tables(json.loads(given.tables.read_text(encoding="utf-8")))))
        return
    if given.out is None:
        parser.error("--out FOLDER or --tables FILE")
    bench = Bench(given.out, given.steps, given.seeds, time.time() + given.minutes * 60)
    path = given.out / "recipes.json"
    try:
        for world in given.worlds:
            for found in measure(bench, world, [DEFAULT, *given.arms]):
                add(path, given.steps, world, found)
    except Stopped:
        print("the minutes are over: the same command goes on")
    if path.exists():
        print("\n".join(tables(json.loads(path.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
