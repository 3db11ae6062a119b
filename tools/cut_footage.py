"""Cut the small real-footage demo set from a Big Buck Bunny excerpt (150 s, 640x360, 24 fps).

Every row of CLIPS lies inside one shot of the excerpt; shots were found by eye. Each clip becomes
NAME.mp4 (320x180, H.264, 24 fps, silent) beside its hand-written caption NAME.txt; the held-out ones, from shots that
no other clip uses, go to the subfolder heldout/.

Footage: Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.command import FFMPEG, answer, needed
from wantrain.terms import UserError

FPS = 24
EXCERPT_SHA256 = "e22b7ee12ece84223bd1557f7ce1ab4aa98a1441b0ac272f43840a397eb56897"
CREDIT = "(c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0; cut, scaled and re-encoded"


class Clip(NamedTuple):
    """One scene: its place in the excerpt."""

    name: str
    start_s: float  # the first frame; all times are frame times, rounded to 1 ms
    end_s: float  # the first frame after the clip; every clip has 4k+1 frames
    heldout: bool = False


# fmt: off
CLIPS = [
    Clip("01_ears-up",            20.833,  22.708),
    Clip("02_leaves-burrow",      22.708,  24.750),
    Clip("03_walks-off",          29.042,  31.083),
    Clip("04_rises-sky",          31.583,  33.958),
    Clip("05_white-flowers",      38.792,  41.167),
    Clip("06_squirrel-watches",   46.292,  48.333),
    Clip("07_smells-flowers",     48.458,  50.500),
    Clip("08_pink-butterfly",     50.708,  53.583),
    Clip("09_butterfly-meadow",   54.958,  57.667),
    Clip("10_picks-apple",        61.250,  63.792),
    Clip("11_looks-at-tree",      64.792,  66.333),
    Clip("12_empty-meadow",       73.042,  74.750),
    Clip("13_purple-butterfly",   83.333,  85.875),
    Clip("14_three-friends",      92.958,  95.833),
    Clip("15_squirrel-peeks",     99.500, 101.708),
    Clip("16_from-above",        121.375, 123.917),
    Clip("17_three-at-tree",     127.500, 130.042),
    Clip("18_worried-rabbit",    141.208, 142.917),
    Clip("19_close-rabbit",       35.833,  38.708, heldout=True),
    Clip("20_chases-butterfly",   87.833,  90.042, heldout=True),
    Clip("21_butterfly-tree",     95.875,  98.417, heldout=True),
    Clip("22_looks-around",      131.000, 133.042, heldout=True),
]
# fmt: on


def find_ffmpeg() -> str:
    """The ffmpeg on PATH, else the one inside the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    return str(needed("imageio_ffmpeg", "cut_footage without an ffmpeg on PATH", FFMPEG, "dev").get_ffmpeg_exe())


def cut(ffmpeg: str, source: Path, clip: Clip, out: Path) -> Path:
    """Write one clip; frames are counted from the start, so the cut is exact."""
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
    return target


def cut_all(args: argparse.Namespace) -> str:
    """Check the inputs, cut every clip; the files with their sizes."""
    if not args.excerpt.is_file() or hashlib.sha256(args.excerpt.read_bytes()).hexdigest() != EXCERPT_SHA256:
        raise UserError(f"not the excerpt the table was made for: {args.excerpt}",
                        f"give big_buck_bunny_excerpt.mp4, whose SHA-256 is {EXCERPT_SHA256}")
    names = {clip.name for clip in CLIPS}
    if strays := [str(path) for path in args.folder.rglob("*") if path.is_file() and path.stem not in names]:
        raise UserError(f"not in the table: {', '.join(strays)}", "remove these, then run the same command again")
    ffmpeg = args.ffmpeg or find_ffmpeg()
    targets = [cut(ffmpeg, args.excerpt, clip, args.folder) for clip in CLIPS]
    return "\n".join(f"{path.relative_to(args.folder)}: {path.stat().st_size / 1000:.0f} kB" for path in targets)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.cut_footage",
                                     description="Cut the demo footage set from the Big Buck Bunny excerpt.")
    parser.add_argument("excerpt", type=Path, help="big_buck_bunny_excerpt.mp4")
    folder = Path(__file__).resolve().parent.parent / "wantrain" / "assets" / "demo" / "footage"
    parser.add_argument("--out", dest="folder", type=Path, default=folder, help="to fill (default: %(default)s)")
    parser.add_argument("--ffmpeg", help="ffmpeg with libx264 (default: on PATH, else imageio-ffmpeg's)")
    return answer(parser, cut_all, arguments)


if __name__ == "__main__":
    sys.exit(main())
