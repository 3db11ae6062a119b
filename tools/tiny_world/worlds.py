"""Three little sets that the embedded base has never seen, for benches of training: a style, a motion, a subject.

python -m tools.tiny_world.worlds --out runs/worlds

Each has `set` (what is trained, behind a trigger), `plain` (the base's own look, without it) and `heldout`: other
scenes of the same, and plain ones. All are functions of the seeds here.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.command import answer
from tools.tiny_world.make_demo import write_set
from tools.tiny_world.world import BACKGROUNDS, NEW_COLOUR, NEW_MOTION, NEW_OBJECT, OBJECTS, Scene, draw_scene

SEED = 7_000_000
"""The first scene; base, demo and other benches have others."""
CRF = 20
NUM_PLAIN, NUM_HELDOUT, NUM_HELDOUT_PLAIN = 8, 16, 4


@dataclass(frozen=True)
class World:
    """A set: its trigger, the style it is drawn in, how many clips there are, and what all its scenes have."""

    trigger: str
    style: str
    num_clips: int
    fixed: dict[str, str]


WORLDS = {
    "style": World("celanime style", "anime", 24, {}),
    "motion": World("swngmove", "natural", 24, {"motion": NEW_MOTION}),
    "subject": World("zogling toy", "natural", 6, {"object": NEW_OBJECT, "colour": NEW_COLOUR}),
}


def scenes(world: World, first_seed: int, count: int) -> list[Scene]:
    """Scenes in which objects and places come in turn, with what the world fixes."""
    drawn = (replace(draw_scene(first_seed + i), object=OBJECTS[i % len(OBJECTS)],
                     background=BACKGROUNDS[i % len(BACKGROUNDS)]) for i in range(count))
    return [replace(scene, **world.fixed) for scene in drawn]


def write_world(folder: Path, world: World) -> str:
    """The sets of one world below the folder, which is its name; what they are, in words."""
    first = SEED + 10_000 * list(WORLDS.values()).index(world)
    plain = World("", "natural", NUM_PLAIN, {})
    write_set(folder / "set", scenes(world, first, world.num_clips), world.style, world.trigger, CRF)
    write_set(folder / "plain", scenes(plain, first + 1000, NUM_PLAIN), plain.style, "", CRF)
    write_set(folder / "heldout", scenes(world, first + 2000, NUM_HELDOUT), world.style, world.trigger, CRF)
    write_set(folder / "heldout", scenes(plain, first + 3000, NUM_HELDOUT_PLAIN), plain.style, "", CRF,
              first=NUM_HELDOUT)
    return f"{folder}: {world.num_clips} clips behind {world.trigger!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world.worlds", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", dest="folder", type=Path, required=True)

    def work(args: argparse.Namespace) -> str:
        return "\n".join(write_world(args.folder / name, world) for name, world in WORLDS.items())

    return answer(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
