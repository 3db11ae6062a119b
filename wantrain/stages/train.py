"""`wantrain train`: config -> frozen base -> LoRA -> batches -> flow-matching loss -> step -> checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch

from wantrain import __version__, engine, flow, lock, logs, lora, metrics, validation
from wantrain import config as schema
from wantrain.config import Config, DataMode, Dtype, OnNonfinite, Optimizer, Resume
from wantrain.data import batches, plan
from wantrain.data.batches import Draws, Order, Split
from wantrain.engine import Accelerator, checkpoint, optimizers
from wantrain.engine.checkpoint import Progress, Record, Writer
from wantrain.engine.ema import Ema
from wantrain.engine.meeting import Meeting
from wantrain.files import leftovers, write_json, write_text
from wantrain.metrics import Trackers
from wantrain.models import hub, sequence
from wantrain.models.base import for_expert, set_steps
from wantrain.models.encode import predict_velocity
from wantrain.models.lora_updates import adapter_for, read_given
from wantrain.plots import density_svg
from wantrain.stages import (
    Cached,
    Encode,
    Encoder,
    Opened,
    Streamed,
    checkpoints_of,
    heldout_samples,
    manifest_digest,
    more_steps_done,
    num_workers,
    opened,
    sample_of,
    sampler_settings,
    spec_of,
    training_faults,
    validation_sigmas,
)
from wantrain.terms import EXIT_INTERRUPTED, NUM_TIMESTEPS, Batch, Bucket, Interrupted, UserError

NUM_PLOTTED = 20_000
"""Sigmas that the plot of the run folder draws."""


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

LEFT_AFTER_S = 600.0
"""A temporary file of the run folder this old is a killed process's."""

TRACKER_S, STOPPED_TRACKER_S = 45.0, 10.0
"""What a tracker may take to end: after the last step, and after a signal to stop, when a launcher may be waiting."""

ONE_PRESS_S = 2.0
"""Launchers pass on what the terminal has sent to all processes already: signals this close are one."""


@dataclass(slots=True)
class Stopper:
    """Within the block Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP (a terminal that closes, unless under
    nohup) ask for a stop after the step at hand; one more ends the process at once, whatever it is doing.
    """

    asked: bool = False
    _asked_at: float = 0.0
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._ask) for number in STOPPING
                        if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._asked_at > ONE_PRESS_S:
            os._exit(EXIT_INTERRUPTED)  # a thread may be writing, a collective may never end
        if not self.asked:
            self.asked, self._asked_at = True, now
            with contextlib.suppress(OSError):  # the terminal may be gone; print may be what was interrupted
                os.write(2, b"\nstopping after this step; once more stops at once\n")


@dataclass(frozen=True, slots=True)
class Training:
    """What the loop works with: the recipe, the engine and where its processes meet, the adapted transformer, its
    optimizer and its average, how far it is, what writes its checkpoints (in the first process), what these say, and
    its trackers.
    """

    recipe: Opened
    accelerator: Accelerator
    meeting: Meeting
    model: torch.nn.Module
    optimizer: Any
    ema: Ema | None
    modules: list[str]
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
    def kind(self) -> optimizers.Kind:
        return optimizers.OPTIMIZERS[self.config.optim.name.name]


def run(config: Config, arguments: Sequence[str]) -> None:
    """Train the recipe's adapter, or those of both experts, going on from the newest checkpoints of the run folder."""
    recipe = opened(config, arguments)
    cached = Cached(recipe) if config.data.mode is DataMode.cache else None  # says at once if entries are missing
    trainings = recipe.trainings()
    for fault in (fault for own in trainings for fault in training_faults(own)):
        raise fault
    with held(trainings, arguments):
        todo = [own for own in trainings if not is_done(own)]
        for number, own in enumerate(todo):
            train_one(own, cached, number + 1 < len(todo))
    if engine.is_first():
        done = " and ".join(f"{one.config.train.num_steps}{f' ({one.base.expert})' * bool(one.base.expert)}"
                            for one in trainings)
        print(f"trained {done} steps; next: {shlex.join(['wantrain', 'export', *arguments])}")


