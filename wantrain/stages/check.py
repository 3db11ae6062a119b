"""`wantrain check`: what a config would do, without loading weights."""

from __future__ import annotations

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Sequence

from wantrain import metrics
from wantrain.config import Config
from wantrain.data.cache import counted, missing
from wantrain.data.folders import Account
from wantrain.data.plan import cropped, enlarged, surprises_of, trimmed_s
from wantrain.density import share_of_schedule
from wantrain.models import hub, inventory
from wantrain.recipe.clips import HELDOUT, Clips, evaluation_faults, first_words, holding_trigger, open_clips
from wantrain.recipe.recipe import Recipe, open_recipe, outline, training_faults


def run(config: Config, arguments: Sequence[str]) -> None:
    """Print clips, buckets, tokens, steps, trainable parameters and files."""
    recipe = open_recipe(config, fetch=False)
    clips = open_clips(recipe, arguments)
    trainings = recipe.trainings()
    for fault in (fault for own in trainings for fault in training_faults(own)):
        raise fault
    print(f"run          {config.run.name} in {recipe.run_dir}")
    print_base(recipe)
    print_data(clips)
    for own in trainings:
        print_training(own, clips)
    to_make = missing(clips.entries)
    print(f"cache        {clips.cache.folder}: {counted(to_make)} " + (
        "needed; not checked, which are there: base not here" if recipe.base.absent else "still to encode"))
    for own in trainings:
        print(f"checkpoints  every {config.train.save_every} steps in {own.run_dir / 'checkpoints'}")
        print(f"export       {own.export_path}")
    for fault in evaluation_faults(clips):
        print(f"evaluate     not yet: {fault.message}")
    mode = f" (wandb {metrics.wandb_mode()})" if "wandb" in config.tracker.names else ""
    print(f"trackers     {', '.join(['jsonl', *config.tracker.names])}{mode}")
    print(f"next: {shlex.join(['wantrain', 'cache' if to_make else 'train', *arguments])}")


def print_base(recipe: Recipe) -> None:
    """Print the files of the base and what they were taken for; of a model that is not here, how to get it."""
    variant, base = recipe.variant, recipe.base
    total = variant.num_parameters or sum(map(math.prod, inventory.tensors(variant.architecture).values()))
    print(f"base         {variant.name}, {total:,} parameters, {recipe.config.model.dtype.name}"
          + (f", the Linears of its blocks in {recipe.base_form}" if recipe.base_form else "")
          + (", or in fewer bits, as the training finds room" if recipe.known_form is None else ""))
    for part, path in base.parts.items():
        print(f"  {part:13}{path}")
    base.refuse_other_parts()
    for own in recipe.trainings():
        if "transformer" in own.base.parts:
            print(f"  detected   {own.base.detected()}")
        for path, strength in own.base.merged:
            print(f"  merged     {path} at strength {strength:g}")
    for where in base.absent:
        size = f", about {inventory.published_gb(variant):.0f} GB where it is stored in bfloat16"
        print(f"  not here   {where}{size if where == recipe.config.model.path else ''}")
        print(f"             `wantrain cache` downloads it, as does: {hub.download_command(where)}")
    if base.absent:
        print("  not checked: base not here    whether its files are whole and this variant's")


def print_training(recipe: Recipe, clips: Clips) -> None:
    """Print the adapter, optimizer, steps and sigmas of one training."""
    config, expert = recipe.config, f"{recipe.base.expert} noise expert: " if recipe.base.expert else ""
    adapter = outline(recipe)
    print(f"adapter      {expert}{config.lora.kind.name}, rank {config.lora.rank}, alpha {config.lora.alpha:g} on "
          f"{adapter.num_modules} modules: {adapter.num_parameters:,} trainable parameters")
    samples = float(sum(p.clip.repeats for p in clips.planned))
    seen = config.train.num_steps * config.data.batch_size
    optim = config.optim
    average = f", exported as an average of mean age {optim.ema:g} of the steps" if optim.keeps_average else ""
    print(f"optimizer    {expert}{optim.name.name}, learning rate {', '.join(f'{rate:g}' for rate in adapter.rates)}"
          f"{average}")
    print(f"steps        {expert}{config.train.num_steps} of {config.data.batch_size} samples = {seen / samples:.1f} "
          f"epochs of {samples:g} samples")
    for density in dict.fromkeys(map(recipe.density, dict.fromkeys(p.bucket for p in clips.planned))):
        low, high = density.within
        share = share_of_schedule(recipe.variant.shift, low, high)
        print(f"sigma        {expert}{density}, in [{low:g}, {high:g}]: {share:.1%} of the schedule; timestep = 1000 * "
              "sigma")


