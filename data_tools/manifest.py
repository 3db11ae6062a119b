"""Manifests as a whole: make one of folders, check it, merge several, hold clips out, say what is in it.

    python -m data_tools.manifest build films/ stills/ --out manifest.jsonl
    python -m data_tools.manifest check manifest.jsonl --trigger sks
    python -m data_tools.manifest merge a.jsonl b.jsonl --out all.jsonl
    python -m data_tools.manifest split all.jsonl --train train.jsonl --heldout heldout.jsonl --share 0.1
    python -m data_tools.manifest stats all.jsonl

Read are .jsonl, .csv and .parquet, written is .jsonl. Columns that are not known here stay as they are, faults are
told together with their lines, and nothing is written where there is one. Media are only read.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import re
import statistics
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_tools.command import (
    Parser,
    absolute,
    add_job_arguments,
    answer,
    check_openable,
    find_files,
    positive,
    relative,
    shown,
    stamp,
)
from data_tools.dividing import TOUCHING_S, Rule, divide, touching
from data_tools.looking import Medium, look_at, seconds_of
from data_tools.rows import (
    Entry,
    captions_in,
    check_written,
    has,
    moved,
    new_ids,
    read_entries,
    refuse,
    sidecars,
    sound_entries,
    write_rows,
)
from wantrain.data.tables import COLUMNS, MEDIA, one_line
from wantrain.terms import IMAGE_SUFFIXES, PARTNERS, UserError

LENGTHS_S = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 60, math.inf)
NUMS_FRAMES, FPS = (17, 33, 49, 81), (16, 24)


def build(paths: Sequence[Path], out: Path, probed: Path | None, partners: Mapping[str, Sequence[Path]]) -> str:
    """Write a row into `out` for every video and image below `paths` that has none; what it did.

    Rows that are there stay as they are, and get only what they lack: a caption, a partner (`partners` gives
    the folders of these). A faulty file is named and gets no row, or loses it, unless a caption would be lost with it.
    """
    check_written(out)
    files, others = find_files(paths)
    folders = [absolute(folder) for some in partners.values() for folder in some]
    clips = [file for file in files if not any(file.is_relative_to(folder) for folder in folders)]
    texts, strays = sidecars(clips, others)
    faults, notes = _faulty(clips, probed)
    captions: dict[Path, list[str]] = {clip: [] for clip in clips}
    for clip, files_of in texts.items():
        captions[clip], fault = captions_in(files_of)
        if fault:
            faults.setdefault(clip, f"{shown(clip)}: {fault}")
    before = {row: Path(row.where("video")) for row in (sound_entries([out])[0] if out.exists() else [])}
    refuse([f"{row.place}: its file is faulty, and its caption is in no sidecar: {faults[clip]}"
             for row, clip in before.items() if clip in faults and not set(row.captions) <= set(captions[clip])],
            "mend these files, or take their rows out yourself")
    kept = [row for row, clip in before.items() if clip not in faults]
    folder, there = out.absolute().parent, {*before.values()}
    new = [Entry(folder, "", {"video": relative(clip, folder), "caption": ""})
           for clip in clips if clip not in faults and clip not in there]
    for row in kept + new:
        notes += _fill(row, captions.get(Path(row.where("video")), []))
    roots = [absolute(path if path.is_dir() else path.parent) for path in paths]
    for column, some in partners.items():
        notes += _pair(column, some, kept + new, roots) if some else []
    if not kept + new:
        found = f"no clip in {', '.join(map(shown, paths))}: {len(files)} videos and images, {len(others)} other files"
        raise UserError("\n  ".join([found, *(f"fault: {faults[clip]}" for clip in sorted(faults))]),
                        "give folders of videos and images that can be read: python -m data_tools.probe FOLDER tells")
    write_rows(out, (row.values for row in kept + new))
    used = {text for found in texts.values() for text in found}
    endings = collections.Counter(file.suffix.lower() or "no ending" for file in {*others} - used - {*strays})
    return "\n".join([
        f"found {len(files) + len(others)} = {len(clips) - len(faults)} clips + {len(faults)} faulty + "
        f"{len(files) - len(clips)} partners + {len(used)} captions + {len(strays)} captions of no clip "
        f"+ {endings.total()} others" + (f" ({_counted(endings)})" if endings else ""),
        f"{shown(out)}: {len(kept + new)} rows = {len(new)} new + {len(kept)} of {len(before)} there before; "
        f"{sum(bool(row.captions) for row in kept + new)} captioned",
        *(f"  fault: {faults[clip]}" for clip in sorted(faults)),
        *(f"  caption of no clip: {shown(text)}" for text in strays), *(f"  note: {note}" for note in notes)])


def _faulty(clips: Iterable[Path], probed: Path | None) -> tuple[dict[Path, str], list[str]]:
    """(what is wrong with files, notes): by `probed`, the output of data_tools.probe, and by what needs no decoder."""
    from data_tools import probe

    if probed and not probed.exists():
        raise UserError(f"--probe {shown(probed)} does not exist", f"python -m data_tools.probe PATH --out {probed}")
    known = {Path(p.path): p for p in probe.read(probed)} if probed else {}
    faults, unknown = {}, []
    for clip in clips:
        found = known.get(clip)
        if found and (found.size_bytes, found.mtime_ns, found.ctime_ns) == stamp(clip):
            if found.fault:
                faults[clip] = found.fault
            continue
        unknown.append(clip)
        try:
            check_openable(clip)
        except (OSError, ValueError) as error:
            faults[clip] = f"{shown(clip)}: {error}"
    return faults, [f"{len(unknown)} files are not in {shown(probed)} or changed since, among them {shown(unknown[0])}"
                    ] if probed and unknown else []


def _fill(row: Entry, texts: Sequence[str]) -> list[str]:
    """Caption a row of a whole file that has none; a note where it has others than its sidecars."""
    if row.span != (0, math.inf) or set(texts) <= set(row.captions):
        return []
    if row.captions:
        return [f"{row.place}: its caption stays, its sidecars say otherwise: {texts[0]!r}"]
    row.values["caption"] = texts[0]
    if texts[1:]:
        row.values["captions"] = list(texts[1:])
    return []


def _pair(column: str, folders: Iterable[Path], rows: Sequence[Entry], roots: Iterable[Path]) -> list[str]:
    """Give the rows the files of their relative names in the folders: of the same ending, or else the only one."""
    there: dict[Path, list[Path]] = collections.defaultdict(list)
    for folder in folders:
        for file in find_files([folder])[0]:
            there[file.relative_to(absolute(folder)).with_suffix("")].append(file)
    notes = []
    for row in rows:
        video = Path(row.where("video"))
        root = next((root for root in roots if video.is_relative_to(root)), None)
        if row.values.get(column) or not root:
            continue
        files = there.get(video.relative_to(root).with_suffix(""), [])
        files = [file for file in files if file.suffix == video.suffix] or files
        if len(files) == 1:
            row.values[column] = relative(files[0], row.folder)
        else:
            notes.append(f"{row.values['video']} has {'several' if files else 'no'} {column}")
    used = {row.where(column) for row in rows}
    return notes + [f"{shown(file)} is the {column} of no clip" for files in there.values() for file in files
                    if str(file) not in used]


def check(files: Sequence[Path], trigger: str, jobs: int, timeout_s: float) -> str:
    """What is worth a look in manifests that can be trained on. UserError with everything that is in the way."""
    faults, notes, num_rows = [], [], 0
    for file in files:
        rows, own = read_entries(file)
        found = look_at(rows, file, jobs, timeout_s)
        own += [f"{row.place}: {fault}" for row in rows for fault in (
            *_caption_faults(row, trigger), *_column_faults(row, file.suffix), *_media_faults(row, found))]
        first = {row.id: row.line for row in reversed(rows)}
        own += [f"{row.place}: duplicate id {row.id!r} (also {first[row.id]})" for row in rows
                if first[row.id] != row.line]
        faults += own or _refused_by_training(file)
        notes += _notes(rows)
        num_rows += len(rows)
    text = "\n".join([f"{num_rows} rows, {len(faults)} faults", *(f"  fault: {fault}" for fault in faults),
                      *(f"  note: {note}" for note in notes)])
    if faults:
        raise UserError(text, "mend these lines, then check again (nothing was changed)")
    return text


def _refused_by_training(file: Path) -> list[str]:
    """The last word is that of the reader that training uses."""
    from wantrain.data import manifest

    try:
        manifest.read(manifest.ClipSource("check", str(file)))
    except UserError as error:
        return [error.message]
    return []


def _caption_faults(row: Entry, trigger: str) -> list[str]:
    if not row.captions:
        return ["no caption yet"]
    faults = [f"the caption lacks {trigger!r}: {text[:60]!r}" for text in row.captions if not has(trigger, text)]
    return faults + (["one of its captions is empty"] if not all(
        one_line(text) for text in (*(row.values.get("captions") or []), row.values.get("caption") or "x")) else [])


def _column_faults(row: Entry, suffix: str) -> list[str]:
    """Columns that training refuses; it leaves texts of a .parquet alone, for sets that others made have many."""
    return [f"unknown column {column!r} with {str(value)[:40]!r}: known are {', '.join(COLUMNS)}, and numbers"
            for column, value in row.values.items() if column not in COLUMNS and suffix != ".parquet"
            and not (value is None or isinstance(value, int | float))]


def _media_faults(row: Entry, found: Mapping[str, Medium]) -> list[str]:
    faults = []
    start_s, end_s = row.span
    for column in MEDIA:
        where = row.where(column)
        if where not in found:
            continue
        seen = found[where]
        if seen.fault:
            faults.append(f"{column} {shown(Path(where))}: {seen.fault}")
        elif seen.duration_s and start_s >= seen.duration_s:
            faults.append(f"begins at {start_s:g} s, but the {column} ends at {seen.duration_s:g} s")
        elif seen.duration_s and math.isfinite(end_s) and end_s > seen.duration_s + 1 / max(seen.fps, 1):
            faults.append(f"ends at {end_s:g} s, but the {column} at {seen.duration_s:g} s")
        if column == "video":
            end_s = min(end_s, seen.duration_s)
    return faults


def _notes(rows: Sequence[Entry]) -> list[str]:
    notes = [f"{row.place}: {'the same span as' if row.span == other.span else 'overlaps'} {other.line}"
             for other, row in touching(rows) if row.span[0] + TOUCHING_S < other.span[1]]
    alike: dict[str, Entry] = {}
    for row in rows:
        other = alike.setdefault("".join(unicodedata.normalize("NFKC", row.id).casefold().split()), row)
        if other.id != row.id:
            notes.append(f"{row.place}: id {row.id!r} is nearly {other.id!r} ({other.line})")
    for column in PARTNERS:
        lacking = [row.line for row in rows if not row.values.get(column)]
        if 0 < len(lacking) < len(rows):
            notes.append(f"{len(lacking)} of {len(rows)} rows have no {column}: {', '.join(lacking[:9])}"
                         + (" ..." if len(lacking) > 9 else ""))
    texts = [(len(text.split()), row.place) for row in rows for text in row.captions]
    if texts:
        number, place = max(texts, key=lambda t: t[0])
        notes.append(f"the longest caption has {number} words ({place}); the model reads 512 tokens")
    return notes


def merge(files: Sequence[Path], out: Path, prefix: bool) -> str:
    """Write the rows of all manifests into one; a clip that several have becomes one row with all their captions.

    UserError where ids clash (with `prefix` each is preceded by its manifest's name), or where two manifests measured
    a clip differently.
    """
    if out.exists() and absolute(out) not in map(absolute, files):
        raise UserError(f"--out {shown(out)} is there, and is not among the manifests: its rows would be lost",
                        "name it among them, or give another --out")
    folder, merged, faults = out.absolute().parent, list[Entry](), list[str]()
    first: dict[tuple[str, float, float], Entry] = {}
    inputs = sound_entries(files)
    for file, rows in zip(files, inputs, strict=True):
        stem = relative(file.absolute().with_suffix(""), folder) + "/" if prefix else ""
        earlier = dict(first)  # a clip that stands twice in one manifest stays so
        ids = new_ids(rows, folder, stem) | {row.id: earlier[row.clip].id for row in rows if row.clip in earlier}
        for row in rows:
            now = Entry(folder, row.place, moved(row, folder, ids))
            if row.clip in earlier:
                faults += _join(earlier[row.clip], now)
            else:
                merged.append(first.setdefault(row.clip, now) if row.clip not in first else now)
    places = collections.defaultdict(list)
    for row in merged:
        places[row.id].append(row.place)
    faults += [f"id {name!r} stands for several clips: {', '.join(there)}"
               for name, there in places.items() if len(there) > 1]
    refuse(faults, "give the clips other ids (--prefix does so), and take out the measurements that are wrong")
    measures = dict.fromkeys(column for row in merged for column in row.values if column not in COLUMNS)
    write_rows(out, (row.values | {column: row.values.get(column) for column in measures} for row in merged))
    num_rows = sum(map(len, inputs))
    return f"{num_rows} rows of {len(files)} manifests = {len(merged)} rows of {shown(out)} + " \
           f"{num_rows - len(merged)} of clips that an earlier one had (all captions are kept)"


def _join(first: Entry, other: Entry) -> list[str]:
    """Give the first row what the other says of the same clip; where they contradict each other."""
    faults, texts = [], list(dict.fromkeys(first.captions + other.captions))
    for column, value in other.values.items():
        if column in ("video", "id", "caption", "captions") or value is None:
            continue
        if first.values.get(column) is None:
            first.values[column] = value
        elif first.values[column] != value:
            faults.append(f"{other.place}: {column} {value!r}, but {first.values[column]!r} in {first.place}")
    if texts != first.captions:
        first.values.update({"caption": texts[0]} | ({"captions": texts[1:]} if texts[1:] else {}))
    return faults


def split(file: Path, train: Path, heldout: Path, rule: Rule, *, jobs: int, timeout_s: float) -> str:
    """Write the rows of a manifest into two, of which the second is never trained on; both sides in numbers."""
    if len({absolute(path) for path in (file, train, heldout)}) < 3:
        raise UserError(f"FILE, --train and --heldout are not three files: {file}, {train}, {heldout}",
                        "give --train and --heldout names of their own")
    rows, = sound_entries([file])
    before = _divided(rows, train, heldout)
    held = divide(rows, rule, before)
    if len(set(held)) < 2:
        raise UserError(f"{'all' if any(held) else 'none'} of the {len(rows)} clips would be held out",
                        "give --num N, or a --share that so few clips can meet")
    found = look_at([row for row in rows if math.isinf(row.span[1])], file, jobs, timeout_s)
    lines = []
    for out, side in ((train, False), (heldout, True)):
        ours = [row for row, is_held in zip(rows, held, strict=True) if is_held == side]
        folder = out.absolute().parent
        ids = new_ids(rows, folder)
        write_rows(out, (moved(row, folder, ids) for row in ours))
        lines.append(f"{shown(out)}: {len(ours)} clips ({len(ours) / len(rows):.1%}), "
                     f"{sum(seconds_of(row, found) for row in ours):.1f} s")
    num_kept = sum(row.clip in before for row in rows)
    if num_kept:
        lines.append(f"{num_kept} clips stayed where they were (remove both files to divide anew)")
    folders = collections.Counter(str(Path(row.values["video"]).parent) for row in rows)
    shares = {str(Path(row.values["video"]).parent) for row, is_held in zip(rows, held, strict=True) if is_held}
    lines += [f"  note: nothing is held out of {name} ({number} clips)" for name, number in folders.items()
              if name not in shares]
    return "\n".join(lines)


def _divided(rows: Iterable[Entry], train: Path, heldout: Path) -> dict[tuple[str, float, float], bool]:
    """The sides of clips that an earlier call divided. UserError where writing anew would lose something."""
    sides: dict[tuple[str, float, float], bool] = {}
    captions: dict[tuple[str, float, float], set[str]] = collections.defaultdict(set)
    for row in rows:
        captions[row.clip] |= set(row.captions)
    there = [path for path in (train, heldout) if path.exists()]
    faults = []
    for path, divided in zip(there, sound_entries(there), strict=True):
        for row in divided:
            if row.clip not in captions:
                faults.append(f"{row.place}: a clip that the manifest lacks: {row.id}")
            elif not set(row.captions) <= captions[row.clip]:
                faults.append(f"{row.place}: a caption that the manifest lacks: {row.captions[0]!r}")
            elif sides.setdefault(row.clip, path == heldout) != (path == heldout):
                faults.append(f"{row.place}: also in {shown(train)}")
    refuse(faults, "bring them into the manifest (python -m data_tools.manifest merge), or remove both files")
    return sides


def stats(file: Path, trigger: str, jobs: int, timeout_s: float) -> str:
    """A manifest in numbers: sizes, lengths, captions, measurements, and what is too short for which recipe."""
    from wantrain.data.films import count_frames

    rows, = sound_entries([file])
    if not rows:
        raise UserError(f"{shown(file)} has no rows", "python -m data_tools.manifest build FOLDER --out manifest.jsonl")
    found = look_at(rows, file, jobs, timeout_s)
    looked = [(row, seen) for row in rows if (seen := found.get(row.where("video"))) and not seen.fault]
    films = [(row, seen) for row, seen in looked if seen.duration_s]
    lengths_s = [seconds_of(row, found) for row, _ in films]
    table = {
        "size": collections.Counter(f"{seen.width}x{seen.height}" for _, seen in looked),
        "aspect": collections.Counter(f"{seen.width / seen.height:.2f}" for _, seen in looked),
        "fps": collections.Counter(f"{seen.fps:g}" for _, seen in films),
    }
    num_images = sum(Path(row.where("video")).suffix.lower() in IMAGE_SUFFIXES for row in rows)
    lines = [f"{shown(file)}: {len(rows)} clips of {len({row.clip[0] for row in rows})} files, {num_images} of them "
             f"images; {sum(lengths_s):.1f} s of video, {len(rows) - len(looked)} not looked into",
             *(f"  {name:10}{_counted(counts)}" for name, counts in table.items() if counts),
             *_caption_lines(rows, trigger)]
    for column in dict.fromkeys(c for row in rows for c in row.values if c not in COLUMNS):
        values = [v for row in rows if isinstance(v := row.values.get(column), int | float) and math.isfinite(v)]
        lines += [f"  {column:10}{_range(values)}, of {len(values)} clips"] if values else []
    for first_s, stop_s in itertools.pairwise(LENGTHS_S):
        if number := sum(first_s <= length_s < stop_s for length_s in lengths_s):
            lines.append(f"  {f'{first_s:g} to {stop_s:g} s':14}{number:6} {'#' * math.ceil(40 * number / len(films))}")
    if films:
        lines.append("  too short for" + "".join(f"{number:6} frames" for number in NUMS_FRAMES))
    for fps in FPS if films else ():
        numbers = [count_frames(seen, *row.bounds, fps) for row, seen in films]
        lines.append(f"    at {fps} fps   " + "".join(
            f"{sum(number < wanted for number in numbers):6}       " for wanted in NUMS_FRAMES).rstrip())
    return "\n".join(lines + [f"  fault: {shown(Path(where))}: {seen.fault}" for where, seen in found.items()
                              if seen.fault])


def _caption_lines(rows: Sequence[Entry], trigger: str) -> list[str]:
    texts = [text for row in rows for text in row.captions]
    lines = [f"  {'captions':10}{sum(bool(row.captions) for row in rows)} of {len(rows)} clips have one, {len(texts)} "
             "in all" + (f"; words {_range([len(text.split()) for text in texts])}" if texts else "")]
    if trigger:
        lines.append(f"  {'trigger':10}{trigger!r} is in {sum(has(trigger, text) for text in texts)} of {len(texts)}")
    words = collections.Counter(word for text in texts for word in set(re.findall(r"\w{4,}", text.lower())))
    lines += [f"  {'words':10}{_counted(words, 15)} (captions with it; of 4 letters and more)"] if words else []
    again = [(number, text) for text, number in collections.Counter(texts).most_common(5) if number > 1]
    return lines + [f"  {'repeated':10}{number} times: {text[:80]!r}" for number, text in again]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):g} to {max(values):g}, median {statistics.median(values):g}"


def _counted(counts: collections.Counter[str], most: int = 12) -> str:
    return ", ".join(f"{value} {number}" for value, number in counts.most_common(most)) + (
        f" and {len(counts) - most} more" if len(counts) > most else "")


def _share(text: str) -> float:
    value = positive(float)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def parser() -> Parser:
    """The command's arguments."""
    top = Parser(prog="python -m data_tools.manifest", description="Make, check, merge, divide and "
                                  "describe manifests. Read are .jsonl, .csv and .parquet; written is .jsonl.",
                                  epilog="VERB --help tells more. Exit codes: 0; 2 where something is to be mended.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="build|check|merge|split|stats")

    one = verbs.add_parser("build", help="a manifest of folders of videos and images, with their captions",
                           description="Captions are NAME.txt beside the clip, and NAME.*.txt for further ones. "
                           "Called again, it adds what is new: rows that are there keep what they say.")
    one.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder at any depth")
    one.add_argument("--out", type=Path, default=Path("manifest.jsonl"), metavar="FILE", help="(default: %(default)s)")
    one.add_argument("--probe", type=Path, metavar="FILE", help="the output of data_tools.probe: files that it found "
                     "faulty are left out (without it only what shows without decoding: empty files, texts)")
    for column in PARTNERS:
        one.add_argument(f"--{column}", type=Path, metavar="FOLDER", help="files of the same relative names there "
                         f"become the column {column} (default: PATH/{column} where it is there)")
    one.set_defaults(work=lambda a: build(a.paths, a.out, a.probe, {
        column: [given] if (given := getattr(a, column)) else [p / column for p in a.paths if (p / column).is_dir()]
        for column in PARTNERS}))

    one = verbs.add_parser("check", help="everything that is wrong, with its line", description="Exit code 2 where "
                           "training would refuse or misread a row; notes alone (overlaps, ids that are nearly the "
                           "same) give 0. Files are opened and demuxed; remembered in FILE.looked.")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.set_defaults(work=lambda a: check(a.files, a.trigger, a.jobs, a.timeout_s))
    other = verbs.add_parser("stats", help="sizes, lengths, captions and measurements in numbers")
    other.add_argument("file", type=Path, metavar="FILE")
    other.set_defaults(work=lambda a: stats(a.file, a.trigger, a.jobs, a.timeout_s))
    for each in (one, other):
        each.add_argument("--trigger", default="", metavar="WORDS", help="what every caption must say, in this case")
        add_job_arguments(each, 120)

    one = verbs.add_parser("merge", help="several manifests as one", description="Paths are rewritten. A clip that "
                           "several have (same file, same span) becomes one row with the captions of all.")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help="may be one of those merged")
    one.add_argument("--prefix", action="store_true", help="precede every id by its manifest's path and name")
    one.set_defaults(work=lambda a: merge(a.files, a.out, a.prefix))

    one = verbs.add_parser("split", help="hold clips out for validation", description="Never are two parts of one "
                           "shot, touching spans of one file, or a clip and its duplicate on both sides. A clip stays "
                           "on its side when others are added: it hangs on a hash of its name, and on what --train and "
                           "--heldout say where they are there.")
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--train", type=Path, required=True, metavar="FILE")
    one.add_argument("--heldout", type=Path, required=True, metavar="FILE")
    how = one.add_mutually_exclusive_group()
    how.add_argument("--share", type=_share, default=0.1, metavar="X",
                     help="each shot is held out with this chance: few clips may miss it (default: %(default)g)")
    how.add_argument("--num", type=positive(int), metavar="N", help="hold out N clips, or a few less where a shot "
                     "would be parted; clips stay on their side only while --train and --heldout are there")
    one.add_argument("--seed", type=int, default=0, help="another gives another choice (default: %(default)s)")
    one.add_argument("--by", choices=("shot", "file"), default="shot", help="what is not parted: a shot, or all of a "
                     "film, which is stricter: nothing held out was ever seen (default: %(default)s)")
    add_job_arguments(one, 120)
    one.set_defaults(work=lambda a: split(a.file, a.train, a.heldout, Rule(
        None if a.num else a.share, a.num, a.seed, a.by == "file"), jobs=a.jobs, timeout_s=a.timeout_s))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, 2 (something to mend, also what `check` finds), 130."""
    return answer(parser(), lambda args: str(args.work(args)), arguments)


if __name__ == "__main__":
    sys.exit(main())
