"""What a sampled video says of itself, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wantrain import __version__, pictures
from wantrain import config as schema
from wantrain.files import digest_path, write_json
from wantrain.models.sampling import Inputs
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import LoraFiles
from wantrain.terms import UserError


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the contact sheet: one prompt with one seed, and what it is sampled from besides."""

    number: int
    prompt: str
    seed: int
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class Record:
    """A sampled video: which of the config's jobs it is, what it was made of and on, and the digest of its frames.

    `loras` are [expert or "", path, strength, digest of the file]; `config` is the whole config as YAML.
    """

    number: int
    prompt: str
    seed: int
    strength: float
    loras: list[list[Any]]
    made_by: dict[str, str]
    frames: str
    config: str


def record_of(recipe: Recipe, loras: LoraFiles, job: Job, strength: float, frames_FCHW: torch.Tensor) -> Record:
    """What is to be kept of a video."""
    used = [[expert or "", str(path), own, digest_path(path, recipe.memo)]
            for expert, uses in loras.items() for path, own in uses]
    return Record(job.number, job.prompt, job.seed, strength, used, maker(), digest_of(frames_FCHW),
                  schema.to_yaml(recipe.config))


def digest_of(frames_FCHW: torch.Tensor) -> str:
    """A digest of every pixel and of the size."""
    state = hashlib.blake2b(repr(tuple(frames_FCHW.shape)).encode(), digest_size=16)
    state.update(frames_FCHW.contiguous().numpy().data)
    return state.hexdigest()


def maker() -> dict[str, str]:
    """The program, its libraries and the device: what the last bits depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"wantrain": __version__, "device": device,
            **{name: version(name) for name in ("torch", "diffusers", "transformers")}}


def write(stem: Path, recipe: Recipe, frames_FCHW: torch.Tensor, record: Record) -> None:
    """A video in each format of the config, and its record beside it; an mp4 holds it too."""
    content, fps = asdict(record), recipe.variant.fps
    for own in recipe.config.sampler.formats:
        path = stem.with_name(f"{stem.name}.{own}")
        if own == "mp4":
            pictures.write_mp4(path, frames_FCHW, fps, comment=json.dumps(content))
        elif own == "webp":
            pictures.write_webp(path, frames_FCHW, fps)
        else:
            pictures.frame_sheet(path, frames_FCHW, fps)
    write_json(stem.with_name(f"{stem.name}.json"), content)


def read(path: Path) -> Record:
    """The record of a video: in an mp4, or beside a file of another format."""
    beside = path if path.suffix in (".mp4", ".json") else path.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"--like {path}: there is no file {beside}", "wantrain sample --like VIDEO.mp4")
    try:
        text = pictures.read_comment(beside) if beside.suffix == ".mp4" else beside.read_text("utf-8")
        return Record(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"--like {path}: it does not say how it was sampled, as the videos of `wantrain sample` do "
                        "where nobody has encoded them anew", f"wantrain sample --like {path.with_suffix('.json')}"
                        ) from error


def refuse_other_files(like: Record) -> None:
    """Raise UserError where a LoRA file is no longer what the video was made with."""
    for _, path, _, digest in like.loras:
        if not Path(path).exists() or digest_path(Path(path)) != digest:
            raise UserError(f"{path} is not the file that the video was made with, or not there any more",
                            "bring that file back, from where the record says")
