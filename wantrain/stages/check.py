"""`wantrain check`: what a config would do, without loading weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from wantrain import config as schema
from wantrain import flow, lora
from wantrain.config import Config
from wantrain.stages import opened, spec_of
from wantrain.terms import Bucket


def num_tokens(bucket: Bucket, vae_px: int = 8, patch_px: int = 2) -> int:
    """Transformer tokens of a clip: latent frames x patches."""
    side = vae_px * patch_px
    return (1 + (bucket.num_frames - 1) // 4) * (bucket.height // side) * (bucket.width // side)


def run(config: Config, arguments: Sequence[str]) -> None:
    """Print clips, buckets, tokens, steps, trainable parameters and files."""
    recipe = opened(config, arguments)
    trainings = recipe.trainings()
    transformer = trainings[0].base.meta_transformer()
    total = sum(p.numel() for p in transformer.parameters())
    modules = lora.inject(transformer, config.lora.targets, spec_of(config), config.train.seed)
    adapted = sum(p.numel() for p in lora.trainable(transformer).values())
    everything = recipe.planned + recipe.heldout
    clips, texts = recipe.cache.missing(everything, ["", *(p.clip.caption for p in everything)])
    samples = sum(p.clip.repeats for p in recipe.planned)
    seen = config.train.num_steps * config.data.batch_size
    multiple = recipe.variant.multiple_px // 2
    print(f"run          {config.run.name} in {recipe.run_dir}")
    print(f"base         {config.model.variant}, {total:,} parameters, {recipe.dtype}")
    for part, path in recipe.base.parts.items():
        print(f"  {part:13}{path}")
    for own in trainings:
        print(f"  detected   {own.base.detected()}")
        for path, strength in own.base.merged:
            print(f"  merged     {path} at strength {strength:g}")
    print(f"adapter      {config.lora.kind.name}, rank {config.lora.rank}, alpha {config.lora.alpha:g} on "
          f"{len(modules)} modules: {adapted:,} trainable parameters")
    for name, count in sorted(Counter(p.clip.source for p in everything).items()):
        repeats = {p.clip.repeats for p in everything if p.clip.source == name}
        print(f"source       {name}: {count} clips x {repeats.pop()} repeats")
    for bucket, count in sorted(Counter(p.bucket for p in recipe.planned).items(), key=str):
        print(f"bucket       {bucket}: {count} clips, {num_tokens(bucket, multiple)} tokens each")
    print(f"steps        {config.train.num_steps} of {config.data.batch_size} samples = {seen / samples:.1f} epochs "
          f"of {samples} samples")
    shift = config.train.shift or recipe.variant.shift
    for own in trainings:
        low, high = own.sigmas
        share = flow.unshift_sigma(high, shift) - flow.unshift_sigma(low, shift)
        print(f"sigma        {f'{own.base.expert} noise expert: ' if own.base.expert else ''}uniform, shift {shift:g}, "
              f"in [{low:g}, {high:g}]: {share:.1%} of the schedule; timestep = 1000 * sigma")
    print(f"cache        {recipe.cache.folder}: {len(clips)} clips and {len(texts)} captions still to encode")
    for own in trainings:
        print(f"checkpoints  every {config.train.save_every} steps in {own.run_dir / 'checkpoints'}")
        print(f"export       {own.export_path}")
    print(f"trackers     {', '.join(['jsonl', *config.tracker.names])} (wandb {schema.wandb_mode()})")
    print(f"next: wantrain {'cache' if clips or texts else 'train'} {' '.join(arguments)}")
