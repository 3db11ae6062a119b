"""`wantrain new`: look at a folder of clips and write a recipe for it, short, complete and commented."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wantrain import costs
from wantrain.config import configs_folder, recipes
from wantrain.config.values import nearest
from wantrain.data import manifest, media, plan
from wantrain.data.apart import hold_out
from wantrain.data.buckets import buckets
from wantrain.data.tables import COLUMNS
from wantrain.files import json_line, write_text
from wantrain.jobs import cores
from wantrain.models.task_media import media_of_task
from wantrain.models.variants import VARIANTS, Variant
from wantrain.recipe.draft import Draft, Prompts, common_opening, draft, is_tiny, look, prompts_for
from wantrain.terms import Clip, Media, MediaInfo, UserError

FOLDER = Path("recipes")
HELDOUT_SHARE = 0.1
MODEL, CARD_GIB = "wan22_ti2v_5b", 24.0
LOOK_S = 300.0
SAVES = 4
"""How often a training is saved and measured on held-out clips."""


@dataclass(frozen=True, slots=True)
class Set:
    """The clips of a new recipe; `whole` is what was not parted between training and held out, film or shot."""

    training: list[Clip]
    plain: list[Clip]
    heldout: list[Clip]
    whole: str
    found: Mapping[Media, MediaInfo]


@dataclass(frozen=True, slots=True)
class New:
    """All that a new recipe is written from. `given` are the paths that the user named, by set."""

    name: str
    model: str
    trigger: str
    given: Mapping[str, str]
    clips: Set
    made: Draft
    prompts: Prompts

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.model]

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.yaml"


def run(given: argparse.Namespace) -> None:
    """Ask for what is not given, look, choose, write, and say why."""
    name = given.NAME.removesuffix(".yaml")
    refuse_name(name)
    model = given.model or asked(given, "model", f"Base ({', '.join(models())})", MODEL)
    if model not in models():
        close = nearest(model, models())
        raise UserError(f"--model {model} is not there; " + (f"did you mean {close[0]}? There" if close else "there")
                        + f" are {', '.join(models())}", f"--model {(close or [MODEL])[0]}")
    where = given.clips or asked(given, "clips", "Folder of clips, or manifest", "")
    clips = listing("clips", where)
    opening = common_opening([clip.caption for clip in clips])
    trigger = given.trigger.strip() or asked(given, "trigger", "Made-up words that call it", opening or name)
    variant, (card_gib, why) = VARIANTS[model], card(given.gpu)
    plain = given.plain or asked(given, "plain", "Folder of ordinary clips, or nothing", "")
    sets = sort_out(clips, listing("plain", plain), listing("heldout", given.heldout))
    seen = look([*sets.training, *sets.plain, *sets.heldout], sets.found, variant)
    new = New(name, model, trigger, {"clips": where, "plain": plain, "heldout": given.heldout}, sets,
              draft(seen, variant, card_gib, len(sets.training)),
              prompts_for(sets.training, sets.heldout, trigger, variant))
    write_text(new.path, recipe_text(new, write_manifests(new)))
    print("\n".join(told(new, why)))


def refuse_name(name: str) -> None:
    """Raise UserError for a name that is taken, or that a file or a command line could not have."""
    if not re.fullmatch(r"[\w][\w.-]{0,99}", name):
        raise UserError(f"NAME = {name!r} is not allowed: letters, digits, _ . and -", "wantrain new my_style")
    if name in recipes():
        raise UserError(f"{name} is a recipe that ships with wantrain", f"wantrain new my_{name}")
    for taken in (FOLDER / f"{name}{what}" for what in (".yaml", ".train.jsonl", ".heldout.jsonl")):
        if os.path.lexists(taken):
            raise UserError(f"{taken} is there, and is not overwritten", f"wantrain run {name}    to use it; or take "
                            "another NAME")


def models() -> list[str]:
    """The bases that ship as configs/model."""
    return sorted(path.stem for path in (configs_folder() / "model").glob("*.yaml"))


def asked(given: argparse.Namespace, option: str, question: str, default: str) -> str:
    """The answer of a person at a terminal, else the default. UserError where nobody can be asked, or answers nothing
    to what is needed.
    """
    asks = not given.yes and sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        except EOFError:
            answer = ""
        if answer or default or option == "plain":
            return answer or default
    elif option == "plain" or (given.yes and default):
        return default
    said = {"clips": "FOLDER", "trigger": "my words", "model": MODEL}
    words = [f"--{name} {shlex.quote(getattr(given, name).strip() or value)}" for name, value in said.items()]
    raise UserError(f"--{option} is not given" + ("" if asks else ", and there is no terminal to ask at"),
                    f"wantrain new {shlex.quote(given.NAME)} {' '.join(words)}"
                    + ("" if option == "clips" else "    or --yes, which takes defaults"))


def card(text: str) -> tuple[float, str]:
    """(GiB of the card's memory, where that is from); the text is a card's name or a size, as for `wantrain plan`."""
    if text:
        return costs.card_of(text).memory_gib, "as given"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / costs.GIB, "the card here"
    return CARD_GIB, "no card here, so one of 24 GiB; --gpu says another"


def listing(source: str, where: str) -> list[Clip]:
    """The clips of a source that the user named, if any, without those that a review marked as out (keep = 0)."""
    clips = manifest.listed(manifest.ClipSource(source, where, key=f"--{source}")).clips if where else []
    kept = [clip for clip in clips if clip.measures.get("keep") != 0]
    if len(kept) < len(clips):
        print(f"{len(clips) - len(kept)} of {where} are marked as out (keep = 0) and left out")
    return kept


def sort_out(clips: list[Clip], plain: list[Clip], heldout: list[Clip]) -> Set:
    """Look into the files, and hold clips out unless that is done."""
    found = media.look_all(plan.files_of([*clips, *plain, *heldout]), Path("cache"), cores(), LOOK_S)
    if heldout:
        return Set(clips, plain, heldout, "", found)
    heldout, whole = hold_out(clips, found, HELDOUT_SHARE)
    apart = {clip.id for clip in heldout}
    return Set([clip for clip in clips if clip.id not in apart], plain, heldout, whole, found)


def write_manifests(new: New) -> dict[str, str]:
    """A path of the recipe for each set: manifests beside the recipe, of what is used and held out, with the trigger.

    Plain clips stay where the user has them.
    """
    paths = {what: path for what, path in new.given.items() if path}
    for what, short, members in (("clips", "train", new.clips.training), ("heldout", "heldout", new.clips.heldout)):
        if members:
            path = FOLDER / f"{new.name}.{short}.jsonl"
            write_text(path, "".join(json_line(row_of(clip, FOLDER, new.trigger)) for clip in members))
            paths[what] = str(path)
    return paths


def row_of(clip: Clip, folder: Path, trigger: str) -> dict[str, Any]:
    """A clip as a row of a manifest in `folder`, with the trigger in its captions. The clip's file is not touched."""
    def named(medium: Media) -> str:
        return Path(os.path.relpath(medium, folder)).as_posix() if isinstance(medium, Path) else medium.url

    captions = [text if trigger in text else f"{trigger}, {text}" for text in (clip.caption, *clip.more_captions)]
    values = {"id": clip.id.partition("/")[2], "video": named(clip.path), "start_s": clip.start_s or None,
              "end_s": clip.end_s, "caption": captions[0], "captions": captions if captions[1:] else None,
              **{kind: named(medium) for kind, medium in clip.partners.items()}}
    kept = {column: value for column, value in values.items() if value is not None}
    return {**{column: kept[column] for column in COLUMNS if column in kept}, **clip.measures}


def sampler_size(new: New) -> list[str]:
    """The sampler's size, where samples need inputs: those come from held-out clips of this size."""
    made, variant = new.made, new.variant
    if not media_of_task(variant.task).encoded or not new.clips.heldout:
        return []
    rules = plan.Rules(buckets(made.num_frames, made.resolutions, variant.multiple_px, made.max_tokens),
                       variant.fps, face_px=variant.face_px, whole_reference=variant.shows_reference_whole)
    placed = plan.place(new.clips.heldout, new.clips.found, rules).used
    return [f"  num_frames: {p.bucket.num_frames}  # of the held-out clips, which samples begin from\n"
            f"  resolution: [{p.bucket.height}, {p.bucket.width}]" for p in placed[:1]]


def recipe_text(new: New, paths: Mapping[str, str]) -> str:
    """The file."""
    name, made, own, tiny = new.name, new.made, new.made.habits, is_tiny(new.variant)
    every = max(10, made.num_steps // SAVES)
    plain = paths.get("plain")
    weights = (", weight: 2", ", weight: 1") if plain else ("", "")
    parts = [
        "# @package _global_",
        f"# wantrain run {name}        (one stage alone: wantrain train {name}; every key: wantrain train --help)",
        f"# Written by wantrain new for the clips of {new.given['clips']}; from now on it is yours to change.",
        f"# Hardware, memory and time: not measured yet. wantrain check {name} gives tokens, steps and sizes.",
        "defaults:", f"  - override /model: {new.model}", "  - _self_", f"run: {{name: {quoted(name)}}}",
        "data:", "  sources:", f"    clips: {{path: {quoted(paths['clips'])}{weights[0]}}}",
        plain and f"    plain: {{path: {quoted(plain)}{weights[1]}}}  # without the trigger: keeps the base's look",
        "heldout" in paths and f"  heldout: {quoted(paths['heldout'])}  # never trained on",
        f"  trigger: {quoted(new.trigger)}", f"  num_frames: {made.num_frames}  # a clip goes to the longest it fills",
        f"  resolutions: {made.resolutions}  # height, width",
        made.max_tokens and f"  max_tokens_per_clip: {made.max_tokens}  # by arithmetic; longer clips get smaller "
        "pictures",
        f"  batch_size: {own.batch_size}", f"optim: {{lr: {own.lr:.1e}, warmup_steps: {own.warmup_steps}}}",
        f"train: {{num_steps: {made.num_steps}, micro_batch_size: {own.batch_size if tiny else 1}, save_every: "
        f"{every}}}",
        made.base_form == "int8" and "memory: {base: int8}  # a byte a weight of the base" + made.waits * (
            "; swap and offload follow from the card when training starts"),
        "heldout" in paths and f"validation: {{every_steps: {every}}}",
        "sampler:", not new.variant.experts and f"  every_steps: {2 * every}  # samples while it trains",
        tiny and "  num_steps: 20\n  guidance: 4.0", *sampler_size(new), *prompt_lines(new, paths)]
    return "\n".join(part for part in parts if part) + "\n"


def prompt_lines(new: New, paths: Mapping[str, str]) -> list[str]:
    """The prompts of samples, with the trigger where it belongs, and those of the evaluation, which places it."""
    prompts = new.prompts
    triggered = [f"{new.trigger}, {text}" for text in (*prompts.like[:1], *prompts.others[:1])]
    lines = ["  prompts:  # like the training, of another subject, and unrelated: without the trigger",
             *(f"    - {quoted(text)}" for text in (*triggered, prompts.unrelated))]
    if "heldout" in paths:
        kinds = {"prompts": prompts.like, "combined": prompts.others, "unrelated": [prompts.unrelated]}
        lines += ["evaluate:  # each is shown by the base, with the trigger, and without it"]
        lines += [line for key, texts in kinds.items()
                  for line in (f"  {key}:", *(f"    - {quoted(text)}" for text in texts))]
    return lines


def quoted(text: str) -> str:
    """Text as YAML takes it whole."""
    return json.dumps(text, ensure_ascii=False)


def told(new: New, why: str) -> list[str]:
    """What was chosen, and why."""
    clips, prompts, number = new.clips, new.prompts, len(new.clips.heldout)
    lacking = sum(new.trigger not in clip.caption for clip in (*clips.training, *clips.heldout))
    apart = f"{number} clip{'s' * (number > 1)}, as given"
    if clips.whole:
        apart = f"{number} clip{'s' * (number > 1)}, {clips.whole}s whole, so that none is on both sides"
    if not number:
        apart = "none, as all are of one shot: no validation and no evaluation; --heldout FOLDER gives some"
    plain = f", {len(clips.plain)} plain ones half as often" if clips.plain else \
        "; none --plain: without the trigger the base's look may drift"
    placed = f", put before {lacking} captions in the manifests: your files stay as they are" if lacking else ""
    lengths, sizes, held_by, steps = new.made.reasons
    return [f"wrote {new.path}",
            f"clips      {len(clips.training)} of {new.given['clips']} to train on{plain}",
            f"held out   {apart}", f"trigger    {new.trigger!r}{placed}", lengths, sizes,
            held_by + ("" if is_tiny(new.variant) else f" ({why})"), steps,
            f"prompts    {len(prompts.like)} like the training, {len(prompts.others)} of other subjects, 1 unrelated",
            f"next: {shlex.join(['wantrain', 'run', new.name])}"]
