"""`wantrain train`: config -> frozen base -> LoRA -> batches -> flow-matching loss -> step -> checkpoints."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from wantrain import asking, engine, lock, logs, metrics
from wantrain import config as schema
from wantrain.config import Config, DataMode, OnNonfinite, Resume
from wantrain.costs import GIB
from wantrain.data import batches
from wantrain.data.batches import Draws, Order, Split
from wantrain.engine import checkpoint, launch, optimizers, saved
from wantrain.engine.checkpoint import Writer
from wantrain.engine.stopping import Stopper
from wantrain.engine.watch import Watch, held_bytes
from wantrain.engine.work import Work
from wantrain.files import leftovers, write_json
from wantrain.models.compiled import Count
from wantrain.models.loading import let_go
from wantrain.recipe import judgement
from wantrain.recipe.clips import Clips, open_clips
from wantrain.recipe.heldout import open_validation
from wantrain.recipe.live import open_live
from wantrain.recipe.recipe import Recipe, more_steps_done, open_recipe, training_faults
from wantrain.recipe.run import run_fingerprint
from wantrain.recipe.samples import Cached, Encode, Encoder, Streamed, prepare_texts, sample_of
from wantrain.recipe.training import (
    OutOfMemory,
    Training,
    advised_if_memory_ends,
    prepare,
    resume,
    save,
    smaller_room,
    start_run,
    tell_memory,
)
from wantrain.terms import Batch, Interrupted, UserError
from wantrain.verdict import Verdict

LEFT_AFTER_S = 600.0
"""A temporary file of the run folder this old is a killed process's."""

FAILED = 1 << len(asking.THINGS)
"""Among the flags of processes: its last checkpoint could not be written."""

TRACKER_S, STOPPED_TRACKER_S = 45.0, 10.0
"""What a tracker may take to end: after the last step, and after a signal to stop, when a launcher may be waiting."""


def run(config: Config, arguments: Sequence[str]) -> None:
    """Train the recipe's adapter, or those of both experts, going on from the newest checkpoints of the run folder."""
    recipe = open_recipe(config)
    clips = open_clips(recipe, arguments)
    cached = Cached(clips) if config.data.mode is DataMode.cache else None  # says at once if entries are missing
    prepare_texts(recipe, clips, launch.device())
    trainings = recipe.trainings()
    for fault in (fault for own in trainings for fault in training_faults(own)):
        raise fault
    with held(trainings, arguments):
        todo = [own for own in trainings if not is_done(own, clips)]
        for number, own in enumerate(todo):
            train_one(own, clips, cached, number + 1 < len(todo))
    if launch.is_first():
        done = " and ".join(f"{one.config.train.num_steps}{f' ({one.base.expert})' * bool(one.base.expert)}"
                            for one in trainings)
        print(f"trained {done} steps; next: {shlex.join(['wantrain', 'export', *arguments])}")


@contextlib.contextmanager
def held(trainings: Sequence[Recipe], arguments: Sequence[str]) -> Iterator[None]:
    """In the block, the first process holds the locks of all these trainings' folders. Files that killed trainings left
    are deleted, and requests that came too late for them.
    """
    with contextlib.ExitStack() as stack:
        for own in trainings if launch.is_first() else ():
            stack.enter_context(lock.held(own.run_dir, ["wantrain", "train", *arguments]))
            for path in leftovers(own.run_dir, time.time() - LEFT_AFTER_S):
                path.unlink(missing_ok=True)
            asking.answer(own.run_dir, asking.asked(own.run_dir))
        yield


def is_done(recipe: Recipe, clips: Clips) -> bool:
    """Whether all steps are done, before anything heavy is loaded. Raises UserError where more are, where the folder or
    its mirror has a checkpoint that train.resume=never does not want, or where checkpoints could not be written.

    Only the first process knows; of several none leaves, since they start and end together.
    """
    if not launch.is_first():
        return False
    own, store = recipe.config.train, recipe.checkpoints
    mirrored, told = saved.mirrored_or_told(store)
    there = [*(path.name for path in store.on_disk()), *mirrored]
    if own.resume is Resume.never and there:
        where = store.folder if store.on_disk() else store.mirror
        raise UserError(f"{where} has {max(there, key=saved.step_of)} and train.resume=never", "start a new run "
                        "with run.name=ANOTHER, or go on with train.resume=auto")
    for told_once in [*told, *saved.refuse_unwritable(store)]:
        print(told_once, file=sys.stderr)
    if max(map(saved.step_of, there), default=-1) < own.num_steps:
        return False
    form = recipe.known_form
    if form is None:
        return False  # what the checkpoints were trained on is for the training to decide
    newest = checkpoint.newest_whole(store, run_fingerprint(recipe, clips, form), schema.formerly(),
                                     own.resume is Resume.any_base)
    assert newest is not None, "there are checkpoints"
    if newest.progress.step > own.num_steps:
        raise more_steps_done(recipe.config, newest.path)
    if newest.progress.step < own.num_steps or launch.world_size() > 1:
        return False
    print("\n".join([*newest.passed, f"{newest.path}: all {own.num_steps} steps are done already"]))
    writer = Writer(store)
    writer.copy()
    tell_mirror(writer)
    return True


