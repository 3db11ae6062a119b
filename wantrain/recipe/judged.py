"""What `evaluate` measures: of the videos as they are on the disk, of columns, of held-out clips to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wantrain import judging, objective, pictures, style, validation
from wantrain.config import Config, variant_of
from wantrain.data import decode
from wantrain.judging import About
from wantrain.models import hub, sampling
from wantrain.models.seeing import ClipSeer, Seer, TinySeer
from wantrain.recipe.clips import Clips, holding_trigger
from wantrain.recipe.draft import is_tiny, without
from wantrain.recipe.records import Shot
from wantrain.recipe.sampler import LoraFiles, Studio
from wantrain.results import Column, Metric
from wantrain.terms import NUM_TIMESTEPS, Batch

Losses = dict[str, torch.Tensor]
"""By column: the held-out loss of every clip at every sigma, [clips, sigmas]."""

LOSS = About("held-out loss", "Mean error on clips that were not trained on; it tells whether the LoRA knows their "
             "kind, and nothing of taste.", "lower")
GAIN = About("held-out loss minus base", "The same, minus that of the base, paired by clip; an interval below 0 says "
             "that the training helped on such clips, not how much one sees of it.", "lower")
STYLE = About("style distance", "Distance in colours and texture from the training clips with the trigger, 0 to 1; it "
              "sees no content, and a copy of one clip scores as well as a style.", "lower")
COLOUR = About("colour distance", "The part of the style distance that compares colours.", "lower")
TEXTURE = About("texture distance", "The part of the style distance that compares texture; blur counts too.", "lower")
SELECTIVITY = About("trigger selectivity", "1 where the LoRA without its trigger samples in the base's style, 0 where "
                    "the trigger makes no difference; it cannot tell whether the style itself is right.", "higher")


@dataclass(frozen=True, slots=True)
class Judged:
    """One video's numbers, its style, and its middle frame."""

    numbers: dict[str, float]
    style: style.Style
    middle_CHW: torch.Tensor


