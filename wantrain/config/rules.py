"""What values of a config are right: each rule is (whether it holds, key, value, what is allowed).

Cheap rules come first: the last one alone needs torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from wantrain.config.keys import example_of, leaf_values, pasted, value_at
from wantrain.config.schema import (
    TRACKERS,
    BaseForm,
    Config,
    DataMode,
    Distribution,
    Experts,
    Extract,
    LoraKind,
    Optim,
    Optimizer,
    Schedule,
)
from wantrain.config.values import nearest
from wantrain.models.variants import VARIANTS, is_trainable
from wantrain.terms import UserError

Rule = tuple[bool, str, object, str]


def refuse_faults(config: Config) -> None:
    """Raise UserError for the first rule that does not hold."""
    for ok, key, value, allowed in _rules(config):
        if not ok:
            raise UserError(f"{key} = {value!r} is not allowed: {allowed}", _remedy(config, key))


def refuse_absent_clips(config: Config) -> None:
    """Raise UserError for a path of clips on this machine with nothing there; for verbs that read clips."""
    paths = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    for key, path in {**paths, "data.heldout": config.data.heldout or ""}.items():
        if path and not _may_hold_clips(path):
            about = "; a backslash parts no folders here" if "\\" in path else ""
            raise UserError(f"{key} = {path!r} does not exist{about}", f"set {key} to a folder of clips with .txt "
                            "captions, a .jsonl, .csv, .parquet or .tar, or a URL")


def _may_hold_clips(path: str) -> bool:
    if "://" in path or set(path) & set("*?["):
        return True
    try:
        return os.path.lexists(Path(path).expanduser())
    except (RuntimeError, ValueError):
        return True  # whoever opens it says why it cannot


def _remedy(config: Config, key: str) -> str:
    """A value that would do: the key's default, where what else is set allows it."""
    if key == "WANDB_MODE":
        return "export WANDB_MODE=offline"
    own: dict[str, Callable[[Config], object]] = {
        "sampler.resolution": _near_size,
        "tracker.names": lambda config: f"[{(nearest(' '.join(config.tracker.names), TRACKERS) or TRACKERS)[0]}]",
        "data.batch_size": lambda config: config.train.micro_batch_size,
        "optim.lr": lambda config: 1.0 if config.optim.name is Optimizer.prodigy else example_of("optim.lr"),
        "optim.weight_decay": lambda config: 0.0 if config.optim.lr >= 1 else example_of("optim.weight_decay")}
    value = own[key](config) if key in own else example_of(key)
    return f"{pasted(key, value)}    for one, on the command line; in a recipe it is written in YAML"


def _near_size(config: Config) -> str:
    """The multiples of what the variant divides by that are nearest to the size of samples; null without one."""
    size, variant = config.sampler.resolution, VARIANTS[config.model.variant]
    if size is None or len(size) != 2 or min(size) < 1:
        return "null"
    sides = (max(1, round(side / variant.multiple_px)) * variant.multiple_px for side in size)
    return f"[{','.join(map(str, sides))}]"


ABOVE_0 = ("lora.alpha", "loss.delta", "loss.min_snr_gamma", "loss.class_weight", "optim.lr", "optim.max_grad_norm",
           "optim.lora_plus", "optim.eps", "sampler.shift", "sigma.shift", "high.alpha", "high.lr", "low.alpha",
           "low.lr")
AT_LEAST_0 = ("optim.weight_decay", "optim.warmup_steps", "data.tag_orders", "train.max_skips", "loss.mask_preserve",
              "validation.every_steps", "sampler.guidance")
AT_LEAST_1 = ("lora.rank", "train.num_steps", "train.micro_batch_size", "data.batch_size", "train.save_every",
              "train.log_every", "train.keep_checkpoints", "train.keep_every", "train.sequence_parallel",
              "report.num_windows", "data.max_tokens_per_clip", "data.max_tokens_per_batch", "data.num_workers",
              "sampler.num_steps", "high.rank", "high.num_steps", "low.rank", "low.num_steps")
SHARES = ("data.caption_dropout", "data.first_frame_share", "loss.mask_background")
SECONDS = ("data.timeout_s", "train.stall_timeout_s")
"""Keys by what their numbers may be; null passes where the schema allows it."""