def print_account(account: Account | None, num_used: int, num_dropped: int) -> None:
    """Print what becomes of every file of a source that is a folder or shards: used, dropped, or passed over."""
    if account is None or not (account.passed or account.with_clips):
        return
    beside = "".join(f" + {number} {what}" for what, number in sorted(account.with_clips.items()))
    found = num_used + num_dropped + account.with_clips.total() + account.num_passed
    print(f"  found      {found} = {num_used} used + {num_dropped} dropped{beside} + {account.num_passed} passed over")
    for line in account.lines():
        print(f"  passed over {line}")


def print_trigger(clips: Clips) -> None:
    """Print how many clips have the trigger in a caption; where none has, how captions begin."""
    trigger, ids = clips.config.data.trigger, {p.clip.id for p in clips.planned}
    if not trigger:
        return
    holding = {p.clip.id for p in holding_trigger(clips)}
    print(f"trigger      {trigger!r} is in captions of {len(holding)} of {len(ids)} clips"
          + ("" if holding else f": a surprise; {first_words(clips)}"))


def print_data(clips: Clips) -> None:
    """Print what becomes of every clip: used, dropped, trimmed, cropped, and which library reads it."""
    used, dropped = clips.planned, clips.plan.dropped
    for source in sorted({p.clip.source for p in used} | {d.clip.source for d in dropped}):
        windows = [p for p in used if p.clip.source == source]
        ids = {p.clip.id for p in windows}
        gone = Counter(d.kind for d in dropped if d.clip.source == source)
        drops = "".join(f" + {count} dropped ({kind})" for kind, count in sorted(gone.items()))
        more = f", {len(windows)} windows" if len(windows) != len(ids) else ""
        repeats = f" x {windows[0].clip.repeats:g}" if windows else ""
        found = len(ids) + sum(gone.values())
        print(f"source       {source}: {found} clips = {len(ids)} used{drops}{repeats}{more}")
        print_account(clips.accounts.get(source), len(ids), sum(gone.values()))
    for one in (*dropped, *clips.heldout_dropped):
        print(f"  dropped    {one.clip.id}: {one.reason}")
    if HELDOUT in clips.accounts:
        used_apart, gone_apart = len(clips.heldout), len(clips.heldout_dropped)
        print(f"held out     {used_apart + gone_apart} clips = {used_apart} used + {gone_apart} dropped")
        print_account(clips.accounts[HELDOUT], used_apart, gone_apart)
    print_trigger(clips)
    factors = clips.batch_factors
    for bucket, count in sorted(Counter(p.bucket for p in used).items(), key=str):
        size = clips.config.data.batch_size * factors.get(bucket, 1)
        print(f"bucket       {bucket}: {count} clips, {bucket.num_tokens(clips.variant.multiple_px)} tokens each, "
              f"{size} a step")
    trims = [trimmed_s(list(windows)) for _, windows in itertools.groupby(used, key=lambda p: p.clip.id)]
    large = [enlarged(p.bucket, p.found) for p in used]
    lost = [cropped(p.bucket, p.found) for p in used]
    print(f"trimmed      {sum(t > 0 for t in trims)} clips, {sum(trims):.1f} s of their spans are in no window"
          + ("; data.extract=uniform misses nothing" if sum(trims) > 0 else ""))
    print(f"cropped      {sum(x > 0.01 for x in lost)} windows, at most {max(lost):.0%} of the picture; enlarged "
          f"{sum(x > 1.01 for x in large)}, at most x {max(large):.2f}")
    if told := Counter(what for p in {p.clip.id: p for p in used}.values() for what in surprises_of(p)):
        print("beware       " + ", ".join(f"{what}: {count} clips" for what, count in told.most_common()))
    readers = Counter(p.found.why_not_decord for p in used if p.found.why_not_decord not in ("", "image"))
    if readers:
        print("read by PyAV " + ", ".join(f"{count} ({why})" for why, count in readers.most_common()))