class Judge:
    """Measures videos against the training clips: those with the trigger, and for copies all of them."""

    def __init__(self, clips: Clips, fps: float) -> None:
        self._fps, self._seer = fps, seer_of(clips.config)
        wanted, thumbs, seen = [], [], []
        holding = {id(p) for p in holding_trigger(clips)}
        for planned in clips.planned:
            frames_FCHW = decode.read_window(planned)
            thumbs.append(judging.thumbs(frames_FCHW))
            if id(planned) in holding:
                wanted.append(style.describe([frames_FCHW]))
                seen += [self._seer.features(frames_FCHW)] if self._seer else []
        self._seen_D = torch.stack(seen).mean(0) if seen else None
        self._wanted, self._trained_NK = style.mean(wanted), torch.cat(thumbs)

    def video(self, frames_FCHW: torch.Tensor, prompt: str) -> Judged:
        """Everything that one video tells alone; `prompt` is its own, without the trigger."""
        described = style.describe([frames_FCHW])
        numbers = {"style": style.distance(described, self._wanted)["style"], **judging.measure(frames_FCHW, self._fps),
                   "memorised": judging.memorised(frames_FCHW, self._trained_NK)}
        if self._seer and self._seen_D is not None:
            adherence = self._seer.adherence(prompt, frames_FCHW)
            numbers |= {"likeness": float(self._seer.features(frames_FCHW) @ self._seen_D)}
            numbers |= {} if adherence is None else {"adherence": adherence}
        return Judged(numbers, described, frames_FCHW[len(frames_FCHW) // 2])

    def style_parts(self, videos: Sequence[Judged]) -> dict[str, float]:
        """style, colour and texture distance of several videos together."""
        return style.distance(style.mean([one.style for one in videos]), self._wanted)


def seer_of(config: Config) -> Seer | None:
    """The encoder that the config names; the tiny base has its own."""
    if config.evaluate.encoder is not None:
        return ClipSeer(hub.local(config.evaluate.encoder))
    return TinySeer() if is_tiny(variant_of(config)) else None


def judge(clips: Clips, shots: Sequence[Shot], folder: Path, fps: float) -> tuple[dict[str, Judged], list[Metric]]:
    """(every video by its shot's name, the metrics of the columns)."""
    own, trigger = Judge(clips, fps), clips.config.data.trigger
    judged = {shot.name: own.video(pictures.read_mp4(folder / f"{shot.name}.mp4"), without(shot.caption, trigger))
              for shot in shots}
    heldout = [own.video(decode.read_window(planned), without(planned.clip.caption, trigger))
               for planned in clips.heldout]
    columns = {shot.column.id: [(other, judged[other.name]) for other in shots if other.column.id == shot.column.id]
               for shot in shots}
    videos = {column: [one for _, one in rows] for column, rows in columns.items()}
    parts = {column: own.style_parts(of_column) for column, of_column in videos.items()}
    floor = own.style_parts(heldout)
    metrics = [Metric(name, about.label, about.tells, about.better, {column: (part[key], None) for column, part in
                                                                     parts.items()}, floor[key])
               for name, key, about in (("style", "style", STYLE), ("colour", "colour", COLOUR),
                                        ("texture", "texture", TEXTURE))]
    for name, about in judging.METRICS.items():
        if name == "diversity":
            found = {column: told for column, rows in columns.items() if (told := diversity(
                [(shot.place[0], one.middle_CHW) for shot, one in rows]))}
            reference = None
        else:
            found = {column: mean for column, of_column in videos.items() if (mean := mean_of(of_column, name))}
            reference = (mean_of(heldout, name) or (None,))[0]
        if found:
            metrics.append(Metric(name, about.label, about.tells, about.better, found, reference))
    return judged, [*metrics, *selectivity({shot.column.id: shot.column for shot in shots}, videos)]


def mean_of(videos: Iterable[Judged], name: str) -> tuple[float, float | None] | None:
    """The mean of one of the videos' numbers with its interval; None where they have none, being single pictures."""
    values = [one.numbers[name] for one in videos if name in one.numbers]
    return validation.interval(torch.tensor(values)).told if values else None


def diversity(rows: Iterable[tuple[int, torch.Tensor]]) -> tuple[float, float | None] | None:
    """Of a column's (place of the prompt, middle_CHW): the mean over prompts, each with several seeds; None without."""
    by_prompt: dict[int, list[torch.Tensor]] = {}
    for place, middle_CHW in rows:
        by_prompt.setdefault(place, []).append(middle_CHW)
    values = [judging.diversity(seeds) for seeds in by_prompt.values() if len(seeds) > 1]
    return validation.interval(torch.tensor(values)).told if values else None


def selectivity(columns: Mapping[str, Column], videos: Mapping[str, Sequence[Judged]]) -> list[Metric]:
    """Of each LoRA that is there with and without the trigger."""
    described = {column: style.mean([one.style for one in of_column]) for column, of_column in videos.items()}
    found = {}
    for plain in columns.values():
        for column in columns.values():
            if plain.lora and not plain.trigger and column.trigger and (column.lora, column.strength) == (
                    plain.lora, plain.strength):
                far, near = (style.distance(described[one.id], described["base"])["style"] for one in (column, plain))
                found[column.id] = (1 - near / far if far else 0.0, None)
    about = SELECTIVITY
    return [Metric("selectivity", about.label, about.tells, about.better, dict(found))] if found else []


def heldout_losses(studio: Studio, heldout: validation.HeldOut, columns: Iterable[tuple[Column, LoraFiles | None]]
                   ) -> Losses:
    """Of the base and of every LoRA at its strength: every held-out clip at every sigma."""
    found = {}
    for column, loras in columns:
        pipeline = studio.pipeline(loras)
        sampling.set_strength(pipeline, column.strength)
        found[column.id] = torch.stack([validation.losses(
            heldout, [(place, s, 0) for place in range(len(heldout.clips))], loss_of(pipeline, sigma))
            for s, sigma in enumerate(heldout.sigmas)], dim=1)
    return found


def loss_of(pipeline: sampling.Pipeline, sigma: float) -> Callable[[Batch], torch.Tensor]:
    """The loss of the transformer that works at this sigma."""
    transformer, _ = pipeline.at(NUM_TIMESTEPS * sigma)
    pipeline.put_to_work(transformer)
    device = pipeline.device
    return lambda batch: objective.losses(transformer, batch, objective.Objective(), device=device,
                                          dtype=pipeline.dtype)


def loss_metrics(losses: Losses) -> list[Metric]:
    """The losses as metrics: means, and what was gained on the base with its interval over clips."""
    if not losses:
        return []
    means: dict[str, tuple[float, float | None]] = {column: (float(table.mean()), None)
                                                    for column, table in losses.items()}
    gains = {column: validation.interval((table - losses["base"]).mean(1)).told
             for column, table in losses.items() if column != "base"}
    return [Metric("heldout_loss", LOSS.label, LOSS.tells, LOSS.better, means),
            Metric("heldout_minus_base", GAIN.label, GAIN.tells, GAIN.better, gains)]

