"""Jobs of several real processes without their seconds of imports: forks of a process that has imported everything.

`python -m tests.distributed.forked` is that process. It serves one caller over its pipes, a JSON line a request, and
holds no threads: a fork of a process with threads may stand still.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing.forkserver
import multiprocessing.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
LONGEST_RUN_S = 60.0
GONE_WITHIN_S = 5.0
NOTICED_WITHIN_S = 1.0
"""What the others get to notice by themselves that one is gone."""

MAIN_THREAD = Path("/proc/self/comm").read_text().strip()
JEMALLOC = "jemalloc_bg_thd"
"""The thread of pyarrow's allocator, which takes care of forks itself."""

IMPORTED = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "datasets", "decord", "av", "hydra",
            "torch.utils.tensorboard", "wantrain.models.base", "wantrain.stages.cache", "wantrain.stages.train")


def zero(stage: int) -> dict[str, str]:
    """What `accelerate launch` sets for a launch file with this ZeRO stage."""
    fields = {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            **(fields if stage == 3 else {})}


ENGINES: dict[str, dict[str, str]] = {
    "DDP": {}, "ZeRO-1": zero(1), "ZeRO-2": zero(2), "ZeRO-3": zero(3),
    "ZeRO-3 offload": {**zero(3), "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
                       "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"},
    "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
              "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
              "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}
"""The environment that chooses an engine. (DDP is what accelerate does with several processes by itself.)"""


# In the process that has imported everything, and in its forks


def start_forkserver() -> None:
    """Start multiprocessing's fork server as a fork of this process, which has imported all that it would import."""
    def fork(path: str, arguments: Sequence[str], pass_fds: Sequence[int]) -> int:
        if pid := os.fork():
            return pid
        try:
            for number in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - {0, 1, 2, *pass_fds}:
                with contextlib.suppress(OSError):
                    os.close(number)  # what keeps the parent's other children from seeing its end
            multiprocessing.forkserver.main(*pass_fds, preload=[])
        finally:
            os._exit(0)

    spawn, multiprocessing.util.spawnv_passfds = multiprocessing.util.spawnv_passfds, fork
    multiprocessing.forkserver.ensure_running()
    multiprocessing.util.spawnv_passfds = spawn


def be_process(arguments: Sequence[str], log: str, environment: Mapping[str, str]) -> NoReturn:
    """One process of a job, in a session of its own; `log` gets all that it says."""
    code = 1
    try:
        os.setsid()
        for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            os.dup2(os.open("/dev/null" if number == 0 else log, flags | os.O_CREAT | os.O_APPEND), number)
        start_forkserver()
        os.environ |= environment
        if "ACCELERATE_USE_FSDP" in environment:
            let_fsdp_run_on_cpu()
        code = importlib.import_module("wantrain.cli").main(arguments)
        multiprocessing.forkserver._forkserver._stop()
    except BaseException:  # noqa: BLE001  (what the interpreter would do with it)
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def let_fsdp_run_on_cpu() -> None:
    """accelerate knows FSDP with GPUs alone; torch's own, which it hands the model to, runs on the CPU as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def threads() -> set[str]:
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


def free_port() -> int:
    """A port below those that the system gives to connections, one of which could take it before it is listened on."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first_given // 2, first_given)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start(arguments: Sequence[str], log: str, num_processes: int, environment: Mapping[str, str] | None) -> list[int]:
    """The process ids of a job's processes; `environment` None: as without a launcher."""
    assert threads() <= {MAIN_THREAD, JEMALLOC}, f"a fork of a process with threads may stand still: {threads()}"
    size, port, pids = str(num_processes), str(free_port()), []
    for rank in range(num_processes):
        launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids.append(os.fork())
        if not pids[-1]:
            be_process(arguments, log, {} if environment is None else launched | dict(environment))
    return pids


def wait(pids: Sequence[int], timeout_s: float, until_failure: bool) -> list[tuple[int, int]]:
    """(process id, exit code) of those that ended by then; returns as soon as all have (or one has failed)."""
    codes: dict[int, int] = {}
    until = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until or (until_failure and any(codes.values())):
            break
        time.sleep(0.005)
    return list(codes.items())


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # its forks would look through all that it has imported
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, given = json.loads(line)
        print(json.dumps({"start": start, "wait": wait}[name](**given)), file=answers, flush=True)


# In the tests


class Forker:
    """Starts jobs in the process that has imported everything, and waits for them there."""

    def __init__(self) -> None:
        # A GPU would be initialised by every fork, and there may be fewer of them than processes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that forks ended with {self._server.wait()}")
        return json.loads(line)

    def _ask(self, name: str, **given: Any) -> Any:
        assert self._server.stdin is not None
        print(json.dumps([name, given]), file=self._server.stdin, flush=True)
        return self._answer()

    def start(self, arguments: Sequence[str], log: Path, num_processes: int = 2, engine: str | None = "DDP"
              ) -> list[int]:
        """The ids of the processes of `wantrain ARGUMENTS`, each in a session of its own; `log` gets what they say.

        `engine` None: one process that no launcher started.
        """
        assert engine or num_processes == 1
        return self._ask("start", arguments=list(arguments), log=str(log), num_processes=num_processes,
                         environment=ENGINES[engine] if engine else None)

    def wait(self, pids: Sequence[int], timeout_s: float = LONGEST_RUN_S, until_failure: bool = False
             ) -> dict[int, int]:
        """Exit codes by process of those that ended within so many seconds (or when one had failed)."""
        return dict(self._ask("wait", pids=list(pids), timeout_s=timeout_s, until_failure=until_failure))

    def run(self, arguments: Sequence[str], log: Path, num_processes: int = 2, engine: str | None = "DDP"
            ) -> float:
        """Seconds of a job that no one disturbs. RuntimeError where it fails, hangs or leaves a process."""
        began = time.monotonic()
        pids = self.start(arguments, log, num_processes, engine)
        codes = self.wait(pids, until_failure=True)
        took = time.monotonic() - began
        rest = left_over(pids)
        codes |= self.wait([pid for pid in pids if pid not in codes])
        if any(codes.values()) or rest:
            raise RuntimeError(f"exit codes {codes}, left over {rest}\n{log.read_text()[-3000:]}")
        return took

    def end(self, pids: Sequence[int], longest_s: float = LONGEST_RUN_S) -> dict[int, int]:
        """Exit codes of a job's processes: when one has failed, the others are stopped a moment later, as launchers do.
        """
        codes = self.wait(pids, longest_s, until_failure=True)
        codes |= self.wait([pid for pid in pids if pid not in codes], NOTICED_WITHIN_S)
        for pid in set(pids) - codes.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        return codes | self.wait([pid for pid in pids if pid not in codes])

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


@contextlib.contextmanager
def forking() -> Iterator[Forker]:
    one = Forker()
    try:
        yield one
    finally:
        one.close()


def kill_session(pid: int) -> None:
    """Kill a process of a job with all that it started."""
    for send in (os.kill, os.killpg):  # a process that has just been forked has no session yet
        with contextlib.suppress(ProcessLookupError):
            send(pid, signal.SIGKILL)


def in_sessions(sessions: Sequence[int]) -> list[int]:
    """Processes of these sessions that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def left_over(pids: Sequence[int]) -> list[int]:
    """What of these sessions still lives after a while; it is killed then."""
    until = time.monotonic() + GONE_WITHIN_S
    while (alive := in_sessions(pids)) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return alive


if __name__ == "__main__":
    serve()