def tell_mirror(writer: Writer) -> None:
    """Wait for the last checkpoint and its copy in the mirror, and print a warning where the copy is not there."""
    if fault := writer.close():
        print(f"WARNING: {writer.store.mirror} lacks the last checkpoint ({fault}). {writer.store.folder} has it whole"
              "\n  next: start the same command once the mirror can be written: it copies what is there",
              file=sys.stderr)


def train_one(recipe: Recipe, clips: Clips, cached: Cached | None, another_follows: bool, room: float = math.inf
              ) -> None:
    """One adapter on one transformer. Where its memory ends, it goes on once within less. Raises Interrupted."""
    training = prepare(recipe, clips, room)
    try:
        train_to_end(training, cached)
    except OutOfMemory as error:
        smaller = smaller_room(training) if math.isinf(room) else None
        if smaller is None:
            raise
        print(f"WARNING: {error.message}\n  it goes on by itself, this once, from the last checkpoint, within "
              f"{smaller / GIB:.2f} GiB", file=sys.stderr)
        training.trackers.close(STOPPED_TRACKER_S)
        launch.end(training.accelerator, another_follows=True)
    else:
        if training.progress.step < recipe.config.train.num_steps:
            raise Interrupted(f"stopped after step {training.progress.step}; saved in {recipe.run_dir / 'checkpoints'}")
        launch.end(training.accelerator, another_follows)
        return
    del training
    let_go()
    train_one(recipe, clips, cached, another_follows, smaller)


def train_to_end(training: Training, cached: Cached | None) -> None:
    """From the newest checkpoint to the last step, or to where the user stops it."""
    recipe, clips = training.recipe, training.clips
    with (training.rendezvous.guarded(), advised_if_memory_ends(recipe, clips, training.accelerator, training.memory),
          Stopper() as stopper):
        resume(training)
        start_run(training)
        try:
            train(training, cached or Encoder(recipe, clips.cache, training.device), stopper)
        finally:
            training.writer.finish()  # whatever happens to this step, the last checkpoint gets written
        tell_mirror(training.writer)
        limit_s = min(STOPPED_TRACKER_S if stopper.asked else TRACKER_S, recipe.config.train.stall_timeout_s / 4)
        if told := training.trackers.close(limit_s):
            print(told, file=sys.stderr)
        tell_memory(training)
        training.rendezvous.flags(0)  # when another leaves, a launcher would end the first, which may still write


def train(training: Training, source: Encode, stopper: Stopper) -> None:
    """The loop, to the last step or to where the user stops it; both are saved."""
    config, recipe, progress = training.config, training.recipe, training.progress
    heldout, live, last = open_validation(training, source), open_live(training, source), config.train.num_steps
    steps = range(progress.step, last)
    ahead = batches.ahead(steps, batch_maker(training, source, progress.step))
    work, watch, kernels, verdict = Work(training.rendezvous.waited_s), Watch(), Count(), None
    with metrics.Metrics(recipe.run_dir / "metrics.jsonl", training.trackers.log, progress.step, last,
                         training.accelerator.is_main_process) as board:
        for _ in steps:
            began = time.perf_counter()
            micro_batches = next(ahead)
            waited_s = time.perf_counter() - began
            numbers = train_step(training, progress.step, micro_batches)
            progress.step += 1
            numbers |= {"step_s": time.perf_counter() - began, "data_wait_s": waited_s,
                        "memory_gib": engine.peak_memory_gib(training.device)}
            tokens = num_tokens(training, micro_batches)
            work.add(tokens, numbers["step_s"], waited_s)
            alarms = watch.alarms(tokens, numbers["step_s"], waited_s, held_bytes(training.device))
            if heldout and (progress.step % config.validation.every_steps == 0 or progress.step == last):
                numbers |= heldout.numbers(progress.step)
                board.say(f"step {progress.step}: validation loss {numbers['validation_loss']:.5f}")
            if progress.step % config.train.log_every == 0 or "validation_loss" in numbers:
                board.write(progress.step, numbers)
            compiled = kernels.news()
            board.advance({"loss": f"{numbers['loss']:.4f}", "grad": f"{numbers['grad_norm']:.3f}",
                           "wait": f"{waited_s * 1000:.0f}ms", "mem": f"{numbers['memory_gib']:.1f}GiB"},
                          is_usual=not compiled)
            asked = asked_of(training, stopper)
            if asked & {"save", "stop"} or progress.step % config.train.save_every == 0 or progress.step == last:
                save(training)
            if "sample" in asked or live.is_due(progress.step):
                board.say(live.sample(progress.step))
            if heldout and "validation_loss" in numbers:  # after the samples, whose seeds count in it
                verdict = judgement.write(heldout)
                track_verdict(training, verdict)
            for news in filter(None, (training.writer.news(), training.trackers.news(), compiled, *alarms)):
                board.say(news)
            if "stop" in asked:
                break
    if verdict and training.accelerator.is_main_process:
        print("\n".join(verdict.sentences))
    work.report(training.rendezvous, recipe.run_dir / "processes.json", training.device,
                training.accelerator.is_main_process)


