"""Two machines, each a network namespace with its own address and host name, joined by a link that can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import arguments_for
from tests.runs import LAUNCH, numbers, state
from wantrain.engine import checkpoint, saved

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS, UNDISTURBED = 4, 24
STALL_S, ENDED_S = 10, 60
"""What a process waits for another, and how soon after a cut both launches must be over."""


class Machines:
    """machine0 (10.77.0.1) and machine1 (10.77.0.2), and the processes started on them."""

    def __init__(self) -> None:
        self.names = [f"wantrain{os.getpid()}m{i}" for i in (0, 1)]

    def ip(self, *words: str) -> str:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout

    def make(self) -> None:
        for i, name in enumerate(self.names):
            self.ip("netns", "add", name)
            hosts = Path("/etc/netns", name, "hosts")  # `ip netns exec` shows it as /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 not-machine{i}\n10.77.0.1 machine0\n10.77.0.2 machine1\n")
        one, two = self.names
        self.ip("link", "add", "link0", "netns", one, "type", "veth", "peer", "name", "link0", "netns", two)
        for i, name in enumerate(self.names):
            self.ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "link0")
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "link", "set", "link0", "up")

    def remove(self) -> None:
        """These, and what a pytest that was killed has left."""
        found = re.findall(r"^wantrain(\d+)m[01]", self.ip("netns", "list"), re.MULTILINE)
        left = {f"wantrain{pid}m{i}" for pid in found if not Path("/proc", pid).exists() for i in (0, 1)}
        for name in {*self.names, *left}:
            self.end(name)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def end(self, name: str) -> None:
        """Kill what still runs in that namespace."""
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def link(self, state: str) -> None:
        self.ip("-n", self.names[0], "link", "set", "link0", state)

    def start(self, index: int, command: list[str], output: Path, **env: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self.names[index], "unshare", "--uts", "sh", "-c",
                  f'hostname machine{index}; exec "$@"', "sh"]
        root = str(LAUNCH.parent)
        with output.open("wb") as file:
            return subprocess.Popen([*inside, *command], cwd=root, stdout=file, stderr=subprocess.STDOUT, env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "link0",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env})


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    own = Machines()
    allowed = shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0
    try:
        if not allowed:
            pytest.skip("needs root, `ip` and `unshare`")
        try:
            own.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield own
    finally:
        if allowed:
            own.remove()


Start = Callable[..., list[subprocess.Popen[bytes]]]


def train(clips: Path, cache_dir: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["train", *arguments_for(clips, cache_dir, run_dir), "train.micro_batch_size=2",
            f"train.stall_timeout_s={STALL_S}", *overrides]


@pytest.fixture(scope="module")
def start(machines, clips, cache_dir, cached, tmp_path_factory) -> Start:
    """start(root, overrides...) -> a launch on each machine, the run folders root/machine0 and root/machine1."""

    def call(root: Path, *overrides: str) -> list[subprocess.Popen[bytes]]:
        return [machines.start(i, [
            "accelerate", "launch", "--config_file", str(LAUNCH / "nodes.yaml"), "--machine_rank", str(i),
            "--main_process_ip", "10.77.0.1", "-m", "wantrain",
            *train(clips, cache_dir, root / f"machine{i}", *overrides)], root / f"output_{i}.txt") for i in (0, 1)]

    return call


def ended(launches: list[subprocess.Popen[bytes]], within_s: float) -> list[int]:
    """Exit codes; raises TimeoutExpired."""
    until = time.monotonic() + within_s
    return [launch.wait(max(0.1, until - time.monotonic())) for launch in launches]


def wait_for(condition: Callable[[], object], launches: list[subprocess.Popen[bytes]], within_s: float = 120) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert all(launch.poll() is None for launch in launches), "a launch is over already"
        assert time.monotonic() < until
        time.sleep(0.005)


def all_output(root: Path) -> str:
    return "\n".join(p.read_text()[-2000:] for p in sorted(root.rglob("*.txt")) + sorted(root.rglob("*.log")))


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> Path:
    """The folder of two machines' run, every second checkpoint kept."""
    root = tmp_path_factory.mktemp("undisturbed")
    codes = ended(start(root, f"train.num_steps={UNDISTURBED}", "train.save_every=2", "train.keep_every=2"), 240)
    assert codes == [0, 0], all_output(root)
    return root


