"""Captions for a manifest: from a vision-language model, sidecar files, file names or another column.

    python -m data_tools.caption manifest.jsonl --kind style --trigger wrds --dry-run
    python -m data_tools.caption manifest.jsonl --kind style --trigger wrds
    python -m data_tools.caption stills/ --from sidecars --out stills.jsonl

A caption that is there is kept unless told otherwise, rows and columns stay as they are, media are only read, and
rows = captioned + kept + faulty. The model is any that transformers loads for images and text. It sees frames as
pictures with their times, not as a video: transformers makes videos only with torchvision, which nothing else here
needs. Decoding is greedy and batches are made in the manifest's order, so the same call gives the same captions.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import operator
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.captioner import (
    MODEL,
    Answer,
    Captioner,
    Job,
    Seen,
    Settings,
    is_image,
    judge,
    see,
    with_trigger,
    worded,
)
from data_tools.command import Parser, add_job_arguments, answer, is_medium, needed, positive, shown, stamp
from data_tools.rows import Entry, captions_in, folder_entries, has, is_url, moved, sidecars, sound_entries, write_rows
from wantrain.data.tables import one_line
from wantrain.files import digest_text
from wantrain.jobs import Ending, progress
from wantrain.journal import Journal, Key, Outcome, Outcomes, by_workers
from wantrain.terms import UserError

SOURCES = ("model", "sidecars", "names")
DTYPES = ("bfloat16", "float32", "4bit")

HOW = ("Write the caption of this {medium} for training a video generator: one paragraph of 40 to 80 words in plain "
       "English, in the present tense, only what can be seen. Begin with the subject itself, not with a phrase like "
       "'the {medium} shows'. No lists, no guesses, no praise; do not mention frames or times. ")
KINDS = {
    "general": "Describe the subjects, what they do and in which order, the place, the light, the framing and movement "
               "of the camera, and the visual style.",
    "style": "Describe the subjects, what they do, the place and the framing, as if you saw them in reality. Leave out "
             "everything about how it is made and looks as a whole: no word on medium, technique, style, artist, era, "
             "palette, line, texture, grain, lens, grading, lighting or mood.",
    "character": "The main figure is called {trigger}: name it so, and never otherwise. Describe what {trigger} does, "
                 "its pose, expression and clothes, the place, other figures, the light and the camera. Leave out what "
                 "is always the same about {trigger}: face, hair, eyes, skin, build, age, sex, species.",
    "motion": "Describe the subjects and how they look, the place, the light, the visual style and the framing, as "
              "they are at the beginning. Leave out the movement: no word on what the subjects or the camera do, on "
              "speed, on what changes or how it ends.",
}
"""What to describe and what not, by kind of set: what is left out goes to the trigger, what is said stays free."""

ELSEWHERE = "on another machine: fetch it, then caption it here"


def readable(name: str) -> str:
    """The words in a file's name, without numbers, sizes and what `data_tools.split` adds to names."""
    stem = Path(re.sub(r"(\.\w+)@\d+\.\d{3}\.\w+$", r"\1", name)).stem
    words = re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)).split()
    kept = [re.sub(r"(?<=[^\W\d]{2})\d+$", "", word) for word in words
            if not re.fullmatch(r"\d+([px]\d*|fps|k|s)?|v\d+", word, re.I)]
    return " ".join(kept)