@contextlib.contextmanager
def held(trainings: Sequence[Opened], arguments: Sequence[str]) -> Iterator[None]:
    """In the block, the first process holds the folders of all these trainings, cleared of what killed ones left."""
    with contextlib.ExitStack() as stack:
        for own in trainings if engine.is_first() else ():
            stack.enter_context(lock.held(own.run_dir, ["wantrain", "train", *arguments]))
            for path in leftovers(own.run_dir, time.time() - LEFT_AFTER_S):
                path.unlink(missing_ok=True)
        yield


def is_done(recipe: Opened) -> bool:
    """Whether all steps are done, before anything heavy is loaded. Raises UserError where more are, where the folder or
    its mirror has a checkpoint that train.resume=never does not want, or where checkpoints could not be written.

    Only the first process knows; of several none leaves, since they start and end together.
    """
    if not engine.is_first():
        return False
    own, place = recipe.config.train, checkpoints_of(recipe.config, recipe.base.expert)
    mirrored, told = checkpoint.mirrored_or_told(place)
    there = [*(path.name for path in place.on_disk()), *mirrored]
    if own.resume is Resume.never and there:
        where = place.folder if place.on_disk() else place.mirror
        raise UserError(f"{where} has {max(there, key=checkpoint.step_of)} and train.resume=never", "start a new run "
                        "with run.name=ANOTHER, or go on with train.resume=auto")
    for told_once in [*told, *checkpoint.refuse_unwritable(place)]:
        print(told_once, file=sys.stderr)
    if max(map(checkpoint.step_of, there), default=-1) < own.num_steps:
        return False
    found = checkpoint.newest_whole(place, fingerprint(recipe), schema.defaults())
    assert found is not None, "there are checkpoints"
    if found.progress.step > own.num_steps:
        raise more_steps_done(recipe.config, found.path)
    if found.progress.step < own.num_steps or engine.world_size() > 1:
        return False
    print("\n".join([*found.passed, f"{found.path}: all {own.num_steps} steps are done already"]))
    writer = Writer(place)
    writer.copy()
    tell_mirror(writer)
    return True


def tell_mirror(writer: Writer) -> None:
    """Wait for the last checkpoint and its copy, and say loudly where there is no copy."""
    if fault := writer.close():
        print(f"WARNING: {writer.place.mirror} lacks the last checkpoint ({fault}). {writer.place.folder} has it whole"
              "\n  next: start the same command once the mirror can be written: it copies what is there",
              file=sys.stderr)


def train_one(recipe: Opened, cached: Cached | None, another_follows: bool) -> None:
    """One adapter on one transformer. Raises Interrupted."""
    training = prepare(recipe)
    with (training.meeting.guarded(), advised_if_memory_ends(recipe, training.accelerator),
          Stopper() as stopper):
        resume(training)
        start_run(training)
        try:
            train(training, cached or Encoder(recipe, training.device), stopper)
        finally:
            training.writer.finish()  # whatever happens to this step, the last checkpoint gets written
        tell_mirror(training.writer)
        limit_s = min(STOPPED_TRACKER_S if stopper.asked else TRACKER_S, recipe.config.train.stall_timeout_s / 4)
        if told := training.trackers.close(limit_s):
            print(told, file=sys.stderr)
        training.meeting.flags(0)  # a launcher would end the first process, which may still write, when another leaves
    if training.progress.step < recipe.config.train.num_steps:
        raise Interrupted(f"stopped after step {training.progress.step}; saved in {recipe.run_dir / 'checkpoints'}")
    engine.end(training.accelerator, another_follows)


