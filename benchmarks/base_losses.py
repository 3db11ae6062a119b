"""What training over a base in fewer bits costs in what is learnt: held-out losses beside those over the whole base.

    python -m benchmarks.base_losses --out runs/base_losses [--steps 60] [--seeds 3] [--twin-steps 20]

Two models. The demo on the embedded base: each form trains with the same clips, order, sigmas and noise, and its last
held-out loss is compared with that of the whole base, seed by seed. A twin of Wan 1.3B's width, two blocks of random
weights, in float32: it learns to denoise smooth random fields, and is tried on others. What is trained there already is
not trained again. nf4 has rows where bitsandbytes is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.base_forms import forms, transformer_of
from benchmarks.memorising import trained
from wantrain import flow

FIELDS, TEXT_DIM = (4, 16, 5, 16, 16), 4096
"""A batch of the twin's latents [B, C, T, H, W], of 320 tokens each."""


def demo_loss(out: Path, form: str, seed: int, num_steps: int) -> float:
    """The last held-out loss of the demo trained over this form of the base."""
    run = out / f"{form}_{seed}_{num_steps}"
    if not (run / "judgement.json").exists():
        own = ["recipe=demo_anime", "tracker=none", f"run.dir={run}", f"data.cache_dir={out / 'cache'}",
               f"memory.base={form}", f"train.seed={seed}", f"train.num_steps={num_steps}",
               f"train.save_every={num_steps}", f"validation.every_steps={num_steps}", "sampler.every_steps=0"]
        trained(own)
    return float(json.loads((run / "judgement.json").read_text())["heldout"]["loss"][-1])


def fields(*key: int | str) -> torch.Tensor:
    """Smooth random fields of FIELDS' shape: of 3 x 4 x 4 random numbers, between which they are straight."""
    coarse = torch.randn(*FIELDS[:2], 3, 4, 4, generator=flow.generator_for(*key))
    return functional.interpolate(coarse, FIELDS[2:], mode="trilinear")


def twin_loss(form: str, num_steps: int, seed: int = 0) -> float:
    """The loss on other fields after so many steps on 8 batches of them."""
    model = transformer_of("" if form == "dtype" else form)
    text = torch.randn(1, 512, TEXT_DIM, generator=flow.generator_for(seed, "text")).expand(FIELDS[0], -1, -1)

    def loss(latents: torch.Tensor, *key: int | str) -> torch.Tensor:
        generator = flow.generator_for(seed, *key)
        sigma = (torch.arange(FIELDS[0]) + torch.rand(FIELDS[0], generator=generator)) / FIELDS[0]
        noise, at = torch.randn(FIELDS, generator=generator), sigma.view(-1, 1, 1, 1, 1)
        answer = model(hidden_states=(1 - at) * latents + at * noise, timestep=1000 * sigma,
                       encoder_hidden_states=text, return_dict=False)[0]
        return functional.mse_loss(answer, noise - latents)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss(fields(seed, "trained", step % 8), "step", step).backward()
        optimizer.step()
    with torch.no_grad():
        return statistics.fmean(float(loss(fields(seed, "heldout", n), "tried", n)) for n in range(4))


def told(name: str, loss_of: Callable[[str, int], float], seeds: int) -> None:
    """Print the losses of every form, and each against the whole base's."""
    whole = [loss_of("dtype", seed) for seed in range(seeds)]
    print(f"{name:8} dtype {statistics.fmean(whole):.4f}", flush=True)
    for form in forms():
        own = [loss_of(form, seed) for seed in range(seeds)]
        changes = [100 * (mine / base - 1) for mine, base in zip(own, whole, strict=True)]
        print(f"{name:8} {form:5} {statistics.fmean(own):.4f}   against dtype, by seed: "
              + " ".join(f"{change:+.2f} %" for change in changes), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--twin-steps", type=int, default=20)
    given = parser.parse_args()
    told("demo", lambda form, seed: demo_loss(given.out, form, seed, given.steps), given.seeds)
    told("twin", lambda form, seed: twin_loss(form, given.twin_steps, seed), 1)


if __name__ == "__main__":
    main()
