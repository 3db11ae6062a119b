"""How far drift may go before prompts that have nothing to do with the training are not followed: on a demo's run.

    make demo
    python -m benchmarks.drifting --run runs/demo_anime [--strengths 0 1 2 3] [--seeds 0 1]

Measures the drift of the run's newest checkpoint at several strengths, which stand for a training that went too far,
and samples the recipe's combined and unrelated prompts without the trigger at each: how well the probe of the tiny
base's world finds the prompt in them, a mean over videos, and how much seeds differ. DRIFT_BAND in wantrain/verdict.py
is a reading of this.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wantrain import config as schema
from wantrain import judging, lora
from wantrain.models.seeing import TinySeer
from wantrain.recipe import drifting, sampler
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import open_recipe
from wantrain.recipe.samples import Cached, samples_of
from wantrain.recipe.training import prepare, resume
from wantrain.validation import HeldOut


def drifts(config: schema.Config, strengths: Sequence[float]) -> list[float]:
    """The drift of the run's adapter at each strength."""
    recipe = open_recipe(config)
    clips = open_clips(recipe, [])
    training, source = prepare(recipe, clips), Cached(clips)
    heldout = HeldOut(clips.heldout, recipe.validation_sigmas, samples_of(clips, source, clips.heldout), 1)
    resume(training)
    measured = drifting.open_drift(training, source, heldout, 10_000)
    assert measured is not None, "the demos have captions for it"
    found = []
    for strength in strengths:
        lora.set_strength(training.model, strength)
        found.append(drifting.shares(measured.measure(), measured.scale)[1])
    return found


def main() -> None:
    """Measure and print."""
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--run", type=Path, required=True)
    given.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1.0, 2.0, 3.0])
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = given.parse_args()
    config = schema.load_yaml((options.run / "config.yaml").read_text(encoding="utf-8"))
    recipe, seer = sampler.open_sampling(config), TinySeer()
    prompts = [*(config.evaluate.combined or []), *(config.evaluate.unrelated or [])]
    moved = drifts(config, options.strengths)
    pipeline = sampler.load_pipeline(recipe, sampler.lora_files(recipe, []), prompts)
    inputs = sampler.inputs_of(recipe, 1, lambda: open_clips(recipe, []))[0]
    for strength, drift in zip(options.strengths, moved, strict=True):
        videos = {prompt: [sampler.sampled(recipe, pipeline, prompt, seed=seed, strength=strength, inputs=inputs)
                           for seed in options.seeds] for prompt in prompts}
        follows = [seer.adherence(prompt, own) or 0.0 for prompt, each in videos.items() for own in each]
        differs = [judging.diversity([own[len(own) // 2] for own in each]) for each in videos.values()]
        print(f"strength {strength:g}: drift {drift:.2f}, adherence {sum(follows) / len(follows):.3f}, "
              f"diversity {sum(differs) / len(differs):.4f}", flush=True)


if __name__ == "__main__":
    main()
