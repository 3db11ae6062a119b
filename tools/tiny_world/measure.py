"""Measures the tiny base: reconstruction by style, and whether samples show what the prompt says.

    python -m tools.tiny_world.measure --base wantrain/assets/tiny_wan --work tiny
    python -m tools.tiny_world.measure --base wantrain/assets/tiny_wan --work tiny --num-probe 3000 \
        --write-probe wantrain/assets/tiny_probe.safetensors

Writes a table to the console and contact sheets of samples (first, middle, last frame) into the work folder.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import logging
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from tools.tiny_world import fast_vae
from tools.tiny_world.clips import HEIGHT, HELD_OUT_SEED, NUM_FRAMES, WIDTH
from tools.tiny_world.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene, caption, draw_scene, render
from wantrain.models.probe import Probe, write

LABELS = {"object": OBJECTS, "colour": tuple(COLOURS), "background": BACKGROUNDS}
GOALS = {"background": 0.90, "colour": 0.85, "object": 0.70}
PSNR_GOAL_DB = 26.0
PROBE_SEED = 3_000_000


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices (B,) by label name."""
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes]) for name, values in LABELS.items()
    }


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, frames_BFCHW: np.ndarray) -> tuple[Tensor, Tensor]:
    """pixels_BCFHW in [-1, 1], and the same through the VAE."""
    pixels = torch.from_numpy(frames_BFCHW).transpose(1, 2).float() / 127.5 - 1
    return pixels, fast_vae.decode(vae, fast_vae.encode_moments(vae, pixels)[:, : vae.config.z_dim]).clamp(-1, 1)


def measure_vae(vae: AutoencoderKLWan, num_clips: int) -> dict[str, float]:
    """Mean PSNR in dB over held-out 9-frame clips, by style."""
    psnr: dict[str, list[float]] = {style: [] for style in STYLES}
    for index in range(num_clips):
        for style in STYLES:
            pixels, again = reconstruct(vae, render(draw_scene(HELD_OUT_SEED + index), style)[None])
            psnr[style].append(-10 * math.log10(((pixels - again) / 2).square().mean().item()))
    return {style: float(np.mean(values)) for style, values in psnr.items()}


def train_probe(vae: AutoencoderKLWan, num_scenes: int, seed: int, styles: tuple[str, ...] = ("natural",)
                ) -> tuple[Probe, dict[str, float]]:
    """A probe trained on reconstructed frames, of the styles in turn, and its accuracy on the last eighth of them."""
    torch.manual_seed(seed)
    scenes = [draw_scene(PROBE_SEED + i) for i in range(num_scenes)]
    frames = [render(scene, styles[i % len(styles)], HEIGHT, WIDTH, NUM_FRAMES)[i % NUM_FRAMES]
              for i, scene in enumerate(scenes)]
    stacked = np.stack(frames)[:, None]
    pixels = torch.cat([reconstruct(vae, stacked[i : i + 32])[1][:, :, 0] for i in range(0, num_scenes, 32)])
    labels, split = labels_of(scenes), num_scenes * 7 // 8
    probe, batch, epochs = Probe(LABELS), 64, 8
    opt = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * (split // batch))
    for _ in range(epochs):
        order = torch.randperm(split)
        for i in range(0, split - batch + 1, batch):
            rows = order[i : i + batch]
            noisy = pixels[rows] + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn(batch, 3, HEIGHT, WIDTH)
            logits = probe(noisy)
            loss = sum(functional.cross_entropy(logits[name], labels[name][rows]) for name in LABELS)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    with torch.no_grad():
        return probe, accuracy(probe, pixels[split:], {name: values[split:] for name, values in labels.items()})


def accuracy(probe: Probe, pixels_BCHW: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of right answers by label name."""
    with torch.no_grad():
        logits = probe(pixels_BCHW)
    return {name: (logits[name].argmax(1) == labels[name]).float().mean().item() for name in LABELS}


def sample(pipeline: WanPipeline, scenes: list[Scene], args: argparse.Namespace) -> Tensor:
    """frames_BFCHW in [0, 1] from the full pipeline, one clip a scene's plain caption."""
    clips = []
    for first in range(0, len(scenes), 12):
        out = pipeline(
            [args.prefix + caption(scene) for scene in scenes[first : first + 12]],
            height=HEIGHT,
            width=WIDTH,
            num_frames=NUM_FRAMES,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(args.seed + first),
            output_type="pt",
        )
        clips.append(out.frames.float())
    return torch.cat(clips)


def contact_sheet(frames_BFCHW: Tensor, scenes: list[Scene], path: Path) -> None:
    """First, middle and last frame of each clip under its caption, three clips a row."""
    scale, columns = 2, 3
    cell_w, cell_h = 3 * WIDTH * scale // 2 + 6, HEIGHT * scale // 2 + 16
    rows = math.ceil(len(scenes) / columns)
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for index, scene in enumerate(scenes):
        left, top = index % columns * cell_w, index // columns * cell_h
        draw.text((left + 2, top + 2), caption(scene), fill="black")
        picked = frames_BFCHW[index, [0, NUM_FRAMES // 2, -1]].permute(2, 0, 3, 1).flatten(1, 2)
        image = Image.fromarray((picked.clamp(0, 1) * 255).byte().numpy())
        sheet.paste(image, (left, top + 15))
    sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.BILINEAR).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the contact sheets")
    parser.add_argument("--num-held-out", type=int, default=32, help="scenes for the VAE")
    parser.add_argument("--num-samples", type=int, default=96)
    parser.add_argument("--num-probe", type=int, default=4000, help="scenes to train and check the probe on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--prefix", default="", help='put before every prompt, such as "celanime style, "')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write-probe", type=Path, help="train a probe of all styles, write it there, and stop")
    args = parser.parse_args()
    logging.disable_progress_bar()
    pipeline = WanPipeline.from_pretrained(args.base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if args.write_probe:
        probe, found = train_probe(pipeline.vae, args.num_probe, args.seed, STYLES)
        write(args.write_probe, probe)
        print(f"wrote {args.write_probe}: " + ", ".join(f"{name} {share:.1%}" for name, share in found.items()))
        return
    for style, value in measure_vae(pipeline.vae, args.num_held_out).items():
        print(f"VAE PSNR {style:10} {value:6.2f} dB  goal {PSNR_GOAL_DB:.0f}  {verdict(value >= PSNR_GOAL_DB)}")
    probe, ceiling = train_probe(pipeline.vae, args.num_probe, args.seed)
    scenes = [draw_scene(HELD_OUT_SEED + 5000 + i) for i in range(args.num_samples)]
    start = time.process_time()
    frames_BFCHW = sample(pipeline, scenes, args)
    cpu_s = (time.process_time() - start) / len(scenes)
    found = accuracy(probe, frames_BFCHW[:, NUM_FRAMES // 2] * 2 - 1, labels_of(scenes))
    for name, goal in GOALS.items():
        line = f"samples  {name:10} {found[name]:6.1%}     goal {goal:.0%} {verdict(found[name] >= goal)}"
        print(f"{line}  (probe on real frames {ceiling[name]:.1%})")
    print(f"{len(scenes)} samples, {args.steps} steps, guidance {args.guidance}: {cpu_s:.2f} CPU-s a sample")
    for first in range(0, min(72, len(scenes)), 36):
        chosen = slice(first, first + 36)
        contact_sheet(frames_BFCHW[chosen], scenes[chosen], args.work / f"samples_{first // 36}.png")


def verdict(passed: bool) -> str:
    """A word for the table."""
    return "ok    " if passed else "MISSED"


if __name__ == "__main__":
    main()
