"""What each process of a training did, and what it waited for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from wantrain.engine import peak_memory_gib
from wantrain.engine.rendezvous import Rendezvous
from wantrain.files import write_json


@dataclass(slots=True)
class Work:
    """What this process did: transformer tokens, seconds, and the seconds that it waited for its clips. It had waited
    `waited_before_s` seconds for other processes when this began.
    """

    waited_before_s: float
    tokens: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0

    def add(self, tokens: int, seconds: float, data_wait_s: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.data_wait_s += data_wait_s

    def report(self, rendezvous: Rendezvous, path: Path, device: torch.device, is_first: bool) -> None:
        """Write what all processes did to `path`, and with several processes a line for each on the console."""
        rows = rendezvous.all({
            "tokens": self.tokens, "seconds": self.seconds, "waited_for_clips_s": self.data_wait_s,
            "waited_for_others_s": rendezvous.waited_s - self.waited_before_s,
            "peak_memory_gib": peak_memory_gib(device)})
        if not is_first:
            return
        named = [{"process": name, **row} for name, row in zip(rendezvous.processes, rows, strict=True)]
        write_json(path, named)
        for row in named if len(named) > 1 else ():
            print(f"{row['process']}: {row['tokens']:,} tokens in {row['seconds']:.1f} s, of which it waited "
                  f"{row['waited_for_clips_s']:.1f} s for clips and {row['waited_for_others_s']:.1f} s for others; "
                  f"{row['peak_memory_gib']:.1f} GiB at the most")
