"""`wantrain plan`: memory, time and price of a recipe by arithmetic, without a GPU, weights, clips or network."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from wantrain import costs
from wantrain.config import Config, Dtype, VaeDtype, expert_config, experts_of
from wantrain.costs import GIB, Card, Choice, Job, MemoryPolicy
from wantrain.recipe import costing
from wantrain.recipe.costing import Room, job_of, largest_bucket, policy_of
from wantrain.terms import UserError

if TYPE_CHECKING:
    from wantrain.models.calibration import Rates

BAR_WIDTH = 40
OWN, BEST = "as the recipe says", "fastest that fits"
HERE = "here"
"""What --gpu is for this machine's own card."""


@dataclass(frozen=True, slots=True)
class Training:
    """One transformer's training: its name (an expert, or empty), job, own policy, steps and micro-steps in each."""

    name: str
    config: Config
    job: Job
    num_steps: int
    num_micro_steps: int

    def hours(self, policy: MemoryPolicy, card: Card) -> float:
        """Hours of all steps, at the largest clips."""
        return self.num_steps * costs.step(self.job, policy, card, self.num_micro_steps).seconds / 3600


def run(config: Config, arguments: Sequence[str], given: argparse.Namespace) -> None:
    """Print the plan for one card, or what each size of card would do."""
    trainings = trainings_of(config, given.gpus)
    if given.gpu is None:
        cards = [costs.card_of(f"{size}gb") for size in costs.TYPICAL]
        plans = [plan_for(config, trainings, card, given) for card in cards]
        print(json.dumps(plans, indent=1) if given.json else told_all(config, trainings, plans))
        return
    plan = plan_for(config, trainings, card_here() if given.gpu == HERE else costs.card_of(given.gpu), given)
    print(json.dumps(plan, indent=1) if given.json else told(config, plan, arguments))


def card_here() -> Card:
    """This machine's card, its rates measured. Raises UserError where there is none."""
    import torch  # the one plan that needs it

    from wantrain.models.calibration import calibrate

    if not torch.cuda.is_available():
        raise UserError(f"--gpu {HERE}: there is no GPU that torch can use", "--gpu 24gb, or the name of a card")
    device = torch.device("cuda")
    return measured(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], calibrate(device))


def measured(name: str, num_bytes: int, rates: Rates) -> Card:
    """A card by what was measured on it."""
    family = costs.Family(1.0, rates.attention / rates.products, rates.attention_backward / rates.products)
    return Card(name, num_bytes / GIB, rates.products / 1e12, None, rates.memory / costs.MEMORY_SHARE / 1e9,
                rates.slot / costs.PCIE_SHARE / 1e9, family, is_measured=True)


