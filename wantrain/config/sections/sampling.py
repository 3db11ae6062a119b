"""What is sampled, evaluated and shown in the data report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from wantrain.config.sections.parts import (
    FloatAbove0,
    FloatFrom0,
    Frames,
    IntFrom0,
    IntFrom1,
    Rule,
    Section,
    Seed,
    near_size,
    size_rule,
)
from wantrain.models.variants import VARIANTS

if TYPE_CHECKING:
    from wantrain.config.schema import Config

VIDEO_FORMATS = ("webp", "png")
SAMPLER_INPUTS = ("first", "last", "control", "control_mask", "background", "reference", "face", "camera", "audio",
                  "video")


class SamplerProfile(Enum):
    official = "official"
    comfy = "comfy"
    diffusers = "diffusers"


class SamplerSolver(Enum):
    unipc = "unipc"
    dpmpp = "dpmpp"
    euler = "euler"


@dataclass(slots=True)
class Sampler(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    prompts: list[str] = field(default_factory=list)
    """What to sample; FILE.txt stands for its lines, a prompt each, but for empty ones and those that begin with #."""
    extend_prompts: str | None = None
    """A chat model (folder or model id, such as Qwen's) that puts prompts into more words; null: as they stand."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    seeds: list[Seed] = field(default_factory=lambda: [0])
    """One video for each prompt, seed, LoRA and strength."""
    every_steps: IntFrom0 = 0
    """Steps between samples in training (docs/validation.md); 0: only when `wantrain ask` asks for them."""
    strengths: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Strengths of all LoRAs together, times their own in sampler.loras; 0 is the base."""
    profile: SamplerProfile = SamplerProfile.official
    """Whose sigmas, shift, solver and noise: official, comfy or diffusers; a seed gives what it gives there."""
    solver: SamplerSolver | None = None
    """unipc, dpmpp or euler as the profile's tool runs it; null: unipc, with comfy euler."""
    num_steps: IntFrom1 | None = None
    """Denoising steps; null takes the variant's."""
    guidance: FloatFrom0 | None = None
    """Classifier-free guidance scale; null takes the variant's (of each expert)."""
    shift: FloatAbove0 | None = None
    """Timestep shift of the sampler; null takes the variant's, or what the profile's tool has (docs/sampling.md)."""
    num_frames: Frames | None = None
    """Frames of a sample; null takes the largest of data.num_frames."""
    resolution: list[int] | None = None
    """[height, width] in pixels; null takes the first of data.resolutions."""
    formats: list[str] = field(default_factory=list)
    """What each video is written as besides mp4 (H.264, plays in browsers): webp (animated), png (a frame sheet)."""
    inputs: list[dict[str, str]] = field(default_factory=list)
    """Files for each prompt or all: first, last, control(_mask), background, reference, face, camera, audio, video."""
    strength: float = 0.7
    """Share of the schedule that a `video` of sampler.inputs goes through; 1 keeps nothing of it."""
    loras: list[str] = field(default_factory=list)
    """LoRAs to sample with: FILE, FILE=STRENGTH or FILE=HIGH/LOW; {expert}: high or low; none: the run's own export."""
    compare: list[str] = field(default_factory=list)
    """Columns beside that LoRA: steps of the run's checkpoints, `all` of them, other LoRA files (as in loras)."""
    fast_lora: str | None = None
    """A few-step LoRA, FILE or FILE=STRENGTH, under every video, the base's too; num_steps is then 4, guidance 1."""
    first_block_cache: FloatAbove0 | None = None
    """Leave out all blocks but the first where that changes by at most this share, e.g. 0.1; null: never."""

    def rules(self, config: Config) -> Iterator[Rule]:
        yield from _text_and_seed_rules("sampler", self.prompts, self.seeds)
        yield bool(self.strengths), "sampler.strengths", self.strengths, "at least one"
        yield len(set(self.strengths)) == len(self.strengths), "sampler.strengths", self.strengths, "each once"
        if self.resolution is not None:
            variant = VARIANTS[config.model.variant]
            yield size_rule("sampler.resolution", self.resolution)
            yield all(side % variant.multiple_px == 0 for side in self.resolution), "sampler.resolution", \
                self.resolution, f"both must be multiples of {variant.multiple_px} for {variant.name}"
        yield set(self.formats) <= set(VIDEO_FORMATS), "sampler.formats", self.formats, \
            "webp and png, beside the mp4 that is always written"
        for given in self.inputs:
            yield set(given) <= set(SAMPLER_INPUTS), "sampler.inputs", given, ", ".join(SAMPLER_INPUTS)
        yield len(self.inputs) in (0, 1, len(self.prompts)), "sampler.inputs", len(self.inputs), \
            "one for all prompts, or one for each"
        yield 0 < self.strength <= 1, "sampler.strength", self.strength, "in (0, 1]"
        yield self.first_block_cache is None or VARIANTS[config.model.variant].has_plain_blocks, \
            "sampler.first_block_cache", self.first_block_cache, \
            f"null for {config.model.variant}, whose transformer adds to what passes from block to block"
        yield self.solver is not SamplerSolver.euler or self.profile is not SamplerProfile.official, "sampler.solver", \
            "euler", "unipc or dpmpp with sampler.profile=official, which has no other"

    def remedies(self, config: Config) -> dict[str, object]:
        """The multiples of what the variant divides by that are nearest to the size of samples; null without one."""
        size, multiple = self.resolution, VARIANTS[config.model.variant].multiple_px
        if size is None or len(size) != 2 or min(size) < 1:
            return {"sampler.resolution": "null"}
        return {"sampler.resolution": near_size(size, multiple)}


def _text_and_seed_rules(section: str, prompts: list[str], seeds: list[int]) -> Iterator[Rule]:
    yield all(prompt.strip() for prompt in prompts), f"{section}.prompts", prompts, "prompts that are not empty"
    yield bool(seeds), f"{section}.seeds", seeds, "at least one"


@dataclass(slots=True)
class Evaluate(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    prompts: list[str] | None = None
    """Prompts like the training, without the trigger; null takes captions of held-out clips."""
    combined: list[str] | None = None
    """Prompts that put other subjects to what is learnt; null takes two of a fixed list that no caption names."""
    unrelated: list[str] | None = None
    """Prompts that have nothing to do with the training; null takes a fixed one."""
    seeds: list[Seed] = field(default_factory=lambda: [0])
    """Each prompt is sampled with each seed; diversity is measured from two on."""
    encoder: str | None = None
    """A CLIP model (folder or model id) that measures prompt adherence and likeness; null: none but the tiny base's."""

    def rules(self, config: Config) -> Iterator[Rule]:
        for prompts in (self.prompts, self.combined, self.unrelated):
            yield from _text_and_seed_rules("evaluate", prompts or [], self.seeds)


@dataclass(slots=True)
class Report(Section):
    may_change: ClassVar[tuple[str, ...]] = ("*",)
    num_windows: IntFrom1 = 60
    """Windows that the data report shows as clips, spread evenly over the set; its tables count all."""
