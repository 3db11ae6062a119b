"""Cut films into shots: spans of a manifest, without touching or re-encoding the film.

    python -m data_tools.split films/ --out manifest.jsonl --min-s 1 --max-s 10

Cuts are found by PySceneDetect's AdaptiveDetector: a frame differs from the one before by a multiple of what its
neighbours do. On 150 s of Big Buck Bunny it finds all 27 hard cuts and no other, also at 0.4 of the brightness or
half the contrast, where ContentDetector at its default of 27 misses 1 and 2; only with 5 of 6 frames taken out is it
the worse one (1 missed, 1 false; none). Neither sees a dissolve (one in that film): `--detector transnetv2` sees most,
and leaves their frames out. Animation shows each drawing for several frames: detectors are shown only the first frame
of such a hold (see `Held`), and their cuts are carried back to the film's frames. Times are on the clock of
`wantrain.data.decode`, and `end_s` is so placed that no frame of the next shot is read at any fps.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import glob
import math
import os
import sys
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from data_tools import transnet
from data_tools.command import (
    SCENEDETECT,
    Parser,
    add_job_arguments,
    answer,
    find_files,
    needed,
    positive,
    relative,
    shown,
    stamp,
)
from data_tools.rows import check_written, sound_entries
from data_tools.shots import DISSOLVE, MOTION_GAP_S, STATIC, TOO_SHORT, Rules, Span, Split, split_file, write_spans
from wantrain.files import digest_text, json_line, write_text
from wantrain.jobs import Ending
from wantrain.journal import Journal, Outcomes, by_workers
from wantrain.terms import IMAGE_SUFFIXES, UserError

VERSION = 1
"""Raise this when shots are found otherwise: what is remembered of another version is found again."""


LONGEST_NAME = 215
"""Bytes of a film's name to which a span's time and what a temporary file needs can be added: 255 in all."""


THRESHOLDS = {"adaptive": 3.0, "transnetv2": 0.5}
"""The detectors, and where each draws the line: a ratio, a probability."""


@dataclass(frozen=True, slots=True)
class Job:
    """One film to split; with `cut_to`, its kept spans are written there, in files named after it.

    Jobs with an equal `key` have the same result.
    """

    path: Path
    rules: Rules
    cut_to: Path | None
    key: str

    def target(self, span: Span) -> Path | None:
        """The file of a kept span that is to be cut out."""
        if self.cut_to is None or span.reason:
            return None
        return self.cut_to / f"{self.path.name}@{span.start_s:.3f}.mp4"


def do(job: Job) -> Split:
    """Split one film and, if wanted, write its spans as files."""
    found = split_file(job.path, job.rules)
    targets = [(span, target) for span in found.spans if (target := job.target(span))]
    try:
        write_spans(job.path, targets)
    except UserError as error:
        return dataclasses.replace(found, unwritten=error.message)
    except (OSError, av.FFmpegError) as error:
        return dataclasses.replace(found, unwritten=f"could not write into {shown(job.cut_to or Path())}: "
                                                    f"{error.strerror or error}")
    return found


@contextlib.contextmanager
def _no_half_files(jobs: Sequence[Job]) -> Iterator[None]:
    """Removes what workers that were ended leave of the files that they were writing."""
    try:
        yield
    finally:
        for job in jobs:
            for half in job.cut_to.glob(f".{glob.escape(job.path.name)}@*.tmp") if job.cut_to else ():
                half.unlink(missing_ok=True)


def _jobs(paths: Sequence[Path], films: Sequence[Path], rules: Rules, cut_to: Path | None) -> list[Job]:
    """The films' jobs. Below `cut_to` the folders are those below the path that leads to the film."""
    folders = sorted((path.absolute() for path in paths if path.is_dir()), key=lambda p: -len(p.parts))
    jobs = []
    for film in films:
        root = next((folder for folder in folders if film.is_relative_to(folder)), film.parent)
        folder = cut_to.absolute() / film.relative_to(root).parent if cut_to else None
        key = (VERSION, film, *stamp(film), dataclasses.astuple(rules), folder)
        jobs.append(Job(film, rules, folder, digest_text(*key)))
    if too_long := [film.name for film in films if cut_to and len(os.fsencode(film.name)) > LONGEST_NAME]:
        raise UserError(f"--cut-to {cut_to}: names of more than {LONGEST_NAME} bytes leave no room for the time that "
                        f"is added to them: {', '.join(map(repr, too_long))}", "give these films shorter names")
    named = collections.Counter((job.cut_to, job.path.name) for job in jobs if job.cut_to)
    if clashes := [name for (_, name), number in named.items() if number > 1]:
        raise UserError(f"--cut-to {cut_to}: several films would be cut into files of the same names: "
                        f"{', '.join(clashes)}", "rename one of them, or call split once for each folder")
    return jobs