def gather(source: Path, out: Path) -> list[Entry]:
    """The rows of a manifest or folder as they stand in `out`; those that are in `out` already stay as they are there.

    UserError where there are none or lines are faulty: all are named.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"{shown(out)}: a manifest with captions is written as .jsonl, and {shown(source)} is none",
                        "give --out FILE.jsonl")
    rows = folder_entries(source) if source.is_dir() else sound_entries([source])[0]
    ids = {row.id: row.id for row in rows}
    rows = [Entry(out.parent, row.place, moved(row, out.parent, ids)) for row in rows]
    if out.exists() and not (source.exists() and out.samefile(source)):
        there = {(row.clip, row.values.get("id")): row for row in sound_entries([out])[0]}
        rows = [there.pop((row.clip, row.values.get("id")), row) for row in rows] + [*there.values()]
    if not rows:
        raise UserError(f"no clips in {shown(source)}", "give a manifest, or a folder of videos and images")
    return rows


def from_texts(rows: Sequence[Entry], source: str) -> tuple[list[list[str]], list[str]]:
    """(captions, fault) of every row, from its sidecar files, its name or a column."""
    files = [Path(row.where("video")) for row in rows]
    folders = {file.parent for file in files if source == "sidecars" and file.parent.is_dir()}
    there = [file for folder in folders for file in folder.iterdir()]
    beside, _ = sidecars(filter(is_medium, there), there)
    found, faults = [], []
    for row, file in zip(rows, files, strict=True):
        texts: Sequence[Any]
        if source == "sidecars":
            texts, fault = captions_in(beside.get(file, []))
            fault = fault or f"no {file.stem}.txt with it"
        elif source == "names":
            texts, fault = [readable(file.name)], f"the name {file.name} has no words"
        else:
            value = row.captions if source == "caption" else row.values.get(source)
            texts, fault = value if isinstance(value, list) else [value], f"its column {source} has no text"
        found.append([line for text in texts if text is not None and (line := one_line(str(text)))])
        faults.append("" if found[-1] else fault)
    return found, faults


def job_of(row: Entry, settings: Settings, is_read: bool = True) -> Job:
    """The span that a row is about."""
    return Job(Path(row.where("video")), *row.span, settings.num_frames, settings.max_pixels, is_read)


def _key(row: Entry, settings: Settings) -> str:
    """What an answer hangs on."""
    job = job_of(row, settings)
    return digest_text(*dataclasses.astuple(job), *stamp(job.path), settings.model, settings.dtype,
                       worded(settings, job), settings.max_tokens)


def from_model(rows: Sequence[Entry], out: Path, settings: Settings, jobs: int, timeout_s: float
               ) -> tuple[list[list[str]], list[str]]:
    """(captions, fault) of every row, from a model. Answers go to a journal beside `out`, batch by batch."""
    journal = journal_of(out)
    known = journal.read()
    keys = ["" if is_url(row.where("video")) else _key(row, settings) for row in rows]
    clips = {key: job_of(row, settings) for key, row in zip(keys, rows, strict=True) if key}
    if {*clips} - {*known}:
        captioner = Captioner(_fetched(settings), settings)

        def work(missing: Sequence[str]) -> Generator[Outcomes[str, Answer]]:
            todo = [(key, clips[key]) for key in missing]
            for seen in _seen_ahead(todo, settings.batch_size, jobs, timeout_s):
                fine = {key: look.result for key, look in seen.items() if not look.result.fault}
                answers = captioner.ask([clips[key] for key in fine], list(fine.values())) if fine else []
                yield {**{key: Outcome(Answer(fault=look.result.fault), look.ending) for key, look in seen.items()},
                       **{key: Outcome(told, Ending.DONE) for key, told in zip(fine, answers, strict=True)}}

        known = journal.filled(known, [key for key in keys if key], work, "clip", "caption")
    told = [judge(known.get(key, Answer(fault=ELSEWHERE)), settings.max_tokens) for key in keys]
    return [[caption] for caption, _ in told], [fault for _, fault in told]


def _fetched(settings: Settings) -> str:
    if settings.dtype == "4bit":
        needed("bitsandbytes", "--dtype 4bit", "bitsandbytes", "adamw_8bit")
    from wantrain.models import hub

    return str(hub.local(settings.model))


def _seen_ahead(todo: Sequence[tuple[str, Job]], size: int, jobs: int, timeout_s: float
                ) -> Iterator[Outcomes[str, Seen]]:
    """What is seen of each batch, in its order; while one is captioned, the next is decoded."""
    batches = [dict(todo[i : i + size]) for i in range(0, len(todo), size)]
    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(_see_all, batch, jobs, timeout_s) for batch in batches[:1]]
        for number, batch in enumerate(batches, 1):
            seen = coming.pop().result()
            coming += [ahead.submit(_see_all, after, jobs, timeout_s) for after in batches[number : number + 1]]
            yield {key: seen[key] for key in batch}


def _see_all(clips: Mapping[Key, Job], jobs: int, timeout_s: float, has_bar: bool = False
             ) -> dict[Key, Outcome[Seen]]:
    found: dict[Key, Outcome[Seen]] = {}
    with progress(len(clips), 0, "clip", "look", has_bar) as bar:
        for some in by_workers(see, clips, lambda job, failure: Seen(fault=f"{shown(job.path)}: {failure}"), jobs,
                               timeout_s)(clips):
            found |= some
            bar.update(len(some))
    return found


def journal_of(out: Path) -> Journal[Answer]:
    """The file that holds answers until the manifest is written. A clip that took too long is tried again."""
    return Journal(out.with_name(out.name + ".journal"), lambda row: Answer(**row),
                   {*Ending} - {Ending.TIMED_OUT})


def _has_caption(row: Entry) -> bool:
    """Whether training would find one: an empty `caption` hides further ones from it."""
    first = row.values.get("caption")
    return bool(row.captions if first is None else one_line(first))


def _wanted(source: Path, out: Path, settings: Settings) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """(all rows, those to caption, those kept). UserError where the column that captions come from is not there."""
    rows = gather(source, out)
    columns = sorted({column for row in rows for column in row.values})
    if settings.source not in (*SOURCES, *columns):
        raise UserError(f"--from {settings.source}: there is no such column", "--from one of: "
                        + ", ".join((*SOURCES, *columns)))
    is_wanted = [settings.overwrite or not _has_caption(row) for row in rows]
    return rows, [*itertools.compress(rows, is_wanted)], [*itertools.compress(rows, map(operator.not_, is_wanted))]


def run(source: Path, out: Path, settings: Settings, jobs: int, timeout_s: float) -> str:
    """Write captions into `out`, which may be `source` itself; returns the counts, which add up, and every fault.

    Raises UserError, also where somebody else has changed `out` in the meantime: nothing is lost then.
    """
    before = stamp(out)
    rows, wanted, kept = _wanted(source, out, settings)
    captions, faults = (from_model(wanted, out, settings, jobs, timeout_s) if settings.source == "model"
                        else from_texts(wanted, settings.source))
    if stamp(out) != before:
        raise UserError(f"{shown(out)} was changed while captions were made; it was left as it is",
                        "the same command again puts them in, and makes none anew")
    for row, texts, fault in zip(wanted, captions, faults, strict=True):
        if not fault:
            first, *further = [with_trigger(text, settings.trigger, settings.form) for text in texts]
            row.values.update({"caption": first} | ({"captions": further} if further else {}))
    write_rows(out, [row.values for row in rows])
    if settings.source == "model":
        journal_of(out).path.unlink(missing_ok=True)
    bare = [row.id for row in kept if not all(has(settings.trigger, text) for text in row.captions)]
    lines = [_counted(rows, kept, faults) + f", in {shown(out)}"]
    lines += [f"  {len(bare)} of those kept are without the trigger, such as {bare[0]}; --from caption --overwrite "
              "puts it into every caption"] if bare else []
    return _answered(lines + _told(wanted, faults), faults)


def _answered(lines: Sequence[str], faults: Sequence[str]) -> str:
    """The lines; a UserError where not one clip was fine."""
    if faults and all(faults):
        raise UserError("\n".join(lines), "mend these clips, or take them out of the manifest")
    return "\n".join(lines)


def preview(source: Path, out: Path, settings: Settings, jobs: int, timeout_s: float) -> str:
    """Say what `run` would do, clip by clip. Writes nothing and loads no weights; raises UserError as `run` does."""
    rows, wanted, kept = _wanted(source, out, settings)
    if settings.source == "model":
        lines, faults = _previewed(wanted, settings, jobs, timeout_s)
    else:
        captions, faults = from_texts(wanted, settings.source)
        lines = [f"{row.id}: " + " | ".join(with_trigger(text, settings.trigger, settings.form) for text in texts)
                 for row, texts in zip(wanted, captions, strict=True) if texts]
    return _answered([*lines, _counted(rows, kept, faults) + "; a dry run: nothing was written",
                      *_told(wanted, faults)], faults)


def _previewed(rows: Sequence[Entry], settings: Settings, jobs: int, timeout_s: float) -> tuple[list[str], list[str]]:
    """(the prompts and a line for every clip, its fault)."""
    captioner = Captioner(settings.model, settings, with_weights=False)
    clips = [job_of(row, settings, is_read=False) for row in rows]
    seen = _see_all({job: job for job, row in zip(clips, rows, strict=True) if not is_url(row.where("video"))}, jobs,
                    timeout_s, has_bar=True)
    prompts: dict[bool, str] = {}
    num_tokens: dict[tuple[int, ...], int] = {}
    lines, faults = [], []
    for row, job in zip(rows, clips, strict=True):
        look = seen[job].result if job in seen else Seen(fault=ELSEWHERE)
        faults.append(look.fault)
        if look.fault:
            continue
        kind = (is_image(job), *look.shape_FHW)
        if kind not in num_tokens:
            prompt = captioner.prompt(job, look)
            prompts.setdefault(is_image(job), prompt)
            blank_FHWC = np.zeros((*look.shape_FHW, 3), np.uint8)
            num_tokens[kind] = captioner.tokenized([prompt], [blank_FHWC])["input_ids"].numel()
        _, height, width = look.shape_FHW
        lines.append(f"{row.id}: frames at {' '.join(f'{t:.2f}' for t in look.times_s)} s, {width}x{height} px, about "
                     f"{num_tokens[kind]} tokens + {settings.max_tokens} at most to answer")
    shown_prompts = [f"the prompt for {'pictures' if is_image else 'videos (times are those of the first)'}:\n{text}"
                     for is_image, text in prompts.items()]
    return shown_prompts + lines, faults


def _counted(rows: Sequence[Entry], kept: Sequence[Entry], faults: Sequence[str]) -> str:
    num_faulty = sum(map(bool, faults))
    return f"{len(rows)} rows = {len(faults) - num_faulty} captioned + {len(kept)} kept + {num_faulty} faulty"


def _told(rows: Sequence[Entry], faults: Sequence[str]) -> list[str]:
    return [f"  fault: {row.id}: {fault}" for row, fault in zip(rows, faults, strict=True) if fault]


def _settings(args: argparse.Namespace) -> Settings:
    prompt = args.prompt or HOW + KINDS[args.kind]
    if args.source == "model" and "{trigger}" in prompt and not args.trigger:
        raise UserError("the prompt" + ("" if args.prompt else f" of --kind {args.kind}") + " names the {trigger}, and "
                        "there is no --trigger", "--trigger WORD: a rare one that the base does not know")
    if "{caption}" not in args.form:
        raise UserError(f"--form {args.form!r} has no {{caption}} in it", "such as --form '{trigger}, {caption}'")
    return Settings(args.source, args.model, args.dtype, prompt, args.trigger, args.form, args.frames, args.max_pixels,
                    args.max_tokens, args.batch_size, args.overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (also where clips are faulty: they are named), 2, 130."""

    def work(args: argparse.Namespace) -> str:
        out = (args.out or args.manifest).absolute()
        todo = preview if args.dry_run else run
        # as many processes as make one batch ready at once, while the one before it is captioned
        return todo(args.manifest, out, _settings(args), max(args.jobs, args.batch_size), args.timeout_s)

    return answer(_parser(), work, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m data_tools.caption", description="Write captions into a manifest. Those that are there are "
        "kept, media are only read.",
        epilog="The same command again goes on where it was stopped: answers are remembered in FILE.journal until the "
        "manifest is written. A trigger is put into a caption once, however often the command runs.")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST",
                        help=".jsonl; or .csv, .parquet or a folder of videos and images with sidecars, with --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the .jsonl to write (default: MANIFEST itself); what "
                        "is captioned there already stays")
    parser.add_argument("--from", dest="source", default="model", metavar="SOURCE",
                        help="model; sidecars (NAME.txt, and NAME.*.txt as further captions); names (the file's, made "
                        "readable); or a column of the manifest (default: %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="general",
                        help="what the set is to teach, which is what captions must not say, so that it goes to the "
                        "trigger: the look (style), what is constant in a figure (character), the movement (motion), "
                        "or nothing in particular (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="your own words to the model in place of those of --kind; "
                        "{medium} is 'video' or 'picture', {trigger} the trigger")
    parser.add_argument("--trigger", default="", metavar="WORD", help="put into every caption that has it not")
    parser.add_argument("--form", default="{trigger}, {caption}", metavar="TEXT",
                        help="how it is put in (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="make captions anew where there are some")
    parser.add_argument("--dry-run", action="store_true", help="show the clips, the exact prompt, the times of the "
                        "frames and the tokens; load no weights, write nothing")
    model = parser.add_argument_group("the model")
    model.add_argument("--model", default=MODEL, metavar="PATH|ID",
                       help="a model for images and text, its folder or hub id (default: %(default)s)")
    model.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                       help="4bit needs bitsandbytes and takes less memory (default: %(default)s)")
    model.add_argument("--frames", type=positive(int), default=8, metavar="N",
                       help="frames seen of a clip, from the middles of equal parts of its span (default: %(default)s: "
                       "one each 0.6 s of 81 frames at 16 fps)")
    model.add_argument("--max-pixels", type=positive(int), default=512 * 512, metavar="N",
                       help="a larger frame is made smaller (default: %(default)s, 512x512: 256 tokens of Qwen3-VL; "
                       "eight frames are about 2000)")
    model.add_argument("--max-tokens", type=positive(int), default=250, metavar="N",
                       help="longest answer (default: %(default)s: twice what is asked for, and well below the 512 "
                       "that Wan reads)")
    model.add_argument("--batch-size", type=positive(int), default=4, metavar="N",
                       help="clips at the same time; a kill loses one batch at most (default: %(default)s)")
    add_job_arguments(parser, 120)
    return parser


if __name__ == "__main__":
    sys.exit(main())
