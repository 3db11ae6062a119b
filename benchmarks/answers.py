"""CPU seconds until a verb answers, on the tiny base: each command line in a process of its own.

    python -m benchmarks.answers [--rounds 3]

It prepares a run first (cache, four steps, an export), in a temporary folder. The seconds are those of the process and
of its workers, the least of the rounds. Behind each stand the heavy packages that it imports. On a machine that others
use, compare with `import torch` alone, which comes first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "omegaconf")
RUN = ["recipe=demo_anime", "tracker=none", "train.num_steps=4", "optim.warmup_steps=0", "validation.every_steps=0"]
LORA = "runs/demo_anime/export/demo_anime.safetensors"
COMMANDS = {
    "--help": ["--help"], "train --help": ["train", "--help"], "train --help all": ["train", "--help", "all"],
    "Tab": ["__complete", "wantrain train optim.n"], "misspelt verb": ["chek", *RUN],
    "misspelt recipe": ["train", "recipe=demo_anmie"], "misspelt key": ["train", *RUN, "lora.rnak=4"],
    "misspelt value": ["train", *RUN, "optim.lr=1e-4x"], "value out of range": ["train", *RUN, "lora.rank=0"],
    "clips not there": ["train", *RUN, "data.heldout=nowhere"], "inspect without a file": ["inspect"],
    "no LoRA": ["sample", *RUN, "sampler.loras=[nowhere.safetensors]"],
    "check": ["check", *RUN], "plan": ["plan", *RUN, "--gpu", "24gb"],
    "export": ["export", *RUN], "inspect LORA": ["inspect", LORA],
    "prune": ["prune", "cache"], "runs": ["runs"], "doctor": ["doctor"], "cache, all there": ["cache", *RUN],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{min(torch_s() for _ in range(given.rounds)):6.2f}  import torch")
        print(f"{cpu_s(['check', *RUN], folder):6.2f}  check, for the first time: it looks into 62 files")
        for verb in ("cache", "train", "export"):
            cpu_s([verb, *RUN], folder)
        for name, command in COMMANDS.items():
            least = min(cpu_s(command, folder) for _ in range(given.rounds))
            print(f"{least:6.2f}  {name:24}{', '.join(imported(command, folder))}")


def torch_s() -> float:
    """CPU seconds of the import of torch alone."""
    return spent(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))


def cpu_s(command: Sequence[str], folder: str) -> float:
    """CPU seconds of `wantrain COMMAND` and its workers."""
    return spent(lambda: answer(command, folder))


def spent(work: Callable[[], object]) -> float:
    """CPU seconds of the processes that the work starts."""
    before = os.times()
    work()
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def imported(command: Sequence[str], folder: str) -> list[str]:
    """Those of HEAVY that the command imports."""
    lines = answer(command, folder, "-X", "importtime").splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return [name for name in HEAVY if name in names]


def answer(command: Sequence[str], folder: str, *options: str) -> str:
    """What `wantrain COMMAND` says on stderr."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *options, "-m", "wantrain", *command], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done.stderr


if __name__ == "__main__":
    main()
