"""What a new recipe says: sizes, lengths, steps and prompts, chosen from the clips and the card, each with its reason.

What is chosen by a rule of thumb says so. Memory is that of `wantrain plan`: arithmetic, not measured.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from wantrain import costs
from wantrain.data.buckets import buckets
from wantrain.data.films import count_frames
from wantrain.models.variants import NATIVE_PX, Variant
from wantrain.recipe.clips import Clips
from wantrain.results import KINDS, Prompt
from wantrain.terms import Bucket, Clip, Media, MediaInfo, UserError

TARGETS, RANK = ("attn_ffn",), 32
"""Those of configs/lora/style.yaml."""

MOST_TOKENS = 1 << 20

LENGTHS = (1, 5, 9, 17, 33, 49, 81, 121)
"""Lengths that recipes are written with, in frames."""

RARE = 0.1
"""A length or a shape of fewer of the clips than this gets no bucket of its own."""

LIKE_NATIVE = 0.1
"""Aspects that differ by less than this, in log, from the model's own take its own size."""

TINY_PX = (64, 96)
"""The size that the tiny base was trained at."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Numbers of a training that hang on the base: samples in a step, how often each clip is shown, learning rate."""

    batch_size: int
    views: int
    lr: float
    warmup_steps: int


REAL = Habits(4, 100, 1e-4, 20)
TINY = Habits(8, 60, 2e-3, 10)
"""Those of demo_anime, which were measured (docs/LOG.md); the others are a rule of thumb."""

FEWEST_STEPS, MOST_STEPS = 300, 3000


@dataclass(frozen=True, slots=True)
class Seen:
    """What looking at the clips told: how many frames each has at the model's speed, and its (height, width)."""

    frames: list[int]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Draft:
    """The choices of a new recipe. `waits`: blocks, or what they keep, must wait on the host, as `memory.swap` and
    `memory.offload` do by themselves. `max_tokens` None: the card holds the longest clip at full size.
    """

    num_frames: list[int]
    resolutions: list[list[int]]
    base_form: str
    waits: bool
    max_tokens: int | None
    num_steps: int
    habits: Habits
    reasons: list[str] = field(default_factory=list)


def look(clips: Sequence[Clip], found: Mapping[Media, MediaInfo], variant: Variant) -> Seen:
    """Lengths and sizes of the clips. Raises UserError for files that cannot be used."""
    if faults := [f"{clip.id}: {seen.fault}" for clip in clips if (seen := found[clip.path]).fault]:
        raise UserError(f"{len(faults)} clip(s) cannot be read:\n  " + "\n  ".join(faults),
                        "take them out of the folder, or mend them, then run the same command again")
    frames = [count_frames(found[clip.path], clip.start_s, clip.end_s, variant.fps) for clip in clips]
    return Seen(frames, [(found[clip.path].height, found[clip.path].width) for clip in clips])


def draft(seen: Seen, variant: Variant, card_gib: float, num_training: int) -> Draft:
    """Choose for `num_training` clips among those that were seen."""
    habits = TINY if is_tiny(variant) else REAL
    lengths = lengths_for(seen.frames, variant.num_frames)
    sizes = sizes_for(seen.sizes, variant)
    longest = max(Bucket(lengths[-1], *size).num_tokens(variant.multiple_px) for size in sizes)
    form, waits, room = ("dtype", False, longest) if is_tiny(variant) else form_for(variant, card_gib, longest)
    steps = 10 * round(num_training * habits.views / habits.batch_size / 10)
    steps = min(max(steps, FEWEST_STEPS), MOST_STEPS)
    made = Draft(lengths, [list(size) for size in sizes], form, waits, None if room >= longest else room, steps, habits)
    return replace(made, reasons=[*_about_clips(made, seen, variant), _about_card(made, variant, card_gib, longest),
                                  _about_steps(made, num_training)])


def is_tiny(variant: Variant) -> bool:
    """Whether this is one of the project's own small bases, which need no card."""
    return variant.name.startswith("tiny")


