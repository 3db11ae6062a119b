"""Prompts in more words (sampler.extend_prompts), kept beside what is sampled, so that a repeat has the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wantrain.engine import launch
from wantrain.files import digest_path, digest_text, read_object, write_json
from wantrain.models import extension, hub
from wantrain.models.loading import let_go
from wantrain.recipe.draft import without
from wantrain.recipe.recipe import Recipe

NAME = "extended_prompts.json"


def captions(recipe: Recipe, prompts: Sequence[str], folder: Path) -> list[str]:
    """The prompts as they are sampled: as they stand, or extended by the config's language model. A trigger in a prompt
    is not the model's to change: it stands before what that says.
    """
    where, trigger = recipe.config.sampler.extend_prompts, recipe.config.data.trigger
    if where is None:
        return list(prompts)
    model = hub.local(where)
    key = digest_text(digest_path(model, recipe.memo), extension.SYSTEM, extension.MOST_TOKENS)
    kept = read_object(folder / NAME)
    known: dict[str, str] = kept["prompts"] if kept.get("key") == key else {}
    bare = [without(prompt, trigger) for prompt in prompts]
    if new := [prompt for prompt in dict.fromkeys(bare) if prompt not in known]:
        known |= dict(zip(new, extension.extended(model, new, launch.device()), strict=True))
        let_go()
        write_json(folder / NAME, {"key": key, "model": where, "prompts": known})
    return [f"{trigger}, {known[own]}" if trigger and trigger in prompt else known[own]
            for own, prompt in zip(bare, prompts, strict=True)]
