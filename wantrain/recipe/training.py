"""A training that is ready to step: frozen base, adapter, optimizer, engine, and where it goes on from."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from wantrain import config as schema
from wantrain import costs, engine, lora, objective
from wantrain.config import Config, Keep, Resume
from wantrain.engine import checkpoint, launch, optimizers, saved, snapshot
from wantrain.engine.checkpoint import Checkpoint, Writer
from wantrain.engine.ema import Ema
from wantrain.engine.rendezvous import Rendezvous
from wantrain.engine.saved import Progress, Record
from wantrain.files import write_json
from wantrain.metrics import Trackers
from wantrain.models import attention, fit, hub, quantised, sequence
from wantrain.models.base import expert_path
from wantrain.models.block import BlockMemory
from wantrain.models.compiled import operations_for
from wantrain.models.loading import free_bytes
from wantrain.models.lora_updates import read_given
from wantrain.recipe.clips import Clips
from wantrain.recipe.costing import Room, job_of, policy_of, told
from wantrain.recipe.recipe import Recipe, form_of
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
    memory: costs.MemoryPolicy
    rendezvous: Rendezvous
    model: torch.nn.Module
    optimizer: Any
    ema: Ema | None
    modules: list[str]
    kernels: dict[str, str]
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

    def at_average(self) -> contextlib.AbstractContextManager[None]:
        """In the block, the model is what a checkpoint of now gives as the adapter. Every process must call it."""
        return optimizers.at_average(self.accelerator, self.model, self.optimizer, self.kind, self.ema)

    def losses(self, batch: Batch) -> torch.Tensor:
        """loss_B of a micro-batch."""
        return objective.losses(self.model, batch, self.recipe.objective, device=self.device, dtype=self.recipe.dtype,
                                unwrapped=self.accelerator.unwrap_model(self.model))


class OutOfMemory(UserError):
    """Memory ended while it was planned otherwise."""


SMALLER = 0.85
"""What is chosen after memory ended takes at most this share of what had been planned."""


@contextlib.contextmanager
def advised_if_memory_ends(recipe: Recipe, clips: Clips, accelerator: Accelerator, policy: costs.MemoryPolicy
                           ) -> Iterator[None]:
    """In the block, running out of memory is an OutOfMemory that says how much was planned and used, and what needs
    less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        peak_gib, why = engine.peak_memory_gib(accelerator.device), str(error).partition("\n")[0]
        px, micro_batch_size = recipe.variant.multiple_px, recipe.config.train.micro_batch_size
        job = largest_job(recipe, clips, accelerator)
        bucket, on_cpu = job.batch.bucket, accelerator.device.type == "cpu"
        offers = costs.savers(job, policy, engine.zero_stage(accelerator), not on_cpu)
        planned = costs.peak(costs.device_parts(job, policy))
        raise OutOfMemory(
            f"out of memory, with {peak_gib:.1f} GiB in use at the most, where {planned / costs.GIB:.2f} were planned: "
            f"{why}; the largest clips are {bucket} ({bucket.num_tokens(px):,} tokens), {micro_batch_size} at once",
            "one of:\n    " + "\n    ".join(map(str, offers[:3]))) from error


def smaller_room(training: Training) -> float | None:
    """The bytes within which a training goes on by itself after its memory ended. None where it does not: in a group of
    processes, which wait for each other in the middle of a step, where the user has set a budget, and where nothing
    that is not set needs less.
    """
    if training.accelerator.num_processes > 1 or training.config.memory.gib is not None:
        return None
    job = largest_job(training.recipe, training.clips, training.accelerator)
    planned = costs.peak(costs.device_parts(job, training.memory))
    policy, _ = memory_policy(training.recipe, training.clips, training.accelerator, SMALLER * planned)
    return SMALLER * planned if costs.peak(costs.device_parts(job, policy)) < planned else None


