"""One file a verb, readable from top to bottom. Here: what several verbs open first."""

from __future__ import annotations

import functools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from wantrain import flow, lora
from wantrain.config import Config, Dtype, LoraFormat
from wantrain.config import for_expert as for_expert_config
from wantrain.data import batches, decode, manifest, media, plan
from wantrain.data.cache import CONDITION, LATENTS, MASK, TEXT, Cache, Conditioning, Entry, describe
from wantrain.data.folders import Account
from wantrain.data.plan import Plan, num_tokens
from wantrain.engine.checkpoint import Place, step_of
from wantrain.files import digest_text
from wantrain.jobs import cores, in_workers
from wantrain.lora import AdapterState, Spec
from wantrain.models import conditioning, encode, hub, sampling
from wantrain.models.base import Base, find, for_expert
from wantrain.models.lora_names import refuse_other_experts_file
from wantrain.models.lora_updates import adapter_for, read_given, refuse_unexportable
from wantrain.models.variants import VARIANTS, Expert, Variant
from wantrain.terms import CLIP, PARTNERS, Bucket, Clip, Dropped, Encoded, PlannedClip, Sample, UserError

HELDOUT = "held out"
"""What the clips of data.heldout are called beside the sources."""

TORCH_DTYPE = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Opened:
    """A recipe with its base's files, its clips placed in buckets and its cache; nothing heavy is loaded yet."""

    config: Config
    base: Base
    """Of the checkpoint, or of one expert."""
    buckets: list[Bucket]
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
    def factors(self) -> dict[Bucket, int]:
        """How many times data.batch_size samples a step takes of each bucket."""
        data = self.config.data
        return batches.batch_factors({p.bucket for p in self.planned}, data.batch_size, data.max_tokens_per_batch,
                                     self.variant.multiple_px)

    @property
    def captions(self) -> list[str]:
        """Every text that training may draw, the empty one first."""
        texts = ["", *(text for p in self.planned + self.heldout
                       for text in batches.captions_of(p.clip, self.config.data.tag_orders))]
        return [*texts, *(words for text in dict.fromkeys(texts) if (words := self.class_caption(text)) is not None)]

    def class_caption(self, caption: str) -> str | None:
        """The caption with the class words in place of the trigger, where training preserves those."""
        words, trigger = self.config.loss.class_words, self.config.data.trigger
        return caption.replace(trigger, words) if words and trigger in caption else None

    @property
    def variant(self) -> Variant:
        return self.base.variant

    def trainings(self) -> list[Opened]:
        """This recipe, or one for each expert that is asked for: two trainings over one cache, high noise first."""
        asked = self.config.model.experts.name
        return [replace(self, base=base, config=for_expert_config(self.config, base.expert))
                for base in self.base.each() if asked in ("both", base.expert)]

    @property
    def run_dir(self) -> Path:
        """The run's folder; an expert's training has its own inside."""
        return run_dir(self.config, self.base.expert)

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the frozen transformer and text encoder."""
        return TORCH_DTYPE[self.config.model.dtype]

    @property
    def export_path(self) -> Path:
        """Where `export` writes and where `sample` and `evaluate` look first."""
        return export_path(self.config, self.base.expert)

    @property
    def sigmas(self) -> tuple[float, float]:
        """[low, high) of the sigmas to train at: the expert's, as far as sigma.range allows."""
        low, high = self.variant.sigmas_of(self.base.expert)
        asked = self.config.sigma.range
        narrowed = (max(low, asked[0]), min(high, asked[1]))
        if not narrowed[0] < narrowed[1]:
            raise UserError(f"sigma.range = {asked} leaves nothing of [{low:g}, {high:g}), where the "
                            f"{self.base.expert} noise expert works", "widen sigma.range, or train the other expert "
                            "alone: model.experts=high or low")
        return narrowed

    @property
    def preserves(self) -> bool:
        """Whether some targets are what the frozen base predicts."""
        loss, sources = self.config.loss, self.config.data.sources
        return bool(loss.class_words or loss.mask_preserve) or any(s.preserve for s in sources.values())

    def density(self, bucket: Bucket) -> flow.Density:
        """How sigma is drawn for a bucket."""
        own, variant = self.config.sigma, self.variant
        shift = variant.shift if own.shift is None else own.shift
        if own.by_resolution:
            shift = flow.shift_for(shift, num_tokens(bucket, variant.multiple_px), variant.native_tokens)
        try:
            return flow.Density(own.distribution.name, tuple(own.shape), shift, self.sigmas)
        except ValueError as error:
            raise UserError(f"sigma: {error}", "widen sigma.range, or choose another sigma.distribution") from error


