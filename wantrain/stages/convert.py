"""`wantrain convert IN OUT format=NAME`: a LoRA in another tool's format, proven by reading it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from wantrain.models import lora_formats
from wantrain.models.lora_formats import DIGEST_KEY, GRAMMARS
from wantrain.models.variants import Expert
from wantrain.terms import UserError

DTYPES = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 1e-2), "float16": (torch.float16, 2e-3)}
"""Storage, and the largest relative error of a delta that it may cost."""
ALLOWED = {"format": tuple(GRAMMARS), "dtype": tuple(DTYPES), "expert": ("high", "low")}
USAGE = "wantrain convert IN OUT format=universal"


def run(arguments: Sequence[str]) -> None:
    """Read, write in the format asked for, read back and compare. What the format cannot hold is refused by name."""
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    files = [Path(a).expanduser() for a in arguments if "=" not in a]
    if len(files) != 2:
        raise UserError(f"convert takes an input and an output, got {len(files)}", USAGE)
    options = {"format": "universal", "dtype": "float32", **options}
    for key, value in options.items():
        if key not in ALLOWED or value not in ALLOWED[key]:
            raise UserError(f"{key}={value} is not allowed: " + ", ".join(ALLOWED.get(key, ALLOWED)), USAGE)
    source, target = files
    expert = cast(Expert, options["expert"]) if "expert" in options else None
    lora = lora_formats.read_lora(source, expert)
    dtype, allowed = DTYPES[options["dtype"]]
    kept = {key: value for key, value in lora.metadata.items() if key not in (DIGEST_KEY, "lora_adapter_metadata")}
    lora_formats.write_lora(target, lora.pairs, options["format"], kept, dtype=dtype, extras=lora.extras)
    worst, module = lora_formats.worst_difference(lora.pairs, lora_formats.read_lora(target).pairs)
    if not math.isfinite(worst) or worst > allowed:
        raise UserError(f"{target}: read back, the delta of {module} differs by {worst:.1e}", "report this as a bug")
    print(f"{source} ({lora.format}) -> {target} ({options['format']}): {len(lora.pairs)} modules"
          + (f" and {len(lora.extras)} other tensors" if lora.extras else "")
          + f"; read back, largest relative error of a delta {worst:.1e}")
