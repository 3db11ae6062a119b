"""The clips: where they are, which windows of them are used, and how they come into batches."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from wantrain.config.sections.parts import (
    MISSING,
    Allowed,
    FloatAbove0,
    Folder,
    Frames,
    IntFrom0,
    IntFrom1,
    Rule,
    Seconds,
    Section,
    Share,
    near_size,
    size_rule,
)
from wantrain.files import like
from wantrain.models.variants import VARIANTS
from wantrain.terms import UserError

if TYPE_CHECKING:
    from wantrain.config.schema import Config



class DataMode(Enum):
    cache = "cache"
    stream = "stream"


class Extract(Enum):
    head = "head"
    middle = "middle"
    uniform = "uniform"
    sliding = "sliding"
    random = "random"


_Repeats = Annotated[float, Allowed("0.001 (once in a thousand epochs) or more", lambda repeats: repeats >= 0.001)]


@dataclass(slots=True)
class Source:
    path: Annotated[str, Allowed("a folder, a manifest or a URL", bool)] = MISSING
    """Folder of media with sidecar .txt, .jsonl, .csv, .parquet, .tar shards ('*.tar'), hf://datasets/OWNER/NAME."""
    repeats: _Repeats = 1.0
    """How often an epoch shows each clip of this source; 0.5 shows one half of them in turn with the other."""
    weight: FloatAbove0 | None = None
    """Share of the samples relative to the weights of other sources, whatever their sizes; in place of repeats."""
    speed: FloatAbove0 = 1.0
    """2 shows two seconds of the source in one; 1 leaves motion as it was."""
    preserve: bool = False
    """Teach the adapter to predict, for these clips, what the frozen base predicts (prior preservation)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to the source's own where they differ, e.g. {video: mp4, caption: text}."""


@dataclass(slots=True)
class Data(Section):
    may_change: ClassVar[tuple[str, ...]] = ("mode", "cache_dir", "heldout", "num_workers", "timeout_s",
                                             "allow_drops", "trigger")
    entangled: ClassVar[tuple[str, ...]] = ("batch_size",)
    sources: dict[str, Source] = MISSING
    """The training sets by name; a regularisation set is one more source without the trigger in its captions."""
    heldout: str | None = None
    """Clips never trained on, for validation and evaluation; same forms as a source's path."""
    trigger: str = ""
    """The words in the captions that call the style; written into the exported file, used by evaluate."""
    mode: DataMode = DataMode.cache
    """cache: read latents made by `wantrain cache`; stream: decode and encode at every step."""
    cache_dir: Folder = "cache"
    """Folder of the content-addressed cache; may be shared by any number of recipes."""
    extract: Extract = Extract.head
    """Which windows of a clip: the head, the middle, uniform (fewest that miss nothing), sliding, random (stream)."""
    limits: dict[str, Any] = field(default_factory=dict)
    """[low, high] by column of measurements (wantrain-filter), null for no bound; clips outside are dropped."""
    allow_drops: bool = False
    """Go on without clips that cannot be used, e.g. unreadable or too short; they are listed with their reasons."""
    max_tokens_per_clip: IntFrom1 | None = None
    """Where a length at a resolution has more transformer tokens than this, its picture shrinks until it fits."""
    max_tokens_per_batch: IntFrom1 | None = None
    """A step takes as many times batch_size samples of a bucket as fit into these tokens; null: always once."""
    tag_orders: IntFrom0 = 0
    """Other orders of a caption's comma-separated tags, encoded once and drawn anew for each sample."""
    num_workers: IntFrom1 | None = None
    """Processes that look into files and decode; null takes all cores, shared by the processes of a machine."""
    timeout_s: Seconds = 300.0
    """A file that takes longer than this to look into, or a clip to decode, is a fault and does not stop the others."""
    num_frames: list[Frames] = MISSING
    """Clip lengths in frames at the model's fps, each 4n+1; a clip goes to the longest that it fills."""
    resolutions: list[list[int]] = MISSING
    """Sizes as [height, width] in pixels; a clip goes to the one nearest in aspect."""
    batch_size: IntFrom1 = 1
    """Samples in an optimizer step over all processes; accumulation follows from train.micro_batch_size."""
    caption_dropout: Share = 0.0
    """Share of samples trained with the empty caption; above 0 the style also enters what guidance moves away from."""
    first_frame_share: Share = 0.5
    """Share of samples given their first frame where the model works with and without (TI2V-5B, Fun-Control)."""

    def rules(self, config: Config) -> Iterator[Rule]:
        yield bool(self.num_frames), "data.num_frames", self.num_frames, "at least one length"
        yield bool(self.resolutions), "data.resolutions", self.resolutions, "at least one [height, width]"
        variant = VARIANTS[config.model.variant]
        for size in self.resolutions:
            yield size_rule("data.resolutions", size)
            yield all(side % variant.multiple_px == 0 for side in size), "data.resolutions", size, \
                f"both must be multiples of {variant.multiple_px} for {variant.name}"
        yield isinstance(self.sources, dict) and bool(self.sources), "data.sources", self.sources, "at least one source"
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        yield len(weighted) in (0, len(self.sources)), "data.sources.*.weight", weighted, "all sources, or none"
        for column, limit in self.limits.items():
            yield _is_range(limit), f"data.limits.{column}", limit, "[low, high] with null for no bound"
        yield self.extract is not Extract.random or self.mode is DataMode.stream, "data.extract", "random", \
            "only with data.mode=stream; uniform or sliding give more than the head from a cache"
        yield self.batch_size % config.train.micro_batch_size == 0, "data.batch_size", self.batch_size, \
            f"a multiple of train.micro_batch_size ({config.train.micro_batch_size})"

    def remedies(self, config: Config) -> dict[str, object]:
        multiple = VARIANTS[config.model.variant].multiple_px
        sizes = [near_size(size, multiple) for size in self.resolutions if len(size) == 2]
        return {"data.batch_size": config.train.micro_batch_size,
                **({"data.resolutions": f"[{','.join(sizes)}]"} if sizes else {})}


def _is_range(limit: object) -> bool:
    """Whether this is [low, high] of numbers or null, and not both null."""
    if not (isinstance(limit, list) and len(limit) == 2):
        return False
    bounds = [bound for bound in limit if bound is not None]
    numbers = all(isinstance(bound, int | float) for bound in bounds)
    return numbers and bool(bounds) and bounds == sorted(bounds)


def refuse_absent_clips(config: Config) -> None:
    """Raise UserError for a path of clips on this machine with nothing there; for verbs that read clips."""
    paths = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    for key, path in {**paths, "data.heldout": config.data.heldout or ""}.items():
        if path and not _may_hold_clips(path):
            about = "; a backslash parts no folders here" if "\\" in path else ""
            raise UserError(f"{key} = {path!r} does not exist{about}",
                            shlex.quote(f"{key}={like(path) or 'FOLDER'}") + "    a folder of clips with .txt "
                            "captions, a .jsonl, .csv, .parquet or .tar, or a URL")


def _may_hold_clips(path: str) -> bool:
    if "://" in path or (path.endswith(".tar") and set(path) & set("*?[")):
        return True  # only shards are named by a pattern
    try:
        return os.path.lexists(Path(path).expanduser())
    except (RuntimeError, ValueError):
        return True  # whoever opens it says why it cannot
