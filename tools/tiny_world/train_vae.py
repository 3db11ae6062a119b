"""Trains the tiny VAE on the world in all styles and some real frames: images first, then 5 and 9 frames.

    python -m tools.tiny_world.train_vae --work tiny --video FILM
    python -m tools.tiny_world.train_vae --work tiny --video FILM --decoder-only --minutes 0 0 40

The second command keeps the encoder, and so the latent space, as it is.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from numpy.random import Generator
from torch import Tensor

from tools.tiny_world import fast_vae
from tools.tiny_world.base import Z_DIM, new_vae
from tools.tiny_world.clips import HELD_OUT_SEED, VAE_SEED, real_clips, rendered_clips
from tools.tiny_world.optim import Average, average_over_processes, optimizers
from tools.tiny_world.world import STYLES

NUM_CLIPS, NUM_REAL, NUM_HELD_OUT = 18_000, 2500, 192
PHASES = ((1, 10), (5, 3), (9, 2))  # frames in a clip, clips in a process's batch
NOT_MUON = ("conv_in", "conv_out", "quant_conv", "gamma")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of snapshots, logs and rendered clips")
    parser.add_argument("--video", type=Path, required=True, help="real film, for --real")
    parser.add_argument("--minutes", type=float, nargs=3, default=(12, 6, 18), help="for 1, 5 and 9 frames")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the mean KL divergence of a latent number")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder; start from vae.pt")
    parser.add_argument("--latent-noise", type=float, default=0.1, help="decoder only: noise in units of latents' std")
    parser.add_argument("--real", type=float, default=0.15, help="share of real frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each, gradients averaged")
    return parser.parse_args()


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 (B, F, C, H, W) to pixels_BCFHW in [-1, 1]."""
    return torch.from_numpy(clips).transpose(1, 2).float().div_(127.5).sub_(1)


def draw_batch(clips: tuple[np.ndarray, np.ndarray], share: float, shape: tuple[int, int], rng: Generator) -> Tensor:
    """pixels_BCFHW of `shape` = (B, F): spans of rendered clips, about `share` of them real."""
    (world, real), (batch, frames) = clips, shape
    spans = []
    for _ in range(batch):
        source = real if rng.random() < share else world
        first = rng.integers(source.shape[1] - frames + 1)
        spans.append(source[rng.integers(len(source)), first : first + frames])
    return to_pixels(np.stack(spans))


@torch.no_grad()
def psnr_by_style(vae: AutoencoderKLWan, held_out: np.ndarray, num_clips: int) -> dict[str, float]:
    """Mean over clips of the PSNR in dB of 9-frame reconstructions, by style."""
    by_style: dict[str, list[float]] = {style: [] for style in STYLES}
    for index in range(num_clips):
        pixels = to_pixels(held_out[index : index + 1])
        pixels_again = fast_vae.decode(vae, fast_vae.encode_moments(vae, pixels)[:, :Z_DIM]).clamp(-1, 1)
        mse = ((pixels - pixels_again) / 2).square().mean().item()
        by_style[STYLES[index % len(STYLES)]].append(-10 * math.log10(mse))
    return {style: float(np.mean(values)) for style, values in by_style.items()}


