"""`wantrain report`: the data as training will see it, as one HTML page, without loading weights."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wantrain import pictures
from wantrain.config import Config
from wantrain.data import cameras, decode, plan, sound
from wantrain.data.cache import missing
from wantrain.data.captions import captions_of
from wantrain.data.folders import Account
from wantrain.files import write_text
from wantrain.jobs import in_workers, progress
from wantrain.models import encode
from wantrain.pages import html
from wantrain.recipe.clips import Clips, first_words, holding_trigger, num_workers, open_clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.terms import TEXT_LEN, WINDOW, Bucket, PlannedClip

TOLD = {cameras.KIND: cameras.told, "audio": sound.told}
"""Partners that a page tells of, and cannot show as a picture."""

SHOWN_PX = 416
"""Longest side of a clip on the page: sixty of 480p would be 100 MB."""

CRF = 23


def run(config: Config, arguments: Sequence[str]) -> None:
    """Write RUN/report/data.html: buckets, drops, trims, captions with their tokens, and clips as the model sees them.
    """
    recipe = open_recipe(config)
    clips = open_clips(recipe, arguments, refuse=False)
    count = partial(encode.count_tokens, recipe.base.tokenizer())
    path = Path(config.run.dir) / "report" / "data.html"
    shown = spread(clips.planned, config.report.num_windows)
    told = surprises(clips, count)
    page = {
        "name": config.run.name, "variant": recipe.variant.name, "fps": recipe.variant.fps,
        "trigger": config.data.trigger, "text_len": TEXT_LEN, "extract": config.data.extract.name,
        "totals": totals(recipe, clips, count), "buckets": bucket_table(clips), "sources": source_table(clips),
        "surprises": told, "dropped": clips.plan.dropped, "num_windows": len(clips.planned),
        "refused": sum(d.kind != "outside limits" for d in clips.plan.dropped) * (not config.data.allow_drops),
        "trims": trims(clips.planned), "cards": list(cards(clips, shown, count)),
    }
    write_text(path, html.data_page(page))
    print(f"{clips.plan.num_found} clips = {len({p.clip.id for p in clips.planned})} used + "
          f"{len(clips.plan.dropped)} dropped; {len(told)} surprises\nreport {path}")


def spread(planned: Sequence[PlannedClip], most: int) -> list[PlannedClip]:
    """At most `most` windows, spread evenly over the plan."""
    places = np.linspace(0, len(planned) - 1, min(most, len(planned)))
    return [planned[int(i)] for i in places]


def totals(recipe: Recipe, clips: Clips, count: Callable[[str], int]) -> dict[str, str]:
    """The numbers at the head of the page."""
    config, planned, px = recipe.config, clips.planned, recipe.variant.multiple_px
    samples = float(sum(p.clip.repeats for p in planned))
    tokens = sum(p.clip.repeats * p.bucket.num_tokens(px) for p in planned)
    seen = sum(p.bucket.num_frames / p.fps for p in planned)
    entries = clips.entries
    size = clips.cache_bytes({text: count(text) for text in clips.captions}, recipe.dtype.itemsize)
    return {
        "clips": f"{clips.plan.num_found} found = {len({p.clip.id for p in planned})} used + "
                 f"{len(clips.plan.dropped)} dropped; {len(clips.heldout)} held out",
        "windows": f"{len(planned)} (data.extract={config.data.extract.name}), {seen:.0f} s of the sources",
        "epoch": f"{samples:g} samples, {tokens:,.0f} transformer tokens",
        "training": f"{config.train.num_steps} steps of {config.data.batch_size} samples"
                    + (" or more" if clips.batch_factors else ""),
        "cache": f"about {size / 2**20:,.1f} MiB for {len(entries)} entries, "
                 f"{len(missing(entries))} of them still to make",
    }


def bucket_table(clips: Clips) -> list[dict[str, Any]]:
    """A row for each bucket: windows, samples an epoch, tokens, batch."""
    rows, factors = [], clips.batch_factors
    by_bucket: dict[Bucket, list[PlannedClip]] = {}
    for p in clips.planned:
        by_bucket.setdefault(p.bucket, []).append(p)
    for bucket, members in sorted(by_bucket.items(), key=lambda item: str(item[0])):
        tokens = bucket.num_tokens(clips.variant.multiple_px)
        batch = clips.config.data.batch_size * factors.get(bucket, 1)
        samples = float(sum(p.clip.repeats for p in members))
        rows.append({"bucket": str(bucket), "windows": len(members), "samples": f"{samples:g}", "tokens": tokens,
                     "batch": batch, "step_tokens": batch * tokens, "steps": f"{samples / batch:.1f}"})
    return rows


def source_table(clips: Clips) -> list[dict[str, Any]]:
    """A row for each source: clips found, used, dropped by kind, repeats."""
    rows = []
    for name in clips.config.data.sources:
        members = [p for p in clips.planned if p.clip.source == name]
        dropped = Counter(d.kind for d in clips.plan.dropped if d.clip.source == name)
        used = len({p.clip.id for p in members})
        account = clips.accounts.get(name, Account())
        rows.append({"source": name, "found": used + dropped.total(), "used": used, "windows": len(members),
                     "dropped": ", ".join(f"{n} {kind}" for kind, n in sorted(dropped.items())) or "0",
                     "passed": "; ".join(account.lines()) or "0",
                     "repeats": f"{members[0].clip.repeats:g}" if members else ""})
    return rows


def surprises(clips: Clips, count: Callable[[str], int]) -> list[tuple[str, list[str]]]:
    """(what, the clips it concerns): what a person would want to know before a GPU is rented."""
    planned, trigger = clips.planned, clips.config.data.trigger
    first = {p.clip.id: p for p in planned}
    captions = Counter(p.clip.caption for p in first.values())
    tokens = {caption: count(caption) for p in first.values() for caption in (p.clip.caption, *p.clip.more_captions)}
    styled = [p for p in first.values() if trigger and trigger in p.clip.caption]
    missing = f"no caption holds the trigger ({trigger}); {first_words(clips)}" if trigger else ""
    without = {p.clip.source for p in styled}

    def named(found: Iterable[PlannedClip]) -> list[str]:
        return [p.name for p in found]

    listed = {
        f"captions longer than {TEXT_LEN} tokens: the rest is cut off": named(
            p for p in first.values() if any(tokens[c] > TEXT_LEN for c in (p.clip.caption, *p.clip.more_captions))),
        f"no trigger ({trigger}) in the caption, though others of the source have it": named(
            p for p in first.values() if trigger and p.clip.source in without and trigger not in p.clip.caption),
        missing: [] if not trigger or holding_trigger(clips) else named(first.values()),
        **{f"passed over in {source}: {what}": names for source, account in clips.accounts.items()
           for what, names in account.passed.items()},
        "dropped of what is held out": [f"{d.clip.id}: {d.reason}" for d in clips.heldout_dropped],
        "the same caption as another clip": named(p for p in first.values() if captions[p.clip.caption] > 1),
        "enlarged: the source is smaller than the bucket": [
            f"{p.name} x {x:.2f}" for p in planned if (x := plan.enlarged(p.bucket, p.found)) > 1.01],
        "cropped by more than a tenth": [
            f"{p.name} {x:.0%}" for p in planned if (x := plan.cropped(p.bucket, p.found)) > 0.1],
        "read by PyAV, because decord would read them wrongly": [
            f"{p.name} ({p.found.why_not_decord})" for p in first.values()
            if p.found.why_not_decord not in ("", "image")],
        "frames repeat: the source has fewer a second than the model": [
            f"{p.name} {fps:.3g} fps" for p in first.values()
            if p.found.duration_s and (fps := p.found.num_frames / p.found.duration_s) < 0.95 * p.fps],
        "speed is changed, as asked": [f"{p.name} x {p.clip.speed:g}" for p in first.values() if p.clip.speed != 1],
    }
    for p in first.values():
        for what in plan.surprises_of(p):
            listed.setdefault(what, []).append(p.name)
    return [(what, which) for what, which in listed.items() if which]


def trims(planned: Sequence[PlannedClip]) -> list[dict[str, str]]:
    """The clips whose span is not all shown, with the seconds that no window has."""
    by_clip: dict[str, list[PlannedClip]] = {}
    for p in planned:
        by_clip.setdefault(p.clip.id, []).append(p)
    return [{"clip": name, "trimmed": f"{lost:.2f} s", "span": span_of(windows[0])}
            for name, windows in by_clip.items() if (lost := plan.trimmed_s(windows)) > 0]


def span_of(planned: PlannedClip) -> str:
    """The clip's span in its source."""
    end_s = planned.clip.end_s if planned.clip.end_s is not None else planned.found.duration_s
    return f"{planned.clip.start_s:.2f} to {end_s:.2f} s" if planned.found.duration_s else "image"


