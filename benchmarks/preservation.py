"""What masks, prior preservation and class words keep, measured on the embedded base with the world it was made of.

    python -m benchmarks.preservation --out runs/preservation [--steps 200] [--only masked_set style_alone ...]

Trains the demo's cel shading once a row of the tables, samples, and prints the tables; contact sheets and the LoRAs
stay in OUT, and what is trained there already is not trained again. Differences are mean absolute ones of uint8 pixels.

The first table: anime clips of which only the object is to be learned. Held-out natural scenes go through the sampler
from their own video (SDEdit), base and LoRA from the same noise; what changed is counted apart inside the object's
mask, outside, and outside at least FAR_PX from it. `px to anime` is how far the pixels inside are from the same scene
drawn in anime, `to anime` the style distance when only what is inside is taken (wantrain.style); `base px` and `base`
are those without the LoRA.

The second: what is left of the base's look where the trigger is absent. `moved` is the difference of the samples
without trigger from the base's samples, `to base` their style distance, `to set` the style distance of samples with
the trigger to the set, `to second` that of those without it to the second set, where there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import opened
from tools.tiny_world import world
from tools.tiny_world.clips import HEIGHT, HELD_OUT_SEED, NUM_FRAMES, WIDTH
from tools.tiny_world.make_demo import deal, write_masks, write_set
from wantrain import cli, pictures, style
from wantrain.config import asset
from wantrain.data import decode
from wantrain.models import sampling
from wantrain.recipe.clips import Clips
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import inputs_of, load_pipeline, lora_files, sampler_settings
from wantrain.stages import evaluate

TRIGGER = "celanime style"
CRF = 20
NUM_STEPS = 200
FAR_PX = 8
SET_SEED = 6_000_000
"""The first scene of the sets that are made here; base and demo have others."""

ALONE = ("~data.sources.regularisation",)
MASKED = {
    "no_masks": ("loss.mask_background=1",),
    "masked": (),
    "masked_and_preserved": ("loss.mask_preserve=1",),
}
"""What the runs on the set with masks differ in: with a background that weighs 1 the masks say nothing."""


def second(path: Path, preserve: bool) -> tuple[str, ...]:
    """A second source, as many of its samples as of the set's."""
    return (f"data.sources.regularisation.path={path}", f"data.sources.regularisation.preserve={preserve}",
            "data.sources.style.weight=1", "data.sources.regularisation.weight=1")


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything goes, and how long each run is: optimizer steps, frames of a clip, held-out scenes."""

    out: Path
    steps: int = NUM_STEPS
    num_frames: int = NUM_FRAMES
    num_scenes: int = 12

    @property
    def plain_sets(self) -> dict[str, Path]:
        """Second sets without the trigger: in the base's own look, and in a look that it must not learn."""
        return {"natural": asset("demo/anime/regularisation"), "blueprint": self.out / "clips" / "blueprint"}

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """The runs of the second table."""
        runs: dict[str, tuple[str, ...]] = {"style_alone": ALONE, "class_words": (*ALONE, "loss.class_words=cartoon")}
        for name, path in self.plain_sets.items():
            runs |= {f"{name}_preserved": second(path, True), f"{name}_trained": second(path, False)}
        return runs

    def trained(self, name: str, *more: str) -> tuple[Recipe, Clips]:
        """The recipe and its clips after cache, train and export."""
        arguments = ["recipe=demo_anime", "tracker=none", f"run.name={name}", f"run.dir={self.out / name}",
                     f"data.cache_dir={self.out / 'cache'}", f"data.num_frames=[{self.num_frames}]",
                     f"train.num_steps={self.steps}", "train.save_every=1000000", "validation.every_steps=0", *more]
        for verb in ("cache", "train", "export"):
            if code := cli.main([verb, *arguments]):
                raise SystemExit(code)
        return opened(arguments)


def write_sets(bench: Bench) -> None:
    """Anime clips with masks of their objects, blueprint clips with plain captions, natural videos to start from."""
    clips = bench.out / "clips"
    if clips.exists():
        return
    scenes = deal(SET_SEED, 24, world.OBJECTS)
    write_set(clips / "objects", scenes, "anime", TRIGGER, CRF)
    write_masks(clips / "objects", scenes, CRF)
    write_set(clips / "blueprint", deal(SET_SEED + 1000, 14, world.OBJECTS), "blueprint", "", CRF)
    for path, scene in heldout_videos(bench).items():
        pictures.write_mp4(path, torch.from_numpy(world.render(scene, "natural", HEIGHT, WIDTH, NUM_FRAMES)), 16)


def heldout_videos(bench: Bench) -> dict[Path, world.Scene]:
    """The natural video of each held-out scene."""
    scenes = deal(HELD_OUT_SEED, bench.num_scenes, world.OBJECTS)
    return {bench.out / "clips" / "natural" / f"{i:02d}.mp4": scene for i, scene in enumerate(scenes)}


@dataclass(frozen=True, slots=True)
class Edited:
    """A held-out scene through the sampler, all frames_FCHW uint8: its mask, its anime rendering, base and LoRA."""

    scene: world.Scene
    mask: torch.Tensor
    anime: torch.Tensor
    base: torch.Tensor
    lora: torch.Tensor


