"""The clips of a recipe: listed, placed in buckets, with their cache. Nothing heavy is loaded."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wantrain.config import Config, DataMode
from wantrain.data import manifest, media, plan
from wantrain.data.buckets import batch_factors, buckets
from wantrain.data.cache import CONDITION, MASK, Cache, Conditioning, Entry, counted, describe, missing
from wantrain.data.captions import captions_of
from wantrain.data.folders import Account
from wantrain.data.plan import Plan
from wantrain.files import digest_text
from wantrain.jobs import cores
from wantrain.models import inventory
from wantrain.models.base import Base, encoder_parts
from wantrain.models.task_media import media_of_task
from wantrain.models.variants import Variant
from wantrain.recipe.recipe import Recipe, open_recipe, outline
from wantrain.terms import PARTNERS, TEXT_LEN, Bucket, Clip, Dropped, PlannedClip, UserError

HELDOUT = "held out"
"""What the clips of data.heldout are called beside the sources."""


@dataclass(frozen=True, slots=True)
class Clips:
    """Every clip of a recipe: the windows to train on, those held out, those dropped, and the cache of them all.

    The same for both experts: what `high` and `low` say in a config is not about clips.
    """

    config: Config
    variant: Variant
    plan: Plan
    heldout: list[PlannedClip]
    cache: Cache
    accounts: Mapping[str, Account] = field(default_factory=dict)
    """What else is in each source, and in data.heldout (HELDOUT)."""
    heldout_dropped: Sequence[Dropped] = ()

    @property
    def planned(self) -> list[PlannedClip]:
        """The windows to train on."""
        return self.plan.used

    @property
    def everything(self) -> list[PlannedClip]:
        """The windows to train on, and those held out."""
        return self.planned + self.heldout

    @property
    def batch_factors(self) -> dict[Bucket, int]:
        """How many times data.batch_size samples a step takes of each bucket."""
        data = self.config.data
        return batch_factors({p.bucket for p in self.planned}, data.batch_size, data.max_tokens_per_batch,
                             self.variant.multiple_px)

    @property
    def captions(self) -> list[str]:
        """Every text that training may draw, the empty one first, and one that goes with every sample."""
        texts = ["", *filter(None, [self.variant.second_prompt]), *(text for p in self.everything
                       for text in captions_of(p.clip, self.config.data.tag_orders))]
        return [*texts, *(words for text in dict.fromkeys(texts) if (words := self.class_caption(text)) is not None)]

    @property
    def shown(self) -> list[str]:
        """Every text that a training samples or measures with, and does not draw."""
        own, validation = self.config.sampler, self.config.validation
        return [*([*own.prompts, own.negative_prompt] if own.prompts else []),
                *(validation.unrelated if validation.every_steps and self.heldout else [])]

    @property
    def entries(self) -> dict[Path, Entry]:
        """All that the cache must hold for these clips."""
        return self.cache.entries(self.everything, [*self.captions, *self.shown])

    def class_caption(self, caption: str) -> str | None:
        """The caption with the class words in place of the trigger, where training preserves those."""
        words, trigger = self.config.loss.class_words, self.config.data.trigger
        return caption.replace(trigger, words) if words and trigger in caption else None

    def cache_bytes(self, caption_tokens: Mapping[str, int], dtype_bytes: int) -> int:
        """About what the whole cache takes: its windows, and text features of these captions' tokens."""
        shape, architecture, total = self.variant.latent_THW, self.variant.architecture, 0
        for kind, p in self.cache.entries(self.everything, []).values():
            assert isinstance(p, PlannedClip), "no caption was asked for"
            if kind == CONDITION:
                total += inventory.condition_bytes(self.variant, p.bucket, "reference" in p.partners)
            else:
                bucket = p.partners["mask"].bucket if kind == MASK else p.bucket
                total += 4 * math.prod(shape(bucket)) * (1 if kind == MASK else architecture.out_channels)
        num_tokens = sum(min(number, TEXT_LEN) for number in caption_tokens.values())
        return total + num_tokens * architecture.text_dim * dtype_bytes