def prepare(recipe: Recipe, clips: Clips, room: float = math.inf) -> Training:
    """Load the frozen base, inject the adapter, make the optimizer, and hand all to the engine that launched us. What
    saves memory is chosen for at most `room` bytes of the device.
    """
    config, optim, num_parts = recipe.config, recipe.config.optim, recipe.config.train.sequence_parallel
    if num_parts > 1:
        lengths = {costs.sequence_length(recipe.variant.latent_THW(p.bucket), "reference" in p.partners)
                   for p in clips.everything}
        sequence.check(recipe.variant, num_parts, lengths)
    accelerator = launch.start(config.data.batch_size, config.train.micro_batch_size, sequence_parallel=num_parts,
                               max_grad_norm=optim.max_grad_norm, timeout_s=config.train.stall_timeout_s)
    policy, free = memory_policy(recipe, clips, accelerator, room)
    if accelerator.is_main_process and math.isfinite(free):
        planned = costs.peak(costs.device_parts(largest_job(recipe, clips, accelerator), policy))
        print(f"memory: {told(policy)}; by the plan {planned / costs.GIB:.2f} of {free / costs.GIB:.2f} GiB"
              + ("" if planned <= free else ": it may not fit, wantrain plan says what would"))
    with advised_if_memory_ends(recipe, clips, accelerator, policy):
        return loaded(recipe, clips, accelerator, policy)


def largest_job(recipe: Recipe, clips: Clips, accelerator: Accelerator) -> costs.Job:
    """The training as far as costs go, at its largest clips."""
    bucket = costs.largest_bucket({p.bucket for p in clips.planned}, recipe.variant.multiple_px)
    return job_of(recipe.config, bucket, accelerator.num_processes)


def memory_policy(recipe: Recipe, clips: Clips, accelerator: Accelerator, most: float
                  ) -> tuple[costs.MemoryPolicy, float]:
    """How this process saves memory on its device, and the bytes that it chose for: at the most `most`. No choice but
    memory.base=auto changes a number.
    """
    config, device, job = recipe.config, accelerator.device, largest_job(recipe, clips, accelerator)
    free = min(free_bytes(device, config.memory.gib), most)
    if math.isinf(free):
        return policy_of(config, job, None, base=recipe.known_form), free
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else free
    card = costs.card_of(f"{total / costs.GIB:.1f}gb")
    if device.type == "cuda":
        with contextlib.suppress(UserError):  # one that nobody wrote down: the speed of a common card of its size
            card = costs.card_of(torch.cuda.get_device_name(device))
    room = Room(card, free, engine.host_bytes() / accelerator.num_processes)
    can_move = not engine.is_deepspeed(accelerator) and not engine.is_fsdp(accelerator)
    policy = policy_of(config, job, room, can_move, recipe.known_form)
    if engine.divides(accelerator) and config.memory.keep is Keep.auto and set(policy.keep) != {"all"}:
        policy = replace(policy, keep=("inputs",) * job.num_blocks)  # through diffusers' blocks: models.fit
    return policy, free


