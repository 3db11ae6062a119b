"""Look into every video and image before anything is spent on them: what it is, what decodes, what is broken.

    python -m data_tools.probe films/ stills/ --out probe.jsonl

One JSON line a file, in the fields of `Probed`; paths are relative to the folder of the output. A file is decoded from
its first frame to its last, in a worker process with a time limit. Nothing is dropped in silence:
found = probed + faulty + ignored. Times and sizes are those of `wantrain.data.media`, so what is said here is what
`wantrain cache` will see. The other tools read the output with `read` or call `probe_files`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from data_tools.command import (
    SUFFIXES,
    absolute,
    add_job_arguments,
    answer,
    check_openable,
    find_files,
    json_line,
    parsed,
    relative,
    shown,
    stamp,
)
from wantrain.data import media
from wantrain.data.films import HDR, NOT_SQUARE, TRANSPARENT, Probe, decoder_of, film_of, has_alpha, opened
from wantrain.files import remembered, write_text
from wantrain.jobs import TIME_LIMIT, in_workers, progress
from wantrain.terms import IMAGE_SUFFIXES, UserError

EXIF_ORIENTATION = 0x0112
EXIF_TURNS_DEG = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}
"""Counter-clockwise turn that shows the picture upright, by Exif orientation (4, 5 and 7 are also mirrored)."""

TRANSFERS = {16: "pq", 18: "hlg"}
"""Names of those of `HDR`."""

DURATION_IN_HEADER = frozenset({"matroska,webm", "flv", "asf"})
"""Containers whose header tells the duration but not the number of frames; the others tell it or only estimate."""


@dataclass(frozen=True, slots=True)
class Probed:
    """What one file holds. `fault` is empty for a usable file; for a faulty one the other fields may be unset.

    `width`, `height` in pixels as shown, after `rotation_deg` (counter-clockwise). `fps` is the constant rate, or the
    mean one when `is_variable_fps`; 0 for one frame. `min_gap_s`, `max_gap_s` lie between neighbouring frames.
    `num_frames` were decoded, `num_frames_claimed` are in the header (0: it does not say). `pixel_aspect` is not 1
    where stored pixels are not square (`width` and `height` are those of the true shape). `has_alpha`: some pixel is
    not opaque. `reader` is decord, pyav or pillow, `reader_reason` why it is not decord.
    """

    path: str
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    kind: str = ""
    container: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    rotation_deg: int = 0
    pixel_aspect: float = 1.0
    fps: float = 0.0
    is_variable_fps: bool = False
    min_gap_s: float = 0.0
    max_gap_s: float = 0.0
    num_frames: int = 0
    num_frames_claimed: int = 0
    duration_s: float = 0.0
    pixel_format: str = ""
    bit_depth: int = 0
    transfer: str = ""
    is_hdr: bool = False
    is_interlaced: bool = False
    has_alpha: bool = False
    has_audio: bool = False
    reader: str = ""
    reader_reason: str = ""
    fault: str = ""


def probe_file(path: Path) -> Probed:
    """Decode the whole file in this process. A bad file is told by `fault`, not by an exception."""
    found = Probed(str(path), *stamp(path))
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else the last file's message may come late, in this file's log
    with av.logging.Capture(local=False) as log:
        try:
            check_openable(path)
            found = (_probe_image if path.suffix.lower() in IMAGE_SUFFIXES else _probe_video)(path, found)
        except UserError as error:
            cause = error.message.partition(" cannot be decoded: ")[2] or error.message
        except av.FFmpegError as error:
            cause = str(error.strerror)
        except FileNotFoundError:
            cause = "a link to nothing, or gone by now"
        except (OSError, ValueError, IndexError, Image.DecompressionBombError) as error:
            cause = str(error)
        else:
            cause = found.fault
    av.logging.set_level(level)
    if not cause:
        return found
    details = [line.strip() for _, _, text in log for line in text.splitlines() if line.strip()]
    detail = f" ({details[0]})" if details and details[0] not in cause else ""
    return dataclasses.replace(found, fault=f"{shown(path)}: {cause}{detail}")


def _probe_image(path: Path, found: Probed) -> Probed:
    try:
        with Image.open(path) as image:
            image.load()
            num_frames = getattr(image, "n_frames", 1)
            container = image.format or ""
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            has_alpha = image.has_transparency_data and _transparent(np.asarray(image.convert("RGBA")))
            mode = image.mode
    except UnidentifiedImageError as error:
        with contextlib.suppress(av.FFmpegError), opened(path) as film:
            if film.streams.video and not _is_picture(film):
                raise ValueError(f"by its content a film ({film.format.name}): give it the ending of one") from error
        raise ValueError("not an image by its content") from error
    size = media.probe(path)
    first_only = f", only the first of its {num_frames} frames is read" if num_frames > 1 else ""
    return dataclasses.replace(
        found, kind="image", container=container.lower(), codec=container.lower(), width=size.width,
        height=size.height, rotation_deg=EXIF_TURNS_DEG.get(orientation, 0), num_frames=num_frames,
        num_frames_claimed=num_frames, pixel_format=mode.lower(), has_alpha=has_alpha,
        bit_depth={"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8),
        reader="pillow", reader_reason=f"image{first_only}")


def _probe_video(path: Path, found: Probed) -> Probed:
    with opened(path) as container:
        if _is_picture(container):
            raise ValueError(f"by its content an image ({container.format.name.removesuffix('_pipe')}): "
                             "give it the ending of one")
        stream = film_of(container)
        demuxed = media.probe(path)
        seen = _decode_all(container, stream)
        assert stream.time_base is not None
        names = container.format.name.split(",")
        suffix = path.suffix.lower().removeprefix(".")
        transfer = int(stream.codec_context.color_trc)
        fps, is_variable, gaps_s = rate(demuxed.times_s, stream.time_base, (stream.average_rate, stream.guessed_rate))
        return dataclasses.replace(
            found, kind="video", container=suffix if suffix in names else names[0],
            codec=stream.codec_context.codec.canonical_name, width=demuxed.width, height=demuxed.height,
            rotation_deg=seen.rotation_deg, pixel_aspect=demuxed.pixel_aspect, fps=fps,
            is_variable_fps=is_variable, min_gap_s=gaps_s[0], max_gap_s=gaps_s[1], num_frames=seen.num_frames,
            num_frames_claimed=stream.frames, duration_s=round(demuxed.duration_s, 6),
            pixel_format=seen.pixel_format, bit_depth=seen.bit_depth, is_interlaced=seen.is_interlaced,
            transfer=TRANSFERS.get(transfer, "" if transfer == 2 else str(transfer)),
            is_hdr=transfer in HDR, has_audio=bool(container.streams.audio),
            has_alpha=seen.has_alpha or stream.metadata.get("alpha_mode") == "1",
            reader="pyav" if demuxed.why_not_decord else "decord", reader_reason=demuxed.why_not_decord,
            fault=_incomplete(container, stream.frames, demuxed, seen))


def _is_picture(container: av.container.InputContainer) -> bool:
    return container.format.name.endswith("_pipe") or container.format.name == "image2"


@dataclass(slots=True)
class _Seen:
    """What decoding told. `end_s` is the end of the last packet of any stream, from the container's start."""

    num_frames: int = 0
    num_damaged: int = 0
    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    rotation_deg: int = 0
    pixel_format: str = ""
    bit_depth: int = 0
    is_interlaced: bool = False
    has_alpha: bool = False
    end_s: float = 0.0
    broken_off: str = ""


