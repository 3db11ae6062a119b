"""wantrain's defaults against those of seven other trainers, and single changes of its own, on the embedded base.

    python -m benchmarks.recipes --out runs/recipes [--worlds style motion subject] [--arms default musubi ...]
                                 [--steps 60] [--seeds 3] [--minutes 60]

Three worlds of tools.tiny_world.worlds: a style, a motion, a subject. Each arm is trained with one seed at each of its
learning rates for half the steps, then at the best of them for all steps and seeds; where the best stands at the edge
of the row, the row grows. All begin from the same weights of the base, see the clips in the same order with the same
noise, and are measured by the same rows of held-out clips. A table a world: held-out loss with intervals of 95 %
against the default over seeds and clips, and what became of plain clips.

Each training is a JSON line in OUT/WORLD/trainings.jsonl; what is there is not trained again. After --minutes all
stops, and the same command goes on. What it means for Wan: docs/recipes.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.tiny_world.worlds import WORLDS, write_world
from wantrain import config as schema
from wantrain.data.cache import missing
from wantrain.files import write_json
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import open_recipe
from wantrain.stages import cache
from wantrain.tuner import search, told
from wantrain.tuner.trainings import STOPPED, Arm, Outcome, Planned, Trainings

LRS = (5e-4, 1e-3, 2e-3, 4e-3)
"""Of an adapter that is not scaled down. Of one that is, those times the square root of its divisor."""
MOST_GROWN = 2
"""Rows of learning rates grow by so many at the most."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an arm differs in, its learning rates, and where that is from."""

    words: tuple[str, ...]
    lrs: tuple[float, ...] = LRS
    source: str = ""


def scaled(divisor: float) -> tuple[float, ...]:
    """The learning rates of an adapter that is scaled down by so much."""
    return tuple(lr * math.sqrt(divisor) for lr in LRS)


PEERS = {
    "musubi": Kind((
        "lora.alpha=1", "sigma.distribution=logit_normal", "sigma.shift=3", "optim.betas=[0.9,0.999]",
        "optim.warmup_steps=0"), scaled(32), "musubi-tuner, its page on Wan: rank 32, alpha 1, shift 3"),
    "diffusion_pipe": Kind(
        ("sigma.distribution=logit_normal", "sigma.shift=1"),
        source="diffusion-pipe examples/main_example.toml: alpha = rank 32, logit-normal without a shift, warm-up"),
    "diffsynth": Kind((
        "sigma.shift=5", "loss.weighting=bell", "optim.betas=[0.9,0.999]", "optim.warmup_steps=0",
        "optim.max_grad_norm=1e9"), source="DiffSynth-Studio diffusion/loss.py, examples/wanvideo: uniform, shift 5, "
                                           "bell weight, no clipping"),
    "ai_toolkit": Kind(
        ("sigma.shift=1", "optim.betas=[0.9,0.999]", "optim.weight_decay=1e-4", "optim.warmup_steps=0"),
        source="ai-toolkit config/examples/train_lora_wan22_14b_24gb.yaml: linear timesteps, adamw with 1e-4"),
    "simpletuner": Kind((
        "lora.targets=[attn]", "lora.rank=16", "lora.alpha=16", "sigma.distribution=logit_normal", "sigma.shift=3",
        "optim.betas=[0.9,0.999]", "optim.max_grad_norm=1e9", "data.caption_dropout=0.1"),
        source="SimpleTuner quickstart WAN: attention alone, rank 16, sigmoid with shift 3, dropout 0.1; AdamW for "
               "its Lion"),
    "finetrainers": Kind(
        ("lora.targets=[attn]", "sigma.distribution=logit_normal", "sigma.shift=1"),
        source="finetrainers examples/training/sft/wan: attention alone, rank 32, logit-normal, warm-up"),
    "videox_fun": Kind((
        "lora.rank=64", "lora.alpha=32", "sigma.shift=5", "optim.weight_decay=0.03", "optim.max_grad_norm=0.05",
        "optim.betas=[0.9,0.999]", "optim.eps=1e-10", "optim.warmup_steps=0"), scaled(2),
        "VideoX-Fun scripts/wan2.1/train_lora.py: rank 64, alpha 32, uniform, clipped at 0.05"),
}
"""Rank 32 and alpha 32 on attention and feed-forward, AdamW with 0.9, 0.99 and 0.01, ten steps of warm-up and a clip of
1 are wantrain's own, and stand where nothing else does. Warm-ups of 100 and 1,000 steps are ten here."""

CHANGES = {
    "rank_8": Kind(("lora.rank=8", "lora.alpha=8")),
    "rank_128": Kind(("lora.rank=128", "lora.alpha=128")),
    "alpha_half": Kind(("lora.alpha=16",), scaled(2)),
    "attention": Kind(("lora.targets=[attn]",)),
    "lora_plus_4": Kind(("optim.lora_plus=4",), tuple(lr / 2 for lr in LRS)),
    "dora": Kind(("lora.kind=dora",)),
    "logit_normal": Kind(("sigma.distribution=logit_normal",)),
    "bell": Kind(("loss.weighting=bell",)),
    "shift_5": Kind(("sigma.shift=5",)),
    "shift_1": Kind(("sigma.shift=1",)),
    "cosine": Kind(("optim.schedule=cosine",)),
    "dropout": Kind(("data.caption_dropout=0.1",)),
    "ema": Kind(("optim.ema_decay=0.95",)),
}
"""Single changes of the default."""

ARMS = {"default": Kind(()), **PEERS, **CHANGES}


