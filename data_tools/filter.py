"""Measure every clip of a manifest, so that a recipe can leave out the blurred, the still, the doubled and the marked.

    python -m data_tools.filter manifest.jsonl --out measured.jsonl

Each measurement is a numeric column. Limits live in the recipe (`data.limits.motion=[0.002,null]`); this tool only
suggests some and tells what they would drop. A clip is judged by NUM_PAIRS pairs of frames spread over its span, in
grey, brought to a short side of LOOK_PX, so that size and frame rate of the source hardly count. The numbers behind
the suggestions, and what each measurement is blind to, stand with the functions.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.command import SCENEDETECT, Parser, absolute, add_job_arguments, answer, needed, shown, stamp
from data_tools.measuring import HASH_BITS, NUM_PAIRS, Job, Measured, measure
from data_tools.rows import Entry, moved, new_ids, read_entries, refuse
from wantrain.files import digest_text, json_line, write_text
from wantrain.journal import Journal, by_workers
from wantrain.terms import UserError

VERSION = 1
"""Raise this when a measurement changes: what is remembered of another version is measured again."""


NEAR_BITS = 28
"""Clips nearer than this are told to be duplicates: see `hash_pictures`."""


SUGGESTED: dict[str, tuple[float | None, float | None]] = {
    "sharpness": (0.35, None), "motion": (0.002, None), "duplicate": (NEAR_BITS, None), "letterbox": (None, 0.01),
    "text": (None, 0.005), "luma": (0.06, 0.94), "black": (None, 0.8), "white": (None, 0.4)}
"""Every column with the limits that calibration suggests: [lowest, highest] that is kept."""


NUM_EXTREMES, NUM_SHOWN = 3, 20



def nearest_earlier(hashes: Sequence[tuple[int, ...]]) -> list[tuple[float, int]]:
    """For each clip (distance in bits to the nearest clip before it, that one's position); (HASH_BITS, -1) for none.

    Two clips are as far apart as the pictures of the one are, in the mean, from their nearest in the other; of both
    ways the nearer, so that a copy of a part is found. The work is n^2 / 2 in numpy, a loop of n in Python.
    """
    nearest = [(float(HASH_BITS), -1)] * min(1, len(hashes))
    repeated = [(clip * NUM_PAIRS)[:NUM_PAIRS] for clip in hashes]  # an image has one
    words_WKN = np.ascontiguousarray(np.array([
        [np.frombuffer(bits.to_bytes(HASH_BITS // 8, "big"), np.uint64) for bits in clip] for clip in repeated]).T)
    for n in range(1, len(hashes)):
        bits_KKn = np.zeros((NUM_PAIRS, NUM_PAIRS, n), np.uint16)
        for words_KN in words_WKN:
            bits_KKn += np.bitwise_count(words_KN[:, None, :n] ^ words_KN[None, :, n, None])
        sums_n = np.minimum(bits_KKn.min(0).sum(0, np.uint16), bits_KKn.min(1).sum(0, np.uint16))
        i = int(sums_n.argmin())
        nearest.append((float(sums_n[i]) / NUM_PAIRS, i))
    return nearest


def read(manifest: Path) -> list[Entry]:
    """The entries of a manifest. UserError with its faults; an id that stands twice is one, for `duplicate_of`."""
    entries, faults = read_entries(manifest)
    lines: dict[str, str] = {}
    faults += [f"{entry.place}: the id {entry.id!r} is also that of {lines[entry.id]}" for entry in entries
               if lines.setdefault(entry.id, entry.line) != entry.line]
    refuse(faults, "mend these lines")
    if not entries:
        raise UserError(f"{shown(manifest)} has no rows", "make one: python -m data_tools.split --help")
    return entries


def _text(rows: Sequence[dict[str, Any]], out: Path) -> str:
    if out.suffix != ".csv":
        return "".join(map(json_line, rows))
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
                      for key, value in row.items()} for row in rows)
    return file.getvalue()


def run(manifest: Path, out: Path, jobs: int, timeout_s: float) -> tuple[list[Entry], list[Measured], int]:
    """Write the manifest with its measurements to `out`: (entries, what was found for each, how many were remembered).

    What is measured is remembered in a file beside `out`, so that a killed call goes on, and other calls measure only
    what is new or changed. Measurements of faulty clips are null; the next call tries them again.
    """
    if out.suffix not in (".jsonl", manifest.suffix):
        raise UserError(f"--out {shown(out)}: neither .jsonl nor, as the manifest is, {manifest.suffix}",
                        f"--out {shown(out.with_suffix('.jsonl'))}")
    needed("cv2", "wantrain-filter", SCENEDETECT, "data")
    journal = journal_of(out)
    old = done = journal.read()
    while True:
        before, entries = stamp(manifest), read(manifest)
        todo = [_job(entry) for entry in entries]
        by_key = {job.key: job for job in todo}
        done = journal.filled(done, [job.key for job in todo], by_workers(
            measure, by_key, lambda job, failure: Measured(fault=f"{shown(job.path)}: {failure}"), jobs, timeout_s),
            "clip", "filter")
        if stamp(manifest) == before:  # else somebody wrote captions meanwhile, which must not be lost
            break
    found = [done[job.key] for job in todo]
    written = _measured(entries, found, out)
    write_text(out, _text([entry.values for entry in written], out))
    return written, found, sum(job.key in old for job in todo)


def _job(entry: Entry) -> Job:
    path = Path(entry.where("video"))
    return Job(path, *entry.bounds, digest_text(VERSION, path, *stamp(path), *entry.bounds))


def journal_of(out: Path) -> Journal[Measured]:
    """The file in which measurements are remembered."""
    return Journal(out.with_name(out.name + ".measured"),
                   lambda row: Measured(**row | {"hashes": tuple(row["hashes"])}))


def _measured(entries: Sequence[Entry], found: Sequence[Measured], out: Path) -> list[Entry]:
    """The entries with their measurements, as they stand in `out`."""
    folder = absolute(out).parent
    ids = new_ids(entries, folder)
    fine = [i for i, measured in enumerate(found) if not measured.fault]
    nearest = dict(zip(fine, nearest_earlier([found[i].hashes for i in fine]), strict=True))
    written = []
    for i, (entry, measured) in enumerate(zip(entries, found, strict=True)):
        bits, earlier = nearest.get(i, (None, -1))
        values = {name: None if measured.fault else bits if name == "duplicate" else getattr(measured, name)
                  for name in SUGGESTED}
        if bits is not None and bits < NEAR_BITS:
            values["duplicate_of"] = ids[entries[fine[earlier]].id]
        kept = {name: value for name, value in moved(entry, folder, ids).items() if name != "duplicate_of"}
        written.append(Entry(folder, entry.place, kept | values))
    return written


def summary(entries: Sequence[Entry], found: Sequence[Measured], num_remembered: int) -> str:
    """Counts that add up, a table of every column, the suggested limits with what they drop, and every fault."""
    faults = [measured.fault for measured in found if measured.fault]
    fine = [entry for entry, measured in zip(entries, found, strict=True) if not measured.fault]
    lines = [f"rows {len(entries)} = {len(entries) - num_remembered - len(faults)} measured + "
             f"{num_remembered} remembered + {len(faults)} faulty"]
    if fine:
        dropped = {column: [entry for entry in fine if not _keeps(limits, entry.values[column])]
                   for column, limits in SUGGESTED.items()}
        lines += [f"  {'column':10}{'min':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'max':>9}  suggested      drops"]
        lines += [_table_line(column, [entry.values[column] for entry in fine], len(dropped[column]))
                  for column in SUGGESTED]
        together = {entry.id for some in dropped.values() for entry in some}
        lines += [f"  all together drop {len(together)} of {len(fine)}:",
                  "  " + " ".join(f"data.limits.{column}={_limits(column)}" for column in SUGGESTED),
                  "  look at these before you set a limit:", *(_extremes(column, fine) for column in SUGGESTED)]
    doubles = [f"  duplicate: {entry.id} of {entry.values['duplicate_of']} ({entry.values['duplicate']:g} bits)"
               for entry in fine if "duplicate_of" in entry.values]
    return "\n".join([*lines, *doubles[:NUM_SHOWN], *([f"  and {len(doubles) - NUM_SHOWN} more: duplicate_of"]
                      if len(doubles) > NUM_SHOWN else []), *(f"  fault: {fault}" for fault in faults)])


def _keeps(limits: tuple[float | None, float | None], value: float) -> bool:
    low, high = limits
    return (low is None or value >= low) and (high is None or value <= high)


def _limits(column: str) -> str:
    return "[" + ",".join("null" if limit is None else f"{limit:g}" for limit in SUGGESTED[column]) + "]"


def _table_line(column: str, values: Sequence[float], num_dropped: int) -> str:
    quantiles = "".join(f"{value:9.4g}" for value in np.percentile(values, (0, 5, 50, 95, 100)))
    return f"  {column:10}{quantiles}  {_limits(column):14}{num_dropped:6}"


def _extremes(column: str, entries: Sequence[Entry]) -> str:
    """The clips at the ends of a column that its limits are about."""
    ordered = sorted(entries, key=lambda entry: entry.values[column])
    ends = zip(("lowest", "highest"), SUGGESTED[column], (ordered, ordered[::-1]), strict=True)
    return "\n".join(f"    {column}, {end}: " + ", ".join(f"{entry.values[column]:.4g} {entry.id}"
                     for entry in some[:NUM_EXTREMES]) for end, limit, some in ends if limit is not None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (also where clips are faulty: they are named), 2, 130."""
    parser = Parser(
        prog="python -m data_tools.filter", description="Measure every clip of a manifest and write the measurements "
        f"as columns: {', '.join(SUGGESTED)}. Nothing is dropped: the recipe's data.limits do that, and this tool ends "
        "with limits to paste there. Media are only read.",
        epilog="The same command again goes on where it was stopped, and measures only what is new or changed (kept in "
        "FILE.measured).")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a .jsonl or .csv; columns it has are kept")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="where the rows go with their measurements (default: into MANIFEST itself)")
    add_job_arguments(parser, 300)

    def work(args: argparse.Namespace) -> str:
        entries, found, num_remembered = run(args.manifest, args.out or args.manifest, args.jobs, args.timeout_s)
        text = summary(entries, found, num_remembered)
        if all(measured.fault for measured in found):
            raise UserError(text, "mend these clips, or take them out of the manifest")
        return text

    return answer(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
