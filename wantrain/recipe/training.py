"""A training that is ready to step: frozen base, adapter, optimizer, engine, and where it goes on from."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

from wantrain import config as schema
from wantrain import costs, engine, lora, objective
from wantrain.config import Config
from wantrain.engine import checkpoint, launch, optimizers, saved, snapshot
from wantrain.engine.checkpoint import Checkpoint, Writer
from wantrain.engine.ema import Ema
from wantrain.engine.rendezvous import Rendezvous
from wantrain.engine.saved import Progress, Record
from wantrain.metrics import Trackers
from wantrain.models import fit, hub, quantised, sequence
from wantrain.models.base import expert_path
from wantrain.models.block import BlockMemory
from wantrain.models.lora_updates import read_given
from wantrain.recipe.clips import Clips
from wantrain.recipe.costing import job_of, keep_of, policy_of
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.run import record_of, write_header
from wantrain.terms import Batch, UserError

if TYPE_CHECKING:
    from wantrain.engine import Accelerator


@dataclass(frozen=True, slots=True)
class Training:
    """All that the loop works with: the recipe and its clips, the engine and where its processes meet, the adapted
    transformer, its optimizer and its average, how far it is, what writes its checkpoints (in the first process), what
    these say, and its trackers.
    """

    recipe: Recipe
    clips: Clips
    accelerator: Accelerator
    rendezvous: Rendezvous
    model: torch.nn.Module
    optimizer: Any
    ema: Ema | None
    modules: list[str]
    base_errors: dict[str, float]
    progress: Progress
    writer: Writer
    record: Record
    trackers: Trackers

    @property
    def config(self) -> Config:
        return self.recipe.config

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def kind(self) -> optimizers.OptimizerKind:
        return optimizers.OPTIMIZERS[self.config.optim.name.name]

    def losses(self, batch: Batch) -> torch.Tensor:
        """loss_B of a micro-batch."""
        return objective.losses(self.model, batch, self.recipe.objective, device=self.device, dtype=self.recipe.dtype,
                                unwrapped=self.accelerator.unwrap_model(self.model))


@contextlib.contextmanager
def advised_if_memory_ends(recipe: Recipe, clips: Clips, accelerator: Accelerator) -> Iterator[None]:
    """In the block, running out of memory is a UserError that says how much was used and what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        peak_gib, why = engine.peak_memory_gib(accelerator.device), str(error).partition("\n")[0]
        px, micro_batch_size = recipe.variant.multiple_px, recipe.config.train.micro_batch_size
        bucket = costs.largest_bucket(clips.planned, px)
        job = job_of(recipe.config, bucket, accelerator.num_processes)
        offers = costs.savers(job, policy_of(recipe.config, job, accelerator.device.type == "cpu"),
                              engine.zero_stage(accelerator))
        raise UserError(
            f"out of memory, with {peak_gib:.1f} GiB in use at the most: {why}; the largest "
            f"clips are {bucket} ({bucket.num_tokens(px):,} tokens), {micro_batch_size} at once",
            "one of:\n    " + "\n    ".join(map(str, offers[:3]))) from error


def prepare(recipe: Recipe, clips: Clips) -> Training:
    """Load the frozen base, inject the adapter, make the optimizer, and hand all to the engine that launched us."""
    config, optim, num_parts = recipe.config, recipe.config.optim, recipe.config.train.sequence_parallel
    if num_parts > 1:
        lengths = {costs.sequence_length(recipe.variant.latent_THW(p.bucket), "reference" in p.partners)
                   for p in clips.everything}
        sequence.check(recipe.variant, num_parts, lengths)
    accelerator = launch.start(config.data.batch_size, config.train.micro_batch_size, sequence_parallel=num_parts,
                               max_grad_norm=optim.max_grad_norm, timeout_s=config.train.stall_timeout_s)
    with advised_if_memory_ends(recipe, clips, accelerator):
        return loaded(recipe, clips, accelerator)


