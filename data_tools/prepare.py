"""From whole films to clips that `wantrain new` takes: every data tool in order, each of which also stands alone.

    python -m data_tools.prepare films/ --trigger "mystyl style" --captioner Qwen/Qwen3-VL-8B-Instruct

Each tool goes on where it was stopped, so the same command does. Without a captioner the captions stay empty: it ends
with the page on which they are written, and goes on once they are. Films are only read; all else is in one folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.command import Parser, answer

SHARE = 0.1
MOST = {"file": 0.25, "shot": 0.5}
"""The largest share of the clips that one film, or one shot, may be to be held out whole."""


def work(args: argparse.Namespace) -> str:
    """Run the tools; returns what is to be done next."""
    from data_tools import caption, filter, manifest, probe, split

    out: Path = args.into
    out.mkdir(parents=True, exist_ok=True)
    rows, films = str(out / "manifest.jsonl"), list(map(str, args.paths))
    step("probe: what every file is", probe.main, [*films, "--out", str(out / "probe.jsonl")])
    step("split: the shots", split.main, [*films, "--out", rows, "--max-s", str(args.max_s)])
    if args.captioner:
        step("caption", caption.main, [rows, "--kind", args.kind, "--trigger", args.trigger, "--model", args.captioner])
    step("filter: measurements", filter.main, [rows])
    review = shlex.join(["wantrain-review", rows, "--trigger", args.trigger])
    if uncaptioned := sum(not row.captions for row in entries(rows)):
        return (f"{uncaptioned} clips have no caption yet" + ("" if args.captioner else ": no --captioner is given")
                + f"; write them beside the playing clips, then run the same command again\n  next: {review}")
    step("check", manifest.main, ["check", rows, "--trigger", args.trigger])
    new = ["wantrain", "new", args.name, "--clips", rows]
    if how := division(rows):
        train, heldout = (str(out / f"{side}.jsonl") for side in ("train", "heldout"))
        step("hold out", manifest.main, ["split", rows, "--train", train, "--heldout", heldout, *how])
        new[-1:] = [train, "--heldout", heldout]
    return (f"read and mend the captions beside the playing clips: {review}\n"
            f"  next: {shlex.join([*new, '--trigger', args.trigger])}")


def step(what: str, main: object, arguments: Sequence[str]) -> None:
    """One tool with its own output. Leaves with its exit code where it has found something to mend."""
    print(f"--- {what}", flush=True)
    assert callable(main)
    if code := main(arguments):
        raise SystemExit(code)


def entries(rows: str) -> list:
    """The rows of the manifest."""
    from data_tools.rows import sound_entries

    return list(sound_entries([Path(rows)])[0])


def division(rows: str) -> list[str]:
    """How about a tenth is held out: whole films where there are several and one is small enough, else whole shots;
    [] where even that leaves nothing.
    """
    from data_tools.dividing import groups

    found = entries(rows)
    for what, most in MOST.items():
        sizes = sorted(map(len, groups(found, what == "file")))
        if len(sizes) > 1 and sizes[0] <= most * len(found):
            return ["--num", str(max(sizes[0], round(SHARE * len(found)))), "--by", what]
    return []


def parser() -> Parser:
    """The command's arguments."""
    made = Parser(
        prog="wantrain prepare", description="From films to clips for wantrain new: probe, split, caption, filter, "
        "check, hold out. Films are only read.", epilog="The same command goes on where it was stopped. Each tool "
        "stands alone as well, with more to set: wantrain-split --help, and so on (docs/data.md).")
    made.add_argument("paths", nargs="+", type=Path, metavar="FILMS", help="films, or folders at any depth")
    made.add_argument("--trigger", required=True, metavar="WORDS", help="made-up words, put before every caption")
    made.add_argument("--captioner", default="", metavar="PATH|ID", help="a Qwen-VL that writes the captions, such as "
                      "Qwen/Qwen3-VL-8B-Instruct (default: none, they are written in the review page)")
    made.add_argument("--kind", choices=("general", "style", "character", "motion"), default="style",
                      help="what captions leave to the trigger (default: %(default)s)")
    made.add_argument("--max-s", type=float, default=10.0, metavar="S", help="longest clip (default: %(default)g)")
    made.add_argument("--into", type=Path, default=Path("prepared"), metavar="FOLDER", help="(default: %(default)s)")
    made.add_argument("--name", default="my_style", metavar="NAME", help="for the command at the end (default: "
                      "%(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (also where captions are still to be written), 2, 130."""
    try:
        return answer(parser(), work, arguments)
    except SystemExit as left:
        return int(left.code or 0)


if __name__ == "__main__":
    sys.exit(main())
