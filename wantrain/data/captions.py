"""The texts that a sample of a clip may be given."""

from __future__ import annotations

import re

from wantrain.terms import Clip


def captions_of(clip: Clip, tag_orders: int) -> list[str]:
    """Every text that a sample of this clip may be given: its captions, each with so many other orders of its tags.

    Tags are separated by commas; the first, where the trigger stands, keeps its place.
    """
    found: dict[str, None] = {}
    for caption in (clip.caption, *clip.more_captions):
        first, *tags = re.split(r"\s*,\s*", caption)
        found[caption] = None
        for number in range(tag_orders if len(tags) > 1 else 0):
            import torch  # only where tags are drawn anew

            from wantrain.flow import generator_for

            order = torch.randperm(len(tags), generator=generator_for("tags", caption, number)).tolist()
            found[", ".join([first, *(tags[i] for i in order)])] = None
    return list(found)
