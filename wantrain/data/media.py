"""What a media file is and where its bytes are. (Without torch or decord, so that worker processes start at once.)"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wantrain.data import cameras, films, sound
from wantrain.data.films import TRANSPARENT, Probe, Unreachable, broken, on_white, unreachable
from wantrain.files import digest_file, digest_text
from wantrain.journal import Journal, by_workers
from wantrain.outside import remote_errors
from wantrain.terms import IMAGE_SUFFIXES, Media, MediaInfo, Remote, UserError

LOOK_VERSION = 4
"""Raise this when `Found` or what fills it changes."""

NEARLY_SQUARE = 0.02
"""Pixels whose sides differ by less of their length are square: resolutions are rounded."""

DEEP = "16-bit grey (the upper 8 are read)"


def probe(path: Path) -> Probe:
    """Demux `path` without decoding more than a frame (an image is one frame at 0 s). Raises UserError."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreachable(path, error) from error
    return _probe_file(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=4)  # the spans of one film follow each other, and each would demux all of it
def _probe_file(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> Probe:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        image, surprises = _read_image(path)
        return Probe(np.zeros(1), 0.0, *image.size, "image", surprises=surprises)
    if path.suffix.lower() == cameras.SUFFIX:
        cameras.read(path)
        return Probe(np.zeros(1), 0.0, 0, 0, cameras.KIND)
    if path.suffix.lower() in sound.SUFFIXES:
        return sound.probe(path)
    return films.probe(path)


def read_image(path: Path) -> Image.Image:
    """The image in RGB, upright, of 16 bits the upper 8, laid on white where it is transparent. Raises UserError."""
    return _read_image(path)[0]


def _read_image(path: Path) -> tuple[Image.Image, str]:
    """(the image, what may surprise about it)"""
    try:
        with Image.open(path) as opened:
            _refuse_not_square(opened, path)
            image = ImageOps.exif_transpose(opened)
            image.load()
            return _in_rgb(image)
    except (FileNotFoundError, PermissionError) as error:
        raise unreachable(path, error) from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise broken(path, error) from error


def _refuse_not_square(image: Image.Image, path: Path) -> None:
    """ValueError where it says of its pixels that they are not square.

    A film's pixels are shown in their shape; an image's is not known. By the standards (PNG's pHYs, JFIF) its numbers
    count pixels, so that more of them across are narrow ones; ffmpeg writes width and height; viewers look at neither.
    """
    info = image.info
    shape = info["jfif_density"] if info.get("jfif_unit") == 0 else info.get("aspect")
    across, down = shape or info.get("dpi") or (1, 1)
    if across > 0 and down > 0 and abs(across / down - 1) > NEARLY_SQUARE:
        command = ["ffmpeg", "-i", str(path), "-vf", "setsar=1", f"{path.with_suffix('')}-square{path.suffix}"]
        raise ValueError(f"its pixels are said to be not square ({across:.4g}:{down:.4g}), and programs do not agree "
                         f"which side is the long one; where it looks right, write it anew: {shlex.join(command)}")


def _in_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of 32 bits (mode {image.mode}), of which none says what is white: save it "
                         "with 8 or 16 bits")
    is_deep = image.mode.startswith("I;16")
    if is_deep:
        grey_HW, clear = np.asarray(image), image.info.get("transparency")
        alpha_HW = np.where(grey_HW == clear, 0, 255) if isinstance(clear, int) else np.full(grey_HW.shape, 255)
        rgba_HWC = np.stack([grey_HW >> 8] * 3 + [alpha_HW], -1).astype(np.uint8)
    elif image.has_transparency_data:
        rgba_HWC = np.asarray(image.convert("RGBA"))
    else:
        return image.convert("RGB"), ""
    surprises = [DEEP] * is_deep + [TRANSPARENT] * bool(rgba_HWC[..., 3].min() < 255)
    return Image.fromarray(on_white(rgba_HWC)), ", ".join(surprises)


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

    try:
        filesystem, path = fsspec.core.url_to_fs(media.url)
        data: bytes = filesystem.cat_file(path, media.offset, end)
    except remote_errors() as error:
        raise Unreachable(f"{media} cannot be read: {error}", "check the address and your credentials") from error
    if 0 <= media.size != len(data):
        raise Unreachable(f"{media} is cut off: {len(data)} of {media.size} bytes", "replace the shard")
    return data


def look(media: Media) -> MediaInfo:
    """Digest and demux one file, in this process. For a bad file `fault` says what is wrong; nothing is raised."""
    path = None
    try:
        with local(media) as path:
            seen = probe(path)
            return MediaInfo(digest_file(path), round(seen.duration_s, 6), seen.width, seen.height, seen.why_not_decord,
                         len(seen.times_s), seen.surprises, sound_s=round(seen.sound_s, 6))
    except UserError as error:
        fault = error.message.partition(" cannot be decoded: ")[2] or error.message
        return MediaInfo(fault=fault.replace(str(path), str(media)) if path else fault)
    except OSError as error:
        return MediaInfo(fault=error.strerror or str(error))


def look_all(media: Sequence[Media], folder: Path, jobs: int, timeout_s: float) -> dict[Media, MediaInfo]:
    """What each file holds, found out in `jobs` processes with `timeout_s` seconds for each.

    What was found is remembered in `folder`, under the file's path, size and times of change (or its `key`), so that
    another start, or another process, only reads what is new. Faulty files are looked at anew, and so is what is new
    where `folder` cannot be written.
    """
    keys = {one: _key(one) for one in media}
    by_key = {key: one for one, key in keys.items()}
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    memory = Journal(folder / "sources.jsonl" if os.access(folder, os.W_OK) else Path(os.devnull),
                     lambda row: MediaInfo(**row))
    known = replace(memory, path=folder / "sources.jsonl").read()
    infos = memory.filled(known, list(by_key), by_workers(
        look, by_key, lambda _, failure: MediaInfo(fault=str(failure)), jobs, timeout_s, limit="data.timeout_s"),
        "file", "look", delay_s=2)
    return {one: infos[key] for one, key in keys.items()}


def _key(media: Media) -> str:
    if isinstance(media, Remote):
        return digest_text(LOOK_VERSION, media.url, media.name, media.key, media.offset, media.size)
    with contextlib.suppress(OSError):
        status = media.stat()
        return digest_text(LOOK_VERSION, media.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return digest_text(LOOK_VERSION, media)