def _decode_all(container: av.container.InputContainer, stream: av.VideoStream) -> _Seen:
    """Decode every frame of the stream, keeping none."""
    seen = _Seen()
    decoder = decoder_of(stream)
    decoder.thread_type = "NONE"
    start = Fraction(container.start_time or 0, av.time_base)
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base - start
                seen.end_s = max(seen.end_s, float(end))
            if packet.stream is not stream:
                continue
            for frame in decoder.decode(packet):
                _look_at(frame, seen)
    except av.FFmpegError as error:
        seen.broken_off = str(error.strerror)
    return seen


def _look_at(frame: av.VideoFrame, seen: _Seen) -> None:
    if not seen.num_frames:
        seen.pixel_format, seen.rotation_deg = frame.format.name, frame.rotation % 360
        seen.bit_depth = max(c.bits for c in frame.format.components)
    seen.num_frames += 1
    seen.num_damaged += frame.is_corrupt
    seen.sizes.add((frame.width, frame.height))
    seen.is_interlaced |= frame.interlaced_frame
    if not seen.has_alpha and has_alpha(frame):
        seen.has_alpha = _transparent(frame.to_ndarray(format="rgba"))


def _transparent(rgba_HWC: np.ndarray) -> bool:
    return bool(rgba_HWC[..., 3].min() < 255)


def _incomplete(container: av.container.InputContainer, claimed: int, demuxed: Probe, seen: _Seen) -> str:
    """What is wrong with a film that opens, '' if nothing."""
    num_timed = len(demuxed.times_s)
    header_s = (container.duration or 0) / av.time_base if container.format.name in DURATION_IN_HEADER else 0.0
    sizes = ", ".join(f"{width}x{height}" for width, height in sorted(seen.sizes))
    faults = {
        f"truncated: the header claims {claimed} frames, {seen.num_frames} decode":
            "truncated" in demuxed.why_not_decord,
        f"truncated: the header claims {header_s:.2f} s, the data ends after {seen.end_s:.2f} s":
            header_s - seen.end_s > max(0.5, 0.02 * header_s),
        f"damaged: decoding stops after {seen.num_frames} of {num_timed} frames: {seen.broken_off}":
            bool(seen.broken_off),
        f"damaged: {seen.num_damaged} of {seen.num_frames} frames decode with errors": seen.num_damaged > 0,
        f"damaged: {num_timed} frames have a time, {seen.num_frames} decode; write it anew with ffmpeg":
            seen.num_frames != num_timed and not demuxed.in_order,  # there, a packet may say "as before"
        f"its frames change their size ({sizes}): cut it there": len(seen.sizes) > 1,
    }
    return next((text for text, found in faults.items() if found), "")