def trainings_of(config: Config, num_gpus: int) -> list[Training]:
    """The trainings that the recipe asks for, each with its expert's own settings."""
    bucket, found = largest_bucket(config), []
    for expert in experts_of(config):
        own = expert_config(config, expert)
        groups = num_gpus // own.train.sequence_parallel
        at_once = own.train.micro_batch_size * groups
        if not groups or num_gpus % own.train.sequence_parallel or own.data.batch_size % at_once:
            raise UserError(f"--gpus {num_gpus} does not fit data.batch_size = {own.data.batch_size}, "
                            f"train.micro_batch_size = {own.train.micro_batch_size} and train.sequence_parallel = "
                            f"{own.train.sequence_parallel}: each GPU (or group that shares clips) takes as many "
                            "samples", f"data.batch_size={max(groups, 1) * own.train.micro_batch_size}")
        job = job_of(own, bucket, num_gpus)
        found.append(Training(expert or "", own, job, own.train.num_steps,
                              own.data.batch_size // at_once))
    return found


def plan_for(config: Config, trainings: Sequence[Training], card: Card, given: argparse.Namespace) -> dict[str, Any]:
    """All numbers for one card: bytes, seconds, hours; `settings` are the recipe's own and what would fit."""
    card = replace(card, memory_gib=min(card.memory_gib, config.memory.gib or math.inf))
    budget, host = card.memory_gib * GIB, given.ram * GIB
    own = {one.name: policy_of(one.config, one.job, Room(card, budget, host)) for one in trainings}
    largest = max(trainings, key=lambda one: costs.peak(costs.device_parts(one.job, own[one.name])))
    job = largest.job
    choice = costs.choose(job, card, budget, host)
    smaller = None if choice.best else costs.relieved(job, card, budget, host)
    policies = named(own[largest.name], choice, job, card)
    return {
        "variant": job.variant.name, "card": asdict(card), "gpus": given.gpus, "bucket": str(job.batch.bucket),
        "tokens": job.tokens, "rows": job.batch.rows, "trainable": job.numbers, "fits": choice.best is not None,
        "settings": {name: {**setting(policy, trainings, job, card, given),
                            "overrides": [] if policy is policies[OWN] else costs.overrides(policy)}
                     for name, policy in policies.items()},
        "relief": relief(smaller),
        "cache": costs.encoding_phases(job.variant, job.batch.bucket, job.itemsize, config.memory.encoders.name,
                                       4 if config.memory.vae is VaeDtype.float32 else 2),
        "disk": {"cache, a clip": costs.cache_bytes(job.variant, job.batch.bucket, job.itemsize),
                 "a checkpoint": costs.checkpoint_bytes(job),
                 "checkpoints": sum(costs.checkpoint_bytes(one.job) for one in trainings)
                 * (config.train.keep_checkpoints + 1)},
    }


def relief(found: tuple[list[str], Choice] | None) -> dict[str, Any] | None:
    """What makes a recipe fit for which nothing does as it is: settings that train something smaller."""
    if found is None or found[1].best is None:
        return None
    settings, best = found[0], found[1].best
    return {"overrides": [*settings, *costs.overrides(best.policy)], "peak": best.nbytes}


def named(own: MemoryPolicy, choice: Choice, job: Job, card: Card) -> dict[str, MemoryPolicy]:
    """The recipe's own policy, and those of a choice by what they are for. The fastest that fits is the recipe's own
    where that is as fast: left to itself a training may let blocks keep differently, which no key says.
    """
    peak, seconds = costs.peak(costs.device_parts(job, own)), costs.step(job, own, card, 1).seconds
    best, faster, smaller = choice.best, choice.faster, choice.smaller
    if best and peak <= card.memory_gib * GIB and seconds <= best.seconds:
        faster = faster if faster and faster.seconds < seconds else None
        smaller = next((one for one in (best, smaller) if one and one.nbytes < peak), None)
        best = costs.Candidate(own, peak, seconds)
    found = {BEST: best, "next faster": faster, "next smaller": smaller}
    return {OWN: own, **{name: one.policy for name, one in found.items() if one}}


def setting(policy: MemoryPolicy, trainings: Sequence[Training], job: Job, card: Card, given: argparse.Namespace
            ) -> dict[str, Any]:
    """What one policy is and takes: parts of the peak, a step, all hours, the price."""
    parts = costs.device_parts(job, policy)
    hours = sum(one.hours(policy, card) for one in trainings)
    one = costs.step(job, policy, card, trainings[0].num_micro_steps)
    mapped = costs.stays_mapped(job, policy, given.ram * GIB)
    return {"policy": costing.told(policy), "parts": parts, "peak": costs.peak(parts),
            "host": costs.host_parts(job, policy, mapped=mapped), "step": asdict(one),
            "hours": hours, "price": None if given.price is None else hours * given.price * given.gpus}


# For people


def told(config: Config, plan: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """The plan for one card as a page."""
    settings, card = plan["settings"], plan["card"]
    own, best = settings[OWN], settings.get(BEST)
    lines = [f"plan         {plan['variant']} on {plan['gpus']} x {card['name']} ({card['memory_gib']:.4g} GiB): "
             + ("arithmetic at rates measured here" if card["is_measured"] else "arithmetic, nothing was measured"),
             f"largest      {plan['bucket']}: {plan['tokens']:,} tokens of {plan['rows']} rows at once; "
             f"{plan['trainable']:,} trainable numbers", "", *bars(OWN, own, card["memory_gib"])]
    if best and best["policy"] != own["policy"]:
        lines += ["", *bars(BEST, best, card["memory_gib"])]
    lines.append("")
    told_of = {name: one for name, one in settings.items() if one is own or one["policy"] != own["policy"]}
    for name, one in told_of.items():
        fits = "fits" if one["peak"] <= card["memory_gib"] * GIB else "does not fit"
        lines.append(f"{name:20}{gib(one['peak']):>9}, {fits}; {time_of(config, one)}")
        lines.append(f"{'':20}{shlex.join(one['overrides']) or one['policy']}")
    if best and best["policy"] == own["policy"]:
        lines.append("nothing that fits is faster than what the recipe says")
    if not best:
        lines += ["nothing fits as it is", *relief_lines(plan)]
    step = own["step"]
    lines += ["", f"a step       {step['tokens']:,} tokens and {step['flops'] / 1e15:.3g} PFLOP on each GPU",
              *(f"cache, {name} {summed(parts)}" for name, parts in plan["cache"].items()),
              "host memory  " + summed((best or own)["host"]),
              f"disk         cache {plan['disk']['cache, a clip'] / 2**20:,.1f} MiB for a clip; checkpoints "
              f"{gib(plan['disk']['checkpoints'])}, {gib(plan['disk']['a checkpoint'])} each",
              f"next: {shlex.join(['wantrain', 'train', *arguments, *(best or plan['relief'] or own)['overrides']])}"]
    return "\n".join(lines)


def relief_lines(plan: Mapping[str, Any]) -> list[str]:
    """What would fit of a recipe that does not."""
    found = plan["relief"]
    if found is None:
        return [f"{'':20}not even with a smaller adapter and clips of a third of the tokens"]
    return [f"{'something smaller':20}{gib(found['peak']):>9}, fits", f"{'':20}{shlex.join(found['overrides'])}"]


def bars(title: str, one: Mapping[str, Any], memory_gib: float) -> list[str]:
    """A line for each part, as long as its share of the card (or of the peak, where that is more)."""
    unit = max(memory_gib * GIB, one["peak"]) / BAR_WIDTH
    lines = [f"  {name:24}{gib(size):>9} {'█' * math.ceil(size / unit)}" for name, size in one["parts"].items() if size]
    return [f"{title}, device memory at the peak", *lines, f"  {'peak':24}{gib(one['peak']):>9} of {memory_gib:g} GiB"]


def told_all(config: Config, trainings: Sequence[Training], plans: Sequence[Mapping[str, Any]]) -> str:
    """A line for each size of card."""
    job = trainings[0].job
    lines = [f"plan         {job.variant.name}, {job.batch.bucket}: {job.tokens:,} tokens at once; arithmetic, nothing "
             "was measured", f"{'card':38}{'peak':>10}  fastest that fits"]
    for plan in plans:
        best = plan["settings"].get(BEST)
        found, time = best or plan["relief"], f"; {time_of(config, best)}" if best else ""
        lines.append(f"{plan['card']['name']:38}" + (
            f"{gib(found['peak']):>10}  {shlex.join(found['overrides']) or 'as the recipe says'}{time}"
            if found else f"{'':12}nothing fits"))
    return "\n".join([*lines, "next: the same with --gpu, e.g. --gpu 24gb, says it part by part"])


def time_of(config: Config, one: Mapping[str, Any]) -> str:
    """A step, all steps and the price. The cards' numbers say nothing of float32."""
    if config.model.dtype is Dtype.float32:
        return "no times for model.dtype=float32"
    price = "" if one["price"] is None else f", price {one['price']:,.2f}"
    return f"{one['step']['seconds']:.3g} s a step, {one['hours']:.3g} hours{price}"


def summed(parts: Mapping[str, int]) -> str:
    """The sum of parts, and each of them."""
    return f"{gib(costs.peak(parts))}: " + ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"
