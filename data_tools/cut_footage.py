"""Cut the small real-footage demo set from a Big Buck Bunny excerpt (150 s, 640x360, 24 fps).

Every row of CLIPS lies inside one shot of the excerpt; shots and captions were found by eye.
Each clip becomes NAME.mp4 (320x180, H.264, 24 fps, silent) with its caption in NAME.txt; the
held-out ones, from shots that no other clip uses, go to the subfolder heldout/.

Footage: Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

FPS = 24
EXCERPT_SHA256 = "e22b7ee12ece84223bd1557f7ce1ab4aa98a1441b0ac272f43840a397eb56897"
CREDIT = "(c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0; cut, scaled and re-encoded"
STYLE = "bbbtoon style, "
STILL = ", the camera stands still"


class Clip(NamedTuple):
    """One scene: its place in the excerpt and its caption."""

    name: str
    start_s: float  # the first frame; all times are frame times, rounded to 1 ms
    end_s: float  # the first frame after the clip; every clip has 4k+1 frames
    caption: str  # what follows STYLE
    heldout: bool = False


# fmt: off
CLIPS = [
    Clip("01_ears-up",            20.833,  22.708, "a large grey rabbit sits in the dark door of its burrow, its ears hang down and then spring straight up, the camera is almost still"),
    Clip("02_leaves-burrow",      22.708,  24.750, "a large grey rabbit climbs out of its burrow under a mossy hill, stands up and stretches its arms, the camera tilts up a little"),
    Clip("03_walks-off",          29.042,  31.083, "a large grey rabbit stands in front of its burrow, then walks over the grass to the right and comes closer" + STILL),
    Clip("04_rises-sky",          31.583,  33.958, "a large grey rabbit with its face turned up rises from below into a wide blue sky, seen from below" + STILL),
    Clip("05_white-flowers",      38.792,  41.167, "big white flowers fill the front while a grey rabbit walks closer from a tree behind them" + STILL),
    Clip("06_squirrel-watches",   46.292,  48.333, "a red squirrel seen from behind sits on a branch and looks down at a small white rabbit on the grass far below" + STILL),
    Clip("07_smells-flowers",     48.458,  50.500, "a close view of a grey rabbit that sniffs white flowers, then lifts its head and smiles while the flowers bend down"),
    Clip("08_pink-butterfly",     50.708,  53.583, "seen from above, a pink butterfly flies over a white rabbit that bends over purple flowers and then looks up, the camera moves slowly"),
    Clip("09_butterfly-meadow",   54.958,  57.667, "a large white rabbit stands in a meadow and turns after a small pink butterfly that flies past it, the camera pans slowly to the right"),
    Clip("10_picks-apple",        61.250,  63.792, "a large white rabbit stands in a meadow, bends down, picks up a red apple and holds it up" + STILL),
    Clip("11_looks-at-tree",      64.792,  66.333, "a white rabbit seen from behind and below turns its head a little and looks up at a big green tree, one ear stands up" + STILL),
    Clip("12_empty-meadow",       73.042,  74.750, "a pink butterfly flies from right to left over an empty meadow with green trees and blue hills" + STILL),
    Clip("13_purple-butterfly",   83.333,  85.875, "a large grey rabbit in a meadow turns its head to a purple butterfly that flutters beside it" + STILL),
    Clip("14_three-friends",      92.958,  95.833, "a thin red squirrel and a round grey chinchilla with a nut stand in the grass, a brown squirrel comes in from the left, the camera pans a little to the left"),
    Clip("15_squirrel-peeks",     99.500, 101.708, "a small brown squirrel peeks out from behind a tree root next to the big grey back of a rabbit and looks up" + STILL),
    Clip("16_from-above",        121.375, 123.917, "seen from high above, a tiny grey rabbit walks away from a tree over the green grass and stops" + STILL),
    Clip("17_three-at-tree",     127.500, 130.042, "a brown squirrel hangs head down on a tree and shouts, a red squirrel and a grey chinchilla stand beside it, the chinchilla loses its nut" + STILL),
    Clip("18_worried-rabbit",    141.208, 142.917, "a large grey rabbit in front of a bright sky with pink clouds looks worried, moves its ears and frowns" + STILL),
    Clip("19_close-rabbit",       35.833,  38.708, "a close view of a large white rabbit under a blue sky that looks to the right, then turns to the camera and smiles" + STILL, heldout=True),
    Clip("20_chases-butterfly",   87.833,  90.042, "a large white rabbit seen from behind runs away over a meadow and reaches up for a small purple butterfly" + STILL, heldout=True),
    Clip("21_butterfly-tree",     95.875,  98.417, "a pink butterfly flutters in front of a thick tree while a grey rabbit comes in from the right, turns around and looks up at it" + STILL, heldout=True),
    Clip("22_looks-around",      131.000, 133.042, "a large grey rabbit stands in a sunny meadow, looks up and turns its head from left to right with a worried face" + STILL, heldout=True),
]
# fmt: on


def find_ffmpeg() -> str:
    """The ffmpeg on PATH, else the one inside the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    import imageio_ffmpeg  # type: ignore[import-untyped]

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def cut(ffmpeg: str, source: Path, clip: Clip, out: Path) -> Path:
    """Write one clip and its caption; frames are counted from the start, so the cut is exact."""
    first, stop = round(clip.start_s * FPS), round(clip.end_s * FPS)
    target = out / ("heldout" if clip.heldout else "") / f"{clip.name}.mp4"
    target.parent.mkdir(parents=True, exist_ok=True)
    filters = f"trim=start_frame={first}:end_frame={stop},setpts=PTS-STARTPTS,"
    filters += "scale=320:180:flags=bicubic+accurate_rnd+bitexact,format=yuv420p"
    command = [ffmpeg, "-nostdin", "-v", "error", "-y", "-i", str(source), "-vf", filters]
    command += ["-an", "-r", str(FPS), "-frames:v", str(stop - first)]
    # No B-frames: the first frame comes at 0 s without an edit list. One thread: the same bytes each time.
    command += ["-c:v", "libx264", "-preset", "slow", "-crf", "27", "-bf", "0", "-threads", "1"]
    command += ["-flags", "+cgop+bitexact", "-fflags", "+bitexact", "-map_metadata", "-1"]
    command += ["-metadata", "title=Big Buck Bunny (excerpt)", "-metadata", f"copyright={CREDIT}"]
    command += ["-use_editlist", "0", "-movflags", "+faststart", str(target)]
    subprocess.run(command, check=True)
    target.with_suffix(".txt").write_text(STYLE + clip.caption + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Read the arguments, check the inputs, cut every clip."""
    parser = argparse.ArgumentParser(description="Cut the demo footage set from the Big Buck Bunny excerpt.")
    parser.add_argument("excerpt", type=Path, help="big_buck_bunny_excerpt.mp4")
    folder = Path(__file__).resolve().parent.parent / "wantrain" / "assets" / "demo" / "footage"
    parser.add_argument("--out", type=Path, default=folder, help="folder to fill (default: %(default)s)")
    parser.add_argument("--ffmpeg", help="ffmpeg with libx264 (default: on PATH, else imageio-ffmpeg's)")
    args = parser.parse_args()
    if not args.excerpt.is_file() or hashlib.sha256(args.excerpt.read_bytes()).hexdigest() != EXCERPT_SHA256:
        parser.error(f"not the excerpt the table was made for: {args.excerpt}")
    names = {clip.name for clip in CLIPS}
    if strays := [str(path) for path in args.out.rglob("*") if path.is_file() and path.stem not in names]:
        parser.error(f"remove what is not in the table first: {', '.join(strays)}")
    for clip in CLIPS:
        target = cut(args.ffmpeg or find_ffmpeg(), args.excerpt, clip, args.out)
        print(f"{target.relative_to(args.out)}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
