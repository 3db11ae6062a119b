"""What a media file is and where its bytes are. (Without torch or decord, so that worker processes start at once.)"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wantrain.files import digest_file, digest_text, remembered
from wantrain.jobs import in_workers, progress
from wantrain.terms import IMAGE_SUFFIXES, Found, Media, Remote, UserError

LOOK_VERSION = 1
"""Raise this when `Found` or what fills it changes."""

POINTERS = (b"ffconcat", b"#EXTM3U", b"<?xml", b"<MPD")
"""How playlists begin: what they name would be opened before their format is known."""

PLAYLISTS = frozenset({"hls", "dash", "concat", "imf"})
"""Formats that only point to other files or addresses: never followed."""

LONGEST_FRAME_S = 60
"""A film whose frames last longer than this on average has no times to go by."""

FINE_GRACE_S, COARSE_GRACE_S = 1e-4, 5.1e-4

NARROW_PX = 64
"""decord 0.6 takes the padding of a row for more colour channels below this width (seen: 48 px gave 4 channels)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What demuxing tells: shown frames' times (seconds, sorted), duration in seconds, size in pixels, who reads.

    Times count from the first frame that has one, which is `start_s` on the file's own clock, of ticks of `tick_s`.
    """

    times_s: np.ndarray
    duration_s: float
    width: int
    height: int
    why_not_decord: str
    start_s: Fraction = Fraction(0)
    tick_s: Fraction = Fraction(0)

    @property
    def grace_s(self) -> float:
        """How much later than its frame was on screen a time may be: clocks of a millisecond (Matroska, FLV, ASF) are
        too coarse for most rates, finer ones are not, and those of a frame a tick are exact.
        """
        return COARSE_GRACE_S if 2 * FINE_GRACE_S < self.tick_s < 4 * COARSE_GRACE_S else FINE_GRACE_S

    @property
    def aspect(self) -> float:
        return self.height / self.width


def broken(path: Path, reason: object) -> UserError:
    """The error for a file that does not decode."""
    return UserError(f"{path} cannot be decoded: {reason}",
                     "replace the file or take it out of the manifest, then run the same command again")


def probe(path: Path) -> Probe:
    """Demux `path` without decoding more than a frame (an image is one frame at 0 s). Raises UserError."""
    try:
        status = path.stat()
    except OSError as error:
        raise broken(path, error.strerror) from error
    return _probe_file(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # the spans of one film follow each other, and each would demux all of it
def _probe_file(path: Path, size: int, mtime_ns: int) -> Probe:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        width, height = read_image(path).size
        return Probe(np.zeros(1), 0.0, width, height, "image")
    try:
        with open_video(path) as container:
            return _probe(container)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise broken(path, error) from error


def open_video(path: Path) -> av.container.InputContainer:
    """The container, forbidden to reach beyond this machine's files. ValueError for a list that points to others."""
    with path.open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(POINTERS):
            raise ValueError("a playlist, not a film")
    return av.open(str(path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="replace")


def _probe(container: av.container.InputContainer) -> Probe:
    if container.format.name in PLAYLISTS:
        raise ValueError(f"a playlist ({container.format.name}), not a film")
    if not container.streams.video:
        raise ValueError("no video in it")
    stream = container.streams.video[0]
    assert stream.time_base is not None
    times, ends, num_discarded = [], [], 0
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        num_discarded += packet.is_discard
        if not packet.is_discard:
            times.append(packet.pts * stream.time_base)
            ends.append((packet.pts + (packet.duration or 0)) * stream.time_base)
    if not times:
        raise ValueError("no video frames")
    start = min(times)
    width, height = stream.codec_context.width, stream.codec_context.height
    pixels = str(stream.codec_context.pix_fmt or "")
    unsafe = {
        "edit list": num_discarded > 0,
        container.format.name: container.format.name in ("mpegts", "gif"),
        "av1": stream.codec_context.name in ("av1", "libdav1d", "libaom-av1"),
        "truncated": len(times) + num_discarded < stream.frames,
        f"narrower than {NARROW_PX} px": min(width, height) < NARROW_PX,
        # it takes these, too, for more colour channels than there are (seen: cinepak's rgb24)
        f"pixels {pixels}": pixels.startswith(("rgb", "bgr", "gbr")) and container.format.name != "gif",
    }
    if _quarter_turns(container, stream) % 2:
        width, height = height, width
    step = Fraction(1) / (stream.average_rate or 25)
    duration = max(*ends, max(times) + (step if max(ends) == max(times) else 0)) - start
    why = ", ".join(reason for reason, found in unsafe.items() if found)
    if duration > LONGEST_FRAME_S * len(times):
        raise ValueError(f"{len(times)} frames in {float(duration):.0f} s: its times are broken")
    return Probe(np.array(sorted(float(t - start) for t in times)), float(duration), width, height, why, start,
                 stream.time_base)


def _quarter_turns(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
    """Quarter turns of the display matrix, read from the first decodable frame."""
    container.seek(0)
    for frame in container.decode(stream):
        return (frame.rotation // 90) % 4
    raise ValueError("no frame decodes")


def read_image(path: Path) -> Image.Image:
    """The image, decoded and turned upright. Raises UserError."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise broken(path, error) from error
    return image


@contextlib.contextmanager
def local(media: Media) -> Iterator[Path]:
    """A path to the bytes: the file itself, or a copy that is gone after the block.

    The copy's name is ours but for its ending: names inside shards are never trusted. Raises UserError.
    """
    if isinstance(media, Path):
        yield media
        return
    with tempfile.TemporaryDirectory(prefix="wantrain-") as folder:
        path = Path(folder) / f"media{media.suffix if media.suffix.isascii() else ''}"
        path.write_bytes(fetch(media))
        yield path


def fetch(media: Remote) -> bytes:
    """The bytes themselves."""
    import fsspec  # only where something is not a plain local file

    end = media.offset + media.size if media.size >= 0 else None
    import httpx2

    try:
        filesystem, path = fsspec.core.url_to_fs(media.url)
        data: bytes = filesystem.cat_file(path, media.offset, end)
    except (OSError, ImportError, ValueError, httpx2.HTTPError) as error:
        raise UserError(f"{media} cannot be read: {error}", "check the address and your credentials") from error
    if 0 <= media.size != len(data):
        raise UserError(f"{media} is cut off: {len(data)} of {media.size} bytes", "replace the shard")
    return data


def look(media: Media) -> Found:
    """Digest and demux one file, in this process. A bad file is told by `fault`, not by an exception."""
    try:
        with local(media) as path:
            seen = probe(path)
            return Found(digest_file(path), round(seen.duration_s, 6), seen.width, seen.height, seen.why_not_decord,
                         len(seen.times_s))
    except UserError as error:
        return Found(fault=error.message.partition(" cannot be decoded: ")[2] or error.message)
    except OSError as error:
        return Found(fault=error.strerror or str(error))


def look_all(media: Sequence[Media], folder: Path, jobs: int, timeout_s: float) -> dict[Media, Found]:
    """What each file holds, found out in `jobs` processes with `timeout_s` seconds for each.

    What was found is remembered in `folder`, under the file's path, size and time of change (or its `key`), so that
    another start, or another process, only reads what is new. Faulty files are looked at anew, and so is what is new
    where `folder` cannot be written.
    """
    memory = folder / "sources.jsonl"
    keys = {one: _key(one) for one in media}
    known = _remembered(memory)
    found = {one: known[key] for one, key in keys.items() if key in known}
    unknown = [one for one in keys if one not in found]
    if not unknown:
        return found
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    memory = memory if os.access(folder, os.W_OK) else Path(os.devnull)
    with memory.open("a", encoding="utf-8") as file, progress(len(keys), len(found), "file", "look", delay_s=2) as bar:
        file.write("\n")  # ends a line that a kill cut off
        for one, seen, why in in_workers(look, unknown, jobs, timeout_s, "data.timeout_s"):
            found[one] = seen or Found(fault=why)
            if not found[one].fault:
                file.write(json.dumps({"key": keys[one], **dataclasses.asdict(found[one])}) + "\n")
                file.flush()
            bar.update()
    return found


def _key(media: Media) -> str:
    if isinstance(media, Remote):
        return digest_text(LOOK_VERSION, media.url, media.name, media.key, media.offset, media.size)
    with contextlib.suppress(OSError):
        status = media.stat()
        return digest_text(LOOK_VERSION, media.resolve(), status.st_size, status.st_mtime_ns)
    return digest_text(LOOK_VERSION, media)


def _remembered(memory: Path) -> dict[str, Found]:
    """What is known, by key."""
    return dict(remembered(memory, lambda row: (row.pop("key"), Found(**row))))
