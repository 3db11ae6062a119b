"""Pre-rendered clips in memory-mapped files: rendering must not wait for training, nor training for rendering."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from tools.tiny_world.world import STYLES, draw_scene, render

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 9

# Disjoint ranges of scene seeds.
VAE_SEED = 0
BASE_SEED = 1_000_000
DEMO_SEED = 5_000_000
HELD_OUT_SEED = 9_000_000


def rendered_clips(path: Path, first_seed: int, count: int, styles: tuple[str, ...] = STYLES) -> np.ndarray:
    """Clips of scenes `first_seed`.. as uint8 (count, F, C, H, W); scene i has style i modulo the styles. Cached."""
    shape = (count, NUM_FRAMES, 3, HEIGHT, WIDTH)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape).flush()
        step = 256
        jobs = [(partial, first_seed, start, min(start + step, count), styles) for start in range(0, count, step)]
        with ProcessPoolExecutor() as pool:
            list(pool.map(_render_range, jobs))
        partial.rename(path)
    clips = np.load(path, mmap_mode="r")
    if clips.shape != shape:
        raise ValueError(f"{path} holds {clips.shape}, expected {shape}; delete it to render anew")
    return clips


def _render_range(job: tuple[Path, int, int, int, tuple[str, ...]]) -> None:
    path, first_seed, start, stop, styles = job
    clips = np.lib.format.open_memmap(path, mode="r+")
    for index in range(start, stop):
        clips[index] = render(draw_scene(first_seed + index), styles[index % len(styles)], HEIGHT, WIDTH, NUM_FRAMES)
    clips.flush()


def real_clips(video: Path, path: Path, count: int, seed: int) -> np.ndarray:
    """Random crops of consecutive real frames as uint8 (count, F, C, H, W), cached in `path`."""
    if not path.exists():
        frames_FHWC = _decode_small(video)
        rng = np.random.default_rng(seed)
        clips = np.empty((count, NUM_FRAMES, 3, HEIGHT, WIDTH), np.uint8)
        for index in range(count):
            first = rng.integers(len(frames_FHWC) - NUM_FRAMES)
            top = rng.integers(frames_FHWC.shape[1] - HEIGHT + 1)
            left = rng.integers(frames_FHWC.shape[2] - WIDTH + 1)
            crop = frames_FHWC[first : first + NUM_FRAMES, top : top + HEIGHT, left : left + WIDTH]
            clips[index] = crop.transpose(0, 3, 1, 2)
        np.save(path, clips)
    return np.load(path, mmap_mode="r")


def _decode_small(video: Path) -> np.ndarray:
    """All frames of `video`, reduced to a little more than the working size, frames_FHWC uint8."""
    import av

    height = HEIGHT + 16
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        width = max(WIDTH, round(height * stream.width / stream.height))
        return np.stack([f.to_ndarray(format="rgb24", width=width, height=height) for f in container.decode(stream)])
