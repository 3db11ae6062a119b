"""Under ZeRO-3 no process ever holds the base whole: not while it loads, not while it trains, not to save its adapter.

A base of 1.1 GB with random weights, two gloo processes started by `accelerate launch`, and the peak of each process's
resident memory. The launched script is `wantrain` with one more row in the variants table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import arguments_for
from wantrain.models.base import EMBEDDED
from wantrain.models.loading import empty_weights
from wantrain.models.variants import VARIANTS, diffusers_config

pytestmark = [pytest.mark.slow, pytest.mark.long]

DRIVER = """
import dataclasses, sys
from wantrain import cli
from wantrain.models.variants import VARIANTS

tiny = VARIANTS["tiny_wan"]
sizes = {sizes}
VARIANTS["mid_wan"] = dataclasses.replace(tiny, name="mid_wan", architecture=dataclasses.replace(
    tiny.architecture, **sizes))
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""
SIZES = {"dim": 1024, "num_heads": 32, "ffn_dim": 4096, "num_layers": 16}
SETTINGS = {
    "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 2e7, "stage3_max_reuse_distance": 0,
                          "stage3_prefetch_bucket_size": 1e7, "stage3_param_persistence_threshold": 1e5},
    "train_micro_batch_size_per_gpu": "auto",
}
"""DeepSpeed's own numbers let a billion parameters be live, which is all of this base."""
LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {settings}, zero3_init_flag: false}}
num_machines: 1
num_processes: 2
"""

ENVIRONMENT = {**{name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
               "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""What torch frees goes back to the system at once: glibc would keep holes of the largest tensors' size, and with the
settings of make all that was ever used."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(the script, arguments for its base, GiB of the base)."""
    folder = tmp_path_factory.mktemp("mid")
    script = folder / "driver.py"
    script.write_text(DRIVER.format(sizes=SIZES))
    scope: dict[str, object] = {"__name__": "driver"}
    exec(script.read_text(), scope)  # so that this process knows the variant as well
    variant = VARIANTS.pop("mid_wan")
    from diffusers import WanTransformer3DModel

    with empty_weights():
        transformer = WanTransformer3DModel.from_config(diffusers_config(variant))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    tensors = {name: torch.randn(t.shape) * 0.02 for name, t in transformer.state_dict().items()}
    size = sum(t.nbytes for t in tensors.values()) / 2**30
    save_file(tensors, file)
    parts = {part: EMBEDDED / part for part in ("vae", "text_encoder", "tokenizer")} | {"transformer": file.parent}
    own = ["model.variant=mid_wan", "model.path=null", *(f"model.parts.{k}={v}" for k, v in parts.items())]
    return script, own, size


def peaks(run: Path) -> list[float]:
    return [row["peak_memory_gib"] for row in json.loads((run / "processes.json").read_text())]


def test_no_process_holds_the_base_whole(base, clips, cache_dir, cached, tmp_path):
    script, own, size_gib = base
    (tmp_path / "zero3.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "zero3.yaml").write_text(LAUNCH.format(settings=tmp_path / "zero3.json"))
    ddp = Path(__file__).parents[2] / "launch" / "ddp.yaml"
    found = {}
    for name, file, more in (("tiny", ddp, []), ("ddp", ddp, own), ("zero3", tmp_path / "zero3.yaml", own)):
        run = tmp_path / name
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), str(script), "train",
                   *arguments_for(clips, cache_dir, run), "train.micro_batch_size=2", "train.num_steps=1", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=Path.cwd(),
                              env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found[name] = peaks(run)
    print(f"base {size_gib:.2f} GiB; peak of each process in GiB: {found}")
    for tiny, whole, shared in zip(*found.values(), strict=True):
        assert shared - tiny < 0.92 * size_gib  # a half of it, 0.12 of its file, and what a step works with
        assert whole - shared > 0.5 * size_gib
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("ddp", "zero3")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    checkpoint = tmp_path / "zero3" / "checkpoints" / "step_000001" / "training.safetensors"
    assert checkpoint.stat().st_size / 2**30 < 0.1 * size_gib
