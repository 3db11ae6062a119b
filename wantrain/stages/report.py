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

from wantrain import pictures, report
from wantrain.config import Config
from wantrain.data import batches, decode, plan
from wantrain.data.cache import CONDITION, LATENTS, MASK
from wantrain.data.folders import Account
from wantrain.files import write_text
from wantrain.jobs import in_workers, progress
from wantrain.models import conditioning, encode
from wantrain.stages import TORCH_DTYPE, Opened, first_words, holding_trigger, num_workers, opened
from wantrain.terms import CLIP, TEXT_LEN, Bucket, PlannedClip

SHOWN_PX = 416
"""Longest side of a clip on the page: sixty of 480p would be 100 MB."""

CRF = 23


def run(config: Config, arguments: Sequence[str]) -> None:
    """Write RUN/report/data.html: buckets, drops, trims, captions with their tokens, and clips as the model sees them.
    """
    recipe = opened(config, arguments, refuse=False)
    count = partial(encode.count_tokens, recipe.base.tokenizer())
    path = Path(config.run.dir) / "report" / "data.html"
    shown = spread(recipe.planned, config.report.num_windows)
    told = surprises(recipe, count)
    page = {
        "name": config.run.name, "variant": recipe.variant.name, "fps": recipe.variant.fps,
        "trigger": config.data.trigger, "text_len": TEXT_LEN, "extract": config.data.extract.name,
        "totals": totals(recipe, count), "buckets": bucket_table(recipe), "sources": source_table(recipe),
        "surprises": told, "dropped": recipe.plan.dropped, "num_windows": len(recipe.planned),
        "refused": sum(d.kind != "outside limits" for d in recipe.plan.dropped) * (not config.data.allow_drops),
        "trims": trims(recipe.planned), "cards": list(cards(recipe, shown, count)),
    }
    write_text(path, report.data_html(page))
    print(f"{recipe.plan.num_found} clips = {len({p.clip.id for p in recipe.planned})} used + "
          f"{len(recipe.plan.dropped)} dropped; {len(told)} surprises\nreport {path}")


def spread(planned: Sequence[PlannedClip], most: int) -> list[PlannedClip]:
    """At most so many windows, evenly over the plan."""
    places = np.linspace(0, len(planned) - 1, min(most, len(planned)))
    return [planned[int(i)] for i in places]


def totals(recipe: Opened, count: Callable[[str], int]) -> dict[str, str]:
    """The numbers at the head of the page."""
    config, planned, px = recipe.config, recipe.planned, recipe.variant.multiple_px
    samples = float(sum(p.clip.repeats for p in planned))
    tokens = sum(p.clip.repeats * plan.num_tokens(p.bucket, px) for p in planned)
    seen = sum(p.bucket.num_frames / p.fps for p in planned)
    entries = recipe.cache.entries(planned + recipe.heldout, recipe.captions)
    missing = recipe.cache.missing(planned + recipe.heldout, recipe.captions)
    return {
        "clips": f"{recipe.plan.num_found} found = {len({p.clip.id for p in planned})} used + "
                 f"{len(recipe.plan.dropped)} dropped; {len(recipe.heldout)} held out",
        "windows": f"{len(planned)} (data.extract={config.data.extract.name}), {seen:.0f} s of the sources",
        "epoch": f"{samples:g} samples, {tokens:,.0f} transformer tokens",
        "training": f"{config.train.num_steps} steps of {config.data.batch_size} samples"
                    + (" or more" if recipe.factors else ""),
        "cache": f"about {cache_bytes(recipe, count) / 2**20:,.1f} MiB for {len(entries)} entries, "
                 f"{len(missing)} of them still to make",
    }


def cache_bytes(recipe: Opened, count: Callable[[str], int]) -> float:
    """What the whole cache of the recipe will take: latents, what the task encodes, and text features."""
    architecture, shape = recipe.variant.architecture, recipe.variant.latent_THW
    dtype_bytes = TORCH_DTYPE[recipe.config.model.dtype].itemsize
    entries = recipe.cache.entries(recipe.planned + recipe.heldout, []).values()
    windows = [(kind, p) for kind, p in entries if isinstance(p, PlannedClip)]
    latents = sum(4 * architecture.out_channels * math.prod(shape(p.bucket)) for kind, p in windows if kind == LATENTS)
    latents += sum(4 * math.prod(shape(p.partners["mask"].bucket)) for kind, p in windows if kind == MASK)
    latents += sum(conditioning.num_bytes(recipe.variant, shape(p.bucket), p.bucket.num_frames,
                                          "reference" in p.partners) for kind, p in windows if kind == CONDITION)
    text = sum(min(count(caption), TEXT_LEN) for caption in dict.fromkeys(recipe.captions))
    return latents + text * architecture.text_dim * dtype_bytes


def bucket_table(recipe: Opened) -> list[dict[str, Any]]:
    """A row for each bucket: windows, samples an epoch, tokens, batch."""
    rows, factors = [], recipe.factors
    by_bucket: dict[Bucket, list[PlannedClip]] = {}
    for p in recipe.planned:
        by_bucket.setdefault(p.bucket, []).append(p)
    for bucket, members in sorted(by_bucket.items(), key=lambda item: str(item[0])):
        tokens = plan.num_tokens(bucket, recipe.variant.multiple_px)
        batch = recipe.config.data.batch_size * factors.get(bucket, 1)
        samples = float(sum(p.clip.repeats for p in members))
        rows.append({"bucket": str(bucket), "windows": len(members), "samples": f"{samples:g}", "tokens": tokens,
                     "batch": batch, "step_tokens": batch * tokens, "steps": f"{samples / batch:.1f}"})
    return rows


