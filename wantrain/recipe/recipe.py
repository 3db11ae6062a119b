"""A config with its base's files: of the whole checkpoint, or of one of its experts. Nothing heavy is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wantrain.config import BaseForm, Config, Dtype, LoraKind, expert_config, variant_of
from wantrain.density import Density, shift_for, unshift_sigma
from wantrain.engine.saved import CheckpointStore, step_of
from wantrain.models import four_bits, hub, inventory
from wantrain.models.base import Base, expert_path, find
from wantrain.models.variants import Variant
from wantrain.recipe import folders
from wantrain.targets import matched, matching
from wantrain.terms import Bucket, UserError

if TYPE_CHECKING:  # what a config would do is told without torch
    import torch

    from wantrain.lora import AdapterState, Spec
    from wantrain.models.base import TextPipeline
    from wantrain.models.conditioning import Encoders
    from wantrain.objective import Objective


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a config says of its base, and the base's files."""

    config: Config
    base: Base
    """Of the checkpoint, or of one expert."""

    @property
    def variant(self) -> Variant:
        return self.base.variant

    def trainings(self) -> list[Recipe]:
        """This recipe, or one for each expert that is asked for: two trainings over one cache, high noise first."""
        asked = self.config.model.experts.name
        return [replace(self, base=base, config=expert_config(self.config, base.expert))
                for base in self.base.each() if asked in ("both", base.expert)]

    @property
    def run_dir(self) -> Path:
        """The run's folder; an expert's training has its own inside."""
        return folders.run_dir(self.config, self.base.expert)

    @property
    def checkpoints(self) -> CheckpointStore:
        """Where the training's checkpoints are."""
        return folders.checkpoints_of(self.config, self.base.expert)

    @property
    def export_path(self) -> Path:
        """Where `export` writes and where `sample` and `evaluate` look first."""
        return folders.export_path(self.config, self.base.expert)

    @property
    def memo(self) -> Path:
        """Where digests of the base's files are remembered: in the folder of the cache."""
        return Path(self.config.data.cache_dir) / "digests"

    @property
    def base_digest(self) -> str:
        """A digest of the frozen transformer."""
        return self.base.digest("transformer", self.memo)

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the frozen transformer and text encoder."""
        import torch

        return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[self.config.model.dtype]

    @property
    def known_form(self) -> str | None:
        """A word of memory.base: how the Linears of the frozen transformer are stored. With memory.base=auto as the
        run folder says, or as most are in the base's own file; None where neither knows: then a training decides.
        """
        own = self.config.memory.base
        if own is not BaseForm.auto:
            return own.name
        folder = folders.run_dir(self.config, None)
        headers = [path for path in (folder / "run.json", *(folder / expert / "run.json" for expert in
                                                            self.variant.experts)) if path.is_file()]
        said = [json.loads(path.read_text()).get("base_form") for path in headers]
        return next(filter(None, said), None) or self.base.stored_form()

    @property
    def base_form(self) -> str:
        """The same as wantrain.models.base takes it: empty where they are in `dtype`, or where nobody knows yet."""
        return form_of(self.known_form or "dtype")

    @property
    def encoders_form(self) -> str:
        """How the Linears of the text and image encoders are stored; empty where they are not quantised."""
        return form_of(self.config.memory.encoders.name)

    def load_text(self, device: torch.device) -> TextPipeline:
        """The text encoder as the config says."""
        return self.base.text(self.dtype, device, self.encoders_form)

    def load_encoders(self, device: torch.device) -> Encoders:
        """The VAE and the image encoder as the config says."""
        import torch

        own = self.config.memory
        return self.base.encoders(device, getattr(torch, own.vae.name), self.encoders_form, own.gib)

    @property
    def adapter_spec(self) -> Spec:
        """How the config wants its adapter."""
        from wantrain.lora import Spec

        own = self.config.lora
        return Spec(own.rank, own.alpha, own.kind.name, own.rank_pattern, own.alpha_pattern)

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
    def validation_sigmas(self) -> list[float]:
        """The validation.sigmas at which this transformer is trained; without them the nine deciles of the inference
        schedule, as far as it is trained there.
        """
        low, high = self.sigmas
        if self.config.validation.sigmas is None:
            shift = self.variant.shift
            below, until = unshift_sigma(low, shift), unshift_sigma(high, shift)
            deciles = [below + (until - below) * number / 10 for number in range(1, 10)]
            return [round(shift * x / (1 + (shift - 1) * x), 4) for x in deciles]
        return [sigma for sigma in self.config.validation.sigmas if low <= sigma < high or sigma == high == 1]

    @property
    def objective(self) -> Objective:
        """How the errors of a batch become its loss."""
        from wantrain.objective import Objective

        own, sources = self.config.loss, self.config.data.sources
        asks_base = bool(own.class_words or own.mask_preserve) or any(s.preserve for s in sources.values())
        return Objective(own.kind.name, own.delta, own.weighting.name, own.min_snr_gamma, own.mask_background,
                         own.mask_preserve, own.class_weight, asks_base)

    def density(self, bucket: Bucket) -> Density:
        """How sigma is drawn for a bucket."""
        own, variant = self.config.sigma, self.variant
        name, shift = own.drawn(variant)
        if own.by_resolution:
            shift = shift_for(shift, bucket.num_tokens(variant.multiple_px), variant.native_tokens)
        try:
            return Density(name, tuple(own.shape), shift, self.sigmas)
        except ValueError as error:
            raise UserError(f"sigma: {error}", "widen sigma.range, or choose another sigma.distribution") from error

    def meta_adapter(self) -> AdapterState:
        """The names, shapes and scales of the adapter that a training makes, on the meta device."""
        from wantrain import lora

        transformer = self.base.meta_transformer()
        lora.inject(transformer, self.config.lora.targets, self.adapter_spec, self.config.train.seed)
        return lora.adapter_state(lora.trainable_parameters(transformer), lora.scales(transformer))


def form_of(word: str) -> str:
    """A word of memory.base as wantrain.models.base takes it."""
    return "" if word == "dtype" else word


def open_recipe(config: Config, fetch: bool = True) -> Recipe:
    """Find the base's files. Raises UserError where one is not there; without `fetch`, what would have to be downloaded
    is only told in `base.absent`.
    """
    own = config.model
    return Recipe(config, find(variant_of(config), own.path, own.parts, own.merge, fetch))


def training_faults(recipe: Recipe) -> Iterator[UserError]:
    """The errors that would keep a training from its first or its last step; `train` and `check` raise the first."""
    config, done = recipe.config, recipe.checkpoints.on_disk()
    if done and step_of(done[-1].name) > config.train.num_steps:
        yield more_steps_done(config, done[-1])
    if config.validation.every_steps and not recipe.validation_sigmas:
        low, high = recipe.sigmas
        yield UserError(f"validation.sigmas = {config.validation.sigmas}: none is in [{low:g}, {high:g}), the sigmas "
                        f"that {'this expert' if recipe.base.expert else 'sigma.range'} leaves to train at",
                        f"add one, e.g. validation.sigmas=[{(low + high) / 2:g}], or validation.every_steps=0")
    if fault := four_bits.fault(recipe.base_form):
        yield fault
    yield from _faults_of_given(recipe)
    if not _is_always_expressible(recipe):
        from wantrain.models.lora_updates import refuse_unexportable

        try:
            refuse_unexportable(recipe.meta_adapter(), config.export.format.name, config.export.dtype.name)
        except UserError as error:
            yield UserError(f"what would be trained could not be exported: {error.message}", error.next_step)


def _faults_of_given(recipe: Recipe) -> Iterator[UserError]:
    """The errors of the LoRA files that the training is given."""
    config = recipe.config
    if not (recipe.base.merged or config.lora.start_from):
        return
    from wantrain.models.lora_updates import adapter_for, read_given

    try:
        for file, _ in recipe.base.merged:
            read_given(file, recipe.base.expert)
        if config.lora.start_from:
            given = read_given(hub.local(expert_path(config.lora.start_from, recipe.base.expert)), recipe.base.expert)
            adapter_for(given, recipe.base.meta_transformer())
    except UserError as error:
        yield error


PLAIN_KINDS = (LoraKind.lora, LoraKind.rslora)
"""Two factors for each module and nothing else."""


def _is_always_expressible(recipe: Recipe) -> bool:
    """Whether every format holds such an adapter: pairs in float32, on modules that have names everywhere."""
    config = recipe.config
    return (config.lora.kind in PLAIN_KINDS and config.export.dtype is Dtype.float32
            and not recipe.variant.architecture.animate)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of an adapter before it is made: its modules, its parameters, its learning rates."""

    num_modules: int
    num_parameters: int
    rates: list[float]