def track_verdict(training: Training, verdict: Verdict | None) -> None:
    """Hand the range of usable steps to the trackers, as numbers and in words."""
    if verdict is None:
        return
    found = {"best": verdict.best, "from": verdict.first, "to": verdict.last}
    step = training.progress.step
    training.trackers.log({f"validation_verdict_{name}": value for name, value in found.items() if value is not None},
                          step)
    training.trackers.tell("verdict", "\n\n".join(verdict.sentences), step)


def num_tokens(training: Training, micro_batches: Sequence[Batch]) -> int:
    """Transformer tokens of this process's samples in one step."""
    px = training.recipe.variant.multiple_px
    return sum(p.bucket.num_tokens(px) for batch in micro_batches for p in batch.planned_B)


def asked_of(training: Training, stopper: Stopper) -> set[str]:
    """What is asked of all processes after the step at hand: by a signal to any of them, or by `wantrain ask`, which
    the first one hears. Raises what kept the last checkpoint from being written, in all of them.
    """
    is_first = training.accelerator.is_main_process
    own = asking.asked(training.recipe.run_dir) if is_first else set()
    flag = sum(1 << bit for bit, what in enumerate(asking.THINGS) if what in own or (what == "stop" and stopper.asked))
    flags = training.rendezvous.flags(flag | (FAILED if training.writer.failed else 0))
    if any(flag & FAILED for flag in flags):
        training.writer.finish()
        raise UserError(f"{training.rendezvous.processes[0]} could not write the last checkpoint",
                        f"look at {training.recipe.run_dir / logs.name_of(0)}")
    if is_first:
        asking.answer(training.recipe.run_dir, own)
    return {what for bit, what in enumerate(asking.THINGS) if any(flag >> bit & 1 for flag in flags)}


def batch_maker(training: Training, source: Encode, start: int) -> Callable[[int], list[Batch]]:
    """step -> this process's micro-batches of it, for steps in order from `start`."""
    config, clips, accelerator = training.config, training.clips, training.accelerator
    num_parts = config.train.sequence_parallel  # of a group of processes all get the same samples
    split = Split(config.data.batch_size, config.train.micro_batch_size, accelerator.num_processes // num_parts,
                  accelerator.process_index // num_parts)
    draws = Draws(training.recipe.density, config.data.caption_dropout, config.data.tag_orders,
                  config.data.first_frame_share)
    order = order_of(clips)
    if isinstance(source, Encoder):
        coming = batches.coming(order_of(clips), split, range(start, config.train.num_steps))
        source = Streamed(clips, source, coming)

    def make(step: int) -> list[Batch]:
        made = batches.micro_batches(order, split, step, draws, partial(sample_of, clips, source))
        return [batches.pinned(batch) for batch in made] if training.device.type == "cuda" else made

    return make


def order_of(clips: Clips) -> Order:
    """The order in which windows make the steps of this config."""
    return Order(clips.planned, clips.config.data.batch_size, clips.config.train.seed, clips.batch_factors)


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
            loss_B = training.losses(batch)
            losses.append(loss_B.detach())
            if accelerator.sync_gradients:
                losses_PN = training.rendezvous.gather(torch.cat(losses))
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
