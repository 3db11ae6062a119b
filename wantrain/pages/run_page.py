"""The page of a run, as a function of its folder: samples side by side, curves, the verdict, losses by clip.

Read are, where they are there: RUN/report/results.json, and of each training's folder live/results.json, metrics.jsonl,
judgement.json, run.json, config.yaml; and RUN/votes.jsonl.
"""

from __future__ import annotations

import base64
import json
import math
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wantrain import config as schema
from wantrain import metrics, results
from wantrain.engine.folders import kept_config, trainings_of
from wantrain.files import digest_text, read_object, remembered, write_text
from wantrain.terms import IMAGE_SUFFIXES, UserError

TEMPLATE = Path(__file__).parent / "templates" / "run.html"
PLACES = ("<!-- POLICY -->", "<!-- DATA -->", "<!-- MEDIA -->")

POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src blob: data:; media-src blob:; "
          "base-uri 'none'; form-action 'none'")
"""What the page in a file may do: nothing of it is asked of anywhere."""

MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg"}

VOTES = "votes.jsonl"

NUM_POINTS = 400
"""Of a curve over all steps: more are brought together."""

NUM_CLIPS = 8
"""Of the worst clips and of the easiest, these many are shown playing."""

CLIP_PX, CLIP_S = 320, 3.0
"""Longest side and length of the small copy of a clip."""

CURVES = ("loss", "grad_norm", "lr", "step_s")
"""Of metrics.jsonl, drawn over the steps."""


@dataclass(frozen=True, slots=True)
class Media:
    """A file that the page shows: a sampled video as it is, or the span of a source, of which a small copy is made."""

    path: Path
    span: tuple[float, float | None] | None = None

    @property
    def key(self) -> str:
        """What the page calls it: another name for another file of the same path."""
        status = self.path.stat()
        return "m" + digest_text(self.path, status.st_size, status.st_mtime_ns, self.span)


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that the page shows of a run, as JSON knows it, and its files by key."""

    shown: dict[str, Any]
    media: dict[str, Media]


def write(run_dir: Path) -> Path:
    """Write the page of a run, one file with everything inside. Returns RUN/report/report.html."""
    found, path = gathered(run_dir), run_dir / "report" / "report.html"
    if not any(found.shown[name] for name in ("sets", "trainings")):
        raise UserError(f"{run_dir} has neither a training nor samples", "wantrain run demo_anime    makes both")
    nonce = secrets.token_urlsafe(16)
    inside = "\n".join(f'<script type="text/plain" id="{key}">{base64.b64encode(held).decode()}</script>'
                       for key, held in _all_bytes(found.media).items())
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce)}">'
    page = filled(policy, {"is_live": False, "runs": [found.shown]}, inside)
    write_text(path, page.replace("NONCE", nonce))
    return path


def filled(policy: str, data: Mapping[str, Any], media: str) -> str:
    """The template with a policy, its data, and files as base64 text; scripts and styles still have the word NONCE."""
    page = TEMPLATE.read_text(encoding="utf-8")
    for place, text in zip(PLACES, (policy, json_text(data), media), strict=True):
        before, _, after = page.partition(place)
        page = before + text + after
    return page


def json_text(value: Any) -> str:
    """JSON that may stand inside a script of a page: no number that JSON lacks, no character that ends the script."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("NONCE", "NONC\\u0045")


def _finite(value: Any) -> Any:
    """The value with null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _all_bytes(media: Mapping[str, Media]) -> dict[str, bytes]:
    """What the page holds of each file; none of a clip that cannot be read any more."""
    with tempfile.TemporaryDirectory() as folder:
        made = {key: file_of(one, key, Path(folder)) for key, one in media.items()}
        return {key: path.read_bytes() for key, path in made.items() if path is not None}


def file_of(media: Media, key: str, folder: Path) -> Path | None:
    """The file to show, which of a clip's span is made in `folder`; None where the clip cannot be read any more."""
    if media.span is None:
        return media.path
    from wantrain.data import preview

    target = folder / (key + preview.suffix_of(media.path))
    if not target.exists():
        try:
            preview.write(media.path, target, *media.span, fps=16, longest_px=CLIP_PX, most_s=CLIP_S)
        except (UserError, OSError, ValueError):  # of a film's decoder too: it was moved since, or is elsewhere
            return None
    return target


