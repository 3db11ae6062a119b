"""The sampler of a recipe: its settings, its inputs, its LoRA files, and the loaded models behind it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from wantrain.config import Config, Dtype
from wantrain.data import cameras, decode, media, sound
from wantrain.data.buckets import buckets
from wantrain.models import conditioning, encode, fit, hub, sampling
from wantrain.models.base import expert_path
from wantrain.models.loading import free_bytes
from wantrain.models.lora_names import refuse_other_experts_file
from wantrain.models.profiles import PROFILES
from wantrain.models.task_media import media_of_task
from wantrain.models.variants import Expert, Variant
from wantrain.options import split_strengths
from wantrain.recipe.clips import Clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.terms import Bucket, UserError

STILLS = ("first", "last", "reference")
"""Inputs of a sample that are images."""

KINDS_OF_FILES = {**dict.fromkeys(STILLS, "IMAGE"), "camera": "POSES.txt", "audio": "SOUND"}
"""What an input is called in examples, where it is no video."""

WORKING = 12
"""Tensors of tokens x width that a block holds at its most: its feed-forward layer is nearly three widths, twice."""

FAST_STEPS, FAST_GUIDANCE = 4, (1.0, 1.0)
"""What a few-step LoRA (sampler.fast_lora) is run with, where the config says nothing else."""

LoraFiles = Mapping[Expert | None, Sequence[tuple[Path, float]]]
"""The LoRA files of each adapted transformer with their strengths: by expert, or of the one under None."""


def open_sampling(config: Config) -> Recipe:
    """The recipe, with sampler.fast_lora folded into its base."""
    fast, model = config.sampler.fast_lora, config.model
    if fast is None:
        return open_recipe(config)
    return replace(open_recipe(replace(config, model=replace(model, merge=[*model.merge, fast]))), config=config)


def sampler_settings(recipe: Recipe) -> sampling.Settings:
    """The sampler's settings of a recipe."""
    return settings_of(recipe.config, recipe.variant)


def settings_of(config: Config, variant: Variant) -> sampling.Settings:
    """The sampler's settings: the config's numbers; where it has null, those of the variant or the profile's tool."""
    own, data = config.sampler, config.data
    profile = PROFILES[own.profile.name]
    height, width = own.resolution or data.resolutions[0]
    bucket, = buckets([own.num_frames or max(data.num_frames)], [[height, width]], variant.multiple_px)
    return sampling.Settings(
        num_steps=own.num_steps or (FAST_STEPS if own.fast_lora else variant.num_steps),
        guidance=(own.guidance, own.guidance) if own.guidance is not None else FAST_GUIDANCE if own.fast_lora else
        variant.guidance,
        shift=profile.shift_of(variant) if own.shift is None else own.shift,
        bucket=bucket, negative_prompt=own.negative_prompt, strength=own.strength,
        profile=own.profile.name, solver=own.solver and own.solver.name, first_block_cache=own.first_block_cache,
    )


def lora_files(recipe: Recipe, arguments: Sequence[str]) -> LoraFiles:
    """The LoRA files that the config names, or the run's own exports, of the experts that are asked for."""
    own, trainings = recipe.config.sampler.loras, {one.base.expert: one for one in recipe.trainings()}
    if own:
        return {expert: [use for word in own for use in lora_uses(word, expert)] for expert in trainings}
    paths = {expert: one.export_path for expert, one in trainings.items()}
    if absent := [path for path in paths.values() if not path.exists()]:
        raise UserError(f"no LoRA file {absent[0]}", shlex.join(["wantrain", "export", *arguments]))
    return {expert: [(path, 1.0)] for expert, path in paths.items()}


def lora_uses(word: str, expert: Expert | None) -> list[tuple[Path, float]]:
    """The file and strength of one entry of sampler.loras for a transformer; [] where it is at 0 there."""
    file, strengths = split_strengths(word)
    if not all(map(math.isfinite, strengths)):
        raise UserError(f"sampler.loras: {word} has a strength that is no finite number",
                        f"sampler.loras='[{file}=0.8]'")
    if len(strengths) == 2 and expert is None:
        raise UserError(f"sampler.loras: {word} has strengths for two experts, and the model has one transformer",
                        f"sampler.loras='[{file}={strengths[0]:g}]'")
    strength = strengths[1 if expert == "low" and len(strengths) == 2 else 0]
    if not strength:
        return []
    path = hub.local(expert_path(file, expert))
    refuse_other_experts_file(path, expert)
    return [(path, strength)]


