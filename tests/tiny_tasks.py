"""A whole tiny checkpoint with random weights for every task, and clips with what the task works from."""

from __future__ import annotations

import json
import wave
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from tests import tiny_models as tiny
from tests.conftest import SIZE, moving_square, write_clips
from wantrain import pictures
from wantrain.flow import inference_sigmas
from wantrain.models import sampling
from wantrain.models.base import EMBEDDED, Base
from wantrain.models.encode import Texts
from wantrain.models.fit import AdapterFile, fit
from wantrain.models.fun import class_of
from wantrain.models.profiles import FLOW
from wantrain.models.variants import VARIANTS, diffusers_config

CLIP = {**tiny.CLIP, "hidden_size": 32, "image_size": 8, "patch_size": 4}
"""Five tokens a picture, as wide as the tiny variants' image_dim."""

WAV2VEC2 = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "conv_dim": (16,) * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 8}
"""Of the kind of wav2vec2-large-xlsr-53."""

TASKS = ("tiny_wan", "tiny_wan_a14b", "tiny_wan_i2v", "tiny_wan_i2v_a14b", "tiny_wan_flf2v", "tiny_wan_ti2v",
         "tiny_wan_vace", "tiny_wan_control", "tiny_wan_animate", "tiny_wan_vace_a14b", "tiny_wan_inp_5b",
         "tiny_wan_control_v11", "tiny_wan_control_a14b", "tiny_wan_control_5b", "tiny_wan_camera",
         "tiny_wan_camera_5b", "tiny_wan_animate2", "tiny_wan_s2v")
PIPELINES = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline", "flf2v": "WanImageToVideoPipeline",
             "ti2v": "WanImageToVideoPipeline", "vace": "WanVACEPipeline", "animate": "WanAnimatePipeline"}
"""diffusers' pipeline of each task; Fun's have none."""


def random(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of a size at which every input is heard in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1  # norms
    return module.eval()


def write_a14b(folder: Path) -> Path:
    """A whole checkpoint in the diffusers layout: two random tiny transformers beside the embedded base's parts."""
    part = tiny.Part("tiny_a14b", lambda: tiny.WanTransformer3DModel(**diffusers_config(VARIANTS["tiny_wan_a14b"])),
                     tiny.PARTS["t2v"].official, tiny.PARTS["t2v"].rename)
    for seed, name in enumerate(("transformer", "transformer_2")):
        tiny.module(part, seed).save_pretrained(folder / name)
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).symlink_to(EMBEDDED / name)
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_checkpoint(folder: Path, name: str) -> Path:
    """The variant `name` of the table in the diffusers layout: random transformers, VAE 2.2 and CLIP tower where it has
    them, and the embedded base's other parts.
    """
    variant = VARIANTS[name]
    own = class_of(variant)
    parts = ["transformer", "transformer_2"][: len(variant.experts) or 1]
    for seed, part in enumerate(parts):
        random(own(**diffusers_config(variant)), seed).save_pretrained(folder / part)
    kept = ["text_encoder", "tokenizer", "scheduler"]
    if variant.vae == "2.2" or variant.task == "vace":  # of the embedded VAE diffusers' VACE gets the stride wrong
        random(AutoencoderKLWan(**tiny.VAES[variant.vae]), 5).save_pretrained(folder / "vae")
    else:
        kept.append("vae")
    for part in kept:
        (folder / part).symlink_to(EMBEDDED / part)
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    index |= {part: ["diffusers", variant.transformer_class] for part in parts}
    index |= {"_class_name": PIPELINES.get(variant.task, "WanPipeline"), "boundary_ratio": variant.boundary,
              **({"expand_timesteps": True} if variant.task == "ti2v" else {})}
    if variant.architecture.image_dim:
        random(CLIPVisionModel(CLIPVisionConfig(**CLIP)), 7).save_pretrained(folder / "image_encoder")
        CLIPImageProcessor(crop_size=8, size=8).save_pretrained(folder / "image_processor")
        index |= {"image_encoder": ["transformers", "CLIPVisionModel"],
                  "image_processor": ["transformers", "CLIPImageProcessor"]}
    if variant.architecture.speech:
        random(Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC2)), 8).save_pretrained(folder / "audio_encoder")
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "audio_encoder")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class OfficialSteps(UniPCMultistepScheduler):
    """diffusers' scheduler for its own pipelines, which ask for a number of steps, over the official sigmas."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | None = None,
                      sigmas: object = None, mu: object = None) -> None:
        if sigmas is None:
            super().set_timesteps(sigmas=np.array(inference_sigmas(num_inference_steps)), device=device)
        else:
            super().set_timesteps(sigmas=sigmas, device=device)


def official_steps(found: Base, shift: float) -> OfficialSteps:
    """The base's scheduler for one of diffusers' pipelines."""
    return OfficialSteps.from_config(FLOW, flow_shift=shift)


def pipeline(found: Base, loras: Mapping[str | None, Path] | None = None) -> sampling.Pipeline:
    """The base's parts in float32, ready to sample, with LoRA files by expert."""
    cpu = torch.device("cpu")
    transformers = [one.transformer(torch.float32, cpu) for one in found.each()]
    for one, transformer in zip(found.each(), transformers, strict=True):
        fit(transformer, cpu, [AdapterFile(loras[one.expert], one.expert)] if loras else ())
    return sampling.Pipeline(found.variant, transformers, Texts(lambda: found.text(torch.float32, cpu)),
                             found.encoders(cpu), torch.float32)


