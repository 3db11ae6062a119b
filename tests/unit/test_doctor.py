"""`wantrain doctor` on machines that lack things: no GPU, no git, no room, a home that cannot be written, odd cards."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from wantrain import cli
from wantrain.stages import doctor


@pytest.fixture
def told(monkeypatch, tmp_path, capsys):
    """told() -> (findings by name, all that was printed); imports of packages are taken to succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "fault_of_import", lambda module: "")
    monkeypatch.setattr(doctor, "_attend", lambda torch, device, backend: None)

    def call():
        assert cli.main(["doctor", "--json"]) == 0
        printed = capsys.readouterr().out
        found = {}
        for one in json.loads(printed)["findings"]:
            found.setdefault(one["name"], SimpleNamespace(**one))  # versions of packages come last
        return found, printed

    return call


def fake_torch(capability, driver_built="12.8", available=True):
    own = SimpleNamespace(name="Card", major=capability[0], minor=capability[1])
    cuda = SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 1, get_device_properties=lambda n: own,
        mem_get_info=lambda n: (8 * 2**30, 24 * 2**30), get_device_capability=lambda: capability)
    kernels = SimpleNamespace(SDPBackend=SimpleNamespace(**dict.fromkeys(doctor.ATTENTION)))
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=driver_built, hip=None), __version__="9.9",
                           nn=SimpleNamespace(attention=kernels))


def test_without_a_gpu_git_or_compiler(told, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found, _ = told()
    assert found["git"].value == "none (wantrain needs none)"
    assert found["C compiler"].value == "none"
    assert "apt-get" in found["C compiler"].mend
    assert found["driver"].value == "none"
    assert found["devices"].limits


@pytest.mark.parametrize(("capability", "bf16", "fp8"), [((7, 5), "emulated", "no"), ((8, 0), "yes", "no"),
                                                         ((8, 9), "yes", "yes"), ((12, 0), "yes", "yes")])
def test_what_a_card_can_do_follows_from_its_capability(told, monkeypatch, capability, bf16, fp8):
    monkeypatch.setattr(doctor, "_torch", lambda: fake_torch(capability))
    found, _ = told()
    assert found["device 0"].value == \
        f"Card, 24.0 GiB, 8.0 of it free, compute capability {capability[0]}.{capability[1]}"
    assert found["bf16"].value == bf16
    assert bool(found["bf16"].limits) == (bf16 != "yes")
    assert found["fp8 products"].value.split()[0] == fp8


def test_a_torch_without_cuda_beside_a_driver_is_named_with_what_mends_it(told, monkeypatch):
    monkeypatch.setattr(doctor, "_torch", lambda: fake_torch((8, 0), None, available=False))
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    found, _ = told()
    assert "without CUDA" in found["devices"].value
    assert "force-reinstall torch" in found["devices"].mend


def test_a_full_disk(told, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 2**29)
    found, _ = told()
    assert found["cache/"].value == "0.5 GiB free"
    assert found["cache/"].mend == "data.cache_dir=/a/folder/with/room"
    assert found["runs/"].mend == "run.dir=/a/folder/with/room"

    def refuse(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor, "free_bytes", refuse)
    found, _ = told()
    assert found["cache/"].limits == "nothing may be written there"
    assert "No space left" in found["hubs"].value


def test_a_home_that_cannot_be_written(told, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(doctor.downloads.constants, "HF_HUB_CACHE", str(home / ".cache/huggingface/hub"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    found, _ = told()
    assert "read-only" in found["hub cache"].value
    assert found["hub cache"].mend.startswith("export HF_HUB_CACHE=")
    assert found["cache/"].limits == "it cannot be written"


def test_no_home_name_or_token_is_told(told, monkeypatch, tmp_path):
    home = tmp_path / "home" / "jane-doe"
    home.mkdir(parents=True)
    for name, value in (("HOME", str(home)), ("LOGNAME", "jane-doe"), ("HF_TOKEN", "hf_abcdefghijklmnop"),
                        ("WANDB_API_KEY", "f" * 40)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "janes-laptop")
    monkeypatch.setattr(doctor.downloads.constants, "HF_HUB_CACHE", str(home / "hub"))
    broken = f"{home}/lib/x.so on janes-laptop of jane-doe: hf_abcdefghijklmnop {'f' * 40}"
    monkeypatch.setattr(doctor, "fault_of_import", lambda module: broken if module == "decord" else "")
    found, printed = told()
    assert found["hub cache"].value.startswith("~/hub")
    assert found["Hugging Face"].value == "a token is there"
    assert found["decord"].value == "~/lib/x.so on HOST of USER: TOKEN TOKEN"
    for secret in ("jane", "laptop", "hf_abc", "ffff"):
        assert secret not in printed


def test_a_part_that_fails_costs_only_itself(told, monkeypatch):
    def fail():
        raise RuntimeError("the driver is mad")

    monkeypatch.setattr(doctor, "_torch", fail)
    found, _ = told()
    assert found["gpu"].value == found["attention"].value == "not known: RuntimeError: the driver is mad"
    assert "torch" in found, "the packages are still told"


def test_an_import_that_crashes_or_fails_is_told_in_a_line(monkeypatch, tmp_path):
    (tmp_path / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "failing.py").write_text("print('noise'); raise ImportError('libfoo.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.fault_of_import("crashing") == "its import crashes: signal 11"
    assert doctor.fault_of_import("failing") == "ImportError: libfoo.so is missing"
    assert doctor.fault_of_import("json") == ""


@pytest.mark.slow
def test_a_bare_machine_has_no_traceback(tmp_path):
    environment = {"HOME": "/proc/none", "PATH": "", "PYTHONPATH": str(Path(doctor.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-m", "wantrain", "doctor"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "git               none" in done.stdout
    assert "limit wantrain here" in done.stdout