def loaded(recipe: Recipe, clips: Clips, accelerator: Accelerator, policy: costs.MemoryPolicy) -> Training:
    """The part of `prepare` that takes memory: load the base, inject the adapter, make the optimizer."""
    config, optim, own = recipe.config, recipe.config.optim, recipe.config.train
    rendezvous = Rendezvous(own.stall_timeout_s)
    optimizers.check(accelerator, optim.name.name)
    form = form_of(policy.base)
    refuse_swap(accelerator, policy.swap)
    start = None
    if config.lora.start_from:
        start = read_given(hub.local(expert_path(config.lora.start_from, recipe.base.expert)), recipe.base.expert)
    device = engine.loading_device(accelerator, through_host=policy.swap > 0)
    host_bytes = engine.host_bytes() / accelerator.num_processes
    mapped = costs.stays_mapped(largest_job(recipe, clips, accelerator), policy, host_bytes)
    transformer = recipe.base.transformer(recipe.dtype, device, engine.shard_parameter(accelerator), form,
                                          mapped=mapped)
    errors = quantised.relative_errors(transformer)
    if errors and accelerator.is_main_process:
        print(quantised.told(errors, form, accelerator.device))
    modules = fit.fit(transformer, accelerator.device,
                      fit.NewAdapter(config.lora.targets, recipe.adapter_spec, own.seed, start),
                      memory=BlockMemory(policy.keep, policy.swap, policy.offload, mapped),
                      is_divided=bool(engine.divides(accelerator)), sequence_parallel=own.sequence_parallel)
    kernels = {"attention": attention.name_of(transformer, accelerator.device),
               "compiled": operations_for(accelerator.device)[1]}
    if accelerator.is_main_process:
        print("; ".join(f"{what}: {own}" for what, own in kernels.items()))
    record = record_of(recipe, clips, lora.scales(transformer), policy.base)
    groups = optimizers.groups(lora.trainable_parameters(transformer),
                               lora.lr_factors(transformer, optim.lora_plus, optim.lr_factors))
    rendezvous.flags(0)  # all have their base
    with rendezvous.guarded():
        model, optimizer = accelerator.prepare(transformer, optimizers.make(
            optim.name.name, groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay),
            device_placement=[False, True] if policy.swap else None)
    ema = Ema(accelerator, model, optim.ema) if optim.ema is not None and optim.keeps_average else None
    writer = Writer(recipe.checkpoints, own.stall_timeout_s / 2)  # others wait meanwhile
    return Training(recipe, clips, accelerator, policy, rendezvous, model, optimizer, ema, modules, kernels, errors,
                    Progress(), writer, record, Trackers())


def refuse_swap(accelerator: Accelerator, swap: int) -> None:
    """Raise UserError where the engine does not let blocks wait in host memory."""
    if swap and (engine.is_deepspeed(accelerator) or engine.is_fsdp(accelerator)):
        raise UserError(f"memory.swap = {swap}: DeepSpeed and FSDP2 put all weights on the device. Allowed there: 0",
                        "launch with launch/ddp.yaml or launch/one_gpu.yaml, or set memory.swap=0")


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
            newest = checkpoint.newest_whole(store, training.record.fingerprint, schema.formerly(),
                                             training.config.train.resume is Resume.any_base)
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


def tell_memory(training: Training) -> None:
    """Add to `run.json` what the plan said of the peak of device memory, and what it was; on a GPU, say both."""
    recipe, device = training.recipe, training.device
    if not training.accelerator.is_main_process:
        return
    parts = costs.device_parts(largest_job(recipe, training.clips, training.accelerator), training.memory)
    planned, measured = costs.in_tensors(parts) / costs.GIB, engine.peak_memory_gib(device)
    path = recipe.run_dir / "run.json"
    of = "tensors of the device" if device.type == "cuda" else "the whole process"
    write_json(path, {**json.loads(path.read_text("utf-8")),
                      "memory": {"policy": asdict(training.memory), "planned_gib": planned, "peak_gib": measured,
                                 "peak_is_of": of}})
    if device.type == "cuda":
        print(f"device memory: {measured:.2f} GiB at the most, {planned:.2f} by the plan")


def start_run(training: Training) -> None:
    """Write the header of the run folder and open the trackers."""
    config, recipe, accelerator, progress = training.config, training.recipe, training.accelerator, training.progress
    progress.run_id = progress.run_id or secrets.token_hex(4)
    if accelerator.is_main_process:
        write_header(recipe, training.clips, {
            "num_processes": accelerator.num_processes, "engine": accelerator.distributed_type.value,
            "zero_stage": engine.zero_stage(accelerator), "processes": training.rendezvous.processes,
            "start_step": progress.step, "run_id": progress.run_id, "modules": training.modules,
            **training.kernels,
            "base_form": training.memory.base, "base_errors": training.base_errors,
            "products_in_bytes": quantised.has_products(training.memory.base, training.device)})
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in schema.flat(config).items()}
    training.trackers.open(config.tracker.names if accelerator.is_main_process else (), recipe.run_dir,
                           config.tracker.project, run_name=config.run.name, run_id=progress.run_id,
                           first_step=progress.step + 1, settings=flat)
