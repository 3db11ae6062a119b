"""Every real recipe is bfloat16: the whole way in it, on the tiny base, and films that are not finite."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import arguments_for
from wantrain import cli, results
from wantrain.engine import checkpoint

MORE = ["model.dtype=bfloat16", "validation.every_steps=2", "validation.sigmas=[0.5]", "sampler.strengths=[1]"]


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    """(the run folder, its arguments) of a run that was cached, trained, resumed and exported in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16")
    arguments = [*arguments_for(clips, folder / "cache", folder / "run"), *MORE]
    for verb, *more in (["cache"], ["train", "train.num_steps=1"], ["train", "train.num_steps=2"],
                        ["export", "train.num_steps=2"]):
        assert cli.main([verb, *arguments, *more]) == 0, verb
    return folder / "run", [*arguments, "train.num_steps=2"]


def test_bfloat16_trains_resumes_exports_samples_and_evaluates(trained, tmp_path):
    run, arguments = trained
    whole = tmp_path / "whole"
    assert cli.main(["train", *arguments, f"run.dir={whole}"]) == 0
    ends = [checkpoint.load(folder / "checkpoints" / "step_000002", None)[1] for folder in (run, whole)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items()), "a resume is exact"
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.values(ends[0]).values())
    assert cli.main(["sample", *arguments]) == 0
    assert cli.main(["evaluate", *arguments]) == 0
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    losses = {metric.name: metric.columns for metric in results.read(run / "report").metrics}["heldout_loss"]
    assert math.isfinite(last["loss"])
    assert losses["strength_1"][0] == pytest.approx(last["validation_loss"], rel=1e-2)
    assert losses["strength_1"] != losses["base"]


def test_a_film_that_is_not_finite_is_an_error_that_names_it(trained, tmp_path, capsys):
    run, arguments = trained
    path, = (run / "export").glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        tensors[name][:] = torch.finfo(tensors[name].dtype).max
    save_file(tensors, tmp_path / "broken.safetensors")
    own = [*arguments, f"sampler.loras={tmp_path / 'broken.safetensors'}", f"run.dir={tmp_path / 'run'}"]
    assert cli.main(["sample", *own]) == 2
    said = capsys.readouterr().err
    assert "'a square', seed 0, LoRA strength 1: the latents are not finite at timestep" in said
    assert "sampler.strengths" in said
    assert "model.dtype=float32" in said
    assert not list((tmp_path / "run").glob("samples/*.mp4"))
