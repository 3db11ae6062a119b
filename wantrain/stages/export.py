"""`wantrain export`: the newest checkpoint as a LoRA file, proven by reading it back.

The checkpoint alone says what was trained: neither base nor clips nor cache need be there.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from wantrain import config as schema
from wantrain.config import Config, expert_config, experts_of, variant_of
from wantrain.engine import checkpoint, saved
from wantrain.engine.checkpoint import Checkpoint
from wantrain.models.lora_formats import read_lora
from wantrain.models.lora_loaders import told
from wantrain.models.variants import Expert
from wantrain.recipe.comfy import write_workflow
from wantrain.recipe.exporting import write_adapter
from wantrain.recipe.folders import checkpoints_of, export_path, workflow_path
from wantrain.terms import UserError


def run(config: Config, arguments: Sequence[str]) -> None:
    """Write `export/NAME.safetensors`, or the pair of both experts, each read back and compared with what was trained,
    and `NAME.workflow.json`, in which ComfyUI samples them.
    """
    found = {expert: newest(expert_config(config, expert), expert) for expert in experts_of(config)}
    if absent := [expert for expert, one in found.items() if one is None]:
        raise UserError(f"no checkpoint in {checkpoints_of(config, absent[0]).folder}", next_command(arguments, found))
    for expert, one in found.items():
        assert one is not None, "refused above"
        export_one(expert_config(config, expert), expert, one)
    paths = {expert: export_path(config, expert) for expert in variant_of(config).experts or (None,)}
    there = {expert: path for expert, path in paths.items() if path.exists()}  # the other one of an earlier export
    print(write_workflow(config, workflow_path(config), there))


def next_command(arguments: Sequence[str], found: Mapping[Expert | None, Checkpoint | None]) -> str:
    """The next command where a training has no checkpoint: export the other expert alone, or train."""
    train = shlex.join(["wantrain", "train", *arguments])
    trained = [expert for expert, one in found.items() if one is not None]
    if not trained:
        return train
    alone = shlex.join(["wantrain", "export", *arguments, f"model.experts={trained[0]}"])
    return f"{alone}    for the {trained[0]} noise expert alone; or train the other one:\n    {train}"


def newest(config: Config, expert: Expert | None) -> Checkpoint | None:
    """The newest whole checkpoint of a training, in the run folder or its mirror.

    Raises UserError where the config contradicts it, as a resume does.
    """
    found = checkpoint.newest_whole(checkpoints_of(config, expert), None)
    if found is None:
        return None
    record = saved.record_of(found.path)
    if not (record.scales and record.saved_at):
        raise UserError(f"{found.path} was written by an older wantrain and does not say how its adapter is scaled",
                        "train one more step with this version, e.g. train.num_steps="
                        f"{found.progress.step + 1}: its checkpoint does")
    of_config = {key: value for key, value in record.fingerprint.items()
                 if not key.startswith("(") and key != saved.BASE_FORM}  # not of files, nor of how they were held
    saved.refuse_another_config(of_config, schema.resume_keys(config), schema.formerly())
    return found


def export_one(config: Config, expert: Expert | None, found: Checkpoint) -> None:
    """One adapter in the format asked for, and what was written in words."""
    step, kind, form = found.progress.step, saved.record_of(found.path).kind, config.export.format.name
    print("".join(f"{message}; step {step} is exported\n" for message in found.passed), end="")
    path = export_path(config, expert)
    made = write_adapter(path, config, found)
    print(f"exported {path} ({form}): {kind} on {made.num_modules} modules, step {step}; read back against the "
          f"checkpoint, largest relative error of a delta {made.worst:.1e}")
    print(told(read_lora(path), variant_of(config).task))
