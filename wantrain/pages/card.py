"""The card of a LoRA for a model hub: README.md, whose head the hub reads, and whose text people do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from wantrain.models.variants import Task
from wantrain.results import Column, Results, Video

KIND: dict[Task, str] = {
    **dict.fromkeys(("t2v", "ti2v"), "text-to-video"),
    **dict.fromkeys(("i2v", "flf2v", "camera", "camera_inpaint", "s2v"), "image-to-video"),
    **dict.fromkeys(("vace", "control", "control_reference", "control_inpaint", "animate",
                     "animate2"), "video-to-video")}
"""The hub's word for each task."""


@dataclass(frozen=True, slots=True)
class About:
    """What a card tells. `base` is the model id of the base, '' for none that is public; `files` are those of the
    folder with a sentence each; `samples` the videos with their files in it; `column` is what these were sampled with.
    """

    name: str
    task: Task
    base: str
    trigger: str
    license: str
    version: str
    rank: int
    num_clips: int | None
    num_steps: int | None
    files: Mapping[str, str]
    samples: Sequence[tuple[str, Video]]
    column: Column | None
    results: Results | None
    verdict: Sequence[str]


def text_of(about: About) -> str:
    """The whole card."""
    parts = [head(about), f"# {about.name}", _summary(about), "<Gallery />" if about.samples else "", _files(about),
             _use(about), _measured(about), _training(about)]
    return "\n\n".join(filter(None, parts)) + "\n"


def head(about: About) -> str:
    """The YAML between two lines of three dashes."""
    kind = KIND[about.task]
    told: dict[str, Any] = {
        "license": about.license, "library_name": "diffusers", "pipeline_tag": kind,
        **({"base_model": about.base, "base_model_relation": "adapter"} if about.base else {}),
        "tags": ["wan", "lora", "diffusers", kind, "template:diffusion-lora", "wantrain"],
        **({"instance_prompt": about.trigger} if about.trigger else {}),
        **({"widget": [{"text": video.caption, "output": {"url": file}} for file, video in about.samples]}
           if about.samples else {})}
    return f"---\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000)}---"


def _summary(about: About) -> str:
    of = f" of `{about.base}`" if about.base else ""
    trigger = f" Begin the prompt with `{about.trigger}`." if about.trigger else ""
    return f"A LoRA of rank {about.rank}{of}, trained with wantrain {about.version}.{trigger}"


def _files(about: About) -> str:
    return "## Files\n\n| file | |\n|---|---|\n" + "\n".join(f"| `{name}` | {does} |" for name, does in
                                                           about.files.items())


def _use(about: About) -> str:
    workflow = next((name for name in about.files if name.endswith(".workflow.json")), "")
    drop = f" Then drop `{workflow}` into its window." if workflow else " Load it with LoraLoaderModelOnly."
    return f"## Use\n\nIn ComfyUI, put the `.safetensors` into `models/loras`.{drop}"


def _measured(about: About) -> str:
    """The numbers of the samples' column beside those of the base."""
    if about.results is None or about.column is None:
        return ""
    base = next((column for column in about.results.columns if not column.lora), None)
    rows = [f"| {_cell(metric.label)} | {_number(metric.columns.get(base.id)) if base else ''} | "
            f"{_number(metric.columns.get(about.column.id))} | {_cell(metric.tells)} |"
            for metric in about.results.metrics if about.column.id in metric.columns]
    if not rows:
        return ""
    return "\n".join(["## Measured", "", f"| | base | {_cell(about.column.label)} | what it can and cannot tell |",
                      "|---|---|---|---|", *rows, "",
                      "With the half width of the interval of 95 %, where it is known."])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    return f"{found[0]:.4g}" + ("" if found[1] is None else f" ± {found[1]:.2g}")


def _training(about: About) -> str:
    told = " and ".join(f"{number} {what}" for number, what in ((about.num_clips, "clips"), (about.num_steps, "steps"))
                        if number)
    return "\n\n".join(["## Training", (f"{told}; " if told else "") + "`recipe.yaml` has every setting.",
                        *about.verdict])
