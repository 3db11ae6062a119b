"""Every task on its tiny twin: cached, trained, exported, sampled; and against diffusers' pipeline of the task.

Regenerate the golden numbers after a change that is meant to change them:
`python -m tests.parity.test_tasks [NAME ...]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_models as tiny
from tests.conftest import NUM_FRAMES, arguments_for, moving_square
from tests.tiny_tasks import (
    PIPELINES,
    TASKS,
    official_steps,
    pipeline,
    random,
    tone,
    write_checkpoint,
    write_set,
)
from wantrain import cli, pictures
from wantrain.models import base, conditioning, sampling
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


GOLDEN = Path(__file__).parents[1] / "golden" / "tasks.json"


def size_of(name: str) -> tuple[int, int]:
    return (64, 96) if VARIANTS[name].multiple_px == 32 else (32, 48)


def write_twin(root: Path, name: str) -> Twin:
    """The task's checkpoint and its set, cached."""
    path = write_checkpoint(root / "checkpoint", name)
    clips = write_set(root / "clips", name)
    height, width = size_of(name)
    twin = Twin(name, path, [
        *arguments_for(clips, root / "cache", root / "run"), f"model.variant={name}", f"model.path={path}",
        f"data.resolutions=[[{height},{width}]]", f"data.num_frames=[1,{NUM_FRAMES}]",
        "data.sources.regularisation.repeats=1", "optim.lr=0.02",
        f"export.format={'diffusers' if name == 'tiny_wan_vace' else 'universal'}"])
    twin.run("cache", root / "run")
    return twin


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made: dict[str, Twin] = {}

    def make(name: str) -> Twin:
        if name not in made:
            made[name] = write_twin(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


def numbers(run: Path, key: str = "loss") -> dict[str, list[float]]:
    """A number of every step, of each training."""
    return {file.parent.name if file.parent != run else "": [json.loads(line)[key] for line in
                                                             file.read_text().splitlines()]
            for file in sorted(run.rglob("metrics.jsonl"))}


WITH_PIPELINE = [name for name in TASKS if VARIANTS[name].task in PIPELINES and name != "tiny_wan_inp_5b"]


def tasks(quick, in_ci, names=TASKS):
    """Every name as a parameter: the `quick` in the default tier, those `in_ci` in the slow one, the others in the long
    one.
    """
    marks = {name: [pytest.mark.slow, *[pytest.mark.long] * (name not in in_ci)] for name in names}
    return [pytest.param(name, marks=[] if name in quick else marks[name]) for name in names]


@pytest.mark.parametrize("name", tasks((), ("tiny_wan_i2v",)))
def test_cached_is_streamed_and_four_at_once_are_four_times_one_in_mixed_buckets(twins, tmp_path, name):
    """Nine steps are seven of clips and two of the picture."""
    twin = twins(name)
    for run, more in {"cached": (), "streamed": ("data.mode=stream",), "ones": ("train.micro_batch_size=1",)}.items():
        twin.run("train", tmp_path / run, "train.num_steps=9", *more)
    cached = numbers(tmp_path / "cached")
    assert cached == numbers(tmp_path / "streamed")
    assert cached.keys() == set(twin.variant.experts or [""])
    for expert, losses in numbers(tmp_path / "ones").items():
        assert len(losses) == 9
        assert losses == pytest.approx(cached[expert], rel=1e-3)
        assert losses[0] == pytest.approx(cached[expert][0], rel=1e-5)


def sampler_and_pipeline(twin: Twin, exports: dict[str | None, Path] | None):
    """Ours and diffusers', each with the LoRA files loaded its own way."""
    found = base.find(twin.variant, str(twin.path), {})
    ours = pipeline(found, exports)
    kind = getattr(diffusers, PIPELINES[twin.variant.task])
    theirs = kind.from_pretrained(twin.path, dtype=torch.float32)
    theirs.scheduler = official_steps(found, twin.variant.shift)
    theirs.set_progress_bar_config(disable=True)
    for one in found.each():
        if exports:
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
    if task == "animate":
        face = moving_square(5, NUM_FRAMES, 16, 16)
        return ({"control": film, "face": face, "reference": film[:1]},
                {"image": pil(film[:1])[0], "pose_video": pil(film), "face_video": pil(face),
                 "segment_frame_length": NUM_FRAMES, "prev_segment_conditioning_frames": 1})
    return {}, {}


@pytest.mark.parametrize("name", tasks(("tiny_wan_vace",), ("tiny_wan_i2v", "tiny_wan_ti2v"),
                                       WITH_PIPELINE))
def test_twenty_steps_are_as_they_were_and_diffusers_samples_the_export_as_we_do(twins, tmp_path, name):
    twin = twins(name)
    exports = trained(twin, tmp_path)
    ours, theirs = sampler_and_pipeline(twin, exports)
    height, width = size_of(name)
    own, given = inputs_of(twin.variant.task, height, width)
    if "image" in given and twin.variant.architecture.image_dim:  # its processor crops: give it ours (tested apart)
        frames = torch.cat([own[k] for k in ("first", "last", "reference") if k in own])
        theirs.encode_image = lambda images, device: ours.encoders.image_tokens(frames, len(frames))["image"]
    settings = sampling.Settings(4, (3.0, 5.0), twin.variant.shift, Bucket(NUM_FRAMES, height, width), "")
    video = sampling.sample(ours, "a square", 1, settings, sampling.Inputs(own))
    guidance = {"guidance_scale": 5.0, "guidance_scale_2": 3.0} if twin.variant.experts else {"guidance_scale": 3.0}
    length = {} if "segment_frame_length" in given else {"num_frames": NUM_FRAMES}
    want = theirs(prompt="a square", negative_prompt="", height=height, width=width, num_inference_steps=4, **length,
                  generator=torch.Generator().manual_seed(1), max_sequence_length=512,
                  output_type="np", **guidance, **given).frames[0]
    difference = abs(video.movedim(1, -1).numpy() / 255 - want)
    assert difference.mean() < 0.003, "rounding to bytes costs up to 0.002"
    sampling.set_strength(ours, 0)
    plain = sampling.sample(ours, "a square", 1, settings, sampling.Inputs(own))
    assert abs(plain.movedim(1, -1).numpy() / 255 - want).mean() > 0.01, "the LoRA is not heard"


def trained(twin: Twin, run: Path) -> dict[str | None, Path]:
    """Twenty steps, which are as they were, and their exports."""
    twin.run("train", run, "train.num_steps=20")
    golden = json.loads(GOLDEN.read_text())[twin.name]
    for key, rel in (("loss", 1e-4), ("grad_norm", 1e-3)):
        for expert, now in numbers(run, key).items():
            assert now == pytest.approx(golden[key][expert], rel=rel), (key, expert)
    twin.run("export", run)
    return {expert: run / "export" / f"demo_anime{f'_{expert}_noise' if expert else ''}.safetensors"
            for expert in twin.variant.experts or (None,)}


@pytest.mark.parametrize("name", tasks((), ("tiny_wan_control", "tiny_wan_s2v"),
                                       [name for name in TASKS if name not in WITH_PIPELINE]))
def test_what_diffusers_has_no_pipeline_for_trains_resumes_and_samples_as_the_merged_official_file(
        twins, tmp_path, name):
    """The export is folded into the base by `merge`, under official names; that base samples what base and LoRA do."""
    twin = twins(name)
    exports = trained(twin, tmp_path / "run")
    twin.run("train", tmp_path / "parts", "train.num_steps=9")
    twin.run("train", tmp_path / "parts", "train.num_steps=20")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "run"), "to the bit"
    found = base.find(twin.variant, str(twin.path), {})
    parts = {}
    for one in found.each():
        parts[one.expert or "transformer"] = tmp_path / f"wan2.2_{one.expert}_noise.safetensors"
        assert cli.main(["merge", str(one.parts["transformer"]), str(exports[one.expert]),
                         str(parts[one.expert or "transformer"]), "layout=official", "dtype=float32"]) == 0
    merged = base.find(twin.variant, str(twin.path), {part: str(path) for part, path in parts.items()})
    height, width = size_of(name)
    settings = sampling.Settings(3, (3.0, 5.0), twin.variant.shift, Bucket(NUM_FRAMES, height, width), "")
    inputs = sampling.Inputs(own_inputs_of(twin.variant.task, height, width))
    ours, folded = pipeline(found, exports), pipeline(merged)
    want = sampling.sample(folded, "a square", 1, settings, inputs).float()
    assert (sampling.sample(ours, "a square", 1, settings, inputs) - want).abs().mean() < 0.5
    sampling.set_strength(ours, 0)
    assert (sampling.sample(ours, "a square", 1, settings, inputs) - want).abs().mean() > 2, "the LoRA is not heard"
    given = dict(inputs.frames)
    for kind in ("reference", "camera", "audio", *["control"] * twin.variant.architecture.driven):
        if kind in given:
            changed = {"camera": lambda one: one * 1.5, "audio": lambda one: one.abs()}.get(
                kind, lambda one: moving_square(8, len(one), height, width))
            given[kind] = changed(given[kind])
            other = sampling.sample(folded, "a square", 1, settings, sampling.Inputs(given))
            assert (other - want).abs().mean() > 0.3, f"the {kind} is not heard"


