"""Which tools load which LoRA file rightly, and what happens in the others.

The table below is held against each tool's own rules, cell by cell, by tests/parity/loader_table.py, which writes
docs/lora-files.md and names there the version of each tool that was read; the first measurement, of the tools
themselves, is in docs/facts.md, "LoRA loaders".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from wantrain.lora import MAGNITUDE
from wantrain.models.lora_formats import LoraFile, split_extra
from wantrain.models.names import ANIMATE
from wantrain.models.variants import VARIANTS, Task

Traits = frozenset[str]
"""What the tools tell apart in a file:

dora, product (LoHa, LoKr), diff (of norms, biases, whole weights), diff_m (of modulation); alpha (an alpha stands in
a tensor), scaled (an alpha is not the rank), ranks (they differ); vace, animate (their own modules), head (any Linear
outside the blocks), conv, no block (nothing in `blocks`), half image (one of k_img and v_img without the other),
incomplete (not every attention and ffn Linear of blocks 0 to N), no first k (without blocks.0.cross_attn.k), twins
(no prefix and diffusers' names); and `for TASK`, where the base is known.
"""

_NAMES = "applies nothing: it does not know these names"
_PRODUCT = "applies nothing of a LoHa or LoKr"
_LENGTHS = "leaves out the lengths of a DoRA"
_DIFFS = "applies the low-rank part alone"
_NO_MODEL = "has no such model"
_ANIMATE: tuple[Task, ...] = ("animate", "animate2")
_LATER_FUN: tuple[Task, ...] = ("control_reference", "control_inpaint", "camera", "camera_inpaint")
_FUN: tuple[Task, ...] = ("control", *_LATER_FUN)


@dataclass(frozen=True, slots=True)
class Loader:
    """One tool: the formats whose names it knows, the tasks it has no model for, and what breaks in it.

    `breaks`: traits, all of which a file must have (a format's name counts as one) -> what the tool then does.
    `unknown`: what it does with a file of another format.
    """

    formats: tuple[str, ...]
    breaks: Mapping[tuple[str, ...], str]
    lacks: tuple[str, ...] = ()
    unknown: str = _NAMES


_COMFY_BREAKS = {
    ("fun", "no first k"): "applies nothing: it knows this format by the k of block 0's cross-attention",
    ("dora",): "divides a DoRA by the length of the untrained weight: fold it in with wantrain merge",
    ("diff_m",): "never applies a change of modulation",
}
_ONE_RANK = "has one rank for all modules"

LOADERS: dict[str, Loader] = {
    "ComfyUI": Loader(("universal", "comfy_updown", "kohya", "fun"), _COMFY_BREAKS),
    "WanVideoWrapper": Loader(
        ("universal", "comfy_updown", "kohya", "fun", "diffsynth", "diffsynth_pipe"),
        {key: why for key, why in _COMFY_BREAKS.items() if key[0] != "fun"}
        | {("fun", "vace"): "loses what is under vace_blocks",
           ("fun", "conv"): "loses convolutions",
           ("diffsynth", "head"): "applies what is in blocks alone",
           ("twins",): "applies a part, and self-attention on cross-attention"},
        unknown="applies nothing, or a part on the wrong modules"),
    "diffusers": Loader(
        ("universal", "comfy_updown", "kohya", "diffusers"),
        {("universal", "vace"): "raises: vace_blocks are left over", ("comfy_updown", "vace"): "raises: vace_blocks "
         "are left over", ("universal", "no block"): "raises: nothing is in blocks",
         ("comfy_updown", "no block"): "raises: nothing is in blocks",
         ("universal", "head", "alpha"): "raises: alphas outside the blocks are left over",
         ("comfy_updown", "head", "alpha"): "raises: alphas outside the blocks are left over",
         ("universal", "half image"): "raises: k_img and v_img only both",
         ("comfy_updown", "half image"): "raises: k_img and v_img only both",
         ("universal", "conv"): "raises: a convolution is left over",
         ("comfy_updown", "conv"): "raises: a convolution is left over",
         ("kohya", "incomplete"): "raises: it wants every attention and ffn Linear of all blocks, and nothing else",
         ("product",): "raises: it reads no LoHa or LoKr", ("diff",): "leaves out differences of norms",
         ("diff_m",): "raises: it reads no change of modulation",
         ("for animate2",): "raises: its class of Animate-2 has other names"},
        (*_LATER_FUN, "s2v"), "raises, or applies nothing"),
    "PEFT": Loader(("peft",), {}, unknown="asks for a folder with adapter_config.json"),
    "DiffSynth-Studio": Loader(
        ("universal", "comfy_updown", "diffsynth"),
        {("vace",): "applies the part in blocks; load it a second time, into pipe.vace", ("conv",): "raises on a "
         "convolution", ("product",): _PRODUCT, ("dora",): _LENGTHS, ("diff",): _DIFFS, ("diff_m",): _DIFFS,
         ("twins",): _NAMES}),
    "LightX2V": Loader(
        ("universal", "comfy_updown", "diffsynth"),
        {("conv",): "passes over convolutions", ("product",): _PRODUCT, ("dora",): _LENGTHS, ("twins",): _NAMES}),
    "VideoX-Fun": Loader(
        ("universal", "comfy_updown", "kohya", "fun", "diffsynth"),
        {("conv",): "raises on a convolution of three dimensions", ("product",): "raises on a LoHa or LoKr",
         ("dora",): "raises on a DoRA", ("diff",): "raises on whole differences", ("diff_m",): "raises on whole "
         "differences", ("twins",): _NAMES}),
    "ai-toolkit": Loader(
        ("universal", "comfy_updown", "diffusers"),
        {("scaled",): "ignores alpha: the strength is wrong", ("ranks",): f"{_ONE_RANK}: a wrong delta",
         ("head",): "applies what is in blocks alone", ("conv",): "applies what is in blocks alone",
         ("animate",): "applies what is in blocks alone", ("product",): _PRODUCT, ("dora",): _LENGTHS,
         ("diff",): _DIFFS, ("diff_m",): _DIFFS},
        ("vace", *_ANIMATE, *_FUN, "s2v", "flf2v")),
    "diffusion-pipe": Loader(
        ("universal",),
        {("alpha",): "raises on an alpha", ("ranks",): f"{_ONE_RANK}, raises", ("head",): "raises: has no LoRA outside "
         "the blocks", ("conv",): "raises on a convolution", ("product",): "raises on a LoHa or LoKr",
         ("dora",): "raises on a DoRA", ("diff",): "raises on whole differences", ("diff_m",): "raises on whole "
         "differences"},
        ("vace", *_ANIMATE, *_FUN, "s2v"), "raises: it does not know these names"),
    "musubi-tuner": Loader(
        ("kohya",), {("conv",): "raises on a convolution of three dimensions", ("dora",): _LENGTHS,
                     ("diff",): _DIFFS, ("diff_m",): _DIFFS},
        ("vace", *_ANIMATE, *_LATER_FUN, "s2v", "ti2v"), f"{_NAMES}; wantrain convert IN OUT format=kohya"),
    "LyCORIS": Loader(("lycoris",), {}, unknown=_NAMES),
}
"""In SimpleTuner too for LyCORIS; ComfyUI and WanVideoWrapper have every task."""


def not_loading(lora: LoraFile, task: str = "") -> list[tuple[str, str]]:
    """Each tool that does not apply this file (as `read_lora` gives it) rightly, and what it does instead.

    `task`: of the base that it is for (Variant.task), where the file's own metadata does not say it.
    """
    found = traits(lora, task)
    return [(name, why) for name, loader in LOADERS.items() if (why := _breaks(loader, lora.format, found))]


def loading(lora: LoraFile, task: str = "") -> list[str]:
    """The tools that apply this file rightly."""
    wrong = dict(not_loading(lora, task))
    return [name for name in LOADERS if name not in wrong]


def told(lora: LoraFile, task: str = "") -> str:
    """Text for the user: the tools that load this file rightly, and what each other tool does with it."""
    return "\n".join([f"loads in  {', '.join(loading(lora, task)) or 'no tool that we know'}",
                      *(f"not in    {tool}: {why}" for tool, why in not_loading(lora, task))])


def _breaks(loader: Loader, format: str, found: Traits) -> str:
    """What keeps a tool from applying such a file rightly; empty when nothing does."""
    if any(f"for {task}" in found for task in loader.lacks):
        return _NO_MODEL
    if format not in loader.formats:
        return loader.unknown
    return next((why for key, why in loader.breaks.items() if found | {format} >= set(key)), "")


def traits(lora: LoraFile, task: str = "") -> Traits:
    """The properties of this file on which its loading in tools depends."""
    suffixes = {split_extra(name)[1] for name in lora.extras}
    modules = [*lora.pairs, *(split_extra(name)[0] for name in lora.extras)]
    blocks = [module for module in modules if module.startswith("blocks.")]
    has_image = {leaf for leaf in ("k_img", "v_img") if any(module.endswith(leaf) for module in blocks)}
    has = {
        "dora": bool({MAGNITUDE, "dora_scale"} & suffixes),
        "product": any(suffix.startswith(("hada_", "lokr_")) for suffix in suffixes),
        "diff": bool({"diff", "diff_b"} & suffixes),
        "diff_m": "diff_m" in suffixes or any(module.endswith("modulation") for module in modules),
        "alpha": any(name.endswith(".alpha") for name in lora.names),
        "scaled": any(not math.isclose(pair.scale, 1.0) for pair in lora.pairs.values()),
        "ranks": len({pair.rank for pair in lora.pairs.values()}) > 1,
        "vace": any(module.startswith("vace_") for module in modules),
        "animate": any(ANIMATE.is_module(module) for module in modules),
        "head": any(not re.match(r"(vace_)?blocks\.", module) for module in lora.pairs),
        "conv": any(pair.a.ndim > 2 for pair in lora.pairs.values()),
        "no block": not blocks,
        "half image": len(has_image) == 1,
        "incomplete": not _is_complete(set(lora.pairs), bool(has_image)),
        "no first k": "blocks.0.cross_attn.k" not in lora.pairs,
        "twins": any(re.match(r"(vace_)?blocks\.\d+\.(attn[12]|ffn\.net)\.", name) for name in lora.names),
    }
    variant = VARIANTS.get(lora.metadata.get("wantrain.variant", ""))
    task = task or (variant.task if variant else "") or ("vace" if has["vace"] else "animate" if has["animate"] else "")
    return frozenset({name for name, true in has.items() if true} | ({f"for {task}"} if task else set()))


def _is_complete(modules: set[str], with_image: bool) -> bool:
    """Whether these are all Linears of attention and ffn in blocks 0 to N."""
    numbers = {module.split(".")[1] for module in modules if module.startswith("blocks.")}
    leaves = [*(f"{attn}.{x}" for attn in ("self_attn", "cross_attn") for x in "qkvo"), "ffn.0", "ffn.2",
              *(("cross_attn.k_img", "cross_attn.v_img") if with_image else ())]
    return modules == {f"blocks.{n}.{leaf}" for n in map(str, range(len(numbers))) for leaf in leaves}
