"""`wantrain train`: config -> frozen base -> LoRA -> batches -> flow-matching loss -> step -> checkpoints."""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch

from wantrain import __version__, engine, flow, lora, metrics, validation
from wantrain import config as schema
from wantrain.config import Config, DataMode, Resume
from wantrain.data import batches
from wantrain.data.batches import Draws, Order, Split
from wantrain.engine import Accelerator, checkpoint, optimizers
from wantrain.engine.ema import Ema
from wantrain.files import write_json, write_text
from wantrain.models import hub, sequence
from wantrain.models.base import for_expert
from wantrain.models.encode import predict_velocity
from wantrain.models.lora_updates import read_adapter
from wantrain.plots import density_svg
from wantrain.stages import (
    Cached,
    Encode,
    Encoder,
    Opened,
    Streamed,
    heldout_samples,
    manifest_digest,
    num_workers,
    opened,
    sample_of,
    spec_of,
)
from wantrain.terms import Batch, Interrupted, Sample, UserError

NUM_PLOTTED = 20_000
"""Sigmas that the plot of the run folder draws."""


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(slots=True)
class Stopper:
    """Within the block Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) ask for a stop after the step at hand; a second
    one stops at once.
    """

    asked: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._ask) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; once more stops at once", flush=True)


@dataclass(frozen=True, slots=True)
class Training:
    """What the loop works with: the recipe, the engine, the adapted transformer, its optimizer and its average."""

    recipe: Opened
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    ema: Ema | None
    modules: list[str]

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
    for number, own in enumerate(trainings):
        another_follows = number + 1 < len(trainings)
        is_main = train_one(own, cached, another_follows)
        if is_main and not another_follows:
            done = " and ".join(f"{one.config.train.num_steps}{f' ({one.base.expert})' * bool(one.base.expert)}"
                                for one in trainings)
            print(f"trained {done} steps; next: {shlex.join(['wantrain', 'export', *arguments])}")


def train_one(recipe: Opened, cached: Cached | None, another_follows: bool) -> bool:
    """One adapter on one transformer; returns whether this is the main process. Raises Interrupted."""
    training = prepare(recipe)
    step = resume(training)
    start_run(training, step)
    with Stopper() as stopper:
        step = train(training, cached or Encoder(recipe, training.device), step, stopper)
    if step < recipe.config.train.num_steps:
        raise Interrupted(f"stopped after step {step}; saved in {recipe.run_dir / 'checkpoints'}")
    engine.end(training.accelerator, another_follows)
    return training.accelerator.is_main_process


def prepare(recipe: Opened) -> Training:
    """Frozen base, injected adapter, optimizer, all handed to the engine that launched us."""
    config, optim, num_parts = recipe.config, recipe.config.optim, recipe.config.train.sequence_parallel
    if num_parts > 1:
        sequence.check(recipe.variant, num_parts, num_tokens(recipe))
    accelerator = engine.start(config.data.batch_size, config.train.micro_batch_size, config.tracker.names,
                               recipe.run_dir, config.optim.max_grad_norm, sequence_parallel=num_parts)
    optimizers.check(accelerator, optim.name.name)
    transformer = recipe.base.transformer(recipe.dtype, accelerator.device)
    given = None
    if config.lora.start_from:
        given = read_adapter(hub.local(for_expert(config.lora.start_from, recipe.base.expert)), transformer)
    modules = lora.inject(transformer, config.lora.targets, spec_of(config), config.train.seed)
    if given:
        lora.start_from(transformer, given)
    if config.train.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    if num_parts > 1:
        sequence.share_tokens(transformer, num_parts)
    groups = optimizers.groups(lora.trainable(transformer),
                               lora.lr_factors(transformer, optim.lora_plus, optim.lr_factors))
    model, optimizer = accelerator.prepare(transformer, optimizers.make(
        optim.name.name, groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay))
    ema = None if optim.ema_decay is None else Ema(accelerator, model, optim.ema_decay)
    return Training(recipe, accelerator, model, optimizer, ema, modules)


