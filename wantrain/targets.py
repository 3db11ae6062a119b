"""What lora.targets and patterns by module mean: presets and regular expressions over names of Linears. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from wantrain.terms import UserError

_ATTENTION = r"(vace_)?blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)"
TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "attn": (_ATTENTION,),
    "attn_ffn": (_ATTENTION, r"(vace_)?blocks\.\d+\.ffn\.(net\.0\.proj|net\.2)"),
    "all_linear": (r".*",),
}
"""Names of target sets, each a list of regular expressions over diffusers module names (full match)."""


def matching(names: Sequence[str], target: str, key: str) -> set[str]:
    """The names that one preset or regular expression matches. Raises UserError when none does: a typo must not train
    something else.
    """
    try:
        found = {name for name in names if any(re.fullmatch(p, name) for p in TARGET_PRESETS.get(target, (target,)))}
    except re.error as error:
        raise UserError(f"{key}: {target!r} is not a regular expression: {error}", "mend the pattern") from error
    if not found:
        raise UserError(
            f"{key}: {target!r} matches no Linear here. Allowed: a preset ({', '.join(TARGET_PRESETS)}) or a regular "
            f"expression over names such as {', '.join(names[:3])}",
            "use a preset, e.g. lora.targets=[attn_ffn]" if key == "lora.targets" else f"mend the pattern of {key}",
        )
    return found


def matched(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The names that any of lora.targets matches, in their order. Raises UserError when one matches nothing."""
    found: set[str] = set().union(*(matching(names, target, "lora.targets") for target in targets))
    return [name for name in names if name in found]