def run(paths: Sequence[Path], out: Path, rules: Rules, cut_to: Path | None, *, jobs: int, timeout_s: float
        ) -> tuple[list[Split], list[Path]]:
    """Write the kept spans of every film below `paths` into the manifest `out`: (films as sorted, files ignored).

    Rows of other films stay as they are, and a span that was there keeps its caption. What was found is remembered in
    a file beside `out`, so that a killed call goes on and other calls look only at what is new or changed.
    """
    check_written(out)
    if rules.detector == "adaptive":
        needed("scenedetect", "--detector adaptive", SCENEDETECT, "data")
    else:
        transnet.check_installed()
        if rules.threshold >= 1:
            raise UserError(f"--threshold {rules.threshold:g} is no probability below 1, which --detector transnetv2 "
                            "wants", f"--threshold {THRESHOLDS['transnetv2']:g}")
    if rules.max_s < 2 * rules.min_s:
        raise UserError(f"--max-s {rules.max_s:g} is less than twice --min-s {rules.min_s:g}: a shot a little longer "
                        "than the one would be cut into parts shorter than the other",
                        f"--max-s {2 * rules.min_s:g} or more")
    files, ignored = find_files(paths)
    films = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    if not films:
        raise UserError(f"no film in {', '.join(map(shown, paths))}: {len(files)} images, {len(ignored)} other files",
                        "give films, or folders of films")
    todo = _jobs(paths, films, rules, cut_to)
    by_key = {job.key: job for job in todo}
    do_all = by_workers(do, by_key, lambda job, failure: Split(str(job.path), fault=f"{shown(job.path)}: {failure}"),
                        jobs, timeout_s)

    def work(missing: Sequence[str]) -> Generator[Outcomes[str, Split]]:
        with _no_half_files([by_key[key] for key in missing]), contextlib.closing(do_all(missing)) as coming:
            for some in coming:
                if unwritten := "".join(outcome.result.unwritten for outcome in some.values()):
                    raise UserError(unwritten, "make room, or give another --cut-to, then run the same command again: "
                                    "what was finished is kept")
                yield some

    journal = journal_of(out)
    known = {key: split for key, split in journal.read().items() if key in by_key and all(
        target.exists() for span in split.spans if (target := by_key[key].target(span)))}
    done = journal.filled(known, list(by_key), work, "film", "split")
    rows = [_row(job, span, out) for job in todo for span in done[job.key].spans if not span.reason]
    write_text(out, "".join(map(json_line, _merged(out, {relative(film, out.parent) for film in films}, rows))))
    return [done[job.key] for job in todo], sorted({*ignored, *files} - {*films})


def journal_of(out: Path) -> Journal[Split]:
    """Where shots are remembered; a film that took too long or crashed its reader is tried again."""
    return Journal(out.with_name(out.name + ".shots"), lambda row: Split(**row | {
        "spans": tuple(Span(**span) for span in row["spans"])}), (Ending.DONE, Ending.FAULT))


def _row(job: Job, span: Span, out: Path) -> dict[str, Any]:
    """The manifest's row of a kept span."""
    film = relative(job.path, out.parent)
    identity = f"{film}@{span.shot_s:.3f}#{span.part}"
    if target := job.target(span):
        return {"video": relative(target, out.parent), "id": identity, "caption": ""}
    return {"video": film, "start_s": span.start_s, "end_s": span.end_s, "id": identity, "caption": ""}


def shot_of(identity: str) -> str:
    """What all spans of one shot have in common, given a span's id: FILM@SECONDS."""
    return identity.rpartition("#")[0]