NUMBERS = ((ABOVE_0, 0, False, math.inf, "above 0"), (AT_LEAST_0, 0, True, math.inf, "0 or more"),
           (AT_LEAST_1, 1, True, math.inf, "1 or more"), (SHARES, 0, True, 1, "a share in [0, 1]"),
           (SECONDS, 0, False, 1e8, "seconds, above 0 and at most 1e8"))
"""(keys, lower bound, whether that is allowed itself, upper bound, the same in words)."""

NAME_BYTES = 200
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun")


def _rules(config: Config) -> Iterator[Rule]:
    for key, value in leaf_values(config):
        yield from _rules_of_type(key, value)
    for keys, low, is_allowed_itself, high, allowed in NUMBERS:
        for key in keys:
            value = value_at(config, key)
            yield value is None or (low <= value <= high and (is_allowed_itself or value > low)), key, value, allowed
    yield from _run_rules(config)
    yield from _data_rules(config)
    yield from _adapter_rules(config)
    yield from _optim_rules(config.optim, config.lora.kind)
    yield from _sampler_rules(config)
    yield from _variant_rules(config)
    yield from _sigma_rules(config)


def _rules_of_type(key: str, value: object) -> Iterator[Rule]:
    """What holds for every number and every text, wherever it stands."""
    if isinstance(value, float):
        yield math.isfinite(value), key, value, "a finite number"
    elif isinstance(value, int) and not key.endswith(("seed", "seeds")):
        yield abs(value) < 2**31, key, value, f"between {1 - 2**31} and {2**31 - 1}"
    elif isinstance(value, str):
        yield "\0" not in value, key, value, "text without a NUL byte"
        yield value.encode("utf-8", "replace").decode() == value, key, value, "text that is UTF-8"


def _run_rules(config: Config) -> Iterator[Rule]:
    run, train = config.run, config.train
    yield bool(run.name.strip()), "run.name", run.name, "a name is needed; the exported file has it too"
    yield run.name not in (".", "..") and not set(run.name) & set("/\\"), "run.name", run.name, \
        "a name, not a path; run.dir is the folder"
    yield len(run.name.encode()) <= NAME_BYTES, "run.name", run.name, f"at most {NAME_BYTES} bytes"
    for key, folder in {"run.dir": run.dir, "data.cache_dir": config.data.cache_dir}.items():
        yield bool(folder), key, folder, "the path of a folder"
        yield _may_be_folder(folder), key, folder, "a folder, or a path where one can be made; this is a file"
    for key, seeds in (("train.seed", [train.seed]), ("sampler.seeds", config.sampler.seeds),
                       ("evaluate.seeds", config.evaluate.seeds)):
        yield bool(seeds), key, seeds, "at least one"
        for seed in seeds:
            yield 0 <= seed < 2**63, key, seed, "a whole number from 0, below 2^63"
    for name in config.tracker.names:
        yield name in TRACKERS, "tracker.names", name, " or ".join(dict.fromkeys([*nearest(name, TRACKERS), *TRACKERS]))
    mode = os.environ.get("WANDB_MODE")
    yield "wandb" not in config.tracker.names or mode is None or mode in WANDB_MODES, "WANDB_MODE", mode, \
        "online, offline or disabled"


def _may_be_folder(path: str) -> bool:
    """False where a file is in the place of the folder or of one above it."""
    try:
        return all(above.is_dir() for above in (Path(path), *Path(path).parents) if above.exists())
    except OSError:
        return True  # whoever makes the folder says why it cannot