def loaded(recipe: Recipe, clips: Clips, accelerator: Accelerator) -> Training:
    """The part of `prepare` that takes memory: load the base, inject the adapter, make the optimizer."""
    config, optim, own = recipe.config, recipe.config.optim, recipe.config.train
    keep = keep_of(config, accelerator.device.type == "cpu")
    rendezvous = Rendezvous(own.stall_timeout_s)
    optimizers.check(accelerator, optim.name.name)
    refuse_memory(accelerator, recipe.base_form, config.memory.swap)
    start = None
    if config.lora.start_from:
        start = read_given(hub.local(expert_path(config.lora.start_from, recipe.base.expert)), recipe.base.expert)
    swap = config.memory.swap
    transformer = recipe.base.transformer(recipe.dtype, engine.loading_device(accelerator, through_host=swap > 0),
                                          engine.shard_parameter(accelerator), recipe.base_form)
    errors = quantised.relative_errors(transformer)
    if errors and accelerator.is_main_process:
        print(quantised.told(errors, recipe.base_form))
    modules = fit.fit(transformer, accelerator.device,
                      fit.NewAdapter(config.lora.targets, recipe.adapter_spec, own.seed, start),
                      memory=BlockMemory(keep, swap, config.memory.offload),
                      is_divided=bool(engine.divides(accelerator)), sequence_parallel=own.sequence_parallel)
    record = record_of(recipe, clips, lora.scales(transformer))
    groups = optimizers.groups(lora.trainable_parameters(transformer),
                               lora.lr_factors(transformer, optim.lora_plus, optim.lr_factors))
    rendezvous.flags(0)  # all have their base
    with rendezvous.guarded():
        model, optimizer = accelerator.prepare(transformer, optimizers.make(
            optim.name.name, groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay),
            device_placement=[not swap, True] if swap else None)
    ema = None if optim.ema_decay is None else Ema(accelerator, model, optim.ema_decay)
    writer = Writer(recipe.checkpoints, own.stall_timeout_s / 2)  # others wait meanwhile
    return Training(recipe, clips, accelerator, rendezvous, model, optimizer, ema, modules, errors, Progress(), writer,
                    record, Trackers())


def refuse_memory(accelerator: Accelerator, form: str, swap: int) -> None:
    """Raise UserError where the engine would not do with the base what section memory asks for."""
    if swap and (engine.is_deepspeed(accelerator) or engine.is_fsdp(accelerator)):
        raise UserError(f"memory.swap = {swap}: DeepSpeed and FSDP2 put all weights on the device. Allowed there: 0",
                        "launch with launch/ddp.yaml or launch/one_gpu.yaml, or set memory.swap=0")
    if form and (divides := engine.divides(accelerator)):
        raise UserError(f"memory.base = {form}: {divides} divides the base among processes, which was tried with "
                        "memory.base=dtype alone", "launch with launch/ddp.yaml or zero2.yaml, under which each "
                        "process holds the whole base, or set memory.base=dtype")


def agree(training: Training) -> None:
    """Raise UserError where processes were started with other configs, base weights or clips than the first."""
    first = training.rendezvous.first(training.record.fingerprint)
    changed = saved.differences(first, training.record.fingerprint)
    for name, theirs in zip(training.rendezvous.processes, training.rendezvous.all(changed), strict=True):
        if theirs:
            raise UserError(f"{name} does not train what {training.rendezvous.processes[0]} does:\n  "
                            + "\n  ".join(theirs), "start the same command, over the same files, on every machine")


def resume(training: Training) -> None:
    """Go on from the newest whole checkpoint, put back under this engine, if there is one.

    The first process reads it for all, so that they agree, and machines need no folder in common.
    """
    store, rendezvous = training.writer.store, training.rendezvous
    agree(training)
    newest: Checkpoint | UserError | None = None
    if training.accelerator.is_main_process:
        try:
            newest = checkpoint.newest_whole(store, training.record.fingerprint, schema.defaults())
        except UserError as error:
            newest = error
    newest = rendezvous.first(newest)
    if isinstance(newest, UserError):
        raise newest
    if newest is None:
        return
    progress = training.progress
    progress.step, progress.skipped, progress.run_id = astuple(newest.progress)
    snapshot.restore(training.accelerator, training.model, training.optimizer, kind=training.kind, ema=training.ema,
                       tensors=newest.tensors, updates=progress.step - progress.skipped)
    if training.accelerator.is_main_process:
        print("\n".join([*newest.passed, f"going on from {newest.path}"]))


def save(training: Training) -> None:
    """Begin to write a checkpoint; every process must call it."""
    tensors = snapshot.gather(training.accelerator, training.model, training.optimizer, training.kind, training.ema)
    if training.accelerator.is_main_process:
        training.writer.write(training.progress, tensors, training.record)


def start_run(training: Training) -> None:
    """Write the header of the run folder and open the trackers."""
    config, recipe, accelerator, progress = training.config, training.recipe, training.accelerator, training.progress
    progress.run_id = progress.run_id or secrets.token_hex(4)
    if accelerator.is_main_process:
        write_header(recipe, training.clips, {
            "num_processes": accelerator.num_processes, "engine": accelerator.distributed_type.value,
            "zero_stage": engine.zero_stage(accelerator), "processes": training.rendezvous.processes,
            "start_step": progress.step, "run_id": progress.run_id, "modules": training.modules,
            "base_form": recipe.config.memory.base.name, "base_errors": training.base_errors})
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in schema.flat(config).items()}
    training.trackers.open(config.tracker.names if accelerator.is_main_process else (), recipe.run_dir,
                           config.tracker.project, run_name=config.run.name, run_id=progress.run_id,
                           first_step=progress.step + 1, settings=flat)
