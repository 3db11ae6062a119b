"""Two real processes over gloo, forked or started from the launch files, against one process."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import arguments_for
from tests.runs import assert_same_training
from tests.tiny_tasks import write_a14b
from wantrain import results


@pytest.fixture(scope="module")
def alone(launched):
    return launched(None)


def header(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", pytest.param("zero2", marks=pytest.mark.long)])
def test_launched_processes_train_as_one_does_and_resume_in_one(launched, alone, file):
    """Steps 1 and 2 under two processes, 3 and 4 in one that goes on from their checkpoint."""
    parts = launched(file, "train.num_steps=2", run=f"{file}_parts")
    assert header(parts)["num_processes"] == 2
    assert header(parts)["engine"] == {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED"}[file]
    launched(None, run=parts.name)
    assert header(parts)["start_step"] == 2
    assert_same_training(alone, parts, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.long  # as test_launch shows with the flags of nodes.yaml
def test_zero3_trains_as_one_process_does(launched, alone):
    assert_same_training(alone, launched("zero3"), rtol=2e-4)


@pytest.fixture(scope="module")
def forked(forker, clips, cache_dir, cached, tmp_path_factory):
    """forked("ZeRO-2", overrides...) -> run folder after a training under that engine (None: one process)."""
    root = tmp_path_factory.mktemp("forked")

    def call(engine, *overrides, verb="train", run_dir=None):
        run_dir = run_dir or root / f"run_{len(list(root.glob('*.log')))}"
        forker.run([verb, *arguments_for(clips, cache_dir, run_dir), "train.micro_batch_size=2", *overrides],
                   run_dir.with_suffix(".log"), 2 if engine else 1, engine)
        return run_dir

    return call


def test_two_processes_train_as_one_does_and_resume_in_one(forked):
    one, parts = forked(None), forked("DDP", "train.num_steps=2")
    assert (header(parts)["num_processes"], header(parts)["engine"]) == (2, "MULTI_CPU")
    forked(None, run_dir=parts)
    assert (header(parts)["num_processes"], header(parts)["start_step"]) == (1, 2)
    assert_same_training(one, parts, rtol=2e-5)


@pytest.fixture(scope="module")
def learnt(forked):
    """A LoRA file with an effect."""
    own = ["train.num_steps=2", "optim.lr=0.02"]
    run = forked(None, *own)
    forked(None, *own, verb="export", run_dir=run)
    return run / "export" / "demo_anime.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rtol"), [("DDP", 0), ("ZeRO-3", 1e-6)])
def test_two_processes_validate_and_sample_as_one_does(forked, learnt, engine, rtol):
    """The base's numbers, and those after a step that changes nothing: to the bit, but where weights are divided.
    Drift from a LoRA with an effect, and three samples, of which one process makes two: to the bit, or nearly.
    """
    own = ["train.num_steps=1", "validation.every_steps=1", "optim.lr=1e-30", "validation.budget_pct=400",
           "sampler.every_steps=1", "sampler.seeds=[0,1,2]", f"lora.start_from={learnt}"]
    forked(None, *own, verb="cache")
    runs = [forked(given, *own) for given in (None, engine)]
    one, two = (json.loads((run / "validation.json").read_text()) for run in runs)
    moved = [torch.tensor(found["moved"]["1"]) for found in (one, two)]
    assert moved[0].shape == (1, 9)
    assert moved[0].min() > 0
    torch.testing.assert_close(moved[1], moved[0], rtol=10 * rtol, atol=0)
    for number, column in itertools.product(range(3), ("base", "step_000001")):
        pictures = [np.asarray(Image.open(run / "live" / f"{column}_{number:03d}.png")).astype(int) for run in runs]
        assert np.abs(pictures[0] - pictures[1]).max() <= (1 if rtol else 0)
    assert (one["key"], one["clips"]) == (two["key"], two["clips"])
    for name, losses in one["base"].items():
        assert len(losses) == 10
        assert two["base"][name] == pytest.approx(losses, rel=rtol, abs=0)
        assert two["steps"]["1"][name] == pytest.approx(one["steps"]["1"][name], rel=rtol, abs=0)


@pytest.mark.slow
def test_two_processes_share_an_evaluation(forked, tmp_path):
    """The same videos and numbers as of one; each made its half."""
    own = ["train.num_steps=2", "train.save_every=1", "train.keep_checkpoints=2", "sampler.compare=[1]"]
    run = tmp_path / "run"
    for verb in ("train", "export"):
        forked(None, *own, verb=verb, run_dir=run)

    def evaluated(engine):
        forked(engine, *own, verb="evaluate", run_dir=run)
        frames = {path.name: json.loads(path.read_text())["frames"] for path in (run / "report").glob("0*.json")}
        found = results.read(run / "report")
        shutil.rmtree(run / "report")
        return frames, found

    (frames, shared), (others, alone) = evaluated("DDP"), evaluated(None)
    assert len(frames) == 4
    assert frames == others
    assert [video.file for video in shared.videos] == [video.file for video in alone.videos]
    one, other = ({metric.name: {column: mean for column, (mean, _) in metric.columns.items()}
                   for metric in found.metrics} for found in (shared, alone))
    assert one.keys() == other.keys()
    assert one["heldout_loss"] == pytest.approx(other["heldout_loss"], rel=1e-5)
    assert one["style"] == pytest.approx(other["style"], rel=0.01), "x264 does not always write the same bytes"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rtol"), [("DDP", 2e-5), ("ZeRO-3", 2e-4)])
def test_the_base_answers_in_two_processes_as_in_one(forked, engine, rtol):
    """The plain clips are preserved and one clip has class words: some processes have nothing to ask in some steps."""
    own = ["data.sources.regularisation.preserve=true", "data.trigger=number 1", "loss.class_words=shape",
           "optim.lr=0.02"]
    forked(None, *own, verb="cache")
    assert_same_training(forked(None, *own), forked(engine, *own), rtol)


@pytest.mark.slow
def test_two_processes_build_the_cache_that_one_builds(launched, cache_dir, tmp_path):
    launched("ddp", f"data.cache_dir={tmp_path}", verb="cache")

    def entries(folder):
        files = [p for kind in ("latents", "text") for p in (folder / kind).rglob("*.safetensors")]
        return {p.relative_to(folder): p.read_bytes() for p in files}

    own, other = entries(tmp_path), entries(cache_dir)
    assert len(own) == 10 + 12  # windows; their captions, the empty one, and the prompt
    assert own == {name: other[name] for name in own}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2", "ZeRO-3"])
def test_both_experts_train_one_after_the_other(forked, tmp_path, engine):
    """A second engine in the same processes: the same numbers as from one process."""
    own = ["model.variant=tiny_wan_a14b", f"model.path={write_a14b(tmp_path)}"]
    one, two = forked(None, *own), forked(engine, *own)
    for expert in ("high", "low"):
        assert_same_training(one / expert, two / expert, rtol=2e-5)
