"""`wantrain convert IN OUT format=NAME`: a LoRA in another tool's format, proven by reading it back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from wantrain.models import hub
from wantrain.models.lora_formats import DIGEST_KEY, GRAMMARS, read_lora, split_extra
from wantrain.models.lora_loaders import told
from wantrain.models.lora_names import weights_of
from wantrain.models.lora_updates import STORAGE, write_proven
from wantrain.models.outputs import check_lora_output
from wantrain.models.variants import Expert
from wantrain.options import parse
from wantrain.terms import UserError

USAGE = "wantrain convert IN OUT format=universal"
OPTIONS = {"format": tuple(GRAMMARS), "dtype": tuple(STORAGE), "expert": ("", "high", "low")}


def run(arguments: Sequence[str]) -> None:
    """Read, write in the format asked for, read back and compare. What the format cannot hold is refused by name."""
    files, options = parse(arguments, USAGE, OPTIONS)
    if len(files) != 2:
        raise UserError(f"convert takes an input and an output, got {len(files)}: {', '.join(files)}", USAGE)
    source, target = hub.local(files[0]), Path(files[1]).expanduser()
    check_lora_output(target, options["format"], [weights_of(source)], USAGE)
    lora = read_lora(source, cast("Expert | None", options["expert"] or None))
    held = tuple(suffix for grammar in GRAMMARS.values() for suffix in grammar.extras)
    if strange := [name for name in lora.extras if not split_extra(name)[1].startswith(held)]:
        raise UserError(f"{source}: no format holds {strange[0]}, and wantrain does not apply it",
                        "fold it into a checkpoint with the tool that made it, then wantrain extract")
    kept = {key: value for key, value in lora.metadata.items() if key not in (DIGEST_KEY, "lora_adapter_metadata")}
    worst = write_proven(target, lora, options["format"], kept, options["dtype"])
    print(f"{lora.path} ({lora.format}) -> {target} ({options['format']}): {len(lora.pairs)} LoRA modules"
          + (f" and {len(lora.extras)} other tensors" if lora.extras else "")
          + f"; read back, largest relative error of a delta {worst:.1e}")
    print(told(read_lora(target)))
