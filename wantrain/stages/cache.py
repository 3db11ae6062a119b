"""`wantrain cache`: clips and captions -> latents and text features on disk, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wantrain import engine
from wantrain.config import Config
from wantrain.jobs import progress
from wantrain.stages import Encoder, opened


def run(config: Config, arguments: Sequence[str]) -> None:
    """Build what is missing of the recipe's cache; with several processes each does its share."""
    recipe = opened(config, arguments)
    accelerator = engine.start(engine.world_size(), 1, [], Path(config.run.dir), 1.0)
    everything = recipe.planned + recipe.heldout
    captions = ["", *(p.clip.caption for p in everything)]
    clips, texts = recipe.cache.missing(everything, captions)
    accelerator.wait_for_everyone()  # all have listed what is missing before any entry appears
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    if clips or texts:
        encoder = Encoder(recipe, accelerator.device)
        with progress(len(texts[mine]), 0, "caption", "captions", accelerator.is_main_process) as bar:
            for caption in texts[mine]:
                recipe.cache.write(recipe.cache.text_path(caption), encoder.text(caption), f"caption {caption!r}")
                bar.update()
        with progress(len(clips[mine]), 0, "clip", "clips", accelerator.is_main_process) as bar:
            for planned in clips[mine]:
                recipe.cache.write(recipe.cache.latents_path(planned), encoder.latents(planned),
                                   f"clip {planned.clip.id}")
                bar.update()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"cache {recipe.cache.folder}: {len(everything)} clips and {len(set(captions))} captions ready "
              f"({len(clips)} and {len(texts)} made now)")
