"""That caching is bound by the VAE, and reading a cache costs next to nothing: on Wan2.1's real architectures.

    python -m benchmarks.vae [--size 9 160 272] [--clips 3] --film FILM

Measured here: `wantrain cache`'s loop with the VAE of 127M parameters (random weights, float32, CPU), its time in the
VAE, waiting for frames, and writing; CPU seconds to decode and resize a clip of 81 frames of 480x832 from the film at
its own size and at 1920x1080; reading an entry of that clip. Computed, not measured: floating point operations by
torch's FlopCounterMode on meta tensors, and what follows for a GPU of a given speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data import REAL_LATENTS_CTHW
from benchmarks.step import timed
from tests import odd_files
from wantrain.data import decode, media
from wantrain.data.cache import LATENTS, TEXT, Cache
from wantrain.jobs import in_workers
from wantrain.models import encode
from wantrain.models.variants import VARIANTS
from wantrain.terms import WINDOW, Bucket, Clip, PlannedClip

REAL, FPS = Bucket(81, 480, 832), 16.0
TFLOPS = (20, 100, 200, 400, 1000)
"""Speeds of the GPU that the needed workers are computed for; 1000 is above an H100's peak in bf16, 989."""

NUM_TEXT, TEXT_DIM = 200, 4096


def vae_flops(bucket: Bucket) -> int:
    """Floating point operations of encoding one clip, a multiplication and an addition being two."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKLWan().encode(torch.empty(1, 3, *dataclasses.astuple(bucket)))
    return counter.get_total_flops()


def step_flops() -> int:
    """The least that a training step of the 1.3B transformer does for one such clip: forward, and the gradients of the
    activations, which cost as much again. (The weights have none; checkpointing would add another forward.)
    """
    own = VARIANTS["wan21_t2v_1b3"].architecture
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = WanTransformer3DModel(num_attention_heads=own.num_heads, attention_head_dim=own.dim // own.num_heads,
                                      num_layers=own.num_layers, ffn_dim=own.ffn_dim)
        model(torch.empty(1, *REAL_LATENTS_CTHW), torch.empty(1), torch.empty(1, 512, TEXT_DIM))
    return 2 * counter.get_total_flops()


def windows(path: Path, bucket: Bucket, number: int) -> list[PlannedClip]:
    """So many windows, one after the other."""
    found, length_s = media.look(path), bucket.num_frames / FPS
    return [PlannedClip(Clip(f"{path.name}@{i}", path, "", "film"), bucket, found, FPS, i * length_s)
            for i in range(number)]


def cache_loop(planned: list[PlannedClip], jobs: int) -> dict[str, float]:
    """Seconds a clip of the loop, but for the first clip, for which everything starts."""
    torch.manual_seed(0)
    vae, spent = AutoencoderKLWan().eval(), {"in the VAE": 0.0, "waiting for frames": 0.0, "writing": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), "vae", "text", "")
        arriving = in_workers(decode.frames_in_worker, [(one, (WINDOW,)) for one in planned], jobs, 600)
        for number in range(len(planned)):
            moments = [time.perf_counter()]
            (one, _), result, why = next(arriving)
            if result is None or not result[0]:
                raise SystemExit(why or "a clip does not decode")
            moments.append(time.perf_counter())
            latents = encode.encode_frames(vae, torch.from_numpy(result[0][WINDOW]))
            moments.append(time.perf_counter())
            cache.write((LATENTS, one), {"x": latents})
            moments.append(time.perf_counter())
            for what, began, ended in zip(("waiting for frames", "in the VAE", "writing"), moments, moments[1:],
                                          strict=False):
                spent[what] += (ended - began) * (number > 0)
        list(arriving)
    return {what: seconds / (len(planned) - 1) for what, seconds in spent.items()}


def decode_cpu_s(path: Path) -> float:
    """CPU seconds to decode and resize a clip, the median of three."""
    times = []
    for planned in windows(path, REAL, 2)[:1] * 3:
        began = time.process_time()
        decode.read_window(planned)
        times.append(time.process_time() - began)
    return statistics.median(times)


def read_s() -> tuple[float, float]:
    """(seconds to read a clip's latents and text from the warm cache, checksums included: wall, CPU), medians of 30."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), "vae", "text", "")
        clip = PlannedClip(Clip("a", Path("a"), "a", "a"), REAL, media.MediaInfo("a", 6.0), FPS)
        cache.write((LATENTS, clip), {"x": torch.randn(REAL_LATENTS_CTHW)})
        cache.write((TEXT, "a"), {"x": torch.randn(NUM_TEXT, TEXT_DIM).bfloat16()})
        both = []
        for _ in range(30):
            began = time.process_time()
            wall_s = timed(lambda: (cache.read((LATENTS, clip)), cache.read((TEXT, "a"))))
            both.append((wall_s, time.process_time() - began))
    return statistics.median(w for w, _ in both), statistics.median(c for _, c in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(9, 160, 272), metavar=("F", "H", "W"))
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--film", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)

    reading_s, reading_cpu_s = read_s()
    step = step_flops()
    print(f"reading latents {REAL_LATENTS_CTHW} and {NUM_TEXT} tokens of text: {reading_s * 1e3:.1f} ms, "
          f"{reading_cpu_s * 1e3:.1f} ms of CPU")
    print(f"computed, not measured: a step of 1.3B does at least {step / 1e12:.0f} TFLOP, {step / 1e15:.2f} s at 1000 "
          f"TFLOP/s; reading is {reading_cpu_s / (step / 1e15):.1%} of that", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "1080p.mp4"
        odd_files.ffmpeg("-t", 8, "-i", given.film, "-vf", "scale=1920:1080", "-c:v", "libx264", "-preset", "veryfast",
                         "-an", large)
        decoding = {"at its own size": decode_cpu_s(given.film), "at 1920x1080": decode_cpu_s(large)}
    total = vae_flops(REAL)
    for what, seconds in decoding.items():
        print(f"decoding and resizing a clip of {REAL} from {given.film.name} {what}: {seconds:.2f} CPU-s")
    print(f"computed, not measured: its VAE encode is {total / 1e12:.1f} TFLOP; workers that keep a GPU of so many "
          "TFLOP/s busy (CPU-s of decoding / s of encoding):")
    for speed in TFLOPS:
        print(f"  {speed:5}  encode {total / speed / 1e12:6.2f} s  " + ", ".join(
            f"{seconds * speed * 1e12 / total:.1f} {what}" for what, seconds in decoding.items()), flush=True)

    bucket = Bucket(*given.size)
    spent = cache_loop(windows(given.film, bucket, given.clips), 1)
    print(f"the cache's loop at {bucket} ({vae_flops(bucket) / 1e12:.2f} TFLOP a clip), 1 decoding worker, a clip: "
          + ", ".join(f"{seconds:.3f} s {what} ({seconds / sum(spent.values()):.2%})"
                      for what, seconds in spent.items()))


if __name__ == "__main__":
    main()