def cards(clips: Clips, shown: Sequence[PlannedClip], count: Callable[[str], int]) -> Iterable[Mapping[str, Any]]:
    """What the page shows of a window: the clip as the model sees it, where it is from, its captions."""
    data = clips.config.data
    wanted = ((p, (WINDOW, *p.partners)) for p in shown)
    decoded = in_workers(decode.frames_in_worker, wanted, num_workers(clips.config), data.timeout_s,
                         "data.timeout_s", ordered=True)
    with progress(len(shown), 0, "clip", "report", delay_s=2) as bar:
        for (planned, _), result, why in decoded:
            found, _, fault = result or ({}, "", str(why))
            frames = found.get(WINDOW)
            texts = captions_of(planned.clip, 0)
            to_s = planned.start_s + planned.bucket.num_frames / planned.fps
            yield {
                "name": planned.name, "file": str(planned.clip.path), "bucket": str(planned.bucket),
                "fault": fault, "video": "" if frames is None else media_url(frames, clips.variant.fps),
                "partners": [(name, media_url(array, clips.variant.fps), len(array) == 1)
                             for name, array in found.items() if name not in (WINDOW, *TOLD)],
                "is_image": planned.bucket.num_frames == 1, "size": f"{planned.found.width}x{planned.found.height}",
                "from_s": f"{planned.start_s:.2f}", "to_s": f"{to_s:.2f}",
                "span": span_of(planned), "cropped": f"{plan.cropped(planned.bucket, planned.found):.0%}",
                "captions": [(text, count(text)) for text in texts],
                "measures": {k: f"{v:g}" for k, v in planned.clip.measures.items() if v is not None}
                | {name: TOLD[name](array) for name, array in found.items() if name in TOLD},
            }
            bar.update()


def media_url(frames_FCHW: np.ndarray, fps: float) -> str:
    """The frames as a data URL of an H.264 video (or of a PNG, for one frame), made smaller."""
    frames = torch.from_numpy(frames_FCHW)
    height, width = frames.shape[2:]
    scale = min(1.0, SHOWN_PX / max(height, width))
    if scale < 1:
        height, width = (max(2, 2 * math.floor(side * scale / 2)) for side in (height, width))
        frames = decode.fit(frames, height, width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("frame.png" if len(frames) == 1 else "clip.mp4")
        if len(frames) == 1:
            pictures.write_png(path, frames[0])
        else:
            pictures.write_mp4(path, frames, fps, CRF)
        return html.data_url(path)