def list_clips(config: Config) -> dict[str, manifest.Listing]:
    """The clips of each source and, as HELDOUT, those never trained on, each with what else is there."""
    fetched = Path(config.data.cache_dir) / "fetched"
    sources = [manifest.ClipSource(name, own.path, own.repeats, own.speed, own.preserve, own.columns, fetched)
               for name, own in config.data.sources.items()]
    listed = {source.name: manifest.listed(source) for source in sources}
    if config.data.heldout:
        listed[HELDOUT] = manifest.listed(manifest.ClipSource("heldout", config.data.heldout, fetched=fetched,
                                                              key="data.heldout"))
    return listed


def open_clips(recipe: Recipe, arguments: Sequence[str], refuse: bool = True) -> Clips:
    """List the clips, look into their files and place them. Checks all that can be checked without loading weights.

    `arguments` are the user's overrides. Without `refuse`, clips that cannot be used are only told in the plan.
    """
    config, data, variant = recipe.config, recipe.config.data, recipe.variant
    cache = open_cache(recipe, arguments)
    listed = list_clips(config)
    training = with_sound(variant, [clip for name in data.sources for clip in listed[name].clips])
    heldout = with_sound(variant, listed[HELDOUT].clips if HELDOUT in listed else [])
    refuse_partners(variant, [*training, *heldout])
    infos = media.look_all(plan.files_of(training + heldout), cache.folder, num_workers(config), data.timeout_s)
    rules = plan.Rules(buckets(data.num_frames, data.resolutions, variant.multiple_px, data.max_tokens_per_clip),
                       variant.fps, data.extract.name, data.limits, variant.face_px, variant.shows_reference_whole)
    placed = _without_faults(plan.place(training, infos, rules), cache)
    apart = _without_faults(plan.place(heldout, infos, replace(rules, extract="head", limits={})), cache)
    if refuse:
        refuse_drops([*placed.dropped, *apart.dropped], data.allow_drops)
    if not placed.used:
        raise UserError(f"none of {placed.num_found} clips can be used", "wantrain check says why; look at data.limits")
    clips = Clips(config, variant, Plan(_weighted(placed.used, config), placed.dropped), apart.used, cache,
                  {name: one.account for name, one in listed.items()}, apart.dropped)
    if refuse:
        refuse_undrawn(recipe, clips)
    if refuse and config.loss.class_words and not holding_trigger(clips):
        raise without_trigger(clips)  # without one to replace, the class words would preserve nothing
    return clips


def refuse_unready(config: Config, arguments: Sequence[str]) -> None:
    """Raise what would keep a training from its start, before the libraries are imported that compute."""
    recipe = open_recipe(config)
    clips = open_clips(recipe, arguments)
    for own in recipe.trainings():
        outline(own)  # which refuses targets that match nothing
    if config.data.mode is DataMode.cache:
        refuse_missing(clips)


def refuse_missing(clips: Clips) -> None:
    """Raise UserError, with the command that makes them, where the cache lacks what training draws."""
    if lacking := missing(clips.cache.entries(clips.everything, clips.captions)):
        raise UserError(f"the cache lacks {counted(lacking)} for this base and these settings; the first is "
                        f"{describe(next(iter(lacking.values())))}", clips.cache.build_command)


def open_cache(recipe: Recipe, arguments: Sequence[str]) -> Cache:
    """The cache of the recipe's encoders. UserError where its folder cannot be one."""
    folder, base = Path(recipe.config.data.cache_dir), recipe.base
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data.cache_dir = {recipe.config.data.cache_dir!r} is not a folder",
                        "data.cache_dir=cache, or another folder")
    text_parts = [base.digest(part, recipe.memo) for part in ("text_encoder", "tokenizer")]
    vae_dtype, form = recipe.config.memory.vae, recipe.encoders_form
    return Cache(folder, " ".join([base.digest("vae", recipe.memo), *[vae_dtype.name] * (vae_dtype.name != "float32")]),
                 " ".join([*text_parts, recipe.config.model.dtype.name, *filter(None, [form])]),
                 shlex.join(["wantrain", "cache", *arguments]), conditioning_of(base, recipe.memo, form))


