"""`wantrain cache`: clips and captions -> latents and text features on disk, once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from wantrain.config import Config
from wantrain.data import decode
from wantrain.data.cache import CONDITION, LATENTS, MASK, TEXT, Entry, counted, leftovers, missing
from wantrain.engine import launch
from wantrain.engine.rendezvous import LONGEST_S, Rendezvous
from wantrain.jobs import in_workers, progress
from wantrain.recipe.clips import Clips, num_workers, open_clips
from wantrain.recipe.recipe import open_recipe
from wantrain.recipe.samples import Encoder, write_texts
from wantrain.terms import WINDOW, PlannedClip, UserError


def run(config: Config, arguments: Sequence[str]) -> None:
    """Build what is missing of the recipe's cache; with several processes each does its share."""
    began = time.time()
    accelerator = launch.start(launch.world_size(), 1, max_grad_norm=1.0, timeout_s=config.train.stall_timeout_s)
    meeting = Rendezvous(LONGEST_S)
    with meeting.first_alone():  # it looks into new files, the others read what it noted
        recipe = open_recipe(config)
        clips = open_clips(recipe, arguments)
    entries = clips.entries
    to_make = missing(entries)
    meeting.flags(0)  # all have listed what is missing before any entry appears
    mine = shares(to_make, recipe.variant.multiple_px, accelerator.num_processes)[accelerator.process_index]
    faults = []
    if to_make:
        for training in recipe.trainings():
            training.base.detected()  # as train would, but before hours of encoding
        texts = [str(what) for kind, what in mine.values() if kind == TEXT]
        write_texts(recipe, clips.cache, texts, accelerator.device, accelerator.is_main_process)
        faults = encode_windows(clips, Encoder(recipe, clips.cache, accelerator.device), mine,
                                accelerator.is_main_process)
    failed = any(meeting.flags(int(bool(faults))))
    if accelerator.is_main_process:
        clips.cache.claim(Path(config.run.dir), config.run.name, entries)
        for path in leftovers(clips.cache.folder, began):
            path.unlink(missing_ok=True)
    if failed:
        raise UserError(f"{len(faults)} of this process's clips cannot be decoded (everything else is cached):\n  "
                        + "\n  ".join(faults), "replace these files or take them out of the manifest, or go on without "
                        "them: data.allow_drops=true")
    if accelerator.is_main_process:
        print(f"cache {clips.cache.folder}: {counted(entries)} ready ({counted(to_make)} made now)")


def shares(entries: Mapping[Path, Entry], multiple_px: int, num_processes: int) -> list[dict[Path, Entry]]:
    """The entries dealt to processes: captions by number, windows by tokens, with all that belongs to one together."""
    dealt: list[dict[Path, Entry]] = [{} for _ in range(num_processes)]
    windows: dict[int, dict[Path, Entry]] = {}
    tokens: dict[int, int] = {}
    num_texts = 0
    for path, (kind, what) in entries.items():
        if isinstance(what, PlannedClip):
            windows.setdefault(id(what), {})[path] = (kind, what)
            tokens[id(what)] = what.bucket.num_tokens(multiple_px)
        else:
            dealt[num_texts % num_processes][path] = (kind, what)
            num_texts += 1
    loads = [0] * num_processes
    for key in sorted(windows, key=lambda key: -tokens[key]):  # the largest first, each to who has least
        least = loads.index(min(loads))
        dealt[least] |= windows[key]
        loads[least] += tokens[key]
    return dealt


def encode_windows(clips: Clips, encoder: Encoder, entries: Mapping[Path, Entry], is_main: bool) -> list[str]:
    """Write what is asked of windows among `entries`, decoded by worker processes while this one encodes.

    Returns what could not be decoded; that is remembered, but for what only took too long.
    """
    cache, data, faults = clips.cache, clips.config.data, []
    kinds: dict[int, list[str]] = {}
    windows = {}
    for kind, what in entries.values():
        if isinstance(what, PlannedClip):
            windows[id(what)] = what
            kinds.setdefault(id(what), []).append(kind)
    wanted = [(planned, cache.media_of(planned, kinds[key])) for key, planned in windows.items()]
    with progress(len(wanted), 0, "clip", "clips", is_main) as bar:
        for (planned, _), result, why in in_workers(decode.frames_in_worker, wanted, num_workers(clips.config),
                                                    data.timeout_s, "data.timeout_s"):
            arrays, name, fault = result or ({}, "", f"clip {planned.name}: {why}")
            frames = {name: torch.from_numpy(array) for name, array in arrays.items()}
            for kind in kinds[id(planned)] if frames else ():
                cache.write((kind, planned), encoder.encode(kind, planned, frames))
            if fault:
                faults.append(fault)
            if name:
                kind = {WINDOW: LATENTS, "mask": MASK}.get(name, CONDITION)
                cache.remember_fault((kind, planned), fault)
            bar.update()
    return faults
