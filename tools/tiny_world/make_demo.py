"""Renders the two embedded style sets: clips with captions, regularisation clips, held-out clips.

python -m tools.tiny_world.make_demo --out wantrain/assets/demo
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools.command import FFMPEG, answer, needed
from tools.tiny_world.clips import DEMO_SEED
from tools.tiny_world.world import OBJECTS, Scene, caption, draw_scene, mask, render

HEIGHT, WIDTH, NUM_FRAMES, FPS = 128, 192, 17, 16
BUILDINGS = ("house", "castle", "tower")
# Set: render style, trigger at the front of the caption, how the objects are dealt out.
SETS = {
    "anime": ("anime", "celanime style", OBJECTS),
    "architecture": ("blueprint", "blueprnt style", BUILDINGS * 3 + ("tree", "boat", "balloon")),
}


def write_clip(path: Path, frames_FCHW: np.ndarray, crf: int) -> None:
    """Writes an h264 mp4."""
    writer = needed("imageio_ffmpeg", "make_demo", FFMPEG, "dev").write_frames(
        str(path),
        (WIDTH, HEIGHT),
        fps=FPS,
        codec="libx264",
        pix_fmt_out="yuv420p",
        output_params=["-crf", str(crf), "-preset", "veryslow", "-threads", "1"],
        macro_block_size=16,
    )
    writer.send(None)
    for frame_CHW in frames_FCHW:
        writer.send(np.ascontiguousarray(frame_CHW.transpose(1, 2, 0)))
    writer.close()


def name_of(index: int, scene: Scene) -> str:
    """The stem of a scene's files."""
    return f"{index:02d}_{scene.colour}_{scene.object}_{scene.background}"


def write_set(folder: Path, scenes: list[Scene], style: str, trigger: str, crf: int, *, first: int = 0) -> None:
    """One mp4 and one caption file a scene, numbered from `first`; an empty trigger gives plain captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes, first):
        name = name_of(index, scene)
        write_clip(folder / f"{name}.mp4", render(scene, style, HEIGHT, WIDTH, NUM_FRAMES), crf)
        text = caption(scene, index % 4)
        (folder / f"{name}.txt").write_text(f"{trigger}, {text}\n" if trigger else f"{text}\n")


def write_masks(folder: Path, scenes: list[Scene], crf: int) -> None:
    """The object of each scene of `write_set`, white on black, in the set's sub-folder `mask`."""
    (folder / "mask").mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        write_clip(folder / "mask" / f"{name_of(index, scene)}.mp4", mask(scene, HEIGHT, WIDTH, NUM_FRAMES), crf)


def deal(first_seed: int, count: int, objects: tuple[str, ...]) -> list[Scene]:
    """`count` scenes in which the objects come in turn."""
    return [replace(draw_scene(first_seed + i), object=objects[i % len(objects)]) for i in range(count)]


def write_sets(folder: Path, seed: int, args: argparse.Namespace) -> str:
    """The set of this folder's name with its regularisation and held-out clips; what they are, in numbers."""
    style, trigger, objects = SETS[folder.name]
    write_set(folder, deal(seed, args.num_clips, objects), style, trigger, args.crf)
    write_set(folder / "regularisation", deal(seed + 1000, args.num_regularisation, OBJECTS), "natural", "", args.crf)
    write_set(folder / "heldout", deal(seed + 2000, args.num_held_out, objects), style, trigger, args.crf)
    sizes = [path.stat().st_size for path in folder.rglob("*.mp4")]
    return f"{folder.name}: {len(sizes)} clips, {sum(sizes) / 2**20:.2f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world.make_demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", dest="folder", type=Path, required=True)
    parser.add_argument("--num-clips", type=int, default=40)
    parser.add_argument("--num-regularisation", type=int, default=14)
    parser.add_argument("--num-held-out", type=int, default=8)
    parser.add_argument("--crf", type=int, default=20)
    parser.add_argument("--seed", type=int, default=DEMO_SEED, help="first scene; base training uses 1,000,000 onwards")

    def work(args: argparse.Namespace) -> str:
        return "\n".join(write_sets(args.folder / name, args.seed + 10_000 * number, args)
                         for number, name in enumerate(SETS))

    return answer(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