def difference(a_FCHW: torch.Tensor, b_FCHW: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the channels: difference_FHW."""
    return (a_FCHW.float() - b_FCHW.float()).abs().mean(1)


def edited(bench: Bench, name: str) -> list[Edited]:
    """Train the run of MASKED, and let base and LoRA paint over every held-out scene."""
    videos = heldout_videos(bench)
    prompts = ",".join(f"'{TRIGGER}, {world.caption(scene)}'" for scene in videos.values())
    objects = f"data.sources.style.path={bench.out / 'clips' / 'objects'}"
    recipe, clips = bench.trained(name, *ALONE, objects, *MASKED[name],
                           f"sampler.inputs=[{','.join(f'{{video: {path}}}' for path in videos)}]",
                           f"sampler.prompts=[{prompts}]", "sampler.strength=0.6")
    pipeline, settings = load_pipeline(recipe, lora_files(recipe, ())), sampler_settings(recipe)
    found = []
    texts = recipe.config.sampler.prompts
    inputs = inputs_of(recipe, len(texts), lambda: clips)
    for scene, prompt, given in zip(videos.values(), texts, inputs, strict=True):
        painted = []
        for strength in (0.0, 1.0):
            sampling.set_strength(pipeline, strength)
            painted.append(sampling.sample(pipeline, prompt, 0, settings, given))
        drawn = [torch.from_numpy(frames)[:bench.num_frames] for frames in (
            world.mask(scene, HEIGHT, WIDTH, NUM_FRAMES), world.render(scene, "anime", HEIGHT, WIDTH, NUM_FRAMES))]
        found.append(Edited(scene, *drawn, *painted))
    return found


def change(scenes: Sequence[Edited]) -> dict[str, float]:
    """What the LoRA changed, by place, and how near the object comes to its anime rendering; means over the scenes."""
    rows = []
    anime = style.describe([one.anime for one in scenes])
    for one in scenes:
        changed_FHW, inside_FHW = difference(one.lora, one.base), one.mask[:, 0] > 0
        near_FHW = torch.nn.functional.max_pool2d(inside_FHW.float(), 2 * FAR_PX + 1, 1, FAR_PX) > 0
        places = {"inside": changed_FHW[inside_FHW], "outside": changed_FHW[~inside_FHW],
                  f"{FAR_PX} px off": changed_FHW[~near_FHW],
                  "px to anime": difference(one.lora, one.anime)[inside_FHW],
                  "base px": difference(one.base, one.anime)[inside_FHW]}
        rows.append(torch.stack([values.mean() for values in places.values()]))
    means = dict(zip(places, torch.stack(rows).mean(0).tolist(), strict=True))
    for column, name in (("to anime", "lora"), ("base", "base")):
        pasted = [torch.where(one.mask > 0, getattr(one, name), one.anime) for one in scenes]
        means[column] = style.distance(style.describe(pasted), anime)["style"]
    return means


def measure_masks(bench: Bench, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """A row of the first table each, and `masks.png`."""
    runs = {name: edited(bench, name) for name in names}
    table = {name: change(scenes) for name, scenes in runs.items()}
    if runs:
        middle = bench.num_frames // 2
        first, *_ = runs.values()
        rows = [[one.mask[middle], one.anime[middle], one.base[middle], *(run[i].lora[middle] for run in runs.values())]
                for i, one in enumerate(first)]
        pictures.contact_sheet(bench.out / "masks.png", rows, ["mask", "drawn in anime", "base", *runs],
                               [world.caption(one.scene) for one in first])
    return table


def measure_kept(bench: Bench, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """A row of the second table each, and `NAME.png`: base, with trigger, without."""
    table = {}
    for name in names:
        recipe, clips = bench.trained(name, *bench.kept[name])
        pipeline = load_pipeline(recipe, lora_files(recipe, ()))
        inputs = inputs_of(recipe, len(recipe.config.evaluate.prompts), lambda clips=clips: clips)
        trios = list(evaluate.sample_trios(recipe, pipeline, inputs))
        distances = evaluate.style_distances(clips, {c: style.describe(trio.videos[c] for trio in trios)
                                                      for c in evaluate.CONDITIONS})
        without = [trio.videos["lora_without_trigger"] for trio in trios]
        table[name] = {
            "moved": sum(float(difference(a, trio.videos["base"]).mean())
                         for a, trio in zip(without, trios, strict=True)) / len(trios),
            "to base": distances["lora_without_trigger_to_base"], "to set": distances["lora_with_trigger"],
            "base to set": distances["base"]}
        plain = [decode.read_window(p) for p in recipe.planned if TRIGGER not in p.clip.caption]
        if plain:
            table[name]["to second"] = style.distance(style.describe(without), style.describe(plain))["style"]
        rows = [[trio.videos[c][bench.num_frames // 2] for c in evaluate.CONDITIONS] for trio in trios]
        pictures.contact_sheet(bench.out / f"{name}.png", rows, evaluate.CONDITIONS, [t.prompt for t in trios])
    return table


def show(table: Mapping[str, Mapping[str, float]]) -> None:
    """One line a run."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    if table:
        print(f"\n{'':20}" + "".join(f"{column:>13}" for column in columns))
    for name, row in table.items():
        print(f"{name:20}" + "".join(f"{row[c]:13.3f}" if c in row else " " * 13 for c in columns), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="optimizer steps of each run")
    parser.add_argument("--only", nargs="*", default=None, help="runs to make; all of them unless told")
    given = parser.parse_args()
    bench = Bench(given.out, given.steps)
    runs = [*MASKED, *bench.kept]
    if unknown := [name for name in given.only or [] if name not in runs]:
        parser.error(f"--only {unknown[0]}: the runs are {', '.join(runs)}")
    asked = given.only or runs
    write_sets(bench)
    show(measure_masks(bench, [name for name in MASKED if name in asked]))
    show(measure_kept(bench, [name for name in bench.kept if name in asked]))


if __name__ == "__main__":
    main()
