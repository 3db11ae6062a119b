"""What a sampled video says of itself, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wantrain import __version__, pictures
from wantrain import config as schema
from wantrain.files import digest_path, digest_text, write_json
from wantrain.models.sampling import Inputs
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import LoraFiles, sampler_settings
from wantrain.results import Column
from wantrain.terms import UserError


@dataclass(frozen=True, slots=True)
class Shot:
    """A video to make: its `caption` with its seed, through a column's LoRAs (None: the base).

    `row` numbers the prompts with their seeds; `place` is (the prompt's place, how many prompts there are), which says
    what it is sampled from besides.
    """

    row: int
    place: tuple[int, int]
    caption: str
    seed: int
    column: Column
    loras: LoraFiles | None
    inputs: Inputs

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.row:03d}_{self.column.id}"


@dataclass(frozen=True, slots=True)
class Record:
    """A sampled video: what it was made of and on, and the digest of its frames.

    `place` as in Shot; `loras` are [expert or "", path, strength, digest of the file]; `key` stands for all that
    decides its frames; `config` is the whole config as YAML.
    """

    place: list[int]
    prompt: str
    seed: int
    strength: float
    loras: list[list[Any]]
    made_by: dict[str, str]
    key: str
    frames: str
    config: str


def record_of(recipe: Recipe, shot: Shot, frames_FCHW: torch.Tensor) -> Record:
    """What is to be kept of a video."""
    return Record(list(shot.place), shot.caption, shot.seed, shot.column.strength, _used(recipe, shot), maker(),
                  key_of(recipe, shot), digest_of(frames_FCHW), schema.to_yaml(recipe.config))


def _used(recipe: Recipe, shot: Shot) -> list[list[Any]]:
    return [[expert or "", str(path), own, digest_path(path, recipe.memo)]
            for expert, uses in (shot.loras or {}).items() for path, own in uses]


def key_of(recipe: Recipe, shot: Shot) -> str:
    """A digest of all that decides a video's frames: text, seed, inputs, LoRAs, base, sampler, libraries, device."""
    inputs = {**shot.inputs.frames, **({} if shot.inputs.video is None else {"video": shot.inputs.video})}
    bases = [one.digest(part, recipe.memo) for one in recipe.base.each() for part in sorted(one.parts)]
    own = recipe.config
    return digest_text(
        shot.caption, shot.seed, shot.column.strength, *((expert, strength, digest) for expert, _, strength, digest in
                                                         _used(recipe, shot)),
        sampler_settings(recipe), *(f"{name} {digest_of(frames)}" for name, frames in sorted(inputs.items())), *bases,
        own.model.variant, own.model.dtype.name, recipe.base_form, recipe.encoders_form, own.memory.vae.name,
        sorted(maker().items()))


def is_there(recipe: Recipe, shot: Shot, folder: Path) -> bool:
    """Whether the shot's files are in the folder, whole, as they would be made now."""
    video = folder / f"{shot.name}.mp4"
    try:
        found = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))["key"]
        return bool(found == key_of(recipe, shot)
                    and all(video.with_suffix(f".{kind}").is_file() for kind in recipe.config.sampler.formats)
                    and len(pictures.read_mp4(video)) == sampler_settings(recipe).bucket.num_frames)
    except (OSError, ValueError, TypeError, KeyError):
        return False


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
    """A video as mp4 and in each format of the config, and its record beside it; an mp4 holds it too."""
    content, fps = asdict(record), recipe.variant.fps
    pictures.write_mp4(stem.with_name(f"{stem.name}.mp4"), frames_FCHW, fps, comment=json.dumps(content))
    for own in recipe.config.sampler.formats:
        made = pictures.write_webp if own == "webp" else pictures.frame_sheet
        made(stem.with_name(f"{stem.name}.{own}"), frames_FCHW, fps)
    write_json(stem.with_name(f"{stem.name}.json"), content)  # last: with it the video is whole


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
                        "where nobody has encoded them anew",
                        shlex.join(["wantrain", "sample", "--like", str(path.with_suffix(".json"))])) from error


def refuse_other_files(like: Record) -> None:
    """Raise UserError where a LoRA file is no longer what the video was made with."""
    for _, path, _, digest in like.loras:
        if not Path(path).exists() or digest_path(Path(path)) != digest:
            raise UserError(f"{path} is not the file that the video was made with, or not there any more",
                            "bring that file back, from where the record says")