def outline(recipe: Recipe) -> Outline:
    """The adapter that a training makes. Raises UserError where a target or a pattern matches nothing.

    Plain kinds by arithmetic; the others as PEFT makes them, without memory.
    """
    own, optim = recipe.config.lora, recipe.config.optim
    if own.kind not in PLAIN_KINDS:
        from wantrain import lora

        transformer = recipe.base.meta_transformer()
        names = lora.inject(transformer, own.targets, recipe.adapter_spec, recipe.config.train.seed)
        factors = set(lora.lr_factors(transformer, optim.lora_plus, optim.lr_factors).values())
        number = sum(p.numel() for p in lora.trainable_parameters(transformer).values())
        return Outline(len(names), number, sorted(optim.lr * factor for factor in factors))
    linears = inventory.linears(recipe.variant.architecture)
    names = matched(list(linears), own.targets)
    ranks, chosen = dict.fromkeys(names, own.rank), dict.fromkeys(names, 1.0)
    for target, rank in own.rank_pattern.items():
        ranks |= dict.fromkeys(matching(names, target, "lora.rank_pattern"), rank)
    for target in own.alpha_pattern:
        matching(names, target, "lora.alpha_pattern")
    for target, factor in optim.lr_factors.items():
        chosen |= dict.fromkeys(matching(names, target, "optim.lr_factors"), factor)
    return Outline(len(names), sum(rank * sum(linears[name]) for name, rank in ranks.items()),
                   sorted({optim.lr * factor * side for factor in chosen.values() for side in (1.0, optim.lora_plus)}))


def more_steps_done(config: Config, path: Path) -> UserError:
    """The error for a checkpoint that is of a later step than the config's last one."""
    step = step_of(path.name)
    return UserError(f"train.num_steps = {config.train.num_steps}, and {path} has done {step} already", "set "
                     f"train.num_steps={step} or more, or train fewer steps in a run of their own: run.name=ANOTHER")
