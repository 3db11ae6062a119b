"""A checkpoint as a LoRA file, proven by reading it back: what `export` writes, and what `sampler.compare` samples."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from wantrain import lora
from wantrain.config import Config, expert_config
from wantrain.engine import checkpoint, saved
from wantrain.engine.checkpoint import Checkpoint
from wantrain.engine.saved import Record, step_of
from wantrain.models.lora_formats import LoraFile, products
from wantrain.models.lora_updates import from_adapter, write_proven
from wantrain.models.variants import Expert
from wantrain.recipe.folders import checkpoints_of, export_path
from wantrain.terms import UserError


@dataclass(frozen=True, slots=True)
class Written:
    """A LoRA file that was written: how many modules it adapts, and the largest relative error of a delta in it."""

    num_modules: int
    worst: float


def write_adapter(path: Path, config: Config, found: Checkpoint) -> Written:
    """Write one adapter of a checkpoint in the config's format."""
    record, form = saved.record_of(found.path), config.export.format.name
    state = lora.adapter_state(checkpoint.values(found.tensors), record.scales)
    pairs, extras = from_adapter(state)
    about = metadata(record, found.progress.step)
    worst = write_proven(LoraFile(path, form, pairs, extras), form, about, config.export.dtype.name, state)
    return Written(len(pairs) or len(products(extras)), worst)


def metadata(record: Record, step: int) -> dict[str, str]:
    """What the file says of itself: what the checkpoint says, its step, and when that was saved."""
    saved_at = datetime.fromisoformat(record.saved_at)
    return {**record.metadata, "ss_steps": str(step), "ss_max_train_steps": str(step), "wantrain.steps": str(step),
            "ss_training_finished_at": str(saved_at.timestamp()), "modelspec.date": record.saved_at}


def checkpoint_lora(config: Config, expert: Expert | None, step: int) -> Path:
    """The LoRA file RUN/loras/NAME_step_000050.safetensors of a checkpoint, written where it is not there already or is
    older. Raises UserError where there is no such checkpoint.
    """
    own = expert_config(config, expert)
    store = checkpoints_of(own, expert)
    there = {step_of(path.name): path for path in store.on_disk()}
    if step not in there:
        raise UserError(f"sampler.compare: there is no checkpoint of step {step} in {store.folder}, but of "
                        f"{', '.join(map(str, there)) or 'none'}", "sampler.compare=[all], or train with "
                        "train.keep_every, which keeps more of them")
    file = export_path(own, expert, f"_step_{step:06d}").name
    path = Path(config.run.dir) / "loras" / file
    if not path.exists() or path.stat().st_mtime < (there[step] / saved.CHECKSUMS).stat().st_mtime:
        write_adapter(path, own, Checkpoint(there[step], *checkpoint.load(there[step], None), []))
    return path
