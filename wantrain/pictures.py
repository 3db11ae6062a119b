"""Videos and contact sheets as files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from wantrain.files import atomic_path

GAP_PX = 6
LABEL_PX = 16


def write_mp4(path: Path, frames_FCHW: torch.Tensor, fps: float, crf: int = 16, comment: str = "") -> None:
    """H.264, yuv420p, at `crf` 16 visually lossless: plays in browsers. Sizes must be even."""
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4",
                                                 container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                      options={"crf": str(crf)})
        if comment:
            container.metadata["comment"] = comment
        stream.height, stream.width, stream.pix_fmt = frames_FCHW.shape[2], frames_FCHW.shape[3], "yuv420p"
        for frame_HWC in frames_FCHW.movedim(1, -1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def read_mp4(path: Path) -> torch.Tensor:
    """The frames of a video that `write_mp4` wrote, frames_FCHW uint8. ValueError where it is damaged."""
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not frames:
        raise ValueError(f"{path} has no frames")
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)


def read_comment(path: Path) -> str:
    """The comment that `write_mp4` put into a video; empty where there is none."""
    with av.open(str(path)) as container:
        return str(container.metadata.get("comment", ""))


def middle_frame(path: Path) -> torch.Tensor:
    """The frame in the middle of such a video, frame_CHW uint8. ValueError where it is damaged."""
    frames_FCHW = read_mp4(path)
    return frames_FCHW[len(frames_FCHW) // 2]


def copy_bare(source: Path, target: Path) -> None:
    """Copy a video, its pictures bit by bit, without what it says of itself, which names files of this machine."""
    with atomic_path(target) as temporary, av.open(str(source)) as read, av.open(
            str(temporary), "w", format="mp4", container_options={"movflags": "faststart"}) as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)


def write_webp(path: Path, frames_FCHW: torch.Tensor, fps: float) -> None:
    """An animation for pages and chats that show no video. Times are whole milliseconds, as the format has them."""
    frames = [Image.fromarray(frame_HWC) for frame_HWC in frames_FCHW.movedim(1, -1).contiguous().numpy()]
    ends = [round(1000 * (i + 1) / fps) for i in range(len(frames))]
    durations = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    with atomic_path(path) as temporary:
        frames[0].save(temporary, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0,
                       quality=90, method=4)


def frame_sheet(path: Path, frames_FCHW: torch.Tensor, fps: float, num_columns: int = 5) -> None:
    """A PNG of the frames that begin a latent frame (each fourth), in reading order, with their times."""
    shown = list(range(0, len(frames_FCHW), 4))
    rows = [shown[i : i + num_columns] for i in range(0, len(shown), num_columns)]
    contact_sheet(path, [[frames_FCHW[i] for i in row] for row in rows], [], [
        "  ".join(f"{i / fps:.2f} s" for i in row) for row in rows])


def write_png(path: Path, picture_CHW: torch.Tensor) -> None:
    """One uint8 picture."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture_CHW.movedim(0, -1).contiguous().numpy()).save(temporary, "PNG")


def contact_sheet(path: Path, rows: Sequence[Sequence[torch.Tensor]], columns: Sequence[str], labels: Sequence[str]
                  ) -> None:
    """A PNG grid of pictures_CHW uint8 of one size (small ones are enlarged), columns and rows labelled."""
    _, height, width = rows[0][0].shape
    factor = max(1, round(240 / width))
    cell_h, cell_w = height * factor, width * factor
    font = ImageFont.load_default(12)
    num_columns = max(map(len, rows))
    size = (num_columns * (cell_w + GAP_PX) + GAP_PX,
            LABEL_PX + GAP_PX + len(rows) * (cell_h + LABEL_PX + GAP_PX))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(columns):
        draw.text((GAP_PX + c * (cell_w + GAP_PX), 4), text, "black", font)
    for r, (pictures, text) in enumerate(zip(rows, labels, strict=True)):
        top = LABEL_PX + GAP_PX + r * (cell_h + LABEL_PX + GAP_PX)
        draw.text((GAP_PX, top), text[: size[0] // 6], "black", font)
        for c, picture_CHW in enumerate(pictures):
            image = Image.fromarray(picture_CHW.movedim(0, -1).contiguous().numpy())
            image = image.resize((cell_w, cell_h), Image.Resampling.BICUBIC)
            sheet.paste(image, (GAP_PX + c * (cell_w + GAP_PX), top + LABEL_PX))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")