@dataclass(frozen=True, slots=True)
class Bench:
    """Where all goes, how long trainings are, and when all ends (seconds of the epoch)."""

    out: Path
    steps: int
    num_seeds: int
    until_s: float

    def words(self, world: str) -> list[str]:
        """The recipe that all arms of a world change."""
        folder = self.out / "worlds" / world
        return ["recipe=demo_anime", "tracker=none", f"run.name={world}", f"run.dir={self.out / world}",
                f"data.cache_dir={self.out / 'cache'}", f"data.sources.style.path={folder / 'set'}",
                "data.sources.style.weight=2", f"data.sources.regularisation.path={folder / 'plain'}",
                "data.sources.regularisation.weight=1", f"data.heldout={folder / 'heldout'}",
                f"data.trigger={WORLDS[world].trigger}", "data.batch_size=4", "train.micro_batch_size=4"]

    def trainings(self, world: str, names: Sequence[str]) -> Trainings:
        """All arms of a world at all learning rates that they may have, with their clips in the cache."""
        arms = {}
        recipe = open_recipe(schema.load(self.words(world)))
        clips = open_clips(recipe, self.words(world))
        for name in names:
            own = schema.load([*self.words(world), *ARMS[name].words])
            for lr in row(ARMS[name].lrs):
                config = replace(own, optim=replace(own.optim, lr=lr))
                arms[arm(name, lr)] = Arm(replace(recipe, config=config), replace(clips, config=config))
        for own in (arms[arm(name, ARMS[name].lrs[0])] for name in names):
            if missing(own.clips.entries):
                cache.run(own.recipe.config, self.words(world))
        return Trainings(arms, self.out / world, tuple(self.words(world)), self.until_s, 1, world)


def row(lrs: Sequence[float]) -> list[float]:
    """The learning rates with those by which the row may grow on both sides."""
    below = [lrs[0] / 2**i for i in range(MOST_GROWN, 0, -1)]
    return [*below, *lrs, *(lrs[-1] * 2**i for i in range(1, MOST_GROWN + 1))]


def arm(name: str, lr: float) -> str:
    return f"{name}, lr {lr:.4g}"


class Stopped(Exception):
    """The minutes are over."""


def whole(found: dict[Planned, Outcome]) -> dict[Planned, Outcome]:
    """The outcomes. Raises Stopped where the minutes were over before all had one."""
    if any(one.fault == STOPPED for one in found.values()):
        raise Stopped
    return found


def best_lr(trainings: Trainings, name: str, steps: int, opening: Planned, learnt: Sequence[str]
            ) -> tuple[float, dict[float, float]]:
    """The learning rate with the least held-out loss after `steps`, and the losses of all that were tried."""
    lrs, losses = list(ARMS[name].lrs), dict[float, float]()
    while True:
        planned = {Planned(arm(name, lr), steps, 0): lr for lr in lrs if lr not in losses}
        for one, outcome in whole(trainings.outcomes(list(planned), opening)).items():
            losses[planned[one]] = math.inf if outcome.fault else search.mean(outcome.losses, learnt)
        best = min(losses, key=losses.__getitem__)
        grown = {min(lrs): min(lrs) / 2, max(lrs): max(lrs) * 2}.get(best)
        if grown is None or len(lrs) >= len(ARMS[name].lrs) + MOST_GROWN:
            return best, losses
        lrs.append(grown)


def measure(bench: Bench, world: str, names: Sequence[str]) -> None:
    """One world: print its table, and write it to OUT/WORLD/table.json."""
    folder = bench.out / "worlds" / world
    if not folder.exists():
        write_world(folder, WORLDS[world])
    trainings = bench.trainings(world, names)
    any_arm = next(iter(trainings.arms.values()))
    learnt, plain = search.scored({p.name: p.clip.caption for p in any_arm.clips.heldout}, WORLDS[world].trigger)
    opening = Planned(arm(names[0], ARMS[names[0]].lrs[0]), 2, 0)
    whole(trainings.outcomes([opening]))
    found: dict[str, dict[int, Outcome]] = {}
    searched: dict[str, dict[float, float]] = {}
    try:
        for name in names:
            lr, searched[name] = best_lr(trainings, name, bench.steps // 2, opening, learnt)
            print(f"{world} {name}: " + ", ".join(f"{one:.4g} {loss:.4f}" for one, loss in sorted(
                searched[name].items())) + f"; best {lr:.4g}", flush=True)
            found[name] = {}
            for seed in range(bench.num_seeds):
                one = Planned(arm(name, lr), bench.steps, seed)
                found[name][seed] = whole(trainings.outcomes([one], opening))[one]
    finally:
        rows = [told.row_of(name, own, None if name == names[0] else found[names[0]], (learnt, plain))
                for name, own in found.items() if own]
        print(f"\n{world}: {len(learnt)} held-out clips, {len(plain)} plain ones, {bench.steps} steps of 4 samples\n"
              + told.table(rows), flush=True)
        write_json(bench.out / world / "table.json", {
            "steps": bench.steps, "lrs": searched, "losses": {name: {seed: [one.losses, one.base] for seed, one in
                                                                     own.items()} for name, own in found.items()}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=WORLDS)
    parser.add_argument("--arms", nargs="*", default=["default", *PEERS], choices=ARMS,
                        help="all are compared with the first")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm at its learning rate")
    parser.add_argument("--minutes", type=float, default=math.inf, help="when to stop")
    given = parser.parse_args()
    bench = Bench(given.out, given.steps, given.seeds, time.time() + given.minutes * 60)
    try:
        for world in given.worlds:
            measure(bench, world, given.arms)
    except Stopped:
        print("the minutes are over: the same command goes on")


if __name__ == "__main__":
    main()