def source_table(recipe: Opened) -> list[dict[str, Any]]:
    """A row for each source: clips found, used, dropped by kind, repeats."""
    rows = []
    for name in recipe.config.data.sources:
        members = [p for p in recipe.planned if p.clip.source == name]
        dropped = Counter(d.kind for d in recipe.plan.dropped if d.clip.source == name)
        used = len({p.clip.id for p in members})
        account = recipe.accounts.get(name, Account())
        rows.append({"source": name, "found": used + dropped.total(), "used": used, "windows": len(members),
                     "dropped": ", ".join(f"{n} {kind}" for kind, n in sorted(dropped.items())) or "0",
                     "passed": "; ".join(account.lines()) or "0",
                     "repeats": f"{members[0].clip.repeats:g}" if members else ""})
    return rows


def surprises(recipe: Opened, count: Callable[[str], int]) -> list[tuple[str, list[str]]]:
    """(what, the clips it concerns): what a person would want to know before a GPU is rented."""
    planned, trigger = recipe.planned, recipe.config.data.trigger
    clips = {p.clip.id: p for p in planned}
    captions = Counter(p.clip.caption for p in clips.values())
    tokens = {caption: count(caption) for p in clips.values() for caption in (p.clip.caption, *p.clip.more_captions)}
    styled = [p for p in clips.values() if trigger and trigger in p.clip.caption]
    missing = f"no caption holds the trigger ({trigger}); {first_words(recipe)}" if trigger else ""
    without = {p.clip.source for p in styled}

    def named(found: Iterable[PlannedClip]) -> list[str]:
        return [p.name for p in found]

    listed = {
        f"captions longer than {TEXT_LEN} tokens: the rest is cut off": named(
            p for p in clips.values() if any(tokens[c] > TEXT_LEN for c in (p.clip.caption, *p.clip.more_captions))),
        f"no trigger ({trigger}) in the caption, though others of the source have it": named(
            p for p in clips.values() if trigger and p.clip.source in without and trigger not in p.clip.caption),
        missing: [] if not trigger or holding_trigger(recipe) else named(clips.values()),
        **{f"passed over in {source}: {what}": names for source, account in recipe.accounts.items()
           for what, names in account.passed.items()},
        "dropped of what is held out": [f"{d.clip.id}: {d.reason}" for d in recipe.heldout_dropped],
        "the same caption as another clip": named(p for p in clips.values() if captions[p.clip.caption] > 1),
        "enlarged: the source is smaller than the bucket": [
            f"{p.name} x {x:.2f}" for p in planned if (x := plan.enlarged(p.bucket, p.found)) > 1.01],
        "cropped by more than a tenth": [
            f"{p.name} {x:.0%}" for p in planned if (x := plan.cropped(p.bucket, p.found)) > 0.1],
        "read by PyAV, because decord would read them wrongly": [
            f"{p.name} ({p.found.why_not_decord})" for p in clips.values()
            if p.found.why_not_decord not in ("", "image")],
        "frames repeat: the source has fewer a second than the model": [
            f"{p.name} {fps:.3g} fps" for p in clips.values()
            if p.found.duration_s and (fps := p.found.num_frames / p.found.duration_s) < 0.95 * p.fps],
        "speed is changed, as asked": [f"{p.name} x {p.clip.speed:g}" for p in clips.values() if p.clip.speed != 1],
    }
    for p in clips.values():
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


def cards(recipe: Opened, shown: Sequence[PlannedClip], count: Callable[[str], int]) -> Iterable[Mapping[str, Any]]:
    """What the page shows of a window: the clip as the model sees it, where it is from, its captions."""
    data = recipe.config.data
    wanted = ((p, (CLIP, *p.partners)) for p in shown)
    decoded = in_workers(decode.frames_in_worker, wanted, num_workers(recipe.config), data.timeout_s,
                         "data.timeout_s", ordered=True)
    with progress(len(shown), 0, "clip", "report", delay_s=2) as bar:
        for (planned, _), result, why in decoded:
            found, _, fault = result or ({}, "", str(why))
            frames = found.get(CLIP)
            texts = batches.captions_of(planned.clip, 0)
            to_s = planned.start_s + planned.bucket.num_frames / planned.fps
            yield {
                "name": planned.name, "file": str(planned.clip.path), "bucket": str(planned.bucket),
                "fault": fault, "video": "" if frames is None else media_url(frames, recipe.variant.fps),
                "partners": [(name, media_url(array, recipe.variant.fps), len(array) == 1)
                             for name, array in found.items() if name != CLIP],
                "is_image": planned.bucket.num_frames == 1, "size": f"{planned.found.width}x{planned.found.height}",
                "from_s": f"{planned.start_s:.2f}", "to_s": f"{to_s:.2f}",
                "span": span_of(planned), "cropped": f"{plan.cropped(planned.bucket, planned.found):.0%}",
                "captions": [(text, count(text)) for text in texts],
                "measures": {k: f"{v:g}" for k, v in planned.clip.measures.items() if v is not None},
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
        return report.data_url(path)