def test_two_machines_without_a_common_folder_train_as_one_process_does(undisturbed, launched):
    header = json.loads((undisturbed / "machine0" / "run.json").read_text())
    assert header["num_processes"] == 2
    assert [name.partition(" (")[0] for name in header["processes"]] == [
        "process 0 on machine0", "process 1 on machine1"]
    assert [p.name for p in (undisturbed / "machine1").iterdir()] == ["logs"]
    alone = launched(None, f"train.num_steps={STEPS}")
    for key in ("loss", "grad_norm"):
        two = numbers(undisturbed / "machine0", key)[:STEPS]
        torch.testing.assert_close(two, numbers(alone, key), rtol=2e-5, atol=0)


@pytest.mark.long  # what a process that stands still does to the others: test_one_process_differs
def test_a_cut_link_ends_both_and_the_same_commands_go_on_bitwise(machines, start, undisturbed, tmp_path):
    checkpoints = tmp_path / "machine0" / "checkpoints"
    launches = start(tmp_path, "train.num_steps=1000000", "train.save_every=2")
    wait_for(lambda: saved.steps_on_disk(checkpoints), launches)
    machines.link("down")
    try:
        began = time.monotonic()
        codes = ended(launches, ENDED_S)
        print(f"cut: codes {codes} after {time.monotonic() - began:.0f} s")
    finally:
        machines.link("up")
        for name in machines.names:
            machines.end(name)
    assert 0 not in codes, all_output(tmp_path)
    logs = [(tmp_path / f"machine{i}" / "logs" / f"process_{i}.log").read_text() for i in (0, 1)]
    assert re.search(r"(process 1 on machine1 \(pid \d+\)|another process) is gone, or did not come within", logs[0])
    assert re.search(r"(process 0 on machine0 \(pid \d+\)|another process) is gone, or did not come within", logs[1])
    newest = saved.step_of(saved.steps_on_disk(checkpoints)[-1].name)
    assert newest + 2 <= UNDISTURBED
    codes = ended(start(tmp_path, f"train.num_steps={newest + 2}", "train.save_every=2"), 240)
    assert codes == [0, 0], all_output(tmp_path)
    assert json.loads((tmp_path / "machine0" / "run.json").read_text())["start_step"] == newest
    step, tensors = state(tmp_path / "machine0")
    assert step == newest + 2
    whole = checkpoint.load(undisturbed / "machine0" / "checkpoints" / f"step_{step:06d}", None)[1]
    assert whole.keys() == tensors.keys()
    assert all(torch.equal(whole[name], tensors[name]) for name in whole)


@pytest.mark.long
def test_elastic_goes_on_by_itself_after_a_cut(machines, clips, cache_dir, undisturbed, tmp_path):
    """The run folder is common: after a restart another machine's process may be the first."""
    run = tmp_path / "run"
    launches = [machines.start(i, [str(LAUNCH / "elastic.sh"), *train(
        clips, cache_dir, run, f"train.num_steps={UNDISTURBED}", "train.save_every=2")], tmp_path / f"output_{i}.txt",
        NODES="2:2", GPUS="1", HOST="machine0", RESTARTS="3") for i in (0, 1)]
    try:
        wait_for(lambda: saved.steps_on_disk(run / "checkpoints"), launches)
        machines.link("down")
        logs = [run / "logs" / f"process_{i}.log" for i in (0, 1)]
        wait_for(lambda: all("is gone, or did not come" in log.read_text() for log in logs), launches)
        machines.link("up")
        codes = ended(launches, 240)
    finally:
        machines.link("up")
        for name in machines.names:
            machines.end(name)
    assert codes == [0, 0], all_output(tmp_path)
    header = json.loads((run / "run.json").read_text())
    assert header["num_processes"] == 2
    assert 0 < header["start_step"] < UNDISTURBED
    assert torch.equal(numbers(run, "loss"), numbers(undisturbed / "machine0", "loss"))
    a, b = state(run)[1], state(undisturbed / "machine0")[1]
    assert all(torch.equal(a[name], b[name]) for name in b)
