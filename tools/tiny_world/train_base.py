"""Trains the tiny transformer and text encoder by flow matching on the natural style: images first, then clips.

    python -m tools.tiny_world.train_base --work tiny --encode      # once the VAE's encoder is final
    python -m tools.tiny_world.train_base --work tiny --export wantrain/assets/tiny_wan

With `--minutes 0 0` it only exports the newest snapshots.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tools.tiny_world import fast_vae
from tools.tiny_world.base import (
    Z_DIM,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
    nonsense_word,
    save_base,
    token_ids,
)
from tools.tiny_world.clips import BASE_SEED, HEIGHT, NUM_FRAMES, WIDTH
from tools.tiny_world.optim import Average, average_over_processes, optimizers
from tools.tiny_world.world import caption, draw_scene, render
from wantrain.models.encode import predict_velocity
from wantrain.models.short_text import shorten_text
from wantrain.terms import TEXT_LEN

NOT_MUON = ("condition_embedder", "patch_embedding", "proj_out", "scale_shift_table", "shared", "embed", "bias")
SHIFT = 3.0
IMAGES_SEED = BASE_SEED + 500_000
KINDS = ("images", "clips")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of snapshots and latents")
    parser.add_argument("--encode", action="store_true", help="render and encode the training latents, then stop")
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--num-clips", type=int, default=12_000)
    parser.add_argument("--minutes", type=float, nargs=2, default=(12, 33), help="on images and on clips")
    parser.add_argument("--batch", type=int, nargs=2, default=(64, 24), help="of a process: images, clips")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--caption-drop", type=float, default=0.1)
    parser.add_argument("--nonsense", type=float, default=0.2, help="share of captions with an unknown style word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of one thread each, gradients averaged")
    parser.add_argument("--export", type=Path, help="directory to write the base to, every few minutes and at the end")
    return parser.parse_args()


class Base(nn.Module):
    """What is trained together: the transformer and its text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.text_encoder = new_text_encoder()
        self.tokenizer = new_tokenizer()
        shorten_text(self.transformer)

    def forward(self, noisy_BCTHW: Tensor, sigma_B: Tensor, captions: list[str]) -> Tensor:
        """velocity_BCTHW."""
        ids_BL, mask_BL = token_ids(self.tokenizer, captions)
        text_BLD = self.text_encoder(ids_BL, mask_BL).last_hidden_state * mask_BL[..., None]
        padded_BLD = nn.functional.pad(text_BLD, (0, 0, 0, TEXT_LEN - text_BLD.shape[1]))
        return predict_velocity(self.transformer, noisy_BCTHW, sigma_B, padded_BLD)


def encode_range(job: tuple[Path, int, int, int]) -> Tensor:
    """Latents before normalisation, (count, z_dim, T, h, w) float16, of natural scenes start..stop with F frames."""
    work, start, stop, num_frames = job
    torch.set_num_threads(1)
    vae = new_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    parts = []
    for first in range(start, stop, 16):
        seeds = range(first, min(first + 16, stop))
        clips = [render(draw_scene(seed), "natural", HEIGHT, WIDTH, NUM_FRAMES)[:num_frames] for seed in seeds]
        pixels_BCFHW = torch.from_numpy(np.stack(clips)).transpose(1, 2).float() / 127.5 - 1
        with torch.no_grad():
            parts.append(fast_vae.encode_moments(vae, pixels_BCFHW)[:, :Z_DIM].half())
    return torch.cat(parts)


def encode(args: argparse.Namespace) -> None:
    """Writes latents_clips.pt and latents_images.pt (first frames of further scenes) and latents_stats.pt."""
    stats_path = args.work / "latents_stats.pt"
    with ProcessPoolExecutor() as pool:
        for name, first, count, frames in (
            ("clips", BASE_SEED, args.num_clips, NUM_FRAMES),
            ("images", IMAGES_SEED, args.num_images, 1),
        ):
            if count == 0:
                continue
            jobs = [(args.work, s, min(s + 256, first + count), frames) for s in range(first, first + count, 256)]
            latents = torch.cat(list(pool.map(encode_range, jobs)))
            torch.save(latents, args.work / f"latents_{name}.pt")
            print(name, tuple(latents.shape), flush=True)
            if name == "clips" and not stats_path.exists():
                flat = latents.float()
                stats = {"mean": flat.mean((0, 2, 3, 4)), "std": flat.std((0, 2, 3, 4))}
                torch.save(stats, stats_path)
                print(stats, flush=True)