@contextlib.contextmanager
def advised_if_memory_ends(recipe: Opened, accelerator: Accelerator) -> Iterator[None]:
    """In the block, running out of memory is a UserError that says how much was used and what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        peak_gib, why = engine.peak_memory_gib(accelerator.device), str(error).partition("\n")[0]
        bucket, tokens = largest_bucket(recipe)
        raise UserError(
            f"out of memory, with {peak_gib:.1f} GiB in use at the most: {why}; the largest "
            f"clips are {bucket} ({tokens:,} tokens), {recipe.config.train.micro_batch_size} at once",
            "one of:\n    " + "\n    ".join(savers(recipe.config, accelerator, tokens)[:3])) from error


def largest_bucket(recipe: Opened) -> tuple[Bucket, int]:
    """The bucket of most transformer tokens, and how many a sample of it has."""
    tokens = {p.bucket: plan.num_tokens(p.bucket, recipe.variant.multiple_px) for p in recipe.planned}
    return max(tokens.items(), key=lambda item: item[1])


def savers(config: Config, accelerator: Accelerator, tokens: int) -> list[str]:
    """Settings that need less memory, those that change least first."""
    micro, size = config.train.micro_batch_size, accelerator.num_processes
    offers = {
        "train.activation_checkpointing=true    recomputes each block: same numbers, about a third more time":
            not config.train.activation_checkpointing,
        f"train.micro_batch_size={micro // 2}    accumulates instead: same numbers": micro > 1 and micro % 2 == 0,
        "model.dtype=bfloat16    half of the base": config.model.dtype is Dtype.float32,
        f"--config_file launch/zero3.yaml    each of {size} processes keeps 1/{size} of the base":
            size > 1 and engine.zero_stage(accelerator) < 3,
        "train.sequence_parallel=2    two processes share each clip's tokens: same numbers":
            size > 1 and config.train.sequence_parallel == 1,
        f"data.max_tokens_per_clip={tokens * 3 // 4}    smaller pictures, in a run of their own": True,
        f"lora.rank={max(1, config.lora.rank // 2)}    half of the adapter and its optimizer, in a run of their own":
            True,
        "optim.name=adamw_8bit    moments of a byte, in a run of its own": config.optim.name is Optimizer.adamw,
    }
    return [offer for offer, applies in offers.items() if applies]


def prepare(recipe: Opened) -> Training:
    """Frozen base, injected adapter, optimizer, all handed to the engine that launched us."""
    config, optim, num_parts = recipe.config, recipe.config.optim, recipe.config.train.sequence_parallel
    if num_parts > 1:
        sequence.check(recipe.variant, num_parts, num_tokens(recipe))
    accelerator = engine.start(config.data.batch_size, config.train.micro_batch_size, sequence_parallel=num_parts,
                               max_grad_norm=optim.max_grad_norm, timeout_s=config.train.stall_timeout_s)
    with advised_if_memory_ends(recipe, accelerator):
        return loaded(recipe, accelerator)


def loaded(recipe: Opened, accelerator: Accelerator) -> Training:
    """The rest of `prepare`: all that takes memory."""
    config, optim, own = recipe.config, recipe.config.optim, recipe.config.train
    meeting = Meeting(own.stall_timeout_s)
    optimizers.check(accelerator, optim.name.name)
    start = None
    if config.lora.start_from:
        start = read_given(hub.local(for_expert(config.lora.start_from, recipe.base.expert)), recipe.base.expert)
    transformer = recipe.base.transformer(recipe.dtype, engine.loading_device(accelerator),
                                          engine.keeper_of_shards(accelerator))
    given = adapter_for(start, transformer) if start else None
    modules = lora.inject(transformer, config.lora.targets, spec_of(config), config.train.seed)
    if given:
        lora.start_from(transformer, given)
    record = Record(fingerprint(recipe), config.lora.kind.name, lora.scales(transformer), metadata(recipe))
    if config.train.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    if own.sequence_parallel > 1:
        sequence.share_tokens(transformer, own.sequence_parallel)
    groups = optimizers.groups(lora.trainable(transformer),
                               lora.lr_factors(transformer, optim.lora_plus, optim.lr_factors))
    meeting.flags(0)  # all have their base
    with meeting.guarded():
        model, optimizer = accelerator.prepare(transformer, optimizers.make(
            optim.name.name, groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay))
    ema = None if optim.ema_decay is None else Ema(accelerator, model, optim.ema_decay)
    writer = Writer(checkpoints_of(config, recipe.base.expert), own.stall_timeout_s / 2)  # others wait meanwhile
    return Training(recipe, accelerator, meeting, model, optimizer, ema, modules, Progress(), writer, record,
                    Trackers())


def num_tokens(recipe: Opened) -> set[int]:
    """The tokens that the transformer sees of each window, a reference before it included."""
    shapes = [(recipe.variant.latent_THW(p.bucket), "reference" in p.partners)
              for p in recipe.planned + recipe.heldout]
    return {(t + has_reference) * h * w // 4 for (t, h, w), has_reference in shapes}


def train(training: Training, source: Encode, stopper: Stopper) -> None:
    """The loop, to the last step or to where the user stops it; both are saved."""
    config, recipe, progress = training.config, training.recipe, training.progress
    heldout = None
    if config.validation.every_steps and recipe.heldout:
        heldout = heldout_of(training, source)
    last, saved = config.train.num_steps, progress.step
    steps = range(progress.step, last)
    ahead = batches.ahead(steps, batch_maker(training, source, progress.step))
    work = Work(training.meeting.waited_s)
    with metrics.Metrics(recipe.run_dir / "metrics.jsonl", training.trackers.log, progress.step, last,
                         training.accelerator.is_main_process) as board:
        for _ in steps:
            began = time.perf_counter()
            micro_batches = next(ahead)
            waited_s = time.perf_counter() - began
            if asked_to_stop(training, stopper):
                break
            numbers = train_step(training, progress.step, micro_batches)
            progress.step += 1
            numbers |= {"step_s": time.perf_counter() - began, "data_wait_s": waited_s,
                        "memory_gib": engine.peak_memory_gib(training.device)}
            work.add(micro_batches, recipe.variant.multiple_px, numbers["step_s"], waited_s)
            if heldout and (progress.step % config.validation.every_steps == 0 or progress.step == last):
                numbers["validation_loss"] = validate(training, heldout)
                board.say(f"step {progress.step}: validation loss {numbers['validation_loss']:.5f}")
            if progress.step % config.train.log_every == 0 or "validation_loss" in numbers:
                board.write(progress.step, numbers)
            board.advance({"loss": f"{numbers['loss']:.4f}", "grad": f"{numbers['grad_norm']:.3f}",
                           "wait": f"{waited_s * 1000:.0f}ms", "mem": f"{numbers['memory_gib']:.1f}GiB"})
            if progress.step % config.train.save_every == 0 or progress.step == last:
                save(training)
                saved = progress.step
            for news in filter(None, (training.writer.news(), training.trackers.news())):
                board.say(news)
    if saved < progress.step:
        save(training)
    report_work(training, work)


def asked_to_stop(training: Training, stopper: Stopper) -> bool:
    """Whether a signal reached any process. Raises what kept the last checkpoint from being written, in all of them."""
    flags = training.meeting.flags(2 if training.writer.failed else int(stopper.asked))
    if 2 in flags:
        training.writer.finish()
        raise UserError(f"{training.meeting.processes[0]} could not write the last checkpoint",
                        f"look at {training.recipe.run_dir / logs.name_of(0)}")
    return any(flags)


@dataclass(slots=True)
class Work:
    """What this process did: transformer tokens, seconds, and those that it waited for its clips; `waited_before_s` it
    had waited for others when it began.
    """

    waited_before_s: float
    tokens: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0

    def add(self, micro_batches: Sequence[Batch], multiple_px: int, seconds: float, data_wait_s: float) -> None:
        self.tokens += sum(plan.num_tokens(p.bucket, multiple_px) for batch in micro_batches for p in batch.planned_B)
        self.seconds += seconds
        self.data_wait_s += data_wait_s


def report_work(training: Training, work: Work) -> None:
    """`processes.json`, and with several processes a line for each: how much it did, and what it waited for."""
    own = {"tokens": work.tokens, "seconds": work.seconds, "waited_for_clips_s": work.data_wait_s,
           "waited_for_others_s": training.meeting.waited_s - work.waited_before_s,
           "peak_memory_gib": engine.peak_memory_gib(training.device)}
    rows = training.meeting.all(own)
    if not training.accelerator.is_main_process:
        return
    named = [{"process": name, **row} for name, row in zip(training.meeting.processes, rows, strict=True)]
    write_json(training.recipe.run_dir / "processes.json", named)
    for row in named if len(named) > 1 else ():
        print(f"{row['process']}: {row['tokens']:,} tokens in {row['seconds']:.1f} s, of which it waited "
              f"{row['waited_for_clips_s']:.1f} s for clips and {row['waited_for_others_s']:.1f} s for others; "
              f"{row['peak_memory_gib']:.1f} GiB at the most")


def batch_maker(training: Training, source: Encode, start: int) -> Callable[[int], list[Batch]]:
    """step -> this process's micro-batches of it, for steps in order from `start`."""
    config, recipe, accelerator = training.config, training.recipe, training.accelerator
    num_parts = config.train.sequence_parallel  # of a group of processes all get the same samples
    split = Split(config.data.batch_size, config.train.micro_batch_size, accelerator.num_processes // num_parts,
                  accelerator.process_index // num_parts)
    draws = Draws(recipe.density, config.data.caption_dropout, config.data.tag_orders, config.data.first_frame_share)
    order = order_of(recipe)
    if isinstance(source, Encoder):
        coming = batches.coming(order_of(recipe), split, range(start, config.train.num_steps))
        source = Streamed(recipe, source, coming, num_workers(config))

    def make(step: int) -> list[Batch]:
        made = batches.micro_batches(order, split, step, draws, partial(sample_of, recipe, source))
        return [batches.pinned(batch) for batch in made] if training.device.type == "cuda" else made

    return make


def order_of(recipe: Opened) -> Order:
    """Which windows make each step."""
    return Order(recipe.planned, recipe.config.data.batch_size, recipe.config.train.seed, recipe.factors)


def train_step(training: Training, step: int, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step over this process's micro-batches; its numbers are means over all processes.

    Where a loss or the gradient is not finite on any process, the update is left out on all of them.
    """
    accelerator, optimizer, optim = training.accelerator, training.optimizer, training.config.optim
    lr = engine.learning_rate(step, optim.lr, optim.schedule.name, optim.warmup_steps, training.config.train.num_steps)
    engine.set_learning_rate(optimizer, lr)
    losses: list[torch.Tensor] = []
    for batch in micro_batches:
        with accelerator.accumulate(training.model):
            loss_B = batch_loss(training, batch)
            losses.append(loss_B.detach())
            if accelerator.sync_gradients:
                losses_PN = training.meeting.gather(torch.cat(losses))
                if not losses_PN.isfinite().all():
                    not_finite(training, step, "loss", micro_batches, losses)
                    loss_B = loss_B * math.nan  # every engine leaves out an update whose gradient is not finite
            accelerator.backward(loss_B.mean())
    grad_norm = engine.clip_gradients(accelerator, training.model, optim.max_grad_norm)
    updates = math.isfinite(grad_norm)
    if updates:
        optimizer.step()
        if training.ema is not None:
            training.ema.update(step + 1)
    else:
        if losses_PN.isfinite().all():
            not_finite(training, step, "gradient norm", micro_batches, losses)
        training.progress.skipped += 1
    optimizer.zero_grad()
    return {"loss": float(losses_PN.mean()), "grad_norm": grad_norm, "lr": lr,
            **({"skipped": training.progress.skipped} if training.progress.skipped else {}),
            **optimizers.numbers(optimizer, optim.name.name)}


def not_finite(training: Training, step: int, what: str, micro_batches: Sequence[Batch], losses: Sequence[torch.Tensor]
               ) -> None:
    """Note what each process was working on; raise unless the config goes on without this update."""
    config, process = training.config, training.accelerator.process_index
    note = training.recipe.run_dir / f"nonfinite_{step + 1:06d}_process_{process}.json"
    ids = [name for batch in micro_batches for name in batch.ids]
    write_json(note, {"step": step + 1, "what": what, "clips": ids,
                      "sigmas": [sigma for batch in micro_batches for sigma in batch.sigma_B.tolist()],
                      "places_in_batch": [i for batch in micro_batches for i in batch.index_B],
                      "losses": [str(loss) for loss in torch.cat(list(losses)).tolist()]})
    told = f"step {step + 1}: the {what} is not finite (clips here: {', '.join(ids)}; {note})"
    if config.train.on_nonfinite is OnNonfinite.stop:
        raise UserError(told, "the last checkpoint is untouched; lower optim.lr, look at these clips, or leave such "
                        "updates out: train.on_nonfinite=skip")
    if training.progress.skipped >= config.train.max_skips:
        raise UserError(f"{told}, and {training.progress.skipped} updates were left out before it "
                        f"(train.max_skips = {config.train.max_skips})", "the last checkpoint is untouched; lower "
                        "optim.lr, or look at the clips in the notes beside this one")


@dataclass(slots=True)
class Asked:
    """What the transformer is asked for, and what it should answer: rows of the batch, on the device.

    Where `asks_base_N` is true, `base` gets what the frozen base answers (zeros before and elsewhere); where
    `from_base_N` is true as well, that takes the place of `target`.
    """

    noisy: torch.Tensor
    sigma: torch.Tensor
    text: torch.Tensor
    condition: dict[str, torch.Tensor]
    target: torch.Tensor
    base: torch.Tensor
    asks_base_N: torch.Tensor
    from_base_N: torch.Tensor

    def rows(self, index_N: torch.Tensor) -> Asked:
        """Only these rows, in this order."""
        return Asked(self.noisy[index_N], self.sigma[index_N], self.text[index_N],
                     {name: tensor[index_N] for name, tensor in self.condition.items()}, self.target[index_N],
                     self.base[index_N], self.asks_base_N[index_N], self.from_base_N[index_N])


def asked_of(training: Training, batch: Batch) -> Asked:
    """One row a sample, and after them one with the class words in place of the trigger, where those are trained."""
    device, dtype = training.device, training.recipe.dtype
    latents, noise, sigma, text = (t.to(device, non_blocking=True) for t in (
        batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma, batch.text_BLD))
    preserved_B = torch.tensor([p.clip.preserve for p in batch.planned_B])
    outside_B = torch.zeros_like(preserved_B)
    if training.config.loss.mask_preserve and batch.mask_B1THW is not None:
        outside_B = batch.mask_B1THW.lt(1).flatten(1).any(1)
    rows = Asked(flow.mix(latents, noise, sigma).to(dtype), sigma, text.to(dtype),
                 {name: t.to(device, non_blocking=True) for name, t in batch.condition.items()},
                 flow.velocity(latents, noise), torch.zeros_like(latents), (preserved_B | outside_B).to(device),
                 preserved_B.to(device))
    if batch.class_text_BLD is not None:
        rows = rows.rows(torch.arange(2 * len(latents), device=device) % len(latents))
        rows.text[len(latents):] = batch.class_text_BLD.to(device, dtype)
        rows.asks_base_N[len(latents):] = rows.from_base_N[len(latents):] = True
    return rows


def answer_of_base(training: Training, asked: Asked) -> None:
    """Get the frozen base's answers, and put them in place of those targets that are to be its own.

    One forward in every process, whatever the rows: under ZeRO-3 all must call it.
    """
    places_N = asked.asks_base_N.nonzero()[:, 0]
    some = places_N if len(places_N) else torch.zeros(1, dtype=torch.long, device=training.device)
    model = training.accelerator.unwrap_model(training.model)
    part = asked.rows(some)
    with torch.no_grad(), lora.switched_off(model), engine.autocast(training.device, training.recipe.dtype):
        answer = predict_velocity(model, part.noisy, part.sigma, part.text, part.condition)
    asked.base[places_N] = answer[: len(places_N)].float()
    asked.target[asked.from_base_N] = asked.base[asked.from_base_N]


def batch_loss(training: Training, batch: Batch) -> torch.Tensor:
    """loss_B of one micro-batch: mix, predict, compare, weigh."""
    own, recipe = training.config.loss, training.recipe
    asked = asked_of(training, batch)
    if recipe.preserves:
        answer_of_base(training, asked)
    with engine.autocast(training.device, recipe.dtype):
        predicted = predict_velocity(training.model, asked.noisy, asked.sigma, asked.text, asked.condition)
    num_samples = len(batch.planned_B)
    weight = place_weight(batch, 1, own.mask_background)
    if weight is not None:
        weight = weight.to(training.device).repeat(len(predicted) // num_samples, 1, 1, 1, 1)
    loss_N = flow.loss_per_sample(predicted, asked.target, weight, own.kind.name, own.delta)
    loss_B = loss_N[:num_samples]
    if batch.class_text_BLD is not None:
        has_words_B = batch.class_text_BLD.ne(0).any(-1).any(-1).to(training.device)
        loss_B = loss_B + own.class_weight * has_words_B * loss_N[num_samples:]
    if own.mask_preserve and batch.mask_B1THW is not None:
        outside = place_weight(batch, 0, 1)
        assert outside is not None, "a batch with masks has weights"
        loss_B = loss_B + own.mask_preserve * flow.loss_per_sample(
            predicted[:num_samples], asked.base[:num_samples], outside.to(training.device), own.kind.name, own.delta)
    return loss_B * flow.weight_of_sigma(batch.sigma_B, own.weighting.name, own.min_snr_gamma).to(training.device)


def place_weight(batch: Batch, inside: float, outside: float) -> torch.Tensor | None:
    """Where a loss looks, [B, 1, T, H, W]: so much inside and outside masks, and not at latent frames that were given
    clean. None where it looks everywhere.
    """
    weight = None
    if batch.mask_B1THW is not None:
        weight = outside + (inside - outside) * batch.mask_B1THW
    if batch.known_BT is None:
        return weight
    unknown = (1 - batch.known_BT).view(len(batch.known_BT), 1, -1, 1, 1)
    return unknown.expand(-1, 1, -1, *batch.latents_BCTHW.shape[3:]) if weight is None else weight * unknown


def heldout_of(training: Training, source: Encode) -> validation.HeldOut:
    """The held-out clips at those of the config's sigmas at which this transformer works.

    What this process needs of them is read at once: a fault in a later step would keep the others waiting.
    """
    recipe, accelerator, num_parts = training.recipe, training.accelerator, training.config.train.sequence_parallel
    share = validation.Share(accelerator.num_processes // num_parts, accelerator.process_index // num_parts,
                             lambda values_N: training.meeting.gather(values_N)[::num_parts])
    heldout = validation.HeldOut(recipe.heldout, validation_sigmas(recipe), heldout_samples(recipe, source),
                                 training.config.train.micro_batch_size, share)
    heldout.read()
    return heldout


def validate(training: Training, heldout: validation.HeldOut) -> float:
    """Mean held-out loss."""
    with (optimizers.at_average(training.accelerator, training.model, training.optimizer, training.kind),
          engine.autocast(training.device, training.recipe.dtype)):
        losses = validation.losses(training.model, heldout, training.device)
    return float(losses.mean())


def fingerprint(recipe: Opened) -> dict[str, Any]:
    """What fixes the training's numbers: keys of the config, the base's weights, and the clips with their captions."""
    return {**schema.fingerprint(recipe.config), "(base weights)": recipe.base.digest("transformer", recipe.cache.memo),
            "(clips and captions)": manifest_digest(recipe)}


def metadata(recipe: Opened) -> dict[str, str]:
    """What a LoRA file of this training says of itself: the field's keys (ss_*, modelspec.*) and its origin."""
    config, variant = recipe.config, recipe.variant
    shift = variant.shift if config.sigma.shift is None else config.sigma.shift
    own = {
        "version": __version__, "trigger": config.data.trigger, "variant": variant.name,
        "config_digest": schema.digest(config), "manifest_digest": manifest_digest(recipe),
        "base_digest": recipe.base.digest("transformer", recipe.cache.memo),
        "merged": " ".join(f"{path}={strength:g}" for path, strength in recipe.base.merged),
        "expert": recipe.base.expert or "", "sigmas": " ".join(f"{sigma:g}" for sigma in recipe.sigmas),
        "targets": " ".join(config.lora.targets), "num_heldout": str(len(recipe.heldout)),
    }
    return {
        "software": f"wantrain {__version__}", "ss_output_name": config.run.name, "ss_base_model_version": "wan",
        "ss_network_module": f"wantrain.lora ({config.lora.kind.name})", "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.alpha), "ss_learning_rate": str(config.optim.lr),
        "ss_seed": str(config.train.seed), "ss_num_train_items": str(len(recipe.planned)),
        "ss_discrete_flow_shift": str(shift), "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1", "modelspec.title": config.run.name,
        "modelspec.timestep_range": ",".join(f"{NUM_TIMESTEPS * sigma:g}" for sigma in recipe.sigmas),
        "modelspec.resolution": "x".join(map(str, reversed(config.data.resolutions[0]))),
        "modelspec.trigger_phrase": config.data.trigger,
        **{f"wantrain.{key}": value for key, value in own.items()},
    }


def resume(training: Training) -> None:
    """Go on from the newest whole checkpoint, put back under this engine, if there is one.

    The first process reads it for all, so that they agree, and machines need no folder in common.
    """
    place, meeting = training.writer.place, training.meeting
    agree(training)
    found: checkpoint.Found | UserError | None = None
    if training.accelerator.is_main_process:
        try:
            found = checkpoint.newest_whole(place, training.record.fingerprint, schema.defaults())
        except UserError as error:
            found = error
    found = meeting.first(found)
    if isinstance(found, UserError):
        raise found
    if found is None:
        return
    progress = training.progress
    progress.step, progress.skipped, progress.run_id = astuple(found.progress)
    checkpoint.restore(training.accelerator, training.model, training.optimizer, kind=training.kind, ema=training.ema,
                       tensors=found.tensors, updates=progress.step - progress.skipped)
    if training.accelerator.is_main_process:
        print("\n".join([*found.passed, f"going on from {found.path}"]))


def agree(training: Training) -> None:
    """Raise UserError where processes were started with other configs, base weights or clips than the first."""
    first = training.meeting.first(training.record.fingerprint)
    changed = checkpoint.differences(first, training.record.fingerprint)
    for name, theirs in zip(training.meeting.processes, training.meeting.all(changed), strict=True):
        if theirs:
            raise UserError(f"{name} does not train what {training.meeting.processes[0]} does:\n  "
                            + "\n  ".join(theirs), "start the same command, over the same files, on every machine")


def save(training: Training) -> None:
    """Begin to write a checkpoint; every process must call it."""
    tensors = checkpoint.gather(training.accelerator, training.model, training.optimizer, training.kind, training.ema)
    if training.accelerator.is_main_process:
        training.writer.write(training.progress, tensors, training.record)


def start_run(training: Training) -> None:
    """Trackers, and the run folder's header: config, versions, digests, adapted modules."""
    config, recipe, accelerator, progress = training.config, training.recipe, training.accelerator, training.progress
    progress.run_id = progress.run_id or secrets.token_hex(4)
    if accelerator.is_main_process:
        write_text(recipe.run_dir / "config.yaml", schema.to_yaml(config))
        write_json(recipe.run_dir / "run.json", {
            "wantrain": __version__, "commit": metrics.commit(), "python": platform.python_version(),
            "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")},
            "num_processes": accelerator.num_processes, "engine": accelerator.distributed_type.value,
            "zero_stage": engine.zero_stage(accelerator), "processes": training.meeting.processes,
            "start_step": progress.step, "run_id": progress.run_id, "config_digest": schema.digest(config),
            "base_digest": recipe.base.digest("transformer", recipe.cache.memo), "expert": recipe.base.expert,
            "sigmas": recipe.sigmas,
            "manifest_digest": manifest_digest(recipe),
            "num_clips": len(recipe.planned), "modules": training.modules,
        })
        write_densities(recipe)
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in schema.flat(config).items()}
    training.trackers.open(config.tracker.names if accelerator.is_main_process else (), recipe.run_dir,
                           config.tracker.project, run_name=config.run.name, run_id=progress.run_id,
                           first_step=progress.step + 1, settings=flat)


def write_densities(recipe: Opened) -> None:
    """`sigma_density.svg`: what sigmas are drawn beside those of inference, a plot for each density that buckets have.
    """
    config, variant = recipe.config, recipe.variant
    densities = {recipe.density(bucket): bucket for bucket in dict.fromkeys(p.bucket for p in recipe.planned)}
    steps = range(math.ceil(NUM_PLOTTED / config.data.batch_size))
    inference = sampler_settings(recipe)
    scheduler = recipe.base.scheduler(inference.shift)
    set_steps(scheduler, inference.num_steps)
    for density, bucket in densities.items():
        size = config.data.batch_size
        drawn = torch.cat([flow.draw_sigma(config.train.seed, step, range(size), size, density) for step in steps])
        name = "sigma_density.svg" if len(densities) == 1 else f"sigma_density {bucket}.svg"
        expert = f", {recipe.base.expert} noise expert" if recipe.base.expert else ""
        write_text(recipe.run_dir / name, density_svg(
            f"{config.run.name}{expert}: sigmas of training", drawn.tolist(), density, inference_shift=inference.shift,
            inference_sigmas=scheduler.sigmas[:-1].tolist(), boundary=variant.boundary))
