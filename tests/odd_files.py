"""Films and pictures of every odd kind, small, with what is true about each: the maker knows, no reader is asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image

from tests.conftest import moving_square

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 24
VARIABLE_MS = (0, 20, 40, 60, 80, 100, 500, 600, 700, 800, 900, 1000)
"""When the frames of a film of variable rate are shown, in milliseconds."""

CONTAINER_OPTIONS = {"movflags": "faststart"}  # the index comes first
LOSSLESS = {"preset": "ultrafast", "bf": "0", "qp": "0"}


def ffmpeg(*arguments: object) -> None:
    """Run the ffmpeg of imageio-ffmpeg (another build than PyAV's)."""
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def count_by_ffmpeg(path: Path) -> int:
    """The frames that ffmpeg decodes and would write, without repeats or drops."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", str(path), "-map", "0:v:0",
               "-fps_mode", "passthrough", "-f", "framecrc", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return sum(not line.startswith("#") for line in done.stdout.splitlines())


def frames(seed: int = 0, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """frames_FHWC uint8: a square that drifts."""
    return np.ascontiguousarray(moving_square(seed, num_frames, height, width).movedim(1, -1).numpy())


def numbered(frames_FHWC: np.ndarray) -> np.ndarray:
    """The frames with their number as eight blocks along the top: lowest bit left, white is 1."""
    shown = frames_FHWC.copy()
    block = shown.shape[2] // 8
    for i, frame in enumerate(shown):
        for bit in range(8):
            frame[: shown.shape[1] // 4, bit * block : (bit + 1) * block] = 255 * (i >> bit & 1)
    return shown


def number_of(frame_HWC: np.ndarray) -> int:
    """The number that a frame carries."""
    block = frame_HWC.shape[1] // 8
    return sum(int(frame_HWC[2:8, bit * block + 2 : (bit + 1) * block - 2].mean() > 127) << bit for bit in range(8))


def film_of_shots(shots: Sequence[int], height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """frames_FHWC uint8: shots of these lengths in frames with hard cuts; each shot has its own noise, which drifts.

    Frames of one shot are alike, frames of two shots are not, so that any frame tells its shot.
    """
    generator = torch.Generator().manual_seed(seed)
    film = []
    for length in shots:
        ground = torch.randint(0, 256, (1, 3, height // 8, width // 8 + 8), generator=generator, dtype=torch.uint8)
        wide = ground.repeat_interleave(8, 2).repeat_interleave(8, 3)[0]
        film += [wide[:, :, f % 56 : f % 56 + width] for f in range(length)]
    return np.ascontiguousarray(torch.stack(film).movedim(1, -1).numpy())


def write_film(path: Path, frames_FHWC: np.ndarray, fps: Fraction | int = 24, codec: str = "libx264",
               *, pix_fmt: str = "yuv420p", times_ms: Sequence[int] | None = None, **options: str) -> Path:
    """Encode with PyAV; `times_ms` in place of the constant rate makes a film of variable rate."""
    options = options or (LOSSLESS if codec == "libx264" else {})
    with av.open(str(path), "w", container_options=CONTAINER_OPTIONS) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames_FHWC.shape[1], frames_FHWC.shape[2], pix_fmt
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames_FHWC):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _text(path: Path) -> None:
    path.write_text("not a film at all, but the notes of the day\n" * 9)


def _garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def _cut_off(path: Path) -> None:
    """The first half of a film of noise."""
    whole = path.with_name("." + path.name)
    noise = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    write_film(whole, noise, preset="ultrafast", bf="0")
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()


def _no_index(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frames()[0], format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[:700])


def _cut_off_picture(path: Path) -> None:
    Image.effect_noise((96, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_start(path: Path) -> None:
    """A broadcast that begins inside a group of pictures, as a recording does."""
    noise = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    write_film(path, noise, preset="ultrafast", bf="0", g="8")
    content = path.read_bytes()
    packet = 188
    path.write_bytes(content[: 3 * packet] + content[len(content) // packet // 6 * packet :])


def _flipped(path: Path) -> None:
    """A film with 30 bytes overwritten in the middle of its pictures."""
    noise = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    write_film(path, noise, preset="ultrafast", bf="0")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 30] = bytes(b ^ 0x5A for b in content[middle : middle + 30])
    path.write_bytes(content)


def _audio_only(path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.5", "-c:a", "aac", path)


def _picture_of_length_one(path: Path, **options: object) -> None:
    Image.fromarray(frames(5, 1)[0]).save(path, **options)  # type: ignore[arg-type]


def _turned_picture(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn of 90 degrees clockwise
    Image.fromarray(frames(6, 1)[0]).save(path, exif=exif)


def _transparent_picture(path: Path, num_frames: int) -> None:
    images = [Image.fromarray(np.concatenate([f, np.full((40, 56, 1), 128, np.uint8)], -1))
              for f in frames(3, num_frames, 40, 56)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, lossless=True)


def _through_ffmpeg(path: Path, before: Sequence[object] = (), after: Sequence[object] = ()) -> None:
    """A film of NUM_FRAMES at 24 fps, changed by ffmpeg."""
    source = path.with_name(".source.mp4")
    write_film(source, numbered(frames(7)), preset="ultrafast", bf="0", g="12")
    ffmpeg(*before, "-i", source, *after, path)
    source.unlink()


def _packed(path: Path, is_packed: bool) -> None:
    """MPEG-4 as old DivX and Xvid put it into AVI, which has one picture a chunk: a B-frame goes into the chunk of the
    picture before it, and a picture that says 'as before' takes the place that is left. Not packed: such a picture
    stands in the middle of the film, which stays for two.
    """
    source = path.with_name(".unpacked.avi")
    _through_ffmpeg(source, [], ["-c:v", "mpeg4", "-bf", "1", "-b_strategy", "0", "-g", "12", "-q:v", "2"])
    begin, as_before = b"\0\0\1\xb6", b"\0\0\1\xb6" + int("0101000001001111", 2).to_bytes(2, "big")
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        chunks = [bytes(packet) for packet in whole.demux(video=0) if packet.size]
        if is_packed:
            chunks[0] = chunks[0].replace(begin, b"\0\0\1\xb2DivX503b1393p" + begin)
        else:
            chunks.insert(12, as_before)
        for i in range(1, len(chunks)):
            if is_packed and chunks[i][chunks[i].find(begin) + 4] >> 6 == 2:  # a B-frame
                chunks[i - 1], chunks[i] = chunks[i - 1] + chunks[i], as_before
        for i, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 24)
            container.mux(packet)
    source.unlink()


def _joined(path: Path) -> None:
    """Two recordings, one after the other."""
    _through_ffmpeg(path, [], ["-c:v", "mpeg2video", "-q:v", "2", "-bf", "2"])
    path.write_bytes(path.read_bytes() * 2)


def _two_videos(path: Path, *arguments: object) -> None:
    """A small preview first, which is not what is to be shown."""
    preview = path.with_name(".preview.mkv")
    _through_ffmpeg(preview, [], ["-vf", "negate,scale=64:48", "-c:v", "mjpeg"])
    _through_ffmpeg(path, ["-i", preview], ["-map", "0:v", "-map", "1:v", "-c", "copy", *arguments])
    preview.unlink()


def _stretched_and_turned(path: Path) -> None:
    source = path.with_name(".stretched.mp4")
    _through_ffmpeg(source, [], ["-vf", "setsar=4/3", "-c:v", "libx264", "-preset", "ultrafast"])
    ffmpeg("-display_rotation", 90, "-i", source, "-c", "copy", path)
    source.unlink()


def _hidden_colour(path: Path) -> None:
    """Red, of which the lower half is transparent, as a cut-out has."""
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[: HEIGHT // 2, :, 3] = 255
    Image.fromarray(rgba).save(path)


B_FRAMES = ("-c:v", "libx264", "-preset", "veryfast", "-bf", "2", "-g", "8", "-crf", "12")

VIDEO = {"kind": "video", "width": WIDTH, "height": HEIGHT, "num_frames": NUM_FRAMES, "is_variable_fps": False}
PICTURE = {"kind": "image", "width": WIDTH, "height": HEIGHT, "num_frames": 1, "reader": "pillow", "fps": 0.0}

Made = tuple[Callable[[Path], object], dict[str, object]]

FINE: dict[str, Made] = {
    "12 fps.mp4": (lambda p: write_film(p, frames(), 12), VIDEO | {"fps": 12.0, "codec": "h264", "container": "mp4"}),
    "24 fps.mp4": (lambda p: write_film(p, frames(), 24), VIDEO | {"fps": 24.0, "reader": "decord", "duration_s": 1.0}),
    "25 fps.mkv": (lambda p: write_film(p, frames(), 25), VIDEO | {"fps": 25.0, "container": "matroska"}),
    "29.97 fps.mp4": (lambda p: write_film(p, frames(), Fraction(30000, 1001)), VIDEO | {"fps": 29.97003}),
    "23.976 fps.mkv": (lambda p: write_film(p, frames(), Fraction(24000, 1001)), VIDEO | {"fps": 23.976024}),
    "60 fps.mov": (lambda p: write_film(p, frames(), 60), VIDEO | {"fps": 60.0, "container": "mov"}),
    "variable.mkv": (
        lambda p: write_film(p, frames(0, 12), 25, times_ms=VARIABLE_MS),
        VIDEO | {"fps": 11.0, "num_frames": 12, "is_variable_fps": True, "min_gap_s": 0.02, "max_gap_s": 0.4}),
    "turned.mp4": (
        lambda p: _through_ffmpeg(p, ["-display_rotation", 90], ["-c", "copy"]),
        VIDEO | {"width": HEIGHT, "height": WIDTH, "rotation_deg": 90}),
    "odd size.mkv": (
        lambda p: write_film(p, frames(1, 24, 75, 101), pix_fmt="yuv444p"), VIDEO | {"width": 101, "height": 75}),
    "narrow.mp4": (
        lambda p: write_film(p, frames(1, 24, 32, 48)),
        VIDEO | {"width": 48, "height": 32, "reader": "pyav", "reader_reason": "narrower than 64 px"}),
    "stretched.mp4": (
        lambda p: _through_ffmpeg(p, [], ["-vf", "setsar=4/3", "-c:v", "libx264"]),
        VIDEO | {"pixel_aspect": 4 / 3, "width": WIDTH * 4 // 3}),
    "edit list.mp4": (
        lambda p: _through_ffmpeg(p, ["-ss", "0.25"], ["-c", "copy"]),
        VIDEO | {"num_frames": 18, "num_frames_claimed": 24, "reader": "pyav", "reader_reason": "edit list"}),
    "open gop.ts": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "libx264", "-g", "8", "-bf", "2", "-x264-params", "open-gop=1"]),
        VIDEO | {"fps": 24.0, "container": "mpegts", "reader": "pyav"}),
    "with sound.mp4": (
        lambda p: _through_ffmpeg(p, ["-f", "lavfi", "-i", "sine=duration=1"], ["-c:v", "copy", "-c:a", "aac"]),
        VIDEO | {"has_audio": True}),
    "ten bit pq.mp4": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "libx265", "-x265-params", "log-level=none", "-preset", "ultrafast",
                                          "-vf", "format=yuv420p10le,setparams=color_trc=smpte2084"]),
        VIDEO | {"codec": "hevc", "bit_depth": 10, "is_hdr": True, "transfer": "pq"}),
    "interlaced.mpg": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-vf", "setfield=tff"]),
        VIDEO | {"codec": "mpeg2video", "is_interlaced": True, "container": "mpeg"}),
    "old 1.mpg": (lambda p: write_film(p, frames(), 24, "mpeg1video"), VIDEO | {"codec": "mpeg1video", "fps": 24.0}),
    "old jpegs.avi": (
        lambda p: write_film(p, frames(), 24, "mjpeg", pix_fmt="yuvj420p"),
        VIDEO | {"codec": "mjpeg", "container": "avi"}),
    "old cinepak.avi": (
        lambda p: write_film(p, frames(), 12, "cinepak", pix_fmt="rgb24"), VIDEO | {"codec": "cinepak", "fps": 12.0}),
    "new.webm": (
        lambda p: write_film(p, frames(), 24, "libsvtav1", preset="12"),
        VIDEO | {"codec": "av1", "container": "webm", "reader": "pyav", "reader_reason": "av1"}),
    "clear.webm": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8"]),
        VIDEO | {"codec": "vp9", "has_alpha": True}),
    "clear.mov": (
        lambda p: _through_ffmpeg(p, [], ["-vf", "format=rgba,colorchannelmixer=aa=0.5", "-c:v", "png"]),
        VIDEO | {"codec": "png", "has_alpha": True}),
    "moving.gif": (
        lambda p: _through_ffmpeg(p, [], ["-r", "25"]),
        VIDEO | {"fps": 25.0, "num_frames": 25, "has_alpha": False, "reader": "pyav", "reader_reason": "gif"}),
    "映画 été #1.MP4": (
        lambda p: write_film(p, frames(), 24), VIDEO),
    "no times.avi": (
        lambda p: _through_ffmpeg(p, [], [*B_FRAMES, "-x264-params", "open-gop=1"]),
        VIDEO | {"fps": 24.0, "container": "avi", "reader": "pyav", "reader_reason": "no display times"}),
    "no times old.avi": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "mpeg4", "-bf", "2", "-g", "6", "-q:v", "2"]),
        VIDEO | {"fps": 24.0, "codec": "mpeg4", "reader_reason": "no display times"}),
    "packed.avi": (
        lambda p: _packed(p, is_packed=True),
        VIDEO | {"fps": 24.0, "codec": "mpeg4", "reader_reason": "no display times"}),
    "no times.mpg": (
        lambda p: _through_ffmpeg(p, [], B_FRAMES),
        VIDEO | {"fps": 24.0, "codec": "h264", "container": "mpeg", "reader_reason": "no display times"}),
    "pictures only.m2v": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "mpeg2video", "-bf", "2", "-g", "6", "-q:v", "2"]),
        VIDEO | {"fps": 24.0, "container": "mpegvideo", "reader_reason": "no display times, no duration"}),
    "turned.mkv": (
        lambda p: _through_ffmpeg(p, ["-display_rotation", 270], ["-c", "copy"]),
        VIDEO | {"width": HEIGHT, "height": WIDTH, "reader_reason": "turned or mirrored"}),
    "mirrored.mp4": (
        lambda p: _through_ffmpeg(p, ["-display_hflip"], ["-c", "copy"]),
        VIDEO | {"reader_reason": "turned or mirrored"}),
    "turned and mirrored.mov": (
        lambda p: _through_ffmpeg(p, ["-display_rotation", 90, "-display_vflip"], ["-c", "copy"]),
        VIDEO | {"width": HEIGHT, "height": WIDTH, "reader_reason": "turned or mirrored"}),
    "stretched and turned.mov": (
        _stretched_and_turned, VIDEO | {"width": HEIGHT, "height": WIDTH * 4 // 3, "pixel_aspect": 4 / 3}),
    "palette.mov": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "smc"]), VIDEO | {"codec": "smc", "reader_reason": "pixels pal8"}),
    "palette.avi": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "rawvideo", "-pix_fmt", "pal8"]),
        VIDEO | {"pixel_format": "pal8", "reader_reason": "pixels pal8"}),
    "palette png.mov": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "png", "-pix_fmt", "pal8"]),
        VIDEO | {"pixel_format": "pal8", "reader_reason": "pixels pal8"}),
    "deep grey.mkv": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "ffv1", "-pix_fmt", "gray16le"]),
        VIDEO | {"bit_depth": 16, "reader_reason": "pixels gray16le"}),
    "two videos.mp4": (
        lambda p: _two_videos(p, "-disposition:v:0", "0", "-disposition:v:1", "default"),
        VIDEO | {"codec": "h264", "reader_reason": "several video streams"}),
    "cover.mkv": (
        lambda p: _two_videos(p, "-disposition:v:0", "attached_pic", "-disposition:v:1", "0"),
        VIDEO | {"codec": "h264", "reader_reason": "several video streams"}),
    "no duration.webm": (
        lambda p: _through_ffmpeg(p, [], ["-c:v", "libvpx", "-b:v", "2M", "-cpu-used", "8", "-live", "1"]),
        VIDEO | {"codec": "vp8", "reader_reason": "no duration"}),
    "no duration.mkv": (
        lambda p: _through_ffmpeg(p, [], [*B_FRAMES, "-live", "1"]), VIDEO | {"reader_reason": "no duration"}),
    "in pieces.mp4": (
        lambda p: _through_ffmpeg(p, [], [*B_FRAMES, "-movflags", "frag_keyframe+empty_moov"]), VIDEO | {"fps": 24.0}),
    "clock wraps.ts": (
        lambda p: _through_ffmpeg(p, [], [*B_FRAMES, "-output_ts_offset", 2**33 / 90000 - 1.9]),
        VIDEO | {"fps": 24.0, "reader": "pyav"}),
    "still.png": (_picture_of_length_one, PICTURE | {"container": "png", "bit_depth": 8, "has_alpha": False}),
    "still.jpg": (_picture_of_length_one, PICTURE | {"container": "jpeg"}),
    "still.bmp": (_picture_of_length_one, PICTURE | {"container": "bmp"}),
    "still.webp": (_picture_of_length_one, PICTURE | {"container": "webp", "has_alpha": False}),
    "turned.jpeg": (_turned_picture, PICTURE | {"width": HEIGHT, "height": WIDTH, "rotation_deg": 270}),
    "clear.webp": (
        lambda p: _transparent_picture(p, 1), PICTURE | {"width": 56, "height": 40, "has_alpha": True}),
    "clear moving.webp": (
        lambda p: _transparent_picture(p, 6),
        PICTURE | {"width": 56, "height": 40, "has_alpha": True, "num_frames": 6,
                   "reader_reason": "image, only the first of its 6 frames is read"}),
    "deep.png": (
        lambda p: Image.fromarray(np.arange(64 * 96, dtype=np.uint16).reshape(64, 96)).save(p),
        PICTURE | {"bit_depth": 16}),
    "hidden colour.png": (_hidden_colour, PICTURE | {"has_alpha": True}),
}
"""Name, how it is made, and what is true about it."""

HELD: dict[str, Made] = {
    "as before.avi": (lambda p: _packed(p, is_packed=False), {"kind": "video"}),
}
"""Films of which a picture stays for longer than the container's frame, so that fewer decode than have a time."""

FAULTY: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.mp4": (lambda p: p.touch(), "empty (0 bytes)"),
    "empty.png": (lambda p: p.touch(), "empty (0 bytes)"),
    "cut off.mp4": (_cut_off, "truncated: the header claims 24 frames"),
    "cut off.mkv": (_cut_off, "truncated: the header claims 1.00 s"),
    "no index.mp4": (_no_index, "moov atom not found"),
    "no start.ts": (_no_start, "frames have a time"),
    "joined.mpg": (_joined, "its clock goes back from 0.96 s to 0.00 s; write it anew: ffmpeg -i"),
    "cut off.jpg": (_cut_off_picture, "truncated"),
    "flipped.mp4": (_flipped, "frames decode with errors"),
    "notes.mp4": (_text, "a text file"),
    "notes.png": (_text, "a text file"),
    "garbage.mkv": (_garbage, "Invalid data found"),
    "garbage.webp": (_garbage, "not an image by its content"),
    "sound.mp4": (_audio_only, "only audio"),
    "playlist.ts": (lambda p: p.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"), "a text file"),
    "a film.jpg": (lambda p: write_film(p.with_suffix(".mp4"), frames()).rename(p), "by its content a film"),
    "a picture.mp4": (lambda p: _picture_of_length_one(p, format="PNG"), "by its content an image"),
    "a pipe.mp4": (os.mkfifo, "not a regular file"),
    "a link.mp4": (lambda p: p.symlink_to("nowhere"), "a link to nothing"),
}
"""Name, how it is made, and words that its fault must say."""


def make(folder: Path, names: Iterable[str]) -> None:
    """Write these files of FINE, HELD and FAULTY into the folder."""
    for name in names:
        (FINE | HELD | FAULTY)[name][0](folder / name)
