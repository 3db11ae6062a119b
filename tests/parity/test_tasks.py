"""Every task on its tiny twin: cached, trained, exported, sampled; and against diffusers' pipeline of the task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from tests.conftest import NUM_FRAMES, arguments_for, moving_square
from tests.tiny_tasks import PIPELINES, TASKS, sampler, write_checkpoint, write_set
from wantrain import cli
from wantrain.models import base, sampling
from wantrain.models.variants import VARIANTS
from wantrain.terms import Bucket


@dataclass(frozen=True)
class Twin:
    """One task's checkpoint, cached set and overrides."""

    name: str
    path: Path
    arguments: list[str]

    def run(self, verb: str, run_dir: Path, *more: str) -> None:
        assert cli.main([verb, *self.arguments, f"run.dir={run_dir}", *more]) == 0

    @property
    def variant(self):
        return VARIANTS[self.name]


def size_of(name: str) -> tuple[int, int]:
    return (64, 96) if VARIANTS[name].multiple_px == 32 else (32, 48)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made: dict[str, Twin] = {}

    def make(name: str) -> Twin:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            path = write_checkpoint(root / "checkpoint", name)
            clips = write_set(root / "clips", name)
            height, width = size_of(name)
            arguments = [*arguments_for(clips, root / "cache", root / "run"), f"model.variant={name}",
                         f"model.path={path}", f"data.resolutions=[[{height},{width}]]", "optim.lr=0.02",
                         "export.format=diffusers" if name == "tiny_wan_vace" else "export.format=universal"]
            made[name] = Twin(name, path, arguments)
            made[name].run("cache", root / "run")
        return made[name]

    return make


def losses(run: Path) -> list[float]:
    files = sorted(run.rglob("metrics.jsonl"))
    return [json.loads(line)["loss"] for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_cached_is_streamed(twins, tmp_path, name):
    twin = twins(name)
    twin.run("train", tmp_path / "cached", "train.num_steps=2")
    twin.run("train", tmp_path / "streamed", "train.num_steps=2", "data.mode=stream")
    assert losses(tmp_path / "cached") == losses(tmp_path / "streamed")
    assert len(losses(tmp_path / "cached")) == 2 * (len(twin.variant.experts) or 1)


def sampler_and_pipeline(twin: Twin, exports: dict[str | None, Path] | None):
    """Ours and diffusers', each with the LoRA files loaded its own way."""
    found = base.find(twin.variant, str(twin.path), {})
    ours = sampler(found)
    kind = getattr(diffusers, PIPELINES[twin.variant.task])
    theirs = kind.from_pretrained(twin.path, dtype=torch.float32)
    theirs.scheduler = found.scheduler(twin.variant.shift)
    theirs.set_progress_bar_config(disable=True)
    for one, transformer in zip(found.each(), ours.transformers, strict=True):
        if exports:
            sampling.load_lora(transformer, exports[one.expert])
            theirs.load_lora_weights(str(exports[one.expert]), **({"load_into_transformer_2": True}
                                                                  if one.expert == "low" else {}))
    return ours, theirs


def pil(frames_FCHW):
    return [Image.fromarray(frame.movedim(0, -1).numpy()) for frame in frames_FCHW]


def inputs_of(task: str, height: int, width: int):
    """(our inputs, diffusers' arguments) of a task."""
    film = moving_square(3, NUM_FRAMES, height, width)
    if task in ("i2v", "ti2v"):
        return {"first": film[:1]}, {"image": pil(film[:1])[0]}
    if task == "flf2v":
        return {"first": film[:1], "last": film[-1:]}, {"image": pil(film[:1])[0], "last_image": pil(film[-1:])[0]}
    if task == "vace":
        mask = torch.zeros_like(film)
        mask[:, :, : height // 2] = 255
        reference = moving_square(4, 1, height, width)  # of the sample's size: how it is resized is tested apart
        return ({"control": film, "control_mask": mask, "reference": reference},
                {"video": pil(film), "mask": pil(mask), "reference_images": pil(reference)})
    return {}, {}


@pytest.mark.parametrize("name", [name for name in TASKS if VARIANTS[name].task in PIPELINES])
def test_diffusers_loads_the_export_and_samples_what_we_sample(twins, tmp_path, name):
    twin = twins(name)
    twin.run("train", tmp_path, "train.num_steps=20")
    twin.run("export", tmp_path)
    exports = {expert: tmp_path / "export" / f"demo_anime{f'_{expert}_noise' if expert else ''}.safetensors"
               for expert in twin.variant.experts or (None,)}
    ours, theirs = sampler_and_pipeline(twin, exports)
    height, width = size_of(name)
    own, given = inputs_of(twin.variant.task, height, width)
    if "image" in given and twin.variant.architecture.image_dim:  # its processor crops: give it ours (tested apart)
        frames = torch.cat([own[k] for k in ("first", "last") if k in own])
        theirs.encode_image = lambda images, device: ours.encoders.image_tokens(frames, len(frames))["image"]
    settings = sampling.Settings(4, (3.0, 5.0), twin.variant.shift, Bucket(NUM_FRAMES, height, width), "")
    video = sampling.sample(ours, "a square", 1, settings, sampling.Inputs(own))
    guidance = {"guidance_scale": 5.0, "guidance_scale_2": 3.0} if twin.variant.experts else {"guidance_scale": 3.0}
    want = theirs(prompt="a square", negative_prompt="", height=height, width=width, num_frames=NUM_FRAMES,
                  num_inference_steps=4, generator=torch.Generator().manual_seed(1), max_sequence_length=512,
                  output_type="np", **guidance, **given).frames[0]
    difference = abs(video.movedim(1, -1).numpy() / 255 - want)
    assert difference.mean() < 0.003, "rounding to bytes costs up to 0.002"
    sampling.set_strength(ours, 0)
    plain = sampling.sample(ours, "a square", 1, settings, sampling.Inputs(own))
    assert abs(plain.movedim(1, -1).numpy() / 255 - want).mean() > 0.01, "the LoRA is not heard"