def _merged(out: Path, films: Collection[str], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's rows of other films, then these with the captions, marks and measurements that they had.

    UserError where a caption would be lost, because its span is no longer there.
    """
    old = sound_entries([out])[0] if out.exists() else []
    ours = {entry.id: entry.values for entry in old if shot_of(entry.id).rpartition("@")[0] in films}
    lost = [row["id"] for row in ours.values() if row.get("caption")]
    for row in rows:
        earlier = ours.get(row["id"], {})
        if all(row.get(key) == earlier.get(key) for key in ("video", "start_s", "end_s")):
            row.update(earlier)
            lost = [identity for identity in lost if identity != row["id"]]
    if lost:
        raise UserError(f"{out} has captions for {len(lost)} span(s) that these settings do not give, among them "
                        f"{lost[0]}", "give the settings of the first call, or another --out")
    return [entry.values for entry in old if entry.id not in ours] + list(rows)


def rejected_rows(found: Sequence[Split], folder: Path) -> list[dict[str, Any]]:
    """A row for every span and film that is not in the manifest, with its reason."""
    rows: list[dict[str, Any]] = []
    for film in found:
        video = relative(Path(film.path), folder)
        rows += [{"video": video, "reason": film.fault}] if film.fault else []
        rows += [{"video": video, "start_s": span.start_s, "end_s": span.end_s, "reason": span.reason,
                  "motion": span.motion if math.isfinite(span.motion) else None} for span in film.spans if span.reason]
    return rows


def summary(found: Sequence[Split], ignored: Sequence[Path], rules: Rules) -> str:
    """Counts that add up: films, shots, spans kept and rejected with their reasons, and every fault."""
    spans = [span for film in found for span in film.spans]
    faulty = [film.fault for film in found if film.fault]
    shots = sum(span.part == 1 and span.reason != DISSOLVE for span in spans)
    lines = [f"found {len(found) + len(ignored)} = {len(found) - len(faulty)} films split + {len(faulty)} faulty "
             f"+ {len(ignored)} ignored (images and other files)",
             f"  {shots} shots, {len(spans)} spans after cutting those longer than {rules.max_s:g} s"]
    for reason, limit in (("", ""), (DISSOLVE, " (between two shots)"), (TOO_SHORT, f" (under {rules.min_s:g} s)"),
                          (STATIC, f" (motion under {rules.drop_static or 0:g})")):
        lengths_s = sorted(span.end_s - span.start_s for span in spans if span.reason == reason)
        if lengths_s or not reason:
            lines.append(f"  {reason or 'kept':10}{len(lengths_s)}, {sum(lengths_s):.1f} s{limit}" + (
                f", {lengths_s[0]:.2f} to {lengths_s[-1]:.2f} s, median {lengths_s[len(lengths_s) // 2]:.2f} s"
                if lengths_s else ""))
    return "\n".join(lines + [f"  fault: {fault}" for fault in faulty])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (also where films are faulty: they are named), 2, 130."""
    parser = Parser(
        prog="python -m data_tools.split", description="Find the shots of films and write them into a manifest as "
        "spans (captions are left empty for a later tool). Films are only read. Hard cuts are found; dissolves and "
        "fades only by --detector transnetv2, most of them, and their frames are left out: look at the report.",
        epilog="The same command again goes on where it was stopped. Outcomes are remembered in FILE.shots.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a film, or a folder of films at any depth")
    parser.add_argument("--out", type=Path, default=Path("manifest.jsonl"), metavar="FILE",
                        help="the manifest; rows of other films and captions of the same spans are kept (default: "
                        "%(default)s)")
    parser.add_argument("--min-s", type=positive(float), default=1.0, metavar="S",
                        help="shorter spans are left out (default: %(default)g)")
    parser.add_argument("--max-s", type=positive(float), default=10.0, metavar="S",
                        help="longer shots are cut into equal parts (default: %(default)g: a half still gives 81 "
                        "frames at 16 fps)")
    parser.add_argument("--detector", choices=THRESHOLDS, default="adaptive",
                        help="what finds shots: PySceneDetect's AdaptiveDetector, or TransNetV2, a network that sees "
                        "dissolves and fades as well, 15 times slower (pip install "
                        f'"{transnet.REQUIREMENT}"; default: %(default)s)')
    parser.add_argument("--threshold", type=positive(float), metavar="X",
                        help="lower finds more. adaptive: a cut changes the picture this many times as much as its "
                        f"neighbours do (default: {THRESHOLDS['adaptive']:g}); transnetv2: how probably a frame is in "
                        f"a transition, below 1 (default: {THRESHOLDS['transnetv2']:g})")
    parser.add_argument("--drop-static", type=positive(float), nargs="?", const=0.3, metavar="D",
                        help="leave out spans in which grey values (0..255, at 40 px) change by less than this in "
                        f"{MOTION_GAP_S} s (without a number: %(const)s; default: keep them)")
    parser.add_argument("--rejected", type=Path, metavar="FILE",
                        help="write what is left out here, a JSON line each with its reason")
    parser.add_argument("--cut-to", type=Path, metavar="FOLDER",
                        help="also write every kept span as an mp4 (silent, crf 14) there, and name these in "
                        "the manifest")
    add_job_arguments(parser, 3600)

    def work(args: argparse.Namespace) -> str:
        rules = Rules(args.threshold or THRESHOLDS[args.detector], args.min_s, args.max_s, args.drop_static,
                      args.detector)
        found, ignored = run(args.paths, args.out, rules, args.cut_to, jobs=args.jobs, timeout_s=args.timeout_s)
        if args.rejected:
            write_text(args.rejected, "".join(map(json_line, rejected_rows(found, args.rejected.absolute().parent))))
        if all(film.fault for film in found):
            raise UserError(summary(found, ignored, rules), "give films that can be read: python -m data_tools.probe "
                            "tells what is wrong with these")
        return summary(found, ignored, rules)

    return answer(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