def experts_of(config: Config) -> list[Expert | None]:
    """The experts whose LoRAs the config asks for, high noise first; [None] where there is one transformer."""
    experts: Sequence[Expert | None] = variant_of(config).experts or (None,)
    return [expert for expert in experts if expert is None or config.model.experts.name in ("both", expert)]


def run_dir(config: Config, expert: Expert | None) -> Path:
    """The run's folder; an expert's training has its own inside."""
    return Path(config.run.dir) / (expert or "")


def checkpoints_of(config: Config, expert: Expert | None) -> Place:
    """Where a training's checkpoints are."""
    own = config.train
    mirror = own.mirror and f"{own.mirror.rstrip('/')}/{expert or ''}"
    return Place(run_dir(config, expert) / "checkpoints", mirror, own.keep_checkpoints, own.keep_every)


def export_path(config: Config, expert: Expert | None, what: str = "") -> Path:
    """Where `export` writes the adapter, or `what` of it; a PEFT adapter is a folder."""
    noise = f"_{expert}_noise" if expert else ""
    suffix = "_peft" if config.export.format is LoraFormat.peft else ".safetensors"
    return Path(config.run.dir) / "export" / f"{config.run.name}{what}{noise}{suffix}"


def spec_of(config: Config) -> Spec:
    """How the config wants its adapter."""
    own = config.lora
    return Spec(own.rank, own.alpha, own.kind.name, own.rank_pattern, own.alpha_pattern)


def variant_of(config: Config) -> Variant:
    """The config's row of the variants table; the rules of the config have looked at it."""
    return VARIANTS[config.model.variant]


def clips_of(config: Config) -> dict[str, manifest.Listing]:
    """The clips of each source and, as HELDOUT, those never trained on, each with what else is there."""
    fetched = Path(config.data.cache_dir) / "fetched"
    sources = [manifest.Source(name, own.path, own.repeats, own.speed, own.preserve, own.columns, fetched)
               for name, own in config.data.sources.items()]
    listed = {source.name: manifest.listed(source) for source in sources}
    if config.data.heldout:
        listed[HELDOUT] = manifest.listed(manifest.Source("heldout", config.data.heldout, fetched=fetched,
                                                          key="data.heldout"))
    return listed


