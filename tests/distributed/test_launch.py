"""Every way of launching/README.md that runs on one machine: the right number of processes, which agree with one alone.

ddp.yaml, zero2.yaml and zero3.yaml are in test_two_processes.py, several machines and Slurm in files of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import arguments_for
from tests.runs import LAUNCH, assert_same_training

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
README = (LAUNCH / "README.md").read_text()


@pytest.fixture(scope="module")
def arguments_of(clips, cache_dir, cached, tmp_path_factory):
    """name -> (run folder, arguments)."""
    root = tmp_path_factory.mktemp("launch")
    return lambda name: (root / name, [*arguments_for(clips, cache_dir, root / name), "train.micro_batch_size=2"])


def launch(file, own, code=0):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / file),
               "-m", "wantrain", "train", *own]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=ENVIRONMENT)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(arguments_of):
    run, own = arguments_of("alone")
    launch("cpu.yaml", own)
    return run


def header(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.long  # test_engines trains under the same settings, and holds them against these files
@pytest.mark.parametrize(("file", "stage", "rtol"), [("zero1.yaml", 1, 2e-5), ("zero3_offload.yaml", 3, 2e-4)])
def test_deepspeed(arguments_of, alone, file, stage, rtol):
    run, own = arguments_of(file)
    launch(file, own)
    assert (header(run)["num_processes"], header(run)["engine"], header(run)["zero_stage"]) == (2, "DEEPSPEED", stage)
    assert_same_training(alone, run, rtol)


def test_one_gpu_is_one_process_also_without_a_gpu(arguments_of, alone):
    run, own = arguments_of("one_gpu")
    launch("one_gpu.yaml", own)
    assert header(run)["num_processes"] == header(alone)["num_processes"] == 1
    assert_same_training(alone, run, rtol=0)


def test_fsdp2_is_refused_where_it_would_train_processes_apart(arguments_of):
    _, own = arguments_of("fsdp2")
    done = launch("fsdp2.yaml", own, code=1)
    assert "FSDP, which accelerate does not have without a GPU" in done.stderr


@pytest.mark.parametrize(("more", "engine", "rtol"), [
    ({}, "MULTI_CPU", 2e-5),
    pytest.param({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DEEPSPEED", 2e-4,
                 marks=pytest.mark.long)])
def test_environment_variables_alone(arguments_of, alone, more, engine, rtol):
    """Those of launch/kubernetes.yaml, as two pods of one process have them, and those that launch/README.md adds."""
    assert " ".join(f"{key}={value}" for key, value in more.items()) in README
    run, own = arguments_of(f"environment_{engine}")
    job = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))[1]
    container, = job["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert job["spec"]["completions"] == int(given["WORLD_SIZE"]) == 2
    assert given.pop("RANK") is None  # from the pod's index
    assert set(re.findall(r"([A-Z_]+)=\S", README.partition("RANK=0")[2].splitlines()[0])) <= given.keys()
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", **more}
    command = [sys.executable, *container["command"][1:4], *own]
    pods = [subprocess.Popen(command, env={**ENVIRONMENT, **given, "RANK": str(rank)}) for rank in range(2)]
    assert [pod.wait(timeout=200) for pod in pods] == [0, 0]
    assert (header(run)["num_processes"], header(run)["engine"]) == (2, engine)
    assert header(run)["zero_stage"] == (3 if more else 0)
    assert len(header(run)["processes"]) == 2
    assert_same_training(alone, run, rtol)


def test_the_file_for_machines_takes_zero_3(arguments_of, alone):
    """The flags of launch/README.md; both machines are this one."""
    flags = "--use_deepspeed --zero_stage 3 --deepspeed_multinode_launcher standard"
    assert flags in README
    run, own = arguments_of("nodes_zero3")
    machines = [subprocess.Popen([
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "nodes.yaml"),
        "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", "29732", *flags.split(),
        "-m", "wantrain", "train", *own], env=ENVIRONMENT) for rank in range(2)]
    assert [machine.wait(timeout=200) for machine in machines] == [0, 0]
    assert (header(run)["num_processes"], header(run)["zero_stage"]) == (2, 3)
    assert_same_training(alone, run, rtol=2e-4)


BAD = ["recipe=demo_anime", "train.no_such_key=1"]


@pytest.mark.parametrize("file", ["cpu.yaml", "ddp.yaml"])
def test_a_launcher_turns_every_code_into_1(file):
    done = launch(file, BAD, code=1)
    assert "train.no_such_key" in done.stderr


def test_elastic_does_not_start_anew_what_a_person_must_mend():
    done = subprocess.run([LAUNCH / "elastic.sh", "train", *BAD], capture_output=True, text=True, timeout=200,
                          check=False, env={**ENVIRONMENT, "NODES": "1:1", "GPUS": "2", "PORT": "29733",
                                            "RESTARTS": "5",
                                            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 1
    said = re.findall(r"^error(?: in process (\d))?: ", done.stderr, re.MULTILINE)
    assert len(said) == len(set(said)) > 0  # of each process once; one may be ended before it says anything


def test_the_files_say_what_the_readme_says():
    assert {path.name for path in LAUNCH.iterdir()} - {"README.md"} <= set(re.findall(r"`([\w.]+)`", README))
    for path in LAUNCH.glob("*.yaml"):
        if path.name != "kubernetes.yaml":
            assert yaml.safe_load(path.read_text())["mixed_precision"] == "no", path


def test_every_exit_code_of_the_readme_is_one_of_ours():
    from wantrain import terms

    told = set(map(int, re.findall(r"^\| (\d+) \|", README, re.MULTILINE)))
    assert told == {0, 1, terms.EXIT_USER_ERROR, terms.EXIT_STALLED, terms.EXIT_INTERRUPTED}