def _data_rules(config: Config) -> Iterator[Rule]:
    data, train = config.data, config.train
    yield bool(data.num_frames), "data.num_frames", data.num_frames, "at least one length"
    lengths = [("data.num_frames", frames) for frames in data.num_frames]
    for key, frames in [*lengths, ("sampler.num_frames", config.sampler.num_frames)]:
        yield frames is None or (frames >= 1 and frames % 4 == 1), key, frames, "each must be 4n+1: 1, 5, ..., 81"
    yield bool(data.resolutions), "data.resolutions", data.resolutions, "at least one [height, width]"
    for size in data.resolutions:
        yield len(size) == 2 and min(size) > 0, "data.resolutions", size, "two positive numbers, [height, width]"
    yield isinstance(data.sources, dict) and bool(data.sources), "data.sources", data.sources, "at least one source"
    for name, source in data.sources.items():
        yield bool(source.path), f"data.sources.{name}.path", source.path, "a folder, a manifest or a URL"
        yield source.repeats >= 0.001, f"data.sources.{name}.repeats", source.repeats, \
            "0.001 (once in a thousand epochs) or more"
        yield source.weight is None or source.weight > 0, f"data.sources.{name}.weight", source.weight, "above 0"
        yield source.speed > 0, f"data.sources.{name}.speed", source.speed, "above 0"
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    yield len(weighted) in (0, len(data.sources)), "data.sources.*.weight", weighted, "all sources, or none"
    for column, limit in data.limits.items():
        yield _is_range(limit), f"data.limits.{column}", limit, "[low, high] with null for no bound"
    yield data.extract is not Extract.random or data.mode is DataMode.stream, "data.extract", "random", \
        "only with data.mode=stream; uniform or sliding give more than the head from a cache"
    yield data.batch_size % train.micro_batch_size == 0, "data.batch_size", data.batch_size, \
        f"a multiple of train.micro_batch_size ({train.micro_batch_size})"
    sigmas = config.validation.sigmas
    yield bool(sigmas) and all(0 < s <= 1 for s in sigmas), "validation.sigmas", sigmas, \
        "in (0, 1]: sigma, and not timesteps"
    yield len(set(sigmas)) == len(sigmas), "validation.sigmas", sigmas, "each once"
    yield config.validation.every_steps == 0 or data.heldout is not None, "validation.every_steps", \
        config.validation.every_steps, "0 when data.heldout is not set"


def _adapter_rules(config: Config) -> Iterator[Rule]:
    own, loss = config.lora, config.loss
    numbers = [("lora.rank_pattern", value) for value in own.rank_pattern.values()]
    for key, value in [*numbers, *(("lora.alpha_pattern", value) for value in own.alpha_pattern.values())]:
        yield value > 0, key, value, "positive numbers"
    start = own.start_from or ""
    yield not re.search(r"(^|/)checkpoints(/step_\d+)?/?$", start) and not (Path(start).is_dir() and (
        Path(start) / "checkpoints").is_dir()), "lora.start_from", start, \
        "the .safetensors that `wantrain export` has written; a checkpoint or a run is none: export it first"
    yield bool(own.targets) and all(own.targets), "lora.targets", own.targets, "at least one preset or pattern"
    yield own.kind is not LoraKind.dora or config.memory.base is BaseForm.dtype, "lora.kind", own.kind.name, \
        "another kind, or memory.base=dtype: dora learns lengths of the base's rows, which are stored rounded"
    yield not loss.class_words or bool(config.data.trigger), "loss.class_words", loss.class_words, \
        "only with data.trigger, in whose place they stand"


def _variant_rules(config: Config) -> Iterator[Rule]:
    """What follows from the row of the variants table."""
    names = [own.name for own in VARIANTS.values() if is_trainable(own)]
    variant = VARIANTS.get(config.model.variant)
    yield variant is not None and variant.name in names, "model.variant", config.model.variant, \
        ", ".join(dict.fromkeys([*nearest(config.model.variant, names), *names]))
    assert variant is not None, "the rule above has refused it"
    one = f"{variant.name} has one transformer"
    yield bool(variant.experts) or config.model.experts is Experts.both, "model.experts", config.model.experts.name, one
    for key, value in (*leaf_values(config.high, "high"), *leaf_values(config.low, "low")):
        yield bool(variant.experts) or value is None, key, value, one
    largest = max(variant.architecture.dim, variant.architecture.image_dim or 0)
    ranks = [("lora.rank", config.lora.rank), ("high.rank", config.high.rank), ("low.rank", config.low.rank)]
    for key, rank in [*ranks, *(("lora.rank_pattern", rank) for rank in config.lora.rank_pattern.values())]:
        yield rank is None or rank <= largest, key, rank, \
            f"it is above what any module of {variant.name} has: {largest}; 16 to 128 is usual"
    size = config.sampler.resolution or []
    yield all(side % variant.multiple_px == 0 for side in size), "sampler.resolution", size, \
        f"both must be multiples of {variant.multiple_px} for {variant.name}"