def num_tokens(recipe: Opened) -> set[int]:
    """The tokens that the transformer sees of each window, a reference before it included."""
    shapes = [(recipe.variant.latent_THW(p.bucket), "reference" in p.partners)
              for p in recipe.planned + recipe.heldout]
    return {(t + has_reference) * h * w // 4 for (t, h, w), has_reference in shapes}


def train(training: Training, source: Encode, step: int, stopper: Stopper) -> int:
    """The loop: from `step` to the last, or to where the user stopped it; returns the steps done."""
    config, recipe, accelerator = training.config, training.recipe, training.accelerator
    heldout = []
    if config.validation.every_steps:
        heldout = heldout_samples(recipe, source)
    last, stop = config.train.num_steps, False
    ahead = batches.ahead(range(step, last), batch_maker(training, source, step))
    with metrics.Metrics(recipe.run_dir / "metrics.jsonl", accelerator.log, step, last,
                         accelerator.is_main_process) as board:
        while step < last and not stop:
            began = time.perf_counter()
            micro_batches = next(ahead)
            waited_s = time.perf_counter() - began
            numbers = train_step(training, step, micro_batches)
            step += 1
            numbers |= {"step_s": time.perf_counter() - began, "data_wait_s": waited_s,
                        "memory_gib": engine.peak_memory_gib(training.device)}
            if heldout and (step % config.validation.every_steps == 0 or step == last):
                numbers["validation_loss"] = validate(training, heldout)
                board.say(f"step {step}: validation loss {numbers['validation_loss']:.5f}")
            if step % config.train.log_every == 0 or "validation_loss" in numbers:
                board.write(step, numbers)
            board.advance({"loss": f"{numbers['loss']:.4f}", "grad": f"{numbers['grad_norm']:.3f}",
                           "wait": f"{waited_s * 1000:.0f}ms", "mem": f"{numbers['memory_gib']:.1f}GiB"})
            stop = engine.any_process(accelerator, stopper.asked)
            if step % config.train.save_every == 0 or step == last or stop:
                save(training, step)
    return step


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
    """One optimizer step over this process's micro-batches; its numbers are means over all processes."""
    accelerator, optimizer, optim = training.accelerator, training.optimizer, training.config.optim
    lr = engine.learning_rate(step, optim.lr, optim.schedule.name, optim.warmup_steps, training.config.train.num_steps)
    engine.set_learning_rate(optimizer, lr)
    losses, grad_norm = [], math.nan
    for batch in micro_batches:
        with accelerator.accumulate(training.model):
            loss_B = batch_loss(training, batch)
            refuse_non_finite(training, step, "loss", loss_B, batch)
            losses.append(loss_B.detach())
            accelerator.backward(loss_B.mean())
            if accelerator.sync_gradients:
                grad_norm = engine.clip_gradients(accelerator, training.model, optim.max_grad_norm)
                refuse_non_finite(training, step, "gradient norm", torch.tensor(grad_norm), batch)
            optimizer.step()
            optimizer.zero_grad()
    if training.ema is not None:
        training.ema.update(step + 1)
    return {"loss": float(engine.gather(accelerator, torch.cat(losses)).mean()), "grad_norm": grad_norm, "lr": lr,
            **optimizers.numbers(optimizer, optim.name.name)}


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


def refuse_non_finite(training: Training, step: int, what: str, values: torch.Tensor, batch: Batch) -> None:
    """Stop on every process when a value is not finite on any of them, and note what each was working on."""
    if engine.all_finite(training.accelerator, values):
        return
    note = training.recipe.run_dir / f"nonfinite_{step + 1:06d}_process_{training.accelerator.process_index}.json"
    write_json(note, {"step": step + 1, "what": what, "values": [str(v) for v in values.detach().flatten().tolist()],
                      "clips": batch.ids, "sigmas": batch.sigma_B.tolist(), "places_in_batch": batch.index_B})
    raise UserError(f"step {step + 1}: the {what} is not finite (clips here: {', '.join(batch.ids)}; {note})",
                    "the last checkpoint is untouched; lower optim.lr, or look at these clips")


def validate(training: Training, heldout: Sequence[Sample]) -> float:
    """Mean held-out loss at those of the config's sigmas at which this transformer works."""
    low, high = training.recipe.sigmas
    sigmas = [sigma for sigma in training.config.validation.sigmas if low <= sigma < high or sigma == high == 1]
    with (optimizers.at_average(training.accelerator, training.model, training.optimizer, training.kind),
          engine.autocast(training.device, training.recipe.dtype)):
        losses = validation.losses(training.model, heldout, sigmas, training.device)
    return float(losses.mean())


def fingerprint(recipe: Opened) -> dict[str, Any]:
    """What fixes the training's numbers: keys of the config, the base's weights, and the clips with their captions."""
    return {**schema.fingerprint(recipe.config), "(base weights)": recipe.base.digest("transformer", recipe.cache.memo),
            "(clips and captions)": manifest_digest(recipe)}


def resume(training: Training) -> int:
    """The step to start from: that of the newest whole checkpoint, put back under this engine, or 0."""
    folder = training.recipe.run_dir / "checkpoints"
    if training.config.train.resume is Resume.never and (there := checkpoint.steps_on_disk(folder)):
        raise UserError(f"{there[-1]} exists and train.resume=never", "start a new run with run.name=ANOTHER, or "
                        "go on with train.resume=auto")
    found = checkpoint.newest_whole(folder, fingerprint(training.recipe), schema.defaults())
    if found is None:
        return 0
    path, step, tensors, passed = found
    checkpoint.restore(training.accelerator, training.model, training.optimizer, kind=training.kind, ema=training.ema,
                       tensors=tensors, step=step)
    if training.accelerator.is_main_process:
        print("\n".join([*passed, f"going on from {path}"]))
    return step


def save(training: Training, step: int) -> None:
    """Write a checkpoint; every process must call it."""
    tensors = checkpoint.gather(training.accelerator, training.model, training.optimizer, training.kind, training.ema)
    if training.accelerator.is_main_process:
        checkpoint.save(training.recipe.run_dir / "checkpoints", step, tensors, fingerprint(training.recipe),
                        training.config.train.keep_checkpoints)
    training.accelerator.wait_for_everyone()


def start_run(training: Training, start: int) -> None:
    """Trackers, and the run folder's header: config, versions, digests, adapted modules."""
    config, recipe, accelerator = training.config, training.recipe, training.accelerator
    if accelerator.is_main_process:
        write_text(recipe.run_dir / "config.yaml", schema.to_yaml(config))
        write_json(recipe.run_dir / "run.json", {
            "wantrain": __version__, "commit": metrics.commit(), "python": platform.python_version(),
            "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")},
            "num_processes": accelerator.num_processes, "engine": accelerator.distributed_type.value,
            "start_step": start, "config_digest": schema.digest(config),
            "base_digest": recipe.base.digest("transformer", recipe.cache.memo), "expert": recipe.base.expert,
            "sigmas": recipe.sigmas,
            "manifest_digest": manifest_digest(recipe),
            "num_clips": len(recipe.planned), "modules": training.modules,
        })
        write_densities(recipe)
    os.environ.setdefault("WANDB_MODE", schema.wandb_mode())
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in schema.flat(config).items()}
    accelerator.init_trackers(config.tracker.project, flat,
                              {"wandb": {"name": config.run.name, "dir": str(recipe.run_dir)}})


def write_densities(recipe: Opened) -> None:
    """`sigma_density.svg`: what sigmas are drawn beside those of inference, a plot for each density that buckets have.
    """
    config, variant = recipe.config, recipe.variant
    densities = {recipe.density(p.bucket): p.bucket for p in recipe.planned}
    steps = range(math.ceil(NUM_PLOTTED / config.data.batch_size))
    scheduler = recipe.base.scheduler(variant.shift)
    scheduler.set_timesteps(config.sampler.num_steps or variant.num_steps)
    for density, bucket in densities.items():
        size = config.data.batch_size
        drawn = torch.cat([flow.draw_sigma(config.train.seed, step, range(size), size, density) for step in steps])
        name = "sigma_density.svg" if len(densities) == 1 else f"sigma_density {bucket}.svg"
        expert = f", {recipe.base.expert} noise expert" if recipe.base.expert else ""
        write_text(recipe.run_dir / name, density_svg(
            f"{config.run.name}{expert}: sigmas of training", drawn.tolist(), density, inference_shift=variant.shift,
            inference_sigmas=scheduler.sigmas[:-1].tolist(), boundary=variant.boundary))