def opened(config: Config, recipe_arguments: Sequence[str], refuse: bool = True) -> Opened:
    """Check everything that can be checked without loading weights. `recipe_arguments` are the user's overrides.

    Without `refuse`, clips that cannot be used are only told in the plan.
    """
    variant, data = variant_of(config), config.data
    base = find(variant, config.model.path, config.model.parts, config.model.merge)
    cache_dir = Path(data.cache_dir)
    if cache_dir.exists() and not cache_dir.is_dir():
        raise UserError(f"data.cache_dir = {data.cache_dir!r} is not a folder",
                        "data.cache_dir=cache, or another folder")
    memo = cache_dir / "digests"
    text_parts = [base.digest(part, memo) for part in ("text_encoder", "tokenizer")]
    cache = Cache(cache_dir, base.digest("vae", memo), " ".join([*text_parts, config.model.dtype.name]),
                  shlex.join(["wantrain", "cache", *recipe_arguments]), conditioning_of(base, memo))
    listed = clips_of(config)
    training = [clip for name in data.sources for clip in listed[name].clips]
    heldout = listed[HELDOUT].clips if HELDOUT in listed else []
    refuse_partners(variant, [*training, *heldout])
    found = media.look_all(plan.media_of(training + heldout), cache_dir, num_workers(config), data.timeout_s)
    rules = plan.Rules(plan.buckets(data.num_frames, data.resolutions, variant.multiple_px, data.max_tokens_per_clip),
                       variant.fps, data.extract.name, data.limits, face_px(variant))
    placed = _without_faults(plan.place(training, found, rules), cache)
    apart = _without_faults(plan.place(heldout, found, replace(rules, extract="head", limits={})), cache)
    if refuse:
        refuse_drops([*placed.dropped, *apart.dropped], data.allow_drops)
    if not placed.used:
        raise UserError(f"none of {placed.num_found} clips can be used", "wantrain check says why; look at data.limits")
    recipe = Opened(config, base, list(rules.buckets), Plan(_weighted(placed.used, config), placed.dropped), apart.used,
                    cache, {name: found.account for name, found in listed.items()}, apart.dropped)
    if refuse:
        refuse_undrawn(recipe)
    if refuse and config.loss.class_words and not holding_trigger(recipe):
        raise without_trigger(recipe)  # without one to replace, the class words would preserve nothing
    return recipe


def conditioning_of(base: Base, memo: Path) -> Conditioning:
    """What the cache keeps of a window for the variant's task."""
    media = conditioning.media(base.variant.task)
    if not media:
        return Conditioning()
    image = base.digest("image_encoder", memo) if base.variant.architecture.image_dim else ""
    return Conditioning(digest_text(base.variant.task, image), media)


def refuse_partners(variant: Variant, clips: Sequence[Clip]) -> None:
    """Say which clips lack what the task needs, or have what it would ignore."""
    required, further = conditioning.needed(variant.task)
    alternatives: list[tuple[str, ...]] = [(kind,) for kind in required]
    for needs in alternatives or [further[::2]]:  # VACE: a control video or a reference
        if lacking := [c.id for c in clips if needs and not set(needs) & c.partners.keys()]:
            raise UserError(f"{len(lacking)} clips have no {' or '.join(needs)}, such as {lacking[0]}, and "
                            f"{variant.name} ({variant.task}) works from it", f"add a column, or a folder, {needs[0]} "
                            "to the source: docs/tasks.md")
    for kind in PARTNERS[:-1]:  # a mask is the loss's, of any task
        if kind not in (*required, *further) and (owners := [c.id for c in clips if kind in c.partners]):
            raise UserError(f"{len(owners)} clips have a {kind}, such as {owners[0]}, and {variant.name} "
                            f"({variant.task}) takes none: it would be ignored",
                            f"take the column or the folder `{kind}` out of the source")
    if alone := [c.id for c in clips if "control_mask" in c.partners and "control" not in c.partners]:
        raise UserError(f"{len(alone)} clips have a control_mask and no control, such as {alone[0]}: it says what of a "
                        "control video to make anew", "add the control video, or take the mask out: docs/tasks.md")


def face_px(variant: Variant) -> int:
    """The side of a face's square in pixels, where the variant takes one."""
    sizes = variant.architecture.animate
    return sizes.motion_encoder_size if sizes else 1