def write_partners(folder: Path, task: str, number: int, height: int = 2 * SIZE[0], width: int = 2 * SIZE[1]) -> None:
    """For `clip_0` to `clip_N`: a control video, for VACE also a mask for every clip and a reference for every second,
    for Animate a face and a reference, and for every second a
    background with its mask, for later Fun-Control a reference for every second; for Fun-Camera its moves; for S2V a
    sound, and for every second a reference and a pose.
    """
    for i in range(number if task == "s2v" else 0):
        write_sound(folder / "audio" / f"clip_{i}.wav", 200 + 50 * i)
        if i % 2:
            pictures.write_png(folder / "reference" / f"clip_{i}.png", moving_square(300 + i, 1, 40, 60)[0])
            pictures.write_mp4(folder / "control" / f"clip_{i}.mp4", moving_square(200 + i, 9, height, width), 16)
    for i in range(number if task.startswith("camera") else 0):
        write_move(folder / "camera" / f"clip_{i}.txt", f"{('pan_left', 'zoom_in', 'clockwise')[i % 3]} {0.5 + i}")
    for i in range(number if task.startswith("control") or task in ("vace", "animate", "animate2") else 0):
        pictures.write_mp4(folder / "control" / f"clip_{i}.mp4", moving_square(200 + i, 9, height, width), 16)
        if task == "vace" or (task == "animate" and i % 2):
            mask = torch.zeros(9, 3, height, width, dtype=torch.uint8)
            mask[:, :, : height // 2, i : i + width // 2] = 255
            pictures.write_mp4(folder / "control_mask" / f"clip_{i}.mp4", mask, 16)
        if task == "animate":
            pictures.write_mp4(folder / "face" / f"clip_{i}.mp4", moving_square(250 + i, 9, 64, 64), 16)
        if task == "animate" and i % 2:
            pictures.write_mp4(folder / "background" / f"clip_{i}.mp4", moving_square(270 + i, 9, height, width), 16)
        if task in ("animate", "animate2") or (task in ("vace", "control_reference", "control_inpaint") and i % 2):
            pictures.write_png(folder / "reference" / f"clip_{i}.png", moving_square(300 + i, 1, 40, 60)[0])


def tone(hz: float, seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    """A tone that grows louder, of 16 bits."""
    times = np.arange(round(seconds * rate)) / rate
    return np.round(20_000 * times / seconds * np.sin(2 * np.pi * hz * times)).astype(np.int16)


def write_sound(path: Path, hz: float, seconds: float = 1.0, rate: int = 16_000) -> Path:
    """A wav file, by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(tone(hz, seconds, rate).tobytes())
    return path


def write_move(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")


def write_set(folder: Path, name: str) -> Path:
    """style/ (4 clips and one picture), plain/ (2) and heldout/ (2), each with what its task works from."""
    task = VARIANTS[name].task
    for part, number, caption, seed in (("style", 4, "sqstyle, square number {}", 0), ("plain", 2, "square {}", 50),
                                        ("heldout", 2, "sqstyle, unseen square {}", 100)):
        write_clips(folder / part, number, caption, seed)
        write_partners(folder / part, task, number)
    if task.startswith("camera"):
        write_move(folder / "style" / "camera" / "picture.txt", "static 1")
    kinds = {"control": ["control"], "vace": ["control"], "animate": ["control", "face", "reference"],
             "animate2": ["control", "reference"]}
    for kind in ("", *kinds.get(task.partition("_")[0], [])) if task != "s2v" else ():  # a picture has no sound
        pictures.write_png(folder / "style" / kind / "picture.png", moving_square(400, 1, 2 * SIZE[0], 2 * SIZE[1])[0])
    if task != "s2v":
        (folder / "style" / "picture.txt").write_text("sqstyle, a picture of a square")
    return folder