def own_inputs_of(task: str, height: int, width: int):
    """What a task of Fun, Animate-2 and S2V are sampled from."""
    if task == "s2v":
        return {"reference": moving_square(4, 1, height, width),
                "audio": torch.from_numpy(tone(300, (NUM_FRAMES - 1) / 16) / 32768).float()}
    film, wanted = moving_square(3, NUM_FRAMES, height, width), {"first": moving_square(6, 1, height, width)}
    if task.startswith("camera"):
        zoom = np.tile([0.6, 0.6, 0.5, 0.5, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], (NUM_FRAMES, 1))
        zoom[:, -1] = np.linspace(0, 2, NUM_FRAMES)
        return wanted | {"camera": torch.from_numpy(zoom).float()}
    if task.startswith("control"):
        wanted["control"] = film
    if task == "animate2":
        return {"control": film, "reference": wanted["first"]}
    return wanted | ({"reference": moving_square(4, 1, height, width)} if task.startswith("control_") else {})


@pytest.mark.slow
def test_video_to_video_is_what_diffusers_pipeline_gives(twins):
    twin = twins("tiny_wan")
    found = base.find(twin.variant, str(twin.path), {})
    # of the embedded VAE this pipeline gets the stride wrong
    vae = random(diffusers.AutoencoderKLWan(**tiny.VAES["2.1"]), 5)
    ours = replace(pipeline(found), encoders=conditioning.Encoders(vae, None))
    text = found.text(torch.float32, torch.device("cpu"))
    theirs = diffusers.WanVideoToVideoPipeline(text.tokenizer, text.text_encoder, ours.transformers[0], vae,
                                               official_steps(found, 3.0))
    theirs.set_progress_bar_config(disable=True)
    film = moving_square(3, NUM_FRAMES, 32, 48)
    for strength, steps in ((0.5, 6), (1.0, 3)):
        settings = sampling.Settings(steps, (3.0, 3.0), 3.0, Bucket(NUM_FRAMES, 32, 48), "", strength)
        video = sampling.sample(ours, "a square", 1, settings, sampling.Inputs({}, film))
        want = theirs(video=pil(film), prompt="a square", negative_prompt="", height=32, width=48, strength=strength,
                      num_inference_steps=steps, guidance_scale=3.0, generator=torch.Generator().manual_seed(1),
                      max_sequence_length=512, output_type="np").frames[0]
        assert abs(video.movedim(1, -1).numpy() / 255 - want).mean() < 0.003
        assert abs(video.float() - film).mean() > 1