def reconstruct(vae: AutoencoderKLWan, pixels: Tensor, args: argparse.Namespace, std: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction, and the mean KL divergence of a latent number."""
    if args.decoder_only:
        with torch.no_grad():
            mean = fast_vae.encode_moments(vae, pixels)[:, :Z_DIM]
            strength = args.latent_noise * torch.rand(len(mean), 1, 1, 1, 1)
            z = mean + strength * std * torch.randn_like(mean)
        return fast_vae.decode(vae, z), torch.zeros(())
    mean, logvar = fast_vae.encode_moments(vae, pixels).clamp(-20, 10).chunk(2, 1)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return fast_vae.decode(vae, z), 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def start_video(vae: AutoencoderKLWan) -> None:
    """Makes a VAE that has seen only images treat every frame as one; in time it then averages and repeats."""
    for name, parameter in vae.named_parameters():
        if parameter.ndim != 5 or parameter.shape[2] != 3:
            continue
        if not name.endswith("time_conv.weight"):
            parameter[:, :, :2] = 0
            continue
        parameter.zero_()
        identity = torch.eye(parameter.shape[1])[:, :, None, None]
        if "encoder" in name:
            parameter[:, :, 1:] = 0.5 * identity[:, :, None]
        else:
            parameter[:, :, 2] = identity.repeat(2, 1, 1, 1)
        vae.get_parameter(name.replace("weight", "bias")).zero_()


def load(args: argparse.Namespace) -> tuple[AutoencoderKLWan, Path, Tensor]:
    """The VAE from its newest snapshot, where to save the next one, and the latents' standard deviation."""
    vae, std, snapshot = new_vae(), torch.ones(1, Z_DIM, 1, 1, 1), args.work / "vae.pt"
    if snapshot.exists():
        vae.load_state_dict(torch.load(snapshot, weights_only=True))
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        std = torch.load(args.work / "latents_stats.pt", weights_only=True)["std"].view(1, -1, 1, 1, 1)
        snapshot = args.work / "vae_decoder.pt"
        if snapshot.exists():
            vae.load_state_dict(torch.load(snapshot, weights_only=True))
    return vae, snapshot, std


def train(rank: int, args: argparse.Namespace) -> None:
    """The training loop of one process. Phases and learning rate follow the clock, not a number of steps."""
    torch.set_num_threads(1)
    if args.processes > 1:
        dist.init_process_group("gloo", f"file://{args.work}/rendezvous", rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed + rank)
    rng = np.random.default_rng([args.seed, rank])
    world = rendered_clips(args.work / "vae_train.npy", VAE_SEED, NUM_CLIPS)
    real = real_clips(args.video, args.work / "real.npy", NUM_REAL, seed=1)
    held_out = rendered_clips(args.work / "held_out.npy", HELD_OUT_SEED, NUM_HELD_OUT)
    vae, snapshot, std = load(args)
    opts, average = optimizers(vae, args.lr, NOT_MUON), Average(vae, 0.998)
    start, total, step, errors = time.time(), 60 * sum(args.minutes), 0, []
    elapsed = last_log = 0.0
    phase = int(args.minutes[0] == 0)
    while elapsed < total:
        next_phase = int(np.searchsorted(np.cumsum(args.minutes) * 60, elapsed, side="right"))
        if phase == 0 and next_phase > 0:
            start_video(vae)
            average = Average(vae, 0.998)
        phase = next_phase
        frames, batch = PHASES[phase]
        pixels = draw_batch((world, real), args.real, (batch, frames), rng)
        again, kl = reconstruct(vae, pixels, args, std)
        mse = (again - pixels).square().mean()
        lr = args.lr * min(1, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * elapsed / total)))
        for opt in opts:
            opt.zero_grad(set_to_none=True)
            opt.param_groups[0]["lr"] = lr
        (mse + args.kl * kl).backward()
        elapsed = average_over_processes(list(vae.parameters()), time.time() - start)
        for opt in opts:
            opt.step()
        average.update(vae)
        step += 1
        errors.append(mse.item())
        if rank == 0 and (elapsed - last_log > 60 or elapsed >= total):
            average.swap(vae)
            psnr = psnr_by_style(vae, held_out, 12 if elapsed < total else 48)
            torch.save(vae.state_dict(), snapshot)
            average.swap(vae)
            train_db = -10 * math.log10(np.mean(errors) / 4)
            by_style = " ".join(f"{style} {value:.2f}" for style, value in psnr.items())
            print(f"{elapsed / 60:5.1f} min step {step} frames {frames} train {train_db:.2f} dB {by_style}", flush=True)
            last_log, errors = elapsed, []


def main() -> None:
    args = parse()
    (args.work / "rendezvous").unlink(missing_ok=True)
    if args.processes == 1:
        train(0, args)
    else:
        torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
