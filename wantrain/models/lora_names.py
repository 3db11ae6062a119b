"""LoRAs as a user names them: FILE or FILE=STRENGTH, of which expert, and what is a run and no file."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from wantrain.models import hub
from wantrain.models.containers import open_raw
from wantrain.models.detection import expert_named
from wantrain.models.variants import Expert
from wantrain.models.weight_files import ContainerError, kind_of
from wantrain.options import split_strength
from wantrain.terms import UserError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_LEAF = re.compile(r"(?:^|[._])(?:lora|hada|lokr|oft|dora)_\w+|\.(?:diff|diff_b|diff_m|set_weight)$|"
                   r"\.lora\.(?:down|up)\.")
"""What only a LoRA's tensors have in their names."""


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a LoRA (or LoHa, LoKr, whole differences) and not of a model."""
    return any(_LEAF.search(name) for name in names)


def lora_argument(argument: str) -> tuple[Path, float]:
    """FILE or FILE=STRENGTH, the file a path or model id; a file that exists is a file whatever its name.

    Raises UserError.
    """
    where, strength = named(argument)
    return hub.local(where), strength


def named(argument: str) -> tuple[str, float]:
    """As `lora_argument`, with the file as it is named."""
    if Path(argument).expanduser().exists():
        return argument, 1.0
    where, strength = split_strength(argument)
    if strength is None:
        where, _, word = argument.rpartition("=")
        if where and Path(where).expanduser().exists():
            raise UserError(f"{argument}: the strength {word!r} is not a number", f"{where}=0.8")
        return argument, 1.0
    if not math.isfinite(strength):
        raise UserError(f"{argument}: the strength {strength} is no finite number", f"{where}=0.8")
    return where, strength


def refuse_other_files(names: Iterable[str]) -> None:
    """Raise UserError for a path or model id with nothing there, and for a file that by its name and first bytes, or a
    folder that by what it holds, is no LoRA: before libraries are imported that take seconds.
    """
    for name in names:
        if "{expert}" not in name and (path := hub.here(name)) and (file := weights_of(path)).is_file():
            kind_of(file)


def merge_override(path: Path) -> str:
    """The override that folds a LoRA into the base, to be pasted into a shell."""
    return shlex.quote(f'model.merge=["{path}"]')


def instead_of_adapter(path: Path) -> str:
    """Advice for a LoRA that is more than an adapter, which training and sampling cannot put beside the base: fold it
    in.
    """
    return (f"fold it into the base: {merge_override(path)} (in place of lora.start_from; in place of sampler.loras "
            "together with sampler.strengths=[0])")


def weights_of(path: Path) -> Path:
    """The file with a LoRA's tensors: the path itself, or that in a PEFT adapter's folder.

    Raises ContainerError for a run's folder or checkpoint, naming what its export wrote or the command that exports.
    """
    if run := _run_of(path):
        raise ContainerError(path, "is a run or its checkpoint, and no LoRA file", "a checkpoint belongs to its run; "
                             "what other programs read is the export", _export_of(run))
    if not path.is_dir():
        return path
    if not (path / PEFT_WEIGHTS).is_file() and len(found := sorted(path.glob("*.safetensors"))) > 0:
        raise ContainerError(path, f"is a folder, with {len(found)} files in it", "a folder of several LoRAs",
                             f"name one of them: {shlex.quote(str(found[0]))}")
    return path / PEFT_WEIGHTS


def is_run(path: Path) -> bool:
    """Whether this is a run's folder, or a checkpoint of one."""
    return _run_of(path) is not None


def _run_of(path: Path) -> Path | None:
    """The folder of the run that a path is, or is a checkpoint of."""
    if path.name == "training.safetensors" and (path.parent / "state.json").is_file():
        path = path.parent
    if path.is_dir() and re.fullmatch(r"step_\d+", path.name):
        path = path.parent
    if path.name == "checkpoints" and path.is_dir():
        path = path.parent
    found = path.is_dir() and any((path / below / "checkpoints").is_dir() for below in ("", "high", "low"))
    if not found:
        return None
    return path.parent if path.name in ("high", "low") and not (path / "export").is_dir() else path


def _export_of(run: Path) -> str:
    """What to name instead of the run: the files of its export, or else the command that writes them."""
    if found := sorted((run / "export").glob("*.safetensors")):
        return "name its export: " + " or ".join(shlex.quote(str(file)) for file in found)
    log = run / "logs" / "process_0.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    commands = [line.partition(" wantrain train ")[2] for line in lines if line.startswith("--- ")]
    words = next((command for command in reversed(commands) if command), f"recipe=NAME run.dir={shlex.quote(str(run))}")
    return f"wantrain export {words}    then name its .safetensors in {run / 'export'}"


def said_expert(path: Path, metadata: Mapping[str, str]) -> tuple[Expert | None, str]:
    """The expert that a LoRA is for, and where that is said: in wantrain's metadata, in the name of the file or its
    folders, or in a title that another tool wrote.
    """
    experts: dict[str, Expert] = {"high": "high", "low": "low"}
    if own := experts.get(metadata.get("wantrain.expert", "")):
        return own, "metadata (wantrain.expert)"
    if named := expert_named(path):
        return named, "name"
    for title in (metadata[key] for key in ("ss_output_name", "modelspec.title") if metadata.get(key)):
        if named := expert_named(Path(title)):
            return named, f"metadata ({title})"
    return None, ""


def refuse_other_expert(path: Path, metadata: Mapping[str, str], expert: Expert | None) -> None:
    """Raise UserError for a LoRA that is given to one expert and says that it is the other's."""
    said, by = said_expert(path, metadata)
    if expert and said and said != expert:
        raise UserError(
            f"{path} is given to the {expert} noise expert, but its {by} says that it is the {said} noise expert's",
            f"give it to the {said} one: {{expert}} in a name stands for high or low, e.g. {_template(path, said)}, "
            f"and model.experts={said} works on one alone" + "; rename a file whose name is wrong" * (by == "name"))


def _template(path: Path, expert: str) -> str:
    """The path with {expert} for the last place where it says high or low."""
    found = list(re.finditer(expert, str(path), re.IGNORECASE))
    return f"{str(path)[:found[-1].start()]}{{expert}}{str(path)[found[-1].end():]}" if found \
        else "NAME_{expert}_noise.safetensors"


def refuse_other_experts_file(path: Path, expert: Expert | None) -> None:
    """Raise UserError where a file says that it is of the other expert. Reads its header only."""
    if expert:
        refuse_other_expert(path, open_raw(weights_of(path)).metadata, expert)
