"""The tensors of clips and captions: read from the cache, or encoded on the spot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from wantrain.config import DataMode
from wantrain.data import decode
from wantrain.data.cache import CONDITION, LATENTS, MASK, TEXT, Cache, missing
from wantrain.engine import launch
from wantrain.jobs import in_workers, progress
from wantrain.models import conditioning, encode
from wantrain.models.loading import let_go
from wantrain.recipe.clips import Clips, num_workers, refuse_missing
from wantrain.recipe.recipe import Recipe
from wantrain.terms import WINDOW, Encoded, PlannedClip, Sample, UserError


class Encode(Protocol):
    """What cache and streaming share: a window or a caption to its tensors."""

    def window(self, planned: PlannedClip) -> Encoded: ...
    def text(self, caption: str) -> torch.Tensor: ...


def write_texts(recipe: Recipe, cache: Cache, captions: Sequence[str], device: torch.device, is_main: bool) -> None:
    """Write the features of those captions that the cache lacks, and let go of the text encoder, the largest of all.

    Several processes may be given the same captions: each leaves out what another has written by then.
    """
    entries = missing(cache.entries([], captions))
    text = recipe.load_text(device) if entries else None
    with progress(len(entries), 0, "caption", "captions", is_main) as bar:
        for path, (_, caption) in entries.items():
            if text is not None and not path.exists():
                cache.write((TEXT, str(caption)), {"x": encode.encode_text(text, str(caption))})
            bar.update()
    del text
    let_go()


def prepare_texts(recipe: Recipe, clips: Clips, device: torch.device) -> None:
    """Write every text of a training that is not there yet, before anything else is loaded.

    Each process begins elsewhere in the list and leaves out what others have written, so that they share the work
    without waiting for each other; on machines without a folder in common each writes all.
    """
    texts = [*clips.captions, *clips.shown]
    first = len(texts) * launch.rank() // launch.world_size()
    write_texts(recipe, clips.cache, [*texts[first:], *texts[:first]], device, launch.is_first())
    if launch.is_first():
        streamed = clips.config.data.mode is DataMode.stream
        needed = clips.cache.entries([], texts) if streamed else clips.entries
        clips.cache.claim(Path(clips.config.run.dir), clips.config.run.name, needed)


class Encoder:
    """Decode windows and encode them on the spot with the base's VAE and image encoder, on `device`. Texts are read
    from the cache, where `write_texts` has put them: their encoder is not kept beside these.
    """

    def __init__(self, recipe: Recipe, cache: Cache, device: torch.device) -> None:
        self._variant, self._cache = recipe.variant, cache
        self._encoders = recipe.load_encoders(device)

    def encode(self, kind: str, planned: PlannedClip, frames: conditioning.Frames) -> dict[str, torch.Tensor]:
        """The tensors of one cache entry, float32 on the CPU, from the frames that it is made of."""
        if kind == LATENTS:
            return {"x": self._encoders.latents(frames[WINDOW])}
        if kind == MASK:
            bucket = planned.partners["mask"].bucket
            return {"x": encode.pool_mask(frames["mask"], bucket, self._variant.multiple_px // 2)}
        own = {name: frames[name] for name in self._cache.media_of(planned, [kind])}
        return conditioning.encode(self._variant, self._encoders, conditioning.of_window(own, planned.bucket),
                                   planned.bucket)

    def whole(self, planned: PlannedClip, frames: conditioning.Frames) -> Encoded:
        """Every entry of a window."""
        return encoded({kind: self.encode(kind, planned, frames) for kind in self._cache.kinds_of(planned)})

    def window(self, planned: PlannedClip) -> Encoded:
        """A window, decoded in this process."""
        names = self._cache.media_of(planned, self._cache.kinds_of(planned))
        return self.whole(planned, {name: decode.read_window(planned.part(name)) for name in names})

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._cache.read((TEXT, caption))["x"]


def encoded(entries: Mapping[str, Mapping[str, torch.Tensor]]) -> Encoded:
    """Put a window together from its cache entries, given by kind."""
    return Encoded(entries[LATENTS]["x"], entries[MASK]["x"] if MASK in entries else None, entries.get(CONDITION, {}))


class Streamed:
    """Tensors made on the spot: worker processes decode ahead of training, and this process encodes.

    `coming` are the windows in the order in which they will be asked for.
    """

    def __init__(self, clips: Clips, encoder: Encoder, coming: Iterable[PlannedClip]) -> None:
        self._encoder, cache = encoder, clips.cache
        wanted = ((p, cache.media_of(p, cache.kinds_of(p))) for p in coming)
        self._decoded = in_workers(decode.frames_in_worker, wanted, num_workers(clips.config),
                                   clips.config.data.timeout_s, "data.timeout_s", ordered=True)

    def window(self, planned: PlannedClip) -> Encoded:
        """The next window, which must be this one."""
        (given, _), result, why = next(self._decoded)
        assert given == planned, f"{given.name} was decoded where {planned.name} is asked for"
        frames, _, fault = result or ({}, "", f"clip {planned.clip.id}: {why}")
        if not frames:
            raise UserError(fault, "replace the file or take it out of the manifest; the last checkpoint is untouched")
        return self._encoder.whole(planned, {name: torch.from_numpy(array) for name, array in frames.items()})

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._encoder.text(caption)


class Cached:
    """Tensors read from the cache, which must be complete: UserError otherwise."""

    def __init__(self, clips: Clips) -> None:
        self._cache = clips.cache
        refuse_missing(clips)

    def window(self, planned: PlannedClip) -> Encoded:
        """A window's entries."""
        return encoded({kind: self._cache.read((kind, planned)) for kind in self._cache.kinds_of(planned)})

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._cache.read((TEXT, caption))["x"]


def sample_of(clips: Clips, source: Encode, planned: PlannedClip, caption: str, first: bool) -> Sample:
    """One training or held-out sample; `first`: whether its first frame is given, where the task leaves that open."""
    window = source.window(planned)
    condition, latents_CTHW, known_T = conditioning.arrange(clips.variant, dict(window.condition), window.latents_CTHW,
                                                            first, source.text)
    mask = window.mask_1THW
    if mask is not None and (before := latents_CTHW.shape[1] - window.latents_CTHW.shape[1]):
        whole = mask.expand(1, *window.latents_CTHW.shape[1:])
        mask = torch.cat([torch.ones_like(whole[:, :before]), whole], dim=1)
    words = clips.class_caption(caption)
    return Sample(latents_CTHW, encode.pad_text(source.text(caption)), mask, condition, known_T,
                  None if words is None else encode.pad_text(source.text(words)))


def samples_of(clips: Clips, source: Encode, windows: Sequence[PlannedClip]) -> Callable[[int], Sample]:
    """place -> that window to measure, read once, given its first frame where some of the training samples are.

    Its loss looks everywhere, and at its own caption alone.
    """
    first = clips.config.data.first_frame_share > 0

    @functools.cache
    def sample(place: int) -> Sample:
        own = sample_of(clips, source, windows[place], windows[place].clip.caption, first)
        return replace(own, class_text_LD=None, mask_1THW=None)

    return sample
