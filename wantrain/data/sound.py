"""A clip's sound: the samples of a window, the mean of its channels at the rate that wav2vec2 hears. (Without torch,
so that worker processes start at once.)

Times count as the film's do, from its first frame; those of a file with sound alone, from its first sample.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from wantrain.data import films
from wantrain.terms import SOUND_RATE, UserError

SUFFIXES = frozenset({".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".opus"})
KIND = "sound"
"""What MediaInfo.why_not_decord says where a file is heard, and not seen."""

SEEKS = ("mov", "matroska", "wav", "flac")
"""Formats that say exactly where a moment is; of the others all before it is decoded."""

RUN_UP_S = 1.0
"""Seconds that are decoded before a window: what a decoder or a resampler makes of the past."""

GRACE_S = 2e-3
"""A sound that ends earlier than this before a window's end is whole."""


def probe(path: Path) -> films.Probe:
    """Look at a file with sound alone. Raises UserError."""
    try:
        with films.opened(path) as container:
            if not container.streams.audio:
                raise ValueError("no sound in it")
            stream = container.streams.audio[0]
            start_s = (stream.start_time or 0) * (stream.time_base or Fraction(0))
            sound_s = films.sound_s(container, start_s)
            if sound_s is None:
                raise ValueError("it does not say how long it is: write it anew with ffmpeg")
    except (FileNotFoundError, PermissionError) as error:
        raise films.unreachable(path, error) from error
    except (av.FFmpegError, ValueError) as error:
        raise films.broken(path, error) from error
    return films.Probe(np.zeros(1), sound_s, 0, 0, KIND, start_s, sound_s=sound_s)


def read(path: Path, found: films.Probe, start_s: float, seconds: float) -> np.ndarray:
    """float32 samples in [-1, 1] of `seconds` from `start_s` on, SOUND_RATE a second, of what was `found` of the file.
    Raises UserError.
    """
    wanted = round(seconds * SOUND_RATE)
    try:
        with films.opened(path) as container:
            if not container.streams.audio:
                raise UserError(f"{path} has no sound", "add a column, or a folder, audio to the source: docs/tasks.md")
            heard = _decoded(container, container.streams.audio[0], start_s + float(found.start_s), wanted)
    except av.FFmpegError as error:
        raise films.broken(path, error) from error
    if len(heard) < wanted - GRACE_S * SOUND_RATE:
        raise UserError(f"{path}: the sound ends after {start_s + len(heard) / SOUND_RATE:.2f} s, and "
                        f"{start_s + seconds:.2f} s are needed", "lengthen it, or add a smaller length to "
                        "data.num_frames (of a sample, sampler.num_frames)")
    return np.pad(heard, (0, wanted - len(heard)))


def told(samples: np.ndarray) -> str:
    """How long a window's sound is, and how loud."""
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return f"{len(samples) / SOUND_RATE:.2f} s, " + (f"{10 * np.log10(power):.0f} dB" if power else "silent")


def _decoded(container: av.container.InputContainer, stream: av.AudioStream, begin_s: float, wanted: int) -> np.ndarray:
    """At most `wanted` samples from `begin_s` on the file's clock; zeros before its first."""
    assert stream.time_base is not None, "a demuxed stream has one"
    if begin_s > 2 * RUN_UP_S and any(name in container.format.name for name in SEEKS):
        container.seek(int((begin_s - RUN_UP_S) / stream.time_base), stream=stream)
    resampler = av.AudioResampler(format="fltp", rate=SOUND_RATE)
    pieces: list[np.ndarray] = []
    first_s = None
    for frame in container.decode(stream):
        at_s = float(frame.time or 0.0)
        if first_s is None and at_s + frame.samples / frame.sample_rate < begin_s - RUN_UP_S:
            continue
        first_s = at_s if first_s is None else first_s
        pieces += [one.to_ndarray().mean(0) for one in resampler.resample(frame)]
        if first_s + sum(map(len, pieces)) / SOUND_RATE > begin_s + wanted / SOUND_RATE:
            break
    else:
        pieces += [one.to_ndarray().mean(0) for one in resampler.resample(None)] if pieces else []
    if first_s is None:
        return np.zeros(0, np.float32)
    before = round((begin_s - first_s) * SOUND_RATE)
    whole = np.concatenate([np.zeros(max(0, -before), np.float32), *pieces])
    return whole[max(0, before):][:wanted]