def draw_captions(seeds: list[int], args: argparse.Namespace, rng: np.random.Generator) -> list[str]:
    """Paraphrased captions, some emptied, some behind an unknown style word."""
    captions = []
    for seed in seeds:
        text = caption(draw_scene(seed), int(rng.choice([0, 0, 0, 1, 2, 3])))
        if rng.random() < args.nonsense:
            text = f"{nonsense_word(rng)} style, {text}"
        captions.append("" if rng.random() < args.caption_drop else text)
    return captions


def draw_sigma(count: int) -> Tensor:
    """sigma_B: stratified uniform numbers, shifted towards noise."""
    uniform_B = (torch.randperm(count) + torch.rand(count)) / count
    return SHIFT * uniform_B / (1 + (SHIFT - 1) * uniform_B)


def export(base: Base, args: argparse.Namespace) -> None:
    """Writes the base directory with the newest VAE."""
    vae = new_vae()
    newest = args.work / "vae_decoder.pt"
    vae.load_state_dict(torch.load(newest if newest.exists() else args.work / "vae.pt", weights_only=True))
    stats = torch.load(args.work / "latents_stats.pt", weights_only=True)
    vae.register_to_config(latents_mean=stats["mean"].tolist(), latents_std=stats["std"].tolist())
    save_base(args.export, vae, base.transformer, base.text_encoder, base.tokenizer)


def train(rank: int, args: argparse.Namespace) -> None:
    """The training loop of one process. Phases and learning rate follow the clock, not a number of steps."""
    torch.set_num_threads(1)
    if args.processes > 1:
        dist.init_process_group("gloo", f"file://{args.work}/rendezvous_base", rank=rank, world_size=args.processes)
    stats = torch.load(args.work / "latents_stats.pt", weights_only=True)
    mean, std = (stats[key].view(1, -1, 1, 1, 1) for key in ("mean", "std"))
    latents_NCTHW, phase = torch.empty(0), -1
    torch.manual_seed(args.seed)
    base, snapshot = Base(), args.work / "base.pt"
    if snapshot.exists():
        base.load_state_dict(torch.load(snapshot, weights_only=True))
    torch.manual_seed(1000 * args.seed + rank)
    rng = np.random.default_rng([args.seed, rank])
    opts, average = optimizers(base, args.lr, NOT_MUON), Average(base, 0.998)
    start, total, step, losses = time.time(), 60 * sum(args.minutes), 0, []
    elapsed = last_log = last_export = 0.0
    while elapsed < total:
        if phase != (now := int(elapsed >= 60 * args.minutes[0])):
            phase = now
            latents_NCTHW = torch.load(args.work / f"latents_{KINDS[phase]}.pt", weights_only=True)
        indices = rng.integers(len(latents_NCTHW), size=args.batch[phase])
        latents_BCTHW = (latents_NCTHW[torch.from_numpy(indices)].float() - mean) / std
        captions = draw_captions([(IMAGES_SEED, BASE_SEED)[phase] + int(i) for i in indices], args, rng)
        sigma_B, noise = draw_sigma(len(indices)), torch.randn_like(latents_BCTHW)
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        velocity = base((1 - sigma) * latents_BCTHW + sigma * noise, sigma_B, captions)
        loss = (velocity - (noise - latents_BCTHW)).square().mean()
        lr = args.lr * min(1, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * elapsed / total)))
        for opt in opts:
            opt.zero_grad(set_to_none=True)
            opt.param_groups[0]["lr"] = lr
        loss.backward()
        elapsed = average_over_processes(list(base.parameters()), time.time() - start)
        for opt in opts:
            opt.step()
        average.update(base)
        step += 1
        losses.append(loss.item())
        if rank == 0 and (elapsed - last_log > 60 or elapsed >= total):
            print(f"{elapsed / 60:5.1f} min step {step} {KINDS[phase]} loss {np.mean(losses):.4f}", flush=True)
            average.swap(base)
            torch.save(base.state_dict(), snapshot)
            if args.export and (elapsed - last_export > 300 or elapsed >= total):
                export(base, args)
                last_export = elapsed
            average.swap(base)
            last_log, losses = elapsed, []


def main() -> None:
    args = parse()
    (args.work / "rendezvous_base").unlink(missing_ok=True)
    if args.encode:
        encode(args)
    elif sum(args.minutes) == 0:
        base = Base()
        base.load_state_dict(torch.load(args.work / "base.pt", weights_only=True))
        export(base, args)
    elif args.processes == 1:
        train(0, args)
    else:
        torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
