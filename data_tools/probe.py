"""Look into every video and image before anything is spent on them: what it is, what decodes, what is broken.

    python -m data_tools.probe films/ stills/ --out probe.jsonl

One JSON line a file, in the fields of `probing.Probed`; paths are relative to the folder of the output. A file is
decoded from its first frame to its last, in a worker process with a time limit. Nothing is dropped in silence:
found = probed + faulty + ignored. Times and sizes are those of `wantrain.data.media`, so what is said here is what
`wantrain cache` will see. (What decodes is imported where it is used, so that --help comes at once.)
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.command import SUFFIXES, Parser, absolute, add_job_arguments, answer, find_files, relative, stamp
from wantrain.files import json_line

if TYPE_CHECKING:
    from data_tools.probing import Probed


def read(out: Path) -> list[Probed]:
    """The lines of an output of this tool; a last line cut off by a crash is left out. Paths are made usable."""
    from data_tools.probing import Probed
    from wantrain.files import remembered

    return list(remembered(out, lambda row: Probed(**row | {"path": str(absolute(out.parent / row["path"]))})))


def _line(found: Probed, out: Path) -> str:
    return json_line(dataclasses.asdict(found) | {"path": relative(Path(found.path), out.parent)})


def run(paths: Sequence[Path], out: Path, jobs: int, timeout_s: float) -> tuple[list[Probed], list[Path]]:
    """Probe what is below `paths` into `out`: (probed in the order of their paths, ignored).

    Lines of `out`, and of the journal that a killed call leaves beside it, are kept for files whose size and time of
    change are the same; what ran into the time limit is tried again.
    """
    from data_tools import probing
    from wantrain import journal
    from wantrain.files import digest_text, write_text
    from wantrain.jobs import Ending

    files, ignored = find_files(paths)
    kept = journal.Journal(out.with_name(out.name + ".journal"), lambda row: probing.Probed(**row),
                           {*Ending} - {Ending.TIMED_OUT})
    by_key = {digest_text(path, *stamp(path)): path for path in files}
    known = {digest_text(p.path, p.size_bytes, p.mtime_ns, p.ctime_ns): p for p in read(out) if not p.is_timed_out}
    done = kept.filled(known | kept.read(), list(by_key), journal.by_workers(
        probing.probe_file, by_key, probing.failed, jobs, timeout_s), "file", "probe")
    found = [done[key] for key in by_key]
    write_text(out, "".join(_line(one, out) for one in found))
    kept.path.unlink(missing_ok=True)
    return found, ignored


def summary(found: Sequence[Probed], ignored: Sequence[Path]) -> str:
    """The counts, what may surprise, and every fault."""
    from wantrain.data.films import NOT_SQUARE, TRANSPARENT

    fine, faulty = [p for p in found if not p.fault], [p for p in found if p.fault]
    endings = _counts(path.suffix.lower() or "no ending" for path in ignored)
    surprises: dict[str, list[Any]] = {
        "variable rate": [p.is_variable_fps for p in fine], "rotated": [p.rotation_deg for p in fine],
        "HDR": [p.is_hdr for p in fine], "more than 8 bit": [p.bit_depth > 8 for p in fine],
        "interlaced": [p.is_interlaced for p in fine], TRANSPARENT: [p.has_alpha for p in fine],
        NOT_SQUARE: [p.pixel_aspect != 1 for p in fine],
        "only the first frame is read": [p.kind == "image" and p.num_frames > 1 for p in fine],
    }
    table = {
        "codec": _counts(p.codec for p in fine), "size": _counts(f"{p.width}x{p.height}" for p in fine),
        "fps": _counts("variable" if p.is_variable_fps else f"{p.fps:g}" for p in fine if p.fps),
        "reader": _counts(p.reader + (f" ({p.reader_reason})" if p.reader == "pyav" else "") for p in fine),
        "beware": ", ".join(f"{text} {n}" for text, flags in surprises.items() if (n := sum(map(bool, flags)))),
    }
    num_all = len(found) + len(ignored)
    lines = [f"found {num_all} = {len(fine)} probed + {len(faulty)} faulty + {len(ignored)} ignored"
             + (f" (not known as videos or images: {endings})" if ignored else ""),
             f"  {'frames':8}{sum(p.num_frames for p in fine)} decoded, "
             f"{sum(p.duration_s for p in fine):.1f} s of video",
             *(f"  {name:8}{text}" for name, text in table.items() if text)]
    return "\n".join(lines + [f"  fault: {p.fault}" for p in faulty])


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{value} {n}" for value, n in collections.Counter(values).most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (also where files are faulty: they are the finding), 2, 130."""
    parser = Parser(
        prog="python -m data_tools.probe", description="What every video and image is, and what is wrong with it: "
        "decodes each file to its end, writes one JSON line a file and prints a summary. Sources are only read.",
        epilog="The same command again goes on where it was stopped, and looks only at files that are new or changed.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH",
                        help="a file, or a folder of which everything below is looked at: "
                        + " ".join(sorted(SUFFIXES)))
    parser.add_argument("--out", type=Path, default=Path("probe.jsonl"), metavar="FILE",
                        help="where the lines go (default: %(default)s)")
    add_job_arguments(parser, 120)
    return answer(parser, lambda args: summary(*run(args.paths, args.out, args.jobs, args.timeout_s)), arguments)


if __name__ == "__main__":
    sys.exit(main())
