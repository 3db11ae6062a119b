"""`wantrain convert IN OUT format=NAME`: a LoRA in another tool's format, proven by reading it back."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import cast

from wantrain.models import hub
from wantrain.models.lora_formats import DIGEST_KEY, GRAMMARS, read_lora, split_extra
from wantrain.models.lora_loaders import told
from wantrain.models.lora_names import weights_of
from wantrain.models.lora_updates import write_proven
from wantrain.models.outputs import check_lora_output
from wantrain.models.variants import Expert
from wantrain.terms import UserError


def run(given: argparse.Namespace) -> None:
    """Read, write in the format asked for, read back and compare. What the format cannot hold is refused by name."""
    source, target = hub.local(given.IN), Path(given.OUT).expanduser()
    check_lora_output(target, given.format, [weights_of(source)], "wantrain convert IN OUT")
    lora = read_lora(source, cast("Expert | None", given.expert or None))
    held = tuple(suffix for grammar in GRAMMARS.values() for suffix in grammar.extras)
    if strange := [name for name in lora.extras if not split_extra(name)[1].startswith(held)]:
        raise UserError(f"{source}: no format holds {strange[0]}, and wantrain does not apply it",
                        "fold it into a checkpoint with the tool that made it, then wantrain extract")
    kept = {key: value for key, value in lora.metadata.items() if key not in (DIGEST_KEY, "lora_adapter_metadata")}
    worst = write_proven(replace(lora, path=target), given.format, kept, given.dtype)
    print(f"{lora.path} ({lora.format}) -> {target} ({given.format}): {len(lora.pairs)} LoRA modules"
          + (f" and {len(lora.extras)} other tensors" if lora.extras else "")
          + f"; read back, largest relative error of a delta {worst:.1e}")
    print(told(read_lora(target)))