@pytest.mark.slow
def test_animate_replaces_a_character_as_diffusers_pipeline_does(tmp_path):
    twin = Twin("tiny_wan_animate", write_checkpoint(tmp_path / "checkpoint", "tiny_wan_animate"), [])
    ours, theirs = sampler_and_pipeline(twin, None)
    height, width = size_of(twin.name)
    own, given = inputs_of("animate", height, width)
    mask = torch.zeros_like(own["control"])
    mask[:, :, : height // 2 - 4], mask[4:, :, :, 24:] = 255, 100
    own |= {"background": moving_square(7, NUM_FRAMES, height, width), "control_mask": mask}
    tokens = ours.encoders.image_tokens(own["reference"], 1)["image"]
    theirs.encode_image = lambda images, device: tokens
    settings = sampling.Settings(3, (3.0, 3.0), 5.0, Bucket(NUM_FRAMES, height, width), "")
    video = sampling.sample(ours, "a square", 1, settings, sampling.Inputs(own)).movedim(1, -1).numpy() / 255
    for mode in ("replace", "animate"):
        want = theirs(prompt="a square", negative_prompt="", height=height, width=width, num_inference_steps=3,
                      mode=mode, background_video=pil(own["background"]), mask_video=pil(mask), guidance_scale=3.0,
                      generator=torch.Generator().manual_seed(1), max_sequence_length=512, output_type="np",
                      **given).frames[0]
        assert (abs(video - want).mean() < 0.003) == (mode == "replace")


@pytest.mark.slow
def test_an_expert_may_have_its_own_rank_rate_and_steps(twins, tmp_path, capsys):
    twin = twins("tiny_wan_i2v_a14b")
    own = ["high.rank=2", "high.num_steps=1", "low.lr=0.001", "train.num_steps=3"]
    twin.run("check", tmp_path, *own)
    shown = capsys.readouterr().out
    assert "high noise expert: lora, rank 2, alpha 2" in shown
    assert "low noise expert: lora, rank 4, alpha 4" in shown
    twin.run("train", tmp_path, *own)
    assert {expert: len(steps) for expert, steps in numbers(tmp_path).items()} == {"high": 1, "low": 3}
    assert numbers(tmp_path, "lr") == {"high": [0.02], "low": [0.001] * 3}
    twin.run("train", tmp_path, *own)  # goes on, and has nothing left to do
    twin.run("export", tmp_path, *own)
    ranks = [load_file(tmp_path / "export" / f"demo_anime_{expert}_noise.safetensors")[
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight"].shape[0] for expert in ("high", "low")]
    assert ranks == [2, 4]


@pytest.mark.parametrize("name", tasks((), ("tiny_wan_control",), ["tiny_wan_i2v_a14b", "tiny_wan_control"]))
def test_samples_and_reports_take_their_inputs_from_held_out_clips_or_from_files(twins, tmp_path, name):
    twin = twins(name)
    twin.run("train", tmp_path, "train.num_steps=1", "validation.every_steps=1")
    twin.run("export", tmp_path)
    twin.run("evaluate", tmp_path)
    assert (tmp_path / "report" / "report.html").exists()
    pictures.write_mp4(tmp_path / "film.mp4", moving_square(9, NUM_FRAMES, 64, 96), 16)
    pictures.write_png(tmp_path / "first.png", moving_square(9, 1, 64, 96)[0])
    kind, file = ("control", "film.mp4") if name == "tiny_wan_control" else ("first", "first.png")
    twin.run("sample", tmp_path, f"sampler.inputs=[{{{kind}: {tmp_path / file}}}]")
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


if __name__ == "__main__":
    found = json.loads(GOLDEN.read_text())
    for task in sys.argv[1:] or TASKS:
        with tempfile.TemporaryDirectory() as folder:
            one = write_twin(Path(folder), task)
            one.run("train", Path(folder) / "golden", "train.num_steps=20")
            found[task] = {key: numbers(Path(folder) / "golden", key) for key in ("loss", "grad_norm")}
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