def load_pipeline(recipe: Recipe, loras: LoraFiles, captions: Sequence[str] = ()) -> sampling.Pipeline:
    """The base loaded on the best device, with LoRA files of any format in its transformers, or none.

    First `captions`, if there are some, and the negative prompt are encoded, and the text encoder is let go. Where two
    transformers do not fit in what is left, the second waits in the memory of the host.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = encode.Texts(lambda: recipe.load_text(device))
    if captions:
        own = recipe.variant.second_prompt
        texts.prepare([*captions, recipe.config.sampler.negative_prompt, *([own] if own else [])])
    encoders = recipe.load_encoders(device)
    transformers: list[torch.nn.Module] = []
    in_turn = False
    for base in recipe.base.each():
        taken = sum(tensor.nbytes for one in transformers for tensor in one.state_dict().values())
        in_turn = bool(transformers) and taken + working_bytes(recipe) > free_bytes(device, recipe.config.memory.gib)
        place = torch.device("cpu") if in_turn else device
        transformers.append(base.transformer(recipe.dtype, place, form=recipe.base_form))
        fit.fit(transformers[-1], device, adapter_files(loras, base.expert))
    return sampling.Pipeline(recipe.variant, transformers, texts, encoders, recipe.dtype, in_turn)


def adapter_files(loras: LoraFiles, expert: Expert | None) -> list[fit.AdapterFile]:
    """The files of one transformer."""
    return [fit.AdapterFile(path, expert, strength) for path, strength in loras.get(expert, ())]


class Studio:
    """The loaded pipeline: nothing is loaded before it is asked for, and LoRAs are exchanged in it.

    `captions` are all texts that will be sampled: their encoder is let go before the transformers are loaded.
    """

    def __init__(self, recipe: Recipe, captions: Sequence[str]) -> None:
        self._recipe, self._captions = recipe, captions
        self._pipeline: sampling.Pipeline | None = None
        self._loras: LoraFiles = {}

    def pipeline(self, loras: LoraFiles | None) -> sampling.Pipeline:
        """The pipeline with these LoRAs; None is for the base, whatever is loaded (at strength 0)."""
        wanted = self._loras if loras is None else loras
        if self._pipeline is None:
            self._pipeline = load_pipeline(self._recipe, wanted, self._captions)
        elif wanted != self._loras:
            for base, transformer in zip(self._recipe.base.each(), self._pipeline.transformers, strict=True):
                fit.exchange(transformer, adapter_files(wanted, base.expert))
        self._loras = wanted
        return self._pipeline


def working_bytes(recipe: Recipe) -> int:
    """About what a forward pass takes beside the weights: WORKING tensors of tokens x width."""
    tokens = sampler_settings(recipe).bucket.num_tokens(recipe.variant.multiple_px)
    return WORKING * tokens * recipe.variant.architecture.dim * recipe.dtype.itemsize


def sampled(recipe: Recipe, pipeline: sampling.Pipeline, prompt: str, *, seed: int, strength: float,
            inputs: sampling.Inputs) -> torch.Tensor:
    """A video of the config's sampler, frames_FCHW uint8, with the LoRAs at `strength`; 0 computes as the base.

    UserError where its values are not finite: bytes would make a black film of them.
    """
    sampling.set_strength(pipeline, strength)
    try:
        return sampling.sample(pipeline, prompt, seed, sampler_settings(recipe), inputs)
    except FloatingPointError as error:
        advice = ("lower sampler.strengths, or take an earlier checkpoint" if strength else "look at model.path and "
                  "model.merge, as no LoRA is heard at strength 0")
        precise = ", or try model.dtype=float32" if recipe.config.model.dtype is not Dtype.float32 else ""
        raise UserError(f"no video of prompt {prompt!r}, seed {seed}, LoRA strength {strength:g}: {error}",
                        f"{advice}{precise}; sampler.guidance and sampler.shift may be too large") from error


def inputs_of(recipe: Recipe, num_prompts: int, open_clips: Callable[[], Clips]) -> list[sampling.Inputs]:
    """What each prompt is sampled from besides its text: the files of sampler.inputs, as the sample's size shows them;
    where the task needs inputs and none are named, those of the held-out clips in turn. Only then clips are opened.
    """
    own, bucket = recipe.config.sampler.inputs, sampler_settings(recipe).bucket
    if own:
        if len(own) not in (1, num_prompts):
            raise UserError(f"sampler.inputs has {len(own)} entries for {num_prompts} prompts",
                            "give one entry for all prompts, or one for each")
        read = [read_inputs(recipe, given, bucket) for given in own]
        return read * num_prompts if len(read) == 1 else read
    if not media_of_task(recipe.variant.task).encoded:
        return [sampling.Inputs()] * num_prompts
    clips = open_clips()
    fitting = [p for p in clips.heldout if p.bucket == bucket]
    if not fitting:
        raise UserError(f"{recipe.variant.name} ({recipe.variant.task}) samples from inputs, and neither "
                        f"sampler.inputs nor data.heldout has any of {bucket}", example_of_inputs(recipe.variant))
    windows = [fitting[i % len(fitting)] for i in range(num_prompts)]
    names = [clips.cache.conditioning.present_in(p) for p in windows]
    return [sampling.Inputs(conditioning.of_window(
        {name: decode.read_window(p.part(name)) for name in own}, bucket))
        for p, own in zip(windows, names, strict=True)]


def example_of_inputs(variant: Variant) -> str:
    """An entry of sampler.inputs with which the task can do."""
    task = media_of_task(variant.task)
    names = task.inputs_needed or task.partners[:1] or ("video",)
    return "sampler.inputs='[{" + ", ".join(
        f"{name}: {KINDS_OF_FILES.get(name, 'VIDEO')}" for name in names) + "}]'"


def read_inputs(recipe: Recipe, given: Mapping[str, str], bucket: Bucket) -> sampling.Inputs:
    """The frames of one entry of sampler.inputs: images for first, last and reference, an image or a video for a mask,
    videos for the rest.
    """
    variant, settings = recipe.variant, sampler_settings(recipe)
    task = media_of_task(variant.task)
    about, allowed = f"sampler.inputs: {variant.name} ({variant.task})", {*task.inputs, "video"}
    if unknown := sorted(set(given) - allowed):
        raise UserError(f"{about} takes no {unknown[0]}, but {', '.join(sorted(allowed))}", "rename or remove it")
    if lacking := [name for name in task.inputs_needed if name not in given]:
        raise UserError(f"{about} cannot do without {' and '.join(lacking)}", example_of_inputs(variant))
    if pair := task.lacking(given):
        raise UserError(f"{about} takes {pair[0]} and {pair[1]} together, and there is no {pair[1]}",
                        f"add {pair[1]}: VIDEO, or take {pair[0]} out")
    frames = {name: read_input(variant, name, Path(where), bucket) for name, where in given.items()}
    if "video" in given and not settings.num_steps_from_video:
        raise UserError(f"sampler.strength = {settings.strength:g} of {settings.num_steps} steps leaves none",
                        "raise sampler.strength or sampler.num_steps")
    return sampling.Inputs({name: f for name, f in frames.items() if name != "video"}, frames.get("video"))


def read_input(variant: Variant, name: str, path: Path, bucket: Bucket) -> torch.Tensor:
    """The frames of one file of sampler.inputs."""
    if not path.is_file():
        raise UserError(f"sampler.inputs: {name} = {path} does not exist", "give the path of an image or video")
    if name == "camera":
        return torch.from_numpy(cameras.of_sample(path, bucket))
    if name == "audio":
        return torch.from_numpy(sound.read(path, media.probe(path), 0.0, (bucket.num_frames - 1) / variant.fps))
    is_image = media.look(path).duration_s == 0
    if name in STILLS:
        if not is_image:
            raise UserError(f"sampler.inputs: {name} = {path} is a video, not an image", "save the frame as a PNG")
        bucket = replace(bucket, num_frames=1)
    elif is_image and bucket.num_frames > 1:
        if name != "control_mask":
            raise UserError(f"sampler.inputs: {name} = {path} is an image, and a sample has {bucket.num_frames} frames",
                            "give a video, or sampler.num_frames=1")
        bucket = replace(bucket, num_frames=1)
    if name == "face":
        bucket = replace(bucket, height=variant.face_px, width=variant.face_px)
    return decode.read_clip(path, 0.0, None, variant.fps, bucket,
                            contain=name == "reference" and variant.shows_reference_whole)