def conditioning_of(base: Base, memo: Path, form: str) -> Conditioning:
    """The part of the cache that belongs to the variant's task, whose image encoder is stored in `form`."""
    names = media_of_task(base.variant.task).encoded
    if not names:
        return Conditioning()
    parts = [base.digest(part, memo) for part in encoder_parts(base.variant)]
    return Conditioning(digest_text(base.variant.task, *([*parts, *filter(None, [form])] if parts else [""])), names)


def with_sound(variant: Variant, clips: Sequence[Clip]) -> list[Clip]:
    """The clips; where the task hears, and no sound goes with a clip, that is its own film's."""
    if "audio" not in media_of_task(variant.task).partners:
        return list(clips)
    return [replace(clip, partners={"audio": clip.path, **clip.partners}) for clip in clips]


def refuse_partners(variant: Variant, clips: Sequence[Clip]) -> None:
    """Raise UserError for clips that lack media which the task needs, or have media which it would ignore."""
    task = media_of_task(variant.task)
    for needs in task.partners_needed:
        if lacking := [c.id for c in clips if not set(needs) & c.partners.keys()]:
            raise UserError(f"{len(lacking)} clips have no {' or '.join(needs)}, such as {lacking[0]}, and "
                            f"{variant.name} ({variant.task}) works from it", f"add a column, or a folder, {needs[0]} "
                            "to the source: docs/tasks.md")
    for kind in PARTNERS[:-1]:  # a mask is the loss's, of any task
        if kind not in task.partners and (owners := [c.id for c in clips if kind in c.partners]):
            raise UserError(f"{len(owners)} clips have a {kind}, such as {owners[0]}, and {variant.name} "
                            f"({variant.task}) takes none: it would be ignored",
                            f"take the column or the folder `{kind}` out of the source")
    if alone := [(c.id, pair) for c in clips if (pair := task.lacking(c.partners))]:
        id_, (kind, other) = alone[0]
        raise UserError(f"{len(alone)} clips have a {kind} and no {other}, such as {id_}, and {variant.name} "
                        f"({variant.task}) takes them together",
                        f"add the column or the folder `{other}` to the source, or take `{kind}` out: docs/tasks.md")


