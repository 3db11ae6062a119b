"""Samples in training: what `wantrain sample` makes of that step's LoRA, and the training is as without them."""

from __future__ import annotations

import json

import pytest
import torch

from tests.allocations import Allocations
from tests.conftest import opened
from tests.runs import losses, same_bits, state
from tests.tiny_tasks import write_a14b
from wantrain import asking, pictures, results
from wantrain.models.loading import let_go
from wantrain.recipe import live
from wantrain.recipe.samples import Cached
from wantrain.recipe.training import prepare
from wantrain.stages import train

PROMPTS = "sampler.prompts=['sqstyle, a square', a circle]"


@pytest.fixture
def written(monkeypatch):
    """The frames of every mp4 that is written, by path: x264 may write equal frames as other bytes."""
    found, write = {}, pictures.write_mp4

    def keep(path, frames_FCHW, *rest, **more):
        found[path] = frames_FCHW
        write(path, frames_FCHW, *rest, **more)

    monkeypatch.setattr(pictures, "write_mp4", keep)
    return found


def assert_same(one, two):
    """Up to the rounding to bytes: the training multiplies in another order."""
    differ = (one.int() - two.int()).abs()
    assert differ.max() <= 1
    assert differ.float().mean() < 1e-2


def columns(run):
    return [column.id for column in results.read(run / "live").columns]


def test_samples_are_those_of_the_exported_lora_and_training_is_as_without_them(trained, wantrain, written):
    own = (PROMPTS, "optim.lr=0.05")
    plain, run = trained("plain", *own), trained("run", *own, "sampler.every_steps=2")
    assert losses(plain) == losses(run)
    assert same_bits(state(plain)[1], state(run)[1])
    found = results.read(run / "live")
    assert columns(run) == ["base", "step_000002", "step_000004"]
    assert [(p.text, v.caption) for p, v in zip(found.prompts, found.videos, strict=False)] == [
        ("a square", "sqstyle, a square"), ("a circle", "a circle")]
    assert [(v.column, v.prompt, v.seed) for v in found.videos] == [
        (column, prompt, 0) for column in columns(run) for prompt in (0, 1)]
    assert all((run / "live" / v.file).with_suffix(".png").exists() for v in found.videos)
    for verb in ("export", "sample"):
        assert wantrain(verb, *own, f"run.dir={run}") == 0
    for number in (0, 1):
        for column, name in (("base", "base"), ("step_000004", "strength_1")):
            assert_same(written[run / "live" / f"{column}_{number:03d}.mp4"],
                        written[run / "samples" / f"{number:03d}_{name}.mp4"])
    assert not torch.equal(written[run / "live" / "base_000.mp4"], written[run / "live" / "step_000004_000.mp4"])


def test_how_much_seeds_differ_is_judged_as_a_share_of_the_base(trained, written):
    """The middle frames as 16 x 16 means, by numpy; None where the step has no samples yet."""
    run = trained("run", "sampler.prompts=[a circle]", "sampler.seeds=[0,1]", "sampler.every_steps=4", "optim.lr=0.05",
                  "validation.every_steps=2", "validation.sigmas=[0.5]", "validation.unrelated=[]")

    def differ(column):
        one, other = (written[run / "live" / f"{column}_{number:03d}.mp4"] for number in (0, 1))
        small = [frames[len(frames) // 2].numpy().reshape(3, 16, frames.shape[2] // 16, 16, frames.shape[3] // 16).mean(
            (2, 4)) for frames in (one, other)]
        return abs(small[0] - small[1]).mean()

    share = differ("step_000004") / differ("base")
    assert json.loads((run / "judgement.json").read_text())["diversity"] == [None, pytest.approx(share, rel=1e-4)]
    assert share != 1


def test_a_sample_leaves_no_memory_behind(arguments, cached):
    training = prepare(*opened(arguments))
    sampling, alive = live.open_live(training, Cached(training.clips)), []
    with Allocations() as held:
        for step in (1, 2, 3):
            assert "no samples" not in sampling.sample(step)
            let_go()
            alive.append(held.alive)
    assert alive[0] == alive[1] == alive[2]
    assert held.peak > alive[0] + 2**20


@pytest.mark.slow
def test_samples_that_are_asked_for_and_those_after_a_resume_stand_beside_each_other(trained, monkeypatch):
    step_as_it_is = train.train_step

    def train_step(training, step, micro_batches):
        if step + 1 == 2:
            (training.recipe.run_dir / asking.FOLDER).mkdir(exist_ok=True)
            (training.recipe.run_dir / asking.FOLDER / "sample").touch()
        return step_as_it_is(training, step, micro_batches)

    monkeypatch.setattr(train, "train_step", train_step)
    run = trained("run", "train.num_steps=2")
    before = (run / "live" / "base_000.mp4").stat().st_mtime_ns
    trained("run", "train.num_steps=3", "sampler.every_steps=3")
    assert columns(run) == ["base", "step_000002", "step_000003"]
    assert (run / "live" / "base_000.mp4").stat().st_mtime_ns == before
    trained("run", "train.num_steps=4", "sampler.every_steps=4", "sampler.seeds=[7]")
    assert columns(run) == ["base", "step_000004"]


def test_a_sample_that_fails_is_told_and_does_not_end_the_training(trained, monkeypatch, capsys):
    def fails(*_):
        raise FloatingPointError("the latents are not finite")

    monkeypatch.setattr(live.sampling, "denoising", fails)
    run = trained("run", "sampler.every_steps=2")
    assert "step 2: no samples: the latents are not finite" in capsys.readouterr().out
    assert len(losses(run)) == 4


@pytest.mark.slow
def test_samples_of_an_expert_go_through_both_and_take_the_newest_lora_of_the_other(wantrain, written, tmp_path,
                                                                                    capsys):
    own = ["model.variant=tiny_wan_a14b", f"model.path={write_a14b(tmp_path / 'a14b')}", "train.num_steps=2",
           "optim.lr=0.05", "sampler.every_steps=2", "sampler.num_steps=8"]
    for verb in ("cache", "train", "export", "sample"):
        assert wantrain(verb, *own) == 0
    run = tmp_path / "run"
    assert "no samples" not in capsys.readouterr().out
    assert columns(run / "high") == columns(run / "low") == ["base", "step_000002"]
    sampled, high, low = run / "samples", run / "high" / "live", run / "low" / "live"
    for folder in (high, low):
        assert_same(written[folder / "base_000.mp4"], written[sampled / "000_base.mp4"])
    assert_same(written[low / "step_000002_000.mp4"], written[sampled / "000_strength_1.mp4"])
    assert wantrain("sample", *own, f"sampler.loras=['{run}/export/demo_anime_{{expert}}_noise.safetensors=1/0']") == 0
    assert_same(written[high / "step_000002_000.mp4"], written[sampled / "000_strength_1.mp4"])


@pytest.mark.slow
def test_with_a_few_step_lora_samples_are_those_with_it_in_the_base(trained, wantrain, written, tmp_path):
    own = ("optim.lr=0.05", "train.num_steps=2")
    fast = trained("fast", *own, "train.seed=7")
    assert wantrain("export", f"run.dir={fast}", *own, "train.seed=7") == 0
    own += (f"sampler.fast_lora={fast}/export/demo_anime.safetensors=0.5",)
    run = trained("run", *own, "sampler.every_steps=2")
    for verb in ("export", "sample"):
        assert wantrain(verb, f"run.dir={run}", *own) == 0
    for column, name in (("base", "base"), ("step_000002", "strength_1")):
        assert_same(written[run / "live" / f"{column}_000.mp4"], written[run / "samples" / f"000_{name}.mp4"])