def _sampler_rules(config: Config) -> Iterator[Rule]:
    own = config.sampler
    yield bool(own.strengths), "sampler.strengths", own.strengths, "at least one"
    yield len(set(own.strengths)) == len(own.strengths), "sampler.strengths", own.strengths, "each once"
    if own.resolution is not None:
        yield len(own.resolution) == 2 and min(own.resolution) > 0, "sampler.resolution", own.resolution, \
            "two positive numbers, [height, width]"
    for key, prompts in {"sampler.prompts": own.prompts, "evaluate.prompts": config.evaluate.prompts}.items():
        yield all(prompt.strip() for prompt in prompts), key, prompts, "prompts that are not empty"
    for given in own.inputs:
        yield set(given) <= set(SAMPLER_INPUTS), "sampler.inputs", given, ", ".join(SAMPLER_INPUTS)
    yield len(own.inputs) in (0, 1, len(own.prompts)), "sampler.inputs", len(own.inputs), \
        "one for all prompts, or one for each"
    yield 0 < own.strength <= 1, "sampler.strength", own.strength, "in (0, 1]"


def _sigma_rules(config: Config) -> Iterator[Rule]:
    own = config.sigma
    yield len(own.range) == 2 and 0 <= own.range[0] < own.range[1] <= 1, "sigma.range", own.range, \
        "[low, high] in [0, 1]: sigma, and not timesteps (sigma = timestep / 1000)"
    if own.distribution is Distribution.uniform and not own.shape and own.range == [0, 1]:
        return  # right with every shift
    from wantrain.density import Density

    try:
        Density(own.distribution.name, tuple(own.shape), 1.0 if own.shift is None else own.shift,
                (own.range[0], own.range[1]))
    except ValueError as error:
        yield False, "sigma", {"shape": own.shape, "shift": own.shift, "range": own.range}, str(error)


SAMPLER_INPUTS = ("first", "last", "control", "control_mask", "reference", "face", "video")


def _optim_rules(optim: Optim, kind: LoraKind) -> Iterator[Rule]:
    yield all(f > 0 for f in optim.lr_factors.values()), "optim.lr_factors", optim.lr_factors, "positive numbers"
    yield len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas), "optim.betas", optim.betas, \
        "two numbers in [0, 1)"
    yield optim.ema_decay is None or 0 < optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, \
        "between 0 and 1, e.g. 0.999, or null"
    yield optim.lr * optim.weight_decay < 1, "optim.weight_decay", optim.weight_decay, \
        f"below 1 / optim.lr ({optim.lr:g}): each step takes their product off every weight"
    yield optim.lora_plus == 1 or kind in (LoraKind.lora, LoraKind.rslora, LoraKind.dora), "optim.lora_plus", \
        optim.lora_plus, f"1 with lora.kind={kind.name}, which has no B matrices"
    if optim.name is Optimizer.prodigy:
        yield 0.1 <= optim.lr <= 10, "optim.lr", optim.lr, \
            "optim.name=prodigy multiplies it with the learning rate that it finds: take 1.0, or from 0.1 to 10"
        for key, value, alone in (("optim.lora_plus", optim.lora_plus, 1), ("optim.lr_factors", optim.lr_factors, {})):
            yield value == alone, key, value, f"{alone} with optim.name=prodigy, which finds one learning rate for all"
    if optim.name is Optimizer.schedule_free:
        yield optim.schedule is Schedule.constant, "optim.schedule", optim.schedule.name, \
            "constant with optim.name=schedule_free, whose average takes the schedule's place; warmup_steps is allowed"
        yield optim.ema_decay is None, "optim.ema_decay", optim.ema_decay, \
            "null with optim.name=schedule_free, which exports an average already"
        yield optim.betas[0] > 0, "optim.betas", optim.betas, "a first number above 0 with optim.name=schedule_free"


def _is_range(limit: object) -> bool:
    """Whether this is [low, high] of numbers or null, and not both null."""
    if not (isinstance(limit, list) and len(limit) == 2):
        return False
    bounds = [bound for bound in limit if bound is not None]
    numbers = all(isinstance(bound, int | float) for bound in bounds)
    return numbers and bool(bounds) and bounds == sorted(bounds)
