"""Folders as runs leave them, made without a training: what the tests of pages show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import yaml

from wantrain import pictures, results
from wantrain.results import Column, Metric, Prompt, Results, Video

FPS, NUM_FRAMES = 16, 24
PROMPTS = [Prompt("a lighthouse at dusk", "like the training"), Prompt("a fox in the snow", "combined"),
           Prompt("a glass of water", "unrelated")]


def frames(seed: int, strength: float, size: tuple[int, int] = (96, 144)) -> torch.Tensor:
    """frames_FCHW uint8: a disc over a ground, the same way for a seed; the more strength, the more colour and fewer
    shades. The rows at the top are as bright as the frame's number says: 10 of 255 for each.
    """
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    made = torch.zeros(NUM_FRAMES, 3, height, width)
    for f in range(NUM_FRAMES):
        turn = 2 * math.pi * f / NUM_FRAMES
        cx, cy = width * (0.5 + 0.3 * math.cos(turn + seed)), height * (0.55 + 0.2 * math.sin(turn + seed))
        disc = ((x - cx) ** 2 + (y - cy) ** 2).sqrt() < height / 5
        hue = torch.tensor([0.5 + 0.4 * math.sin(seed + k * 2.1) for k in range(3)])[:, None, None]
        ground = (0.35 + 0.3 * y / height).expand(3, -1, -1)
        picture = torch.where(disc, hue, ground * (1 - strength / 2) + strength / 2 * (1 - hue))
        levels = 3 + 12 * max(0.0, 1 - strength)
        made[f] = (picture * levels).round() / levels
        made[f, :, :12] = 10 * f / 255
    return (made.clamp(0, 1) * 255).to(torch.uint8)


def columns(steps: tuple[int, ...], strengths: tuple[float, ...]) -> list[Column]:
    """Base, and each checkpoint at each strength, in no order that a page should keep."""
    made = [Column(f"step{step}_{strength:g}", f"step {step} x {strength:g}", f"checkpoints/step_{step:06d}", step,
                   strength, True) for step in reversed(steps) for strength in strengths]
    return [*made, Column("base", "base")]


def write_results(folder: Path, *, steps: tuple[int, ...] = (100, 200, 1000), strengths: tuple[float, ...] = (0.5, 1.0),
                  prompts: list[Prompt] = PROMPTS, seeds: tuple[int, ...] = (0, 1), name: str = "mystyle") -> Results:
    """FOLDER/results.json with its videos; those of one look are one file's copies."""
    made, videos = columns(steps, strengths), []
    for column in made:
        for p, prompt in enumerate(prompts):
            for seed in seeds:
                file = folder / f"{column.id}_{p}_{seed}.mp4"
                amount = column.strength * min(1.0, 0.4 + (column.step or 0) / 400)
                pictures.write_mp4(file, frames(10 * p + seed, amount), FPS, crf=24)
                caption = f"mystyl style, {prompt.text}" if column.trigger else prompt.text
                videos.append(Video(file.name, column.id, p, seed, caption, {
                    "style": 0.6 - 0.4 * amount, "motion": 1.5}, f"wantrain sample --like {file.name}"))
    style = {c.id: (0.6 - 0.4 * c.strength * min(1.0, 0.4 + (c.step or 0) / 400), 0.03) for c in made}
    found = Results(name, "mystyl style", FPS, made, prompts, videos, [
        Metric("style", "style distance", "How far colours and textures are from the training's; says nothing of "
               "subject or motion.", "lower", style),
        Metric("adherence", "prompt adherence", "How well an image encoder finds the prompt in the frames; blind to "
               "order and number.", "higher", {c.id: (0.31 - 0.002 * place, 0.004) for place, c in enumerate(made)}),
        Metric("motion", "motion", "Mean optical flow in pixels a frame; a camera's motion counts as well.", "",
               {c.id: (1.5, None) for c in made})],
        {"run.name": name, "train.num_steps": 1000, "lora.rank": 16}, {"LoRA": {"wantrain.base_digest": "0123abcd"}})
    results.write(folder, found)
    return found


def judgement(steps: list[int], clips: list[dict]) -> dict:
    """As a training that begins to overfit at two thirds."""
    far = [step / steps[-1] for step in steps]
    heldout = [0.71 - 0.09 * (1 - math.exp(-5 * x)) + 0.05 * max(0, x - 0.6) for x in far]
    trained = [0.70 - 0.12 * (1 - math.exp(-4 * x)) - 0.05 * x for x in far]
    sigmas = {f"{s:.4f}": 0.3 + s / 2 for s in (0.95, 0.75, 0.5, 0.25)}
    return {
        "steps": steps,
        "heldout": {"loss": heldout, "minus_base": [[loss - 0.71, 0.012] for loss in heldout], "base": 0.71},
        "trained": {"loss": trained, "minus_base": [[loss - 0.70, 0.012] for loss in trained], "base": 0.70},
        "gap": [[h - t - 0.01, 0.016] for h, t in zip(heldout, trained, strict=True)],
        "by_sigma": {s: {"base": base, "loss": [base - 0.1 * x * float(s) for x in far]} for s, base in sigmas.items()},
        "drift": {"by_sigma": {s: [0.02 * x * (1.2 - float(s)) for x in far] for s in sigmas},
                  "mean": [0.012 * x for x in far]},
        "diversity": [1 - 0.4 * x for x in far],
        "clips": [clip | {"base": 0.7, "loss": [0.7 + 0.03 * i - 0.1 * x for x in far]}
                  for i, clip in enumerate(clips)],
        "verdict": {"best": steps[len(steps) * 2 // 3], "from": steps[len(steps) // 3], "to": steps[-2],
                    "memorised_from": steps[-1], "sentences": [
                        f"Usable: steps {steps[len(steps) // 3]} to {steps[-2]}.",
                        "Held-out loss is within its interval of the best over that range; a loss predicts no taste."]}}


def write_training(folder: Path, clips: list[dict] | None = None, num_steps: int = 1000, done: int = 1000,
                   **settings: object) -> None:
    """What a training leaves: metrics.jsonl, judgement.json, run.json, config.yaml, a log."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(7)
    lines = [{"step": step, "loss": 0.75 - 0.1 * step / num_steps + 0.1 * float(torch.randn((), generator=noise)),
              "grad_norm": 0.4, "lr": 1e-4, "step_s": 0.5} for step in range(10, done + 1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = list(range(100, done + 1, 100))
    if len(steps) > 2:
        (folder / "judgement.json").write_text(json.dumps(judgement(steps, clips or [])))
    (folder / "run.json").write_text(json.dumps({"wantrain": "0.0", "base_digest": "0123abcd"}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"num_steps": num_steps}, **settings}))
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "process_0.log").write_text(f"validation: 8 held-out clips\nstep {done}: validation loss 0.62\n")


def clips_in(folder: Path, number: int = 3) -> list[dict]:
    """Clips of a judgement, held out and trained on, with their films."""
    made = []
    for i in range(number):
        path = folder / f"clip_{i}.mp4"
        pictures.write_mp4(path, frames(30 + i, 1.0), FPS)
        made.append({"name": path.name, "file": str(path), "start_s": 0.0, "end_s": 1.0,
                     "set": "trained" if i % 2 else "heldout"})
    return made


def write_run(run_dir: Path, **more: object) -> Path:
    """A whole run: a training with its clips, its samples, its evaluation."""
    write_training(run_dir, clips_in(run_dir / "clips", 12))
    write_results(run_dir / "report", **more)
    return run_dir