def gathered(run_dir: Path) -> Gathered:
    """Read what the folder of a run has."""
    media: dict[str, Media] = {}
    folders = trainings_of(run_dir) or [run_dir]
    sets = [_set("evaluated", run_dir / "report", media),
            *(_set(" ".join(("in training", *_expert(folder, run_dir))), folder / "live", media)
              for folder in folders)]
    found = [one for one in sets if one]
    trainings = [one for folder in folders if (one := _training(folder, run_dir, media))]
    config: dict[str, Any] = next((one["config"] for one in trainings if one["config"]), {})
    reported = next((one for one in found if one["settings"]), None)
    headers = {" ".join(("training", *filter(None, [one["expert"]]))): one["header"] for one in trainings
               if one["header"]}
    return Gathered({
        "name": run_dir.resolve().name, "folder": str(run_dir.resolve()), "sets": found, "trainings": trainings,
        "settings": reported["settings"] if reported else config,
        "provenance": (reported["provenance"] if reported else {}) | headers,
        "votes": list(remembered(run_dir / VOTES, dict)),
    }, media)


def _expert(folder: Path, run_dir: Path) -> list[str]:
    return [folder.name] if folder != run_dir else []


def _set(title: str, folder: Path, media: dict[str, Media]) -> dict[str, Any] | None:
    """A folder of results, its videos named by keys; None where there is none."""
    if not (folder / results.NAME).is_file():
        return None
    try:
        read = results.read(folder)
    except UserError as error:  # of another version: the page says so, and shows the rest
        return {"title": title, "fault": error.message, "settings": {}, "provenance": {}}
    shown = asdict(read)
    for video in shown["videos"]:
        path = (folder / video["file"]).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.suffix in MIME and path.is_file()
        video |= {"key": _named(Media(path), media) if inside else "", "mime": MIME.get(path.suffix, "")}
    return {"title": title, "fault": "", **shown}


def _named(one: Media, media: dict[str, Media]) -> str:
    key = one.key
    media[key] = one
    return key


def _training(folder: Path, run_dir: Path, media: dict[str, Media]) -> dict[str, Any] | None:
    """What one training left; None where it left nothing yet."""
    lines = metrics.read(folder / "metrics.jsonl")
    judgement, header = read_object(folder / "judgement.json"), read_object(folder / "run.json")
    config = schema.flat(kept_config(folder))
    if not (lines or judgement or header or config):
        return None
    for clip in _extremes(judgement.get("clips", [])):
        path = Path(clip["file"])
        if path.is_file():
            mime = MIME[".jpg" if path.suffix.lower() in IMAGE_SUFFIXES else ".mp4"]
            clip |= {"key": _named(Media(path, (clip["start_s"], clip["end_s"])), media), "mime": mime}
    return {"expert": "".join(_expert(folder, run_dir)), "curves": _curves(lines), "judgement": judgement,
            "header": header, "config": config, "step": int(lines[-1]["step"]) if lines else 0,
            "num_steps": config.get("train.num_steps"), "step_s": _pace(lines)}


def _extremes(clips: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clips of each set with the highest and the lowest mean loss over all validations."""
    chosen: list[dict[str, Any]] = []
    for kind in ("heldout", "trained"):
        own = sorted((clip for clip in clips if clip["set"] == kind and clip["loss"]),
                     key=lambda clip: sum(clip["loss"]) / len(clip["loss"]))
        chosen += own[:NUM_CLIPS] + own[max(NUM_CLIPS, len(own) - NUM_CLIPS):]
    return chosen


def _curves(lines: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Points of each of CURVES; each is the mean of neighbours where there are more than can be drawn."""
    return {name: thinned([(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))])
            for name in CURVES}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most NUM_POINTS points."""
    size = math.ceil(len(points) / NUM_POINTS) or 1
    pieces = [points[i:i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def _pace(lines: Sequence[Mapping[str, float]]) -> float | None:
    """Seconds a step, of late: the median, as a step with a validation or a checkpoint takes longer."""
    times = sorted(line["step_s"] for line in lines[-50:] if math.isfinite(line.get("step_s", math.nan)))
    return times[len(times) // 2] if times else None
