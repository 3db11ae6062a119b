"""`wantrain share`: a folder ready for a model hub: card, LoRA files, samples, workflow, recipe. Nothing is sent."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from wantrain import __version__, lock, pictures, results
from wantrain.config import configs_folder
from wantrain.engine.folders import kept_config, named, trainings_of
from wantrain.files import read_object, set_in_place, write_text
from wantrain.models.lora_formats import DIGEST_KEY, GRAMMARS, read_lora
from wantrain.models.lora_updates import write_proven
from wantrain.models.variants import VARIANTS
from wantrain.pages import card
from wantrain.results import Column, Results, Video
from wantrain.terms import UserError

NUM_SAMPLES = 8

MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


def run(given: argparse.Namespace) -> None:
    """Write RUN/share anew, and print the command that uploads it."""
    run_dir = named(given.RUN)
    folder, formats = run_dir / "share", [form for form in given.formats.split(",") if form]
    if unknown := [form for form in formats if form not in GRAMMARS or form == "peft"]:
        allowed = ", ".join(form for form in GRAMMARS if form != "peft")
        raise UserError(f"formats={unknown[0]} is not allowed: {allowed}", f"wantrain share {given.RUN} formats=kohya")
    exports = sorted((run_dir / "export").glob("*.safetensors"))
    if not exports:
        raise UserError(f"{run_dir} has no exported LoRA",
                        shlex.join(["wantrain", "export", *lock.last_words(trainings_of(run_dir))]))
    shutil.rmtree(folder, ignore_errors=True)
    with set_in_place(folder) as made:
        made.mkdir()
        about = fill(made, run_dir, exports, formats, given.license or "apache-2.0")
        write_text(made / "README.md", card.text_of(about))
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}\nlook at {folder / 'README.md'} and "
          "the samples: all of this becomes public\n  next: "
          + shlex.join(["hf", "upload", f"YOU/{run_dir.resolve().name}", str(folder), ".", "--private"])
          + "    after hf auth login; without --private everybody sees it")


def fill(folder: Path, run_dir: Path, exports: Sequence[Path], formats: Sequence[str], license: str) -> card.About:
    """Everything but the card into the folder; what the card tells of it."""
    training = next(iter(trainings_of(run_dir)), run_dir)
    config = kept_config(training)
    files = {**lora_files(folder, exports, formats), "recipe.yaml": "the config as it was trained"}
    for workflow in sorted((run_dir / "export").glob("*.workflow.json")):
        shutil.copyfile(workflow, folder / workflow.name)
        files[workflow.name] = "a ComfyUI workflow with its settings"
    write_text(folder / "recipe.yaml", yaml.safe_dump(without_places(config), sort_keys=False, allow_unicode=True))
    found, column, videos = shown(run_dir)
    samples = []
    for number, (source, video) in enumerate(videos):
        name = f"samples/{number:02d}{source.suffix}"
        pictures.copy_bare(source, folder / name)
        samples.append((name, video))
    model, data = config.get("model", {}), config.get("data", {})
    header = read_object(training / "run.json")
    verdicts = [read_object(one / "judgement.json").get("verdict") or {} for one in trainings_of(run_dir)]
    return card.About(
        run_dir.resolve().name, VARIANTS[model["variant"]].task if model.get("variant") in VARIANTS else "t2v",
        base_of(model), data.get("trigger", ""), license, __version__, config.get("lora", {}).get("rank", 0),
        header.get("num_clips"), config.get("train", {}).get("num_steps"), files, samples, column, found,
        [sentence for verdict in verdicts for sentence in verdict.get("sentences", [])])


def lora_files(folder: Path, exports: Sequence[Path], formats: Sequence[str]) -> dict[str, str]:
    """The exported files, and each in the other formats, proven by reading it back; what each is."""
    told = {}
    for path in exports:
        shutil.copyfile(path, folder / path.name)
        lora = read_lora(path)
        told[path.name] = f"the LoRA, {lora.format}"
        kept = {key: value for key, value in lora.metadata.items() if key != DIGEST_KEY}
        for form in formats:
            other = replace(lora, path=folder / f"{path.stem}_{form}.safetensors")
            write_proven(other, form, kept, "float32")
            told[other.path.name] = f"the same, {form}"
    return told


def shown(run_dir: Path) -> tuple[Results | None, Column | None, list[tuple[Path, Video]]]:
    """The samples to show: of the last checkpoint, with trigger, at the strength nearest to 1, one of each prompt; of
    `evaluate`, or else those of the training.
    """
    folders = [run_dir / "report", *(one / "live" for one in trainings_of(run_dir))]
    folder = next((one for one in folders if (one / results.NAME).is_file()), None)
    if folder is None:
        return None, None, []
    found = results.read(folder)
    columns = [column for column in found.columns if column.lora]
    if not columns:
        return found, None, []
    best = max(columns, key=lambda one: (one.trigger, one.step is None, one.step or 0, -abs(one.strength - 1)))
    firsts: dict[int, tuple[Path, Video]] = {}
    for video in found.videos:
        if video.column == best.id and video.file.endswith(".mp4") and (folder / video.file).is_file():
            firsts.setdefault(video.prompt, (folder / video.file, video))
    return found, best, [firsts[prompt] for prompt in sorted(firsts)][:NUM_SAMPLES]


def base_of(model: Mapping[str, Any]) -> str:
    """The public id of the base: the one that was trained on, or that of its variant; empty where there is none."""
    path = str(model.get("path") or "")
    if MODEL_ID.fullmatch(path) and not Path(path).exists():
        return path
    shipped = configs_folder() / "model" / f"{model.get('variant')}.yaml"
    known = yaml.safe_load(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
    return str(known["path"]) if MODEL_ID.fullmatch(str(known.get("path"))) else ""


def without_places(value: Any) -> Any:
    """A config without the folders of this machine: of an absolute path, or one in a home, the last name alone."""
    if isinstance(value, Mapping):
        return {name: without_places(own) for name, own in value.items()}
    if isinstance(value, list):
        return [without_places(own) for own in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