def num_workers(config: Config) -> int:
    """Processes that look into files and decode: this process's share of the cores unless told."""
    shares = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.data.num_workers or max(1, cores() // shares)


def holding_trigger(recipe: Opened) -> list[PlannedClip]:
    """The windows to train on with the trigger in a caption."""
    trigger = recipe.config.data.trigger
    return [p for p in recipe.planned if any(trigger in text for text in (p.clip.caption, *p.clip.more_captions))]


def without_trigger(recipe: Opened) -> UserError:
    """What to say where no caption holds the trigger."""
    return UserError(f"no training caption holds the trigger {recipe.config.data.trigger!r}; {first_words(recipe)}",
                     "set data.trigger to the words in them")


def first_words(recipe: Opened) -> str:
    """How the captions begin most often, in as many words as the trigger has."""
    number = len(recipe.config.data.trigger.split())
    texts = {text: p.clip.id for p in recipe.planned for text in (p.clip.caption, *p.clip.more_captions)}
    words = Counter(" ".join(text.split()[:number]).strip(".,;:!")[:40] for text in texts)
    return "they begin with " + ", ".join(f"{begun!r} ({count})" for begun, count in words.most_common(3))


def refuse_undrawn(recipe: Opened) -> None:
    """Raise UserError where the whole run draws not one sample of a source, for its repeats are too few."""
    data, planned = recipe.config.data, recipe.planned
    samples = max(own.config.train.num_steps for own in recipe.trainings()) * data.batch_size * max(
        [1, *recipe.factors.values()])
    epoch = sum(p.clip.repeats for p in planned)
    for name, source in data.sources.items():
        shares = [p.clip.repeats for p in planned if p.clip.source == name]
        if shares and max(shares) < 1 and sum(shares) * samples < epoch:
            key = f"data.sources.{name}.{'repeats' if source.weight is None else 'weight'}"
            raise UserError(f"{key} = {source.weight or source.repeats:g} is too small: of the run's {samples} samples "
                            f"{sum(shares) * samples / epoch:.2g} would be of its {len(shares)} windows",
                            f"raise {key} or train.num_steps, or take the source out")


def training_faults(recipe: Opened) -> Iterator[UserError]:
    """What keeps one training from its first or from its last step: `train` and `check` raise the first of these."""
    config, done = recipe.config, checkpoints_of(recipe.config, recipe.base.expert).on_disk()
    if done and step_of(done[-1].name) > config.train.num_steps:
        yield more_steps_done(config, done[-1])
    if config.validation.every_steps and not validation_sigmas(recipe):
        low, high = recipe.sigmas
        yield UserError(f"validation.sigmas = {config.validation.sigmas}: none is in [{low:g}, {high:g}), the sigmas "
                        f"that {'this expert' if recipe.base.expert else 'sigma.range'} leaves to train at",
                        f"add one, e.g. validation.sigmas=[{(low + high) / 2:g}], or validation.every_steps=0")


    try:
        for file, _ in recipe.base.merged:
            read_given(file, recipe.base.expert)
        if config.lora.start_from:
            given = read_given(hub.local(for_expert(config.lora.start_from, recipe.base.expert)), recipe.base.expert)
            adapter_for(given, recipe.base.meta_transformer())
    except UserError as error:
        yield error
    try:
        refuse_unexportable(meta_adapter(recipe), config.export.format.name, config.export.dtype.name)
    except UserError as error:
        yield UserError(f"what would be trained could not be exported: {error.message}", error.next_step)


def more_steps_done(config: Config, path: Path) -> UserError:
    """What to say where a checkpoint is of a later step than the config's last one."""
    step = step_of(path.name)
    return UserError(f"train.num_steps = {config.train.num_steps}, and {path} has done {step} already", "set "
                     f"train.num_steps={step} or more, or train fewer steps in a run of their own: run.name=ANOTHER")


def meta_adapter(recipe: Opened) -> AdapterState:
    """The names, shapes and scales of the adapter that a training makes, on the meta device."""
    transformer = recipe.base.meta_transformer()
    lora.inject(transformer, recipe.config.lora.targets, spec_of(recipe.config), recipe.config.train.seed)
    return lora.adapter_state(lora.trainable(transformer), lora.scales(transformer))


def validation_sigmas(recipe: Opened) -> list[float]:
    """Those of validation.sigmas at which this transformer is trained."""
    low, high = recipe.sigmas
    return [sigma for sigma in recipe.config.validation.sigmas if low <= sigma < high or sigma == high == 1]


def evaluation_faults(recipe: Opened) -> Iterator[UserError]:
    """What keeps `evaluate` from its report, besides a LoRA that is not trained yet; `check` tells the first."""
    config = recipe.config
    wanted = {"evaluate.prompts": config.evaluate.prompts, "data.trigger": config.data.trigger,
              "data.heldout": recipe.heldout}
    if lacking := [key for key, value in wanted.items() if not value]:
        yield UserError(f"evaluate needs {' and '.join(lacking)}", "set them in the recipe; demo_anime shows how")
    elif not holding_trigger(recipe):
        yield without_trigger(recipe)


def _without_faults(placed: Plan, cache: Cache) -> Plan:
    """The plan without the windows that an earlier run could not decode."""
    faults = cache.faults()
    bad = {} if not faults else {p.clip.id: Dropped(p.clip, "unreadable", faults[path.name])
                                 for p in placed.used for path in cache.entries([p], []) if path.name in faults}
    return Plan([p for p in placed.used if p.clip.id not in bad], [*placed.dropped, *bad.values()])


def refuse_drops(dropped: Sequence[Dropped], allowed: bool) -> None:
    """Say all clips that cannot be used, unless the user goes on without them; limits are the user's own wish."""
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


def manifest_digest(recipe: Opened) -> str:
    """A digest of which clips, captions, spans and repeats were trained on.

    Blanks part its words. Where a clip has several captions, their lengths follow and say where each ends; a clip with
    one has none, as in the versions before.
    """
    return digest_text(*(" ".join(map(str, (
        p.found.digest, p.clip.caption, *p.clip.more_captions, p.start_s, p.latest_s, p.fps, p.clip.repeats, p.bucket,
        *(len(text) for text in (p.clip.caption, *p.clip.more_captions) if p.clip.more_captions),
        *(f"{name} {other.found.digest}" for name, other in p.partners.items())))) for p in recipe.planned))


def sampler_settings(recipe: Opened) -> sampling.Settings:
    """The config's sampler with the variant's numbers where the config has none."""
    own, data, variant = recipe.config.sampler, recipe.config.data, recipe.variant
    height, width = own.resolution or data.resolutions[0]
    bucket, = plan.buckets([own.num_frames or max(data.num_frames)], [[height, width]], variant.multiple_px)
    return sampling.Settings(
        num_steps=own.num_steps or variant.num_steps,
        guidance=variant.guidance if own.guidance is None else (own.guidance, own.guidance),
        shift=variant.shift if own.shift is None else own.shift,
        bucket=bucket, negative_prompt=own.negative_prompt, strength=own.strength,
    )


Loras = Mapping[Expert | None, Path]
"""The LoRA file of each adapted transformer: by expert, or of the one under None."""


def sampler_of(recipe: Opened, loras: Loras) -> sampling.Sampler:
    """The base loaded on the best device, with LoRA files of any format in its transformers, or none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers = []
    for base in recipe.base.each():
        transformers.append(base.transformer(recipe.dtype, device))
        if base.expert in loras:
            sampling.load_lora(transformers[-1], loras[base.expert], base.expert)
    return sampling.Sampler(recipe.variant, transformers, recipe.base.text(recipe.dtype, device),
                            encoders_of(recipe, device), recipe.base.scheduler(sampler_settings(recipe).shift),
                            recipe.dtype)


def sampled(recipe: Opened, sampler: sampling.Sampler, prompt: str, *, seed: int, strength: float,
            inputs: sampling.Inputs) -> torch.Tensor:
    """A video of the config's sampler, frames_FCHW uint8, with the LoRAs at `strength`; 0 computes as the base.

    UserError where its values are not finite: bytes would make a black film of them.
    """
    sampling.set_strength(sampler, strength)
    try:
        return sampling.sample(sampler, prompt, seed, sampler_settings(recipe), inputs)
    except FloatingPointError as error:
        advice = ("lower sampler.strengths, or take an earlier checkpoint" if strength else "look at model.path and "
                  "model.merge, as no LoRA is heard at strength 0")
        precise = ", or try model.dtype=float32" if recipe.config.model.dtype is not Dtype.float32 else ""
        raise UserError(f"no video of prompt {prompt!r}, seed {seed}, LoRA strength {strength:g}: {error}",
                        f"{advice}{precise}; sampler.guidance and sampler.shift may be too large") from error


def encoders_of(recipe: Opened, device: torch.device) -> conditioning.Encoders:
    """The VAE, and the CLIP tower where the variant has one."""
    image = recipe.base.image_encoder(torch.float32, device) if recipe.variant.architecture.image_dim else None
    return conditioning.Encoders(recipe.base.vae(device), image)


def inputs_of(recipe: Opened, num_prompts: int) -> list[sampling.Inputs]:
    """What each prompt is sampled from besides its text: the files of sampler.inputs, as the sample's size shows them;
    where the task needs inputs and none are named, those of the held-out clips in turn.
    """
    own, bucket = recipe.config.sampler.inputs, sampler_settings(recipe).bucket
    if own:
        if len(own) not in (1, num_prompts):
            raise UserError(f"sampler.inputs has {len(own)} entries for {num_prompts} prompts",
                            "give one entry for all prompts, or one for each")
        found = [read_inputs(recipe, given, bucket) for given in own]
        return found * num_prompts if len(found) == 1 else found
    if not recipe.cache.conditioning.media:
        return [sampling.Inputs()] * num_prompts
    fitting = [p for p in recipe.heldout if p.bucket == bucket]
    if not fitting:
        raise UserError(f"{recipe.variant.name} ({recipe.variant.task}) samples from inputs, and neither "
                        f"sampler.inputs nor data.heldout has any of {bucket}", example_of_inputs(recipe.variant))
    windows = [fitting[i % len(fitting)] for i in range(num_prompts)]
    names = [recipe.cache.conditioning.media_of(p) for p in windows]
    return [sampling.Inputs(conditioning.of_window(
        {name: decode.read_window(p.part(name)) for name in own}, bucket))
        for p, own in zip(windows, names, strict=True)]


STILLS = ("first", "last", "reference")
"""Inputs of a sample that are images."""


def example_of_inputs(variant: Variant) -> str:
    """An entry of sampler.inputs with which the task can do."""
    required, _ = conditioning.inputs(variant.task)
    names = required or conditioning.needed(variant.task)[1][:1] or ("video",)
    return "sampler.inputs='[{" + ", ".join(
        f"{name}: {'IMAGE' if name in STILLS else 'VIDEO'}" for name in names) + "}]'"


def read_inputs(recipe: Opened, given: Mapping[str, str], bucket: Bucket) -> sampling.Inputs:
    """The frames of one entry of sampler.inputs: images for first, last and reference, an image or a video for a mask,
    videos for the rest.
    """
    variant = recipe.variant
    required, further = conditioning.inputs(variant.task)
    about = f"sampler.inputs: {variant.name} ({variant.task})"
    if unknown := sorted(set(given) - {*required, *further, "video"}):
        allowed = ", ".join(sorted({*required, *further, "video"}))
        raise UserError(f"{about} takes no {unknown[0]}, but {allowed}", "rename or remove it")
    if lacking := [name for name in required if name not in given]:
        raise UserError(f"{about} cannot do without {' and '.join(lacking)}", example_of_inputs(variant))
    if "control_mask" in given and "control" not in given:
        raise UserError(f"{about}: control_mask says what of a control video to make anew, and there is no control",
                        "add control: VIDEO, or take control_mask out")
    frames = {name: read_input(recipe, name, Path(where), bucket) for name, where in given.items()}
    if "video" in given and not sampler_settings(recipe).num_steps_from_video:
        own = recipe.config.sampler
        num_steps = sampler_settings(recipe).num_steps
        raise UserError(f"sampler.strength = {own.strength:g} of {num_steps} steps leaves none",
                        "raise sampler.strength or sampler.num_steps")
    return sampling.Inputs({name: f for name, f in frames.items() if name != "video"}, frames.get("video"))


def read_input(recipe: Opened, name: str, path: Path, bucket: Bucket) -> torch.Tensor:
    """The frames of one file of sampler.inputs."""
    if not path.is_file():
        raise UserError(f"sampler.inputs: {name} = {path} does not exist", "give the path of an image or video")
    is_image = media.look(path).duration_s == 0
    if name in STILLS:
        if not is_image:
            raise UserError(f"sampler.inputs: {name} = {path} is a video, not an image", "save the frame as a PNG")
        bucket = replace(bucket, num_frames=1)
    elif is_image and bucket.num_frames > 1:
        if name != "control_mask":
            raise UserError(f"sampler.inputs: {name} = {path} is an image, and a sample has {bucket.num_frames} frames",
                            "give a video, or sampler.num_frames=1")
        bucket = replace(bucket, num_frames=1)
    if name == "face":
        bucket = replace(bucket, height=face_px(recipe.variant), width=face_px(recipe.variant))
    return decode.read_clip(path, 0.0, None, recipe.variant.fps, bucket, contain=name == "reference")


def lora_files(recipe: Opened, arguments: Sequence[str]) -> Loras:
    """The LoRA files that the config names, or the run's own exports, of the experts that are asked for."""
    own, trainings = recipe.config.sampler.lora, {one.base.expert: one for one in recipe.trainings()}
    if own:
        found = {expert: hub.local(for_expert(own, expert)) for expert in trainings}
        for expert, path in found.items():
            refuse_other_experts_file(path, expert)
        return found
    paths = {expert: one.export_path for expert, one in trainings.items()}
    if absent := [path for path in paths.values() if not path.exists()]:
        raise UserError(f"no LoRA file {absent[0]}", shlex.join(["wantrain", "export", *arguments]))
    return paths


class Encode(Protocol):
    """What cache and streaming share: a window or a caption to its tensors."""

    def window(self, planned: PlannedClip) -> Encoded: ...
    def text(self, caption: str) -> torch.Tensor: ...


class Encoder:
    """Decode and encode on the spot with the base's VAE and encoders, on `device`."""

    def __init__(self, recipe: Opened, device: torch.device) -> None:
        self._variant, self._cache = recipe.variant, recipe.cache
        self._encoders = encoders_of(recipe, device)
        self._text = recipe.base.text(recipe.dtype, device)

    def encode(self, kind: str, planned: PlannedClip, frames: conditioning.Frames) -> dict[str, torch.Tensor]:
        """The tensors of one cache entry, float32 on the CPU, from the frames that it is made of."""
        if kind == LATENTS:
            return {"x": encode.encode_frames(self._encoders.vae, frames[CLIP])}
        if kind == MASK:
            bucket = planned.partners["mask"].bucket
            return {"x": encode.pool_mask(frames["mask"], bucket, self._variant.multiple_px // 2)}
        own = {name: frames[name] for name in self._cache.media_of(kind, planned)}
        return conditioning.encode(self._variant, self._encoders, conditioning.of_window(own, planned.bucket),
                                   planned.bucket)

    def whole(self, planned: PlannedClip, frames: conditioning.Frames) -> Encoded:
        """Every entry of a window."""
        return encoded({kind: self.encode(kind, planned, frames) for kind in self._cache.kinds_of(planned)})

    def window(self, planned: PlannedClip) -> Encoded:
        """A window, decoded in this process."""
        names = media_of(self._cache, planned, self._cache.kinds_of(planned))
        return self.whole(planned, {name: decode.read_window(planned.part(name)) for name in names})

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return encode.encode_text(self._text, caption)


def media_of(cache: Cache, planned: PlannedClip, kinds: Iterable[str]) -> tuple[str, ...]:
    """Everything that must be decoded for entries of these kinds, each once."""
    return tuple(dict.fromkeys(name for kind in kinds for name in cache.media_of(kind, planned)))


def encoded(entries: Mapping[str, Mapping[str, torch.Tensor]]) -> Encoded:
    """A window from its cache entries by kind."""
    return Encoded(entries[LATENTS]["x"], entries[MASK]["x"] if MASK in entries else None, entries.get(CONDITION, {}))


class Streamed:
    """What training asks for, decoded ahead of it in worker processes and encoded here.

    `coming` are the windows in the order in which they will be asked for.
    """

    def __init__(self, recipe: Opened, encoder: Encoder, coming: Iterable[PlannedClip], jobs: int) -> None:
        self._encoder = encoder
        wanted = ((p, media_of(recipe.cache, p, recipe.cache.kinds_of(p))) for p in coming)
        self._decoded = in_workers(decode.frames_in_worker, wanted, jobs, recipe.config.data.timeout_s,
                                   "data.timeout_s", ordered=True)

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
    """The same tensors read from the cache, which must be complete."""

    def __init__(self, recipe: Opened) -> None:
        self._cache = recipe.cache
        if missing := self._cache.missing(recipe.planned + recipe.heldout, recipe.captions):
            raise UserError(f"the cache lacks {counted(missing)} for this base and these settings; the first is "
                            f"{describe(next(iter(missing.values())))}", self._cache.build_command)

    def window(self, planned: PlannedClip) -> Encoded:
        """A window's entries."""
        return encoded({kind: self._cache.read((kind, planned)) for kind in self._cache.kinds_of(planned)})

    def text(self, caption: str) -> torch.Tensor:
        """text_LD of the caption's true length, on the CPU."""
        return self._cache.read((TEXT, caption))["x"]


def counted(entries: Mapping[Path, Entry]) -> str:
    """`3 clips, 0 masks and 2 captions`."""
    kinds = Counter(kind for kind, _ in entries.values())
    more = "".join(f", {kinds[kind]} {kind}s" for kind in (MASK, CONDITION) if kinds[kind])
    return f"{kinds[LATENTS]} clips{more} and {kinds[TEXT]} captions"


def sample_of(recipe: Opened, source: Encode, planned: PlannedClip, caption: str, first: bool) -> Sample:
    """One training or held-out sample; `first`: whether its first frame is given, where the task leaves that open."""
    found = source.window(planned)
    condition, latents_CTHW, known_T = conditioning.arrange(recipe.variant, dict(found.condition), found.latents_CTHW,
                                                            first)
    mask = found.mask_1THW
    if mask is not None and (before := latents_CTHW.shape[1] - found.latents_CTHW.shape[1]):
        whole = mask.expand(1, *found.latents_CTHW.shape[1:])
        mask = torch.cat([torch.ones_like(whole[:, :before]), whole], dim=1)
    words = recipe.class_caption(caption)
    return Sample(latents_CTHW, encode.pad_text(source.text(caption)), mask, condition, known_T,
                  None if words is None else encode.pad_text(source.text(words)))


def heldout_samples(recipe: Opened, source: Encode) -> Callable[[int], Sample]:
    """place -> that held-out clip, read once, given its first frame where some of the training samples are."""
    first = recipe.config.data.first_frame_share > 0

    @functools.cache
    def sample(place: int) -> Sample:
        planned = recipe.heldout[place]
        return replace(sample_of(recipe, source, planned, planned.clip.caption, first), class_text_LD=None)

    return sample