def lengths_for(frames: Sequence[int], native: int) -> list[int]:
    """Lengths that the clips fill, the shortest so that none is left out, none that only few fill."""
    ladder = sorted({length for length in (*LENGTHS, native) if length <= native})
    filled = Counter(max((length for length in ladder if length <= number), default=1) for number in frames)
    shortest = min(filled)
    return [length for length in sorted(filled) if length == shortest or filled[length] >= RARE * len(frames)]


def sizes_for(sizes: Sequence[tuple[int, int]], variant: Variant) -> list[tuple[int, int]]:
    """A size for each shape (wide, tall, square) of the clips, the commonest first: no larger than the clips, nor
    than what the model was trained at.
    """
    shapes: dict[int, list[tuple[int, int]]] = {}
    for height, width in sizes:
        shapes.setdefault(round(math.log(width / height)), []).append((height, width))
    common = [of_shape for of_shape in shapes.values() if len(of_shape) >= RARE * len(sizes)]
    return list(dict.fromkeys(_size(of_shape, variant) for of_shape in sorted(common, key=len, reverse=True)))


def _size(sizes: Sequence[tuple[int, int]], variant: Variant) -> tuple[int, int]:
    """The size nearest to clips of one shape."""
    native = TINY_PX if is_tiny(variant) else NATIVE_PX[variant.vae]
    aspect = median(width / height for height, width in sizes)
    area = min(native[0] * native[1], median(height * width for height, width in sizes))
    for own in (native, native[::-1]):
        if abs(math.log(own[1] / own[0] / aspect)) < LIKE_NATIVE and area >= 0.9 * own[0] * own[1]:
            return own[0], own[1]
    px = variant.multiple_px
    size = [math.ceil(math.sqrt(side) / px) * px for side in (area / aspect, area * aspect)]
    bucket, = buckets([1], [size], px, max(1, int(area // px**2)))
    return bucket.height, bucket.width


def form_for(variant: Variant, card_gib: float, longest: int) -> tuple[str, bool, int]:
    """(how the base is stored, whether it waits on the host, tokens of a clip that then fit): the first way that holds
    the longest clip, from the fastest on, else the one that holds most.
    """
    ways = ("dtype", False), ("int8", False), ("int8", True)
    rooms = {way: tokens_that_fit(variant, card_gib, *way) for way in ways}
    best = next((way for way in ways if rooms[way] >= longest), max(ways, key=lambda way: rooms[way]))
    if rooms[best] < variant.native_tokens // variant.num_frames:  # a still of the native size, about
        raise UserError(f"{variant.name} does not train on a card of {card_gib:g} GiB, by arithmetic, not even in int8 "
                        "with its blocks waiting in host memory", "--model wan21_t2v_1b3, or a larger --gpu")
    return *best, rooms[best]


def tokens_that_fit(variant: Variant, card_gib: float, form: str, waits: bool = False, itemsize: int = 2) -> int:
    """Tokens of one clip for which the card has memory, where each block keeps its input alone; with `waits`, where
    blocks and inputs wait on the host, for which that has memory as well.
    """
    def is_too_long(tokens: int) -> bool:
        bucket = Bucket(1, variant.multiple_px, tokens * variant.multiple_px)
        job = costs.Job(variant, costs.MicroBatch(bucket), costs.Adapter(TARGETS, RANK), itemsize)
        policy = costs.MemoryPolicy(form, ("inputs",) * job.num_blocks, waits * job.num_blocks, waits)
        return costs.peak(costs.device_parts(job, policy)) > card_gib * costs.GIB or (
            costs.peak(costs.host_parts(job, policy)) > costs.HOST_BYTES)

    return bisect.bisect_left(range(1, MOST_TOKENS), True, key=is_too_long)


def _about_clips(made: Draft, seen: Seen, variant: Variant) -> list[str]:
    """Why these lengths and sizes."""
    shortest_s, longest_s = (edge(seen.frames) / variant.fps for edge in (min, max))
    heights, widths = zip(*seen.sizes, strict=True)
    return [
        f"lengths    {', '.join(map(str, made.num_frames))} frames: the clips have {shortest_s:.1f} to {longest_s:.1f} "
        f"s at {variant.fps} fps, and the model's own length is {variant.num_frames}",
        f"sizes      {', '.join(f'{h}x{w}' for h, w in made.resolutions)} (height x width): the clips are "
        f"{min(heights)}x{min(widths)} to {max(heights)}x{max(widths)}"]


def _about_card(made: Draft, variant: Variant, card_gib: float, longest: int) -> str:
    if is_tiny(variant):
        return "card       none is needed: the base is tiny"
    form = "int8" if made.base_form == "int8" else "bfloat16"
    room = f"all {longest:,}" if made.max_tokens is None else f"{made.max_tokens:,} of {longest:,}"
    waits = ", blocks waiting in host memory by turns (memory.swap, memory.offload)" if made.waits else ""
    smaller = "; its picture gets smaller" if made.max_tokens else ""
    return (f"card       {card_gib:g} GiB hold the base in {form}{waits} and, by arithmetic, {room} tokens of the "
            f"longest clip{smaller}")


def _about_steps(made: Draft, num_training: int) -> str:
    views = made.num_steps * made.habits.batch_size / num_training
    rule = "demo_anime's" if made.habits is TINY else "a rule of thumb"
    return (f"steps      {made.num_steps} of {made.habits.batch_size} clips: each is shown {views:.0f} times (aim "
            f"{made.habits.views}, {rule}; from {FEWEST_STEPS} to {MOST_STEPS} steps)")


# Prompts

SUBJECTS = {"lighthouse": "a lighthouse on a cliff at dawn, waves rolling in",
            "tram": "an old tram crossing a bridge in the rain",
            "dog": "a dog running along a beach",
            "woman": "a woman reading at a window, curtains moving in the wind"}
TINY_SUBJECTS = {"house": "a red house on a meadow, standing still", "boat": "a blue boat by the sea, drifting right",
                 "rocket": "a white rocket in the desert, rising", "tower": "a yellow tower at night, standing still"}
"""The tiny base knows no others."""

UNRELATED = "a bowl of oranges on a wooden table, the camera moves slowly closer"


@dataclass(frozen=True, slots=True)
class Prompts:
    """What to sample: `like` the training's captions, `others` with subjects that no caption has, one `unrelated`."""

    like: list[str]
    others: list[str]
    unrelated: str


def prompts_for(training: Sequence[Clip], heldout: Sequence[Clip], trigger: str, variant: Variant) -> Prompts:
    """Prompts without the trigger; those like the training are captions held out, where there are some."""
    subjects = TINY_SUBJECTS if is_tiny(variant) else SUBJECTS
    told = " ".join(clip.caption for clip in training).lower()
    free = [subject for word, subject in subjects.items() if word not in told] or list(subjects.values())
    like = list(dict.fromkeys(without(clip.caption, trigger) for clip in (*heldout, *training)))
    unrelated = free[-1] if is_tiny(variant) else UNRELATED
    return Prompts([text for text in like if text][:2], free[:2], unrelated)


def evaluation_prompts(clips: Clips) -> list[Prompt]:
    """What `evaluate` samples: the prompts of each kind that the config names, and where it names none these."""
    own, config = clips.config.evaluate, clips.config
    drafted = prompts_for([p.clip for p in clips.planned], [p.clip for p in clips.heldout], config.data.trigger,
                          clips.variant)
    return [Prompt(text, kind) for kind, named, chosen in zip(
        KINDS, (own.prompts, own.combined, own.unrelated), (drafted.like, drafted.others, [drafted.unrelated]),
        strict=True) for text in (chosen if named is None else named)]


def without(caption: str, trigger: str) -> str:
    """The caption without the trigger and the comma behind it."""
    return caption.replace(trigger, "").strip(" ,") if trigger else caption


def common_opening(captions: Sequence[str]) -> str:
    """The words before the first comma, where nine in ten captions begin with the same; else ''."""
    openings = Counter(caption.partition(",")[0].strip() for caption in captions if "," in caption)
    opening, number = openings.most_common(1)[0] if openings else ("", 0)
    return opening if number >= 0.9 * len(captions) and len(opening.split()) <= 4 else ""