def rate(times_s: np.ndarray, tick: Fraction, claims: Iterable[Fraction | None]
         ) -> tuple[float, bool, tuple[float, float]]:
    """(fps, whether it varies, smallest and largest gap in seconds) of frames shown at `times_s` (sorted, from 0).

    The rate is constant when every frame lies on its grid, but for the rounding of times to `tick` seconds or a tenth
    of a frame of jitter. A claim of the header is believed only where the times confirm it.
    """
    if len(times_s) < 2:
        return 0.0, False, (0.0, 0.0)
    gaps_s = np.diff(times_s)
    gap_s, index = float(np.median(gaps_s)), np.arange(len(times_s))
    rounding_s = min(1.01 * float(tick), 0.3 * gap_s) + 1e-9
    extremes = (round(float(gaps_s.min()), 6), round(float(gaps_s.max()), 6))
    for claim in claims:
        if claim and np.abs(times_s - index / float(claim)).max() <= rounding_s:
            return round(float(claim), 6), False, extremes
    mean = (len(times_s) - 1) / float(times_s[-1] or 1)
    is_variable = np.abs(times_s - index / mean).max() > max(rounding_s, 0.1 * gap_s)
    return round(mean, 3), bool(is_variable), extremes


def probe_files(paths: Collection[Path], jobs: int, timeout_s: float, probe: Callable[[Path], Probed] = probe_file
                ) -> Iterator[Probed]:
    """Every file probed, as they finish, in `jobs` worker processes with `timeout_s` seconds for each file."""
    for path, found, why in in_workers(probe, paths, jobs, timeout_s):
        yield found or Probed(str(path), *stamp(path), fault=f"{shown(path)}: {why}")


def read(out: Path) -> list[Probed]:
    """The lines of an output of this tool; a last line cut off by a crash is left out. Paths are made usable."""
    return list(remembered(out, lambda row: Probed(**row | {"path": str(absolute(out.parent / row["path"]))})))


def _line(found: Probed, out: Path) -> str:
    return json_line(dataclasses.asdict(found) | {"path": relative(Path(found.path), out.parent)})


def run(paths: Sequence[Path], out: Path, jobs: int, timeout_s: float) -> tuple[list[Probed], list[Path]]:
    """Probe what is below `paths` into `out`: (probed in the order of their paths, ignored).

    Lines of `out`, and of the journal that a killed call leaves beside it, are kept for files whose size and time of
    change are the same.
    """
    files, ignored = find_files(paths)
    journal = out.with_name(out.name + ".journal")
    # what ran into the time limit is tried again
    known = {p.path: p for p in (*read(out), *read(journal)) if f": {TIME_LIMIT}" not in p.fault}
    done = {path: p for path in files if (p := known.get(str(path)))
            and (p.size_bytes, p.mtime_ns, p.ctime_ns) == stamp(path)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file, progress(len(files), len(done), "file", "probe") as bar:
        file.write("\n")  # ends a line that a kill cut off
        for found in probe_files([path for path in files if path not in done], jobs, timeout_s):
            done[Path(found.path)] = found
            file.write(_line(found, out))
            file.flush()
            bar.update()
    write_text(out, "".join(_line(done[path], out) for path in files))
    journal.unlink()
    return [done[path] for path in files], ignored


def summary(found: Sequence[Probed], ignored: Sequence[Path]) -> str:
    """The counts, what may surprise, and every fault."""
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
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.probe", description="What every video and image is, and what is wrong with it: "
        "decodes each file to its end, writes one JSON line a file and prints a summary. Sources are only read.",
        epilog="The same command again goes on where it was stopped, and looks only at files that are new or changed.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH",
                        help="a file, or a folder of which everything below is looked at: "
                        + " ".join(sorted(SUFFIXES)))
    parser.add_argument("--out", type=Path, default=Path("probe.jsonl"), metavar="FILE",
                        help="where the lines go (default: %(default)s)")
    add_job_arguments(parser, 120)
    args = parsed(parser, given)
    return answer(lambda: summary(*run(args.paths, args.out, args.jobs, args.timeout_s)),
                  ["python", "-m", "data_tools.probe", *given])


if __name__ == "__main__":
    sys.exit(main())