def num_workers(config: Config) -> int:
    """The number of worker processes: data.num_workers, else this process's share of the cores."""
    shares = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.data.num_workers or max(1, cores() // shares)


def holding_trigger(clips: Clips) -> list[PlannedClip]:
    """The windows to train on with the trigger in a caption."""
    trigger = clips.config.data.trigger
    return [p for p in clips.planned if any(trigger in text for text in (p.clip.caption, *p.clip.more_captions))]


def without_trigger(clips: Clips) -> UserError:
    """The error for a set in which no caption holds the trigger."""
    return UserError(f"no training caption holds the trigger {clips.config.data.trigger!r}; {first_words(clips)}",
                     "set data.trigger to the words in them")


def first_words(clips: Clips) -> str:
    """The most frequent beginnings of captions, each of as many words as the trigger has."""
    number = len(clips.config.data.trigger.split())
    texts = {text: p.clip.id for p in clips.planned for text in (p.clip.caption, *p.clip.more_captions)}
    words = Counter(" ".join(text.split()[:number]).strip(".,;:!")[:40] for text in texts)
    return "they begin with " + ", ".join(f"{begun!r} ({count})" for begun, count in words.most_common(3))


def refuse_undrawn(recipe: Recipe, clips: Clips) -> None:
    """Raise UserError where the whole run draws not one sample of a source, for its repeats are too few."""
    data, planned = recipe.config.data, clips.planned
    samples = max(own.config.train.num_steps for own in recipe.trainings()) * data.batch_size * max(
        [1, *clips.batch_factors.values()])
    epoch = sum(p.clip.repeats for p in planned)
    for name, source in data.sources.items():
        shares = [p.clip.repeats for p in planned if p.clip.source == name]
        if shares and max(shares) < 1 and sum(shares) * samples < epoch:
            key = f"data.sources.{name}.{'repeats' if source.weight is None else 'weight'}"
            raise UserError(f"{key} = {source.weight or source.repeats:g} is too small: of the run's {samples} samples "
                            f"{sum(shares) * samples / epoch:.2g} would be of its {len(shares)} windows",
                            f"raise {key} or train.num_steps, or take the source out")


def asks_evaluation(config: Config) -> bool:
    """Whether a run is to end in an evaluation: prompts are named, or nothing is and there is what it needs."""
    own = config.evaluate
    named = [prompts for prompts in (own.prompts, own.combined, own.unrelated) if prompts is not None]
    return any(named) or (len(named) < 3 and bool(config.data.trigger and config.data.heldout))


def evaluation_faults(clips: Clips) -> Iterator[UserError]:
    """The errors that would keep `evaluate` from its report, besides a missing LoRA; `check` tells the first."""
    config = clips.config
    own = config.evaluate
    has_prompts = any(prompts is None or prompts for prompts in (own.prompts, own.combined, own.unrelated))
    wanted = {"evaluate.prompts": has_prompts, "data.trigger": config.data.trigger, "data.heldout": clips.heldout}
    if lacking := [key for key, value in wanted.items() if not value]:
        yield UserError(f"evaluate needs {' and '.join(lacking)}", "set them in the recipe; demo_anime shows how")
    elif not holding_trigger(clips):
        yield without_trigger(clips)


def _without_faults(placed: Plan, cache: Cache) -> Plan:
    """The plan without the windows that an earlier run could not decode."""
    faults = cache.faults()
    bad = {} if not faults else {p.clip.id: Dropped(p.clip, "unreadable", faults[path.name])
                                 for p in placed.used for path in cache.entries([p], []) if path.name in faults}
    return Plan([p for p in placed.used if p.clip.id not in bad], [*placed.dropped, *bad.values()])


def refuse_drops(dropped: Sequence[Dropped], allowed: bool) -> None:
    """Raise UserError with all clips that cannot be used, unless data.allow_drops. Clips outside data.limits do not
    count, since the user wants those out.
    """
    faults = [f"{one.clip.id}: {one.reason}" for one in dropped if one.kind != "outside limits"]
    if faults and not allowed:
        raise UserError(f"{len(faults)} clip(s) cannot be used:\n  " + "\n  ".join(faults),
                        "replace them, take them out of the manifest, add a smaller length to data.num_frames, or go "
                        "on without them: data.allow_drops=true")


def _weighted(planned: list[PlannedClip], config: Config) -> list[PlannedClip]:
    """The windows with their sources' weights turned into repeats; an epoch keeps its number of samples."""
    weights = {name: source.weight for name, source in config.data.sources.items() if source.weight is not None}
    if not weights:
        return planned
    counts = Counter(p.clip.source for p in planned)
    unit = len(planned) / sum(weights[name] for name in counts)
    return [replace(p, clip=replace(p.clip, repeats=weights[p.clip.source] * unit / counts[p.clip.source]))
            for p in planned]


def manifest_digest(clips: Clips) -> str:
    """A digest of which clips, captions, spans and repeats were trained on.

    Blanks part its words. Where a clip has several captions, their lengths follow and say where each ends; a clip with
    one has none, as in the versions before.
    """
    return digest_text(*(" ".join(map(str, (
        p.found.digest, p.clip.caption, *p.clip.more_captions, p.start_s, p.latest_s, p.fps, p.clip.repeats, p.bucket,
        *(len(text) for text in (p.clip.caption, *p.clip.more_captions) if p.clip.more_captions),
        *(f"{name} {other.found.digest}" for name, other in p.partners.items())))) for p in clips.planned))
