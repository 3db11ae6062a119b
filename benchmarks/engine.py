"""What a checkpoint keeps the training from, and what processes pay to meet: ratios in one run.

    python -m benchmarks.engine [--million 44] [--processes 2]

Checkpoint: an adapter of so many million parameters with AdamW's moments. Reference (1.00): writing it as `save` does
(safetensors, fsync, checksums, rename). Against it: the copy that `train` waits for before a thread writes.
Rendezvous: processes over gloo. Reference (1.00): one plain gather. Against it: one exchange of a `Rendezvous`, which a
step has two of, whatever its number of micro-batches.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wantrain.engine import checkpoint, launch, saved
from wantrain.engine.rendezvous import Rendezvous


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of one."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def checkpoints(million: int) -> None:
    keys = ("value", "exp_avg", "exp_avg_sq")
    tensors = {f"{i}|{key}": torch.randn(million * 10_000) for i in range(100) for key in keys}
    with tempfile.TemporaryDirectory() as folder:
        place = saved.CheckpointStore(Path(folder))
        written = timed(lambda: checkpoint.save(place, saved.Progress(1), tensors, saved.Record({})), 3)
    copied = timed(lambda: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, 3)
    size = sum(t.nbytes for t in tensors.values()) / 2**30
    print(f"checkpoint of {size:.2f} GiB: written 1.00 ({written:.2f} s), copied {copied / written:.3f}")


def meet(rank: int, processes: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                   "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = launch.start(processes, 1, max_grad_norm=1, timeout_s=60)
    meeting = Rendezvous(60)
    values = torch.zeros(8)
    plain = timed(lambda: bool(accelerator.gather(torch.tensor([0.0])).any()), 300)
    exchange = timed(lambda: meeting.gather(values), 300)
    if rank == 0:
        print(f"meeting of {processes}: plain gather 1.00 ({plain * 1e6:.0f} us), an exchange {exchange / plain:.2f}")
    launch.end(accelerator, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=44, help="parameters; 44 is rank 32 on 1.3B")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    checkpoints(given.million)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(meet, (given.processes, port), nprocs=given.processes)


if __name__ == "__main__":
    main()
