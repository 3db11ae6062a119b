"""`wantrain doctor`: what this machine is, what of it limits wantrain, and what mends that. The text of a bug report.

It must answer where nothing else does, so every look at a library or a device is a call that may fail in any way. No
tokens, names of people or machines, nor paths of a home are in what it prints.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wantrain import __version__, jobs, metrics
from wantrain.models import downloads
from wantrain.outside import Caught, described

IMPORT_S = 120
"""How long the import of a package may take."""
LEAST_FREE_GIB = 10
"""Below this a cache or a run's checkpoints of a real base soon fill the disk."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub",
            "hydra-core", "omegaconf", "numpy", "av", "decord", "deepspeed", "bitsandbytes", "prodigyopt",
            "schedulefree", "gguf", "wandb", "tensorboard", "modelscope")
OPTIONAL = {"deepspeed": "ZeRO", "bitsandbytes": "optim.name=adamw_8bit, memory.base=nf4",
            "prodigyopt": "optim.name=prodigy", "schedulefree": "optim.name=schedule_free", "gguf": "GGUF files",
            "wandb": "tracker=wandb", "tensorboard": "tracker=tensorboard", "modelscope": "model ids of ModelScope"}
"""Packages that only a part of wantrain needs -> that part."""
ATTENTION = {"FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "memory-efficient", "CUDNN_ATTENTION": "cuDNN",
             "MATH": "plain"}
"""torch's own kernels of attention."""
KERNEL_PACKAGES = ("flash_attn", "flash_attn_interface", "sageattention", "xformers")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about the machine; `limits` says what of wantrain it limits, `mend` the command against that."""

    group: str
    name: str
    value: str
    limits: str = ""
    mend: str = ""


def run(given: argparse.Namespace) -> None:
    """Print all findings, or one JSON object with them; what limits wantrain stands together at the end."""
    clean = cleaner()
    findings = [Finding(*(clean(text) for text in dataclasses.astuple(one))) for part in PARTS for one in tried(part)]
    if given.json:
        rows = [dataclasses.asdict(one) for one in findings]
        print(json.dumps({"wantrain": __version__, "findings": rows}, indent=1))
        return
    group = ""
    for one in findings:
        if one.group != group:
            print(f"{one.group}")
            group = one.group
        print(f"  {one.name:18}{one.value}")
    limiting = [one for one in findings if one.limits]
    print(f"\n{len(limiting)} thing(s) limit wantrain here" if limiting else "\nnothing here limits wantrain")
    for one in limiting:
        print(f"  {one.name}: {one.limits}" + (f"\n    next: {one.mend}" if one.mend else ""))


def tried(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What one part finds, and what ended it, if something did."""
    with Caught() as caught:
        yield from part()
    if caught.fault is not None:
        yield Finding(part.__name__, part.__name__, f"not known: {described(caught.fault)}")


def cleaner() -> Callable[[str], str]:
    """What takes homes, names of people and machines, and tokens out of a text."""
    names: list[tuple[Callable[[], str], str]] = [
        (lambda: str(Path.home()), "~"), (lambda: os.environ.get("HOME", ""), "~"), (getpass.getuser, "USER"),
        (socket.gethostname, "HOST")]
    taken: dict[str, str] = {}
    for name, word in names:
        with contextlib.suppress(OSError, KeyError, RuntimeError, ImportError):
            found = name()
            if len(found) > 2 and found not in ("root", "user"):
                taken.setdefault(found, word)

    def clean(text: str) -> str:
        for found, word in taken.items():
            text = re.sub(rf"(?<!\w){re.escape(found)}(?!\w)", word, text)
        return re.sub(r"\b(hf_|ms-|sk-)\w{8,}|\b[0-9a-f]{40}\b", "TOKEN", text)

    return clean


def version_of(package: str) -> str:
    """The version that is installed; empty where none is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def fault_of_import(module: str) -> str:
    """Why a module cannot be imported; empty where it can. In a process of its own, which may print, hang or crash."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], timeout=IMPORT_S, check=False, text=True,
                              capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        return described(error)
    if done.returncode < 0:
        return f"its import crashes: signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or ["it says nothing"])[-1] if done.returncode else ""


def _torch() -> Any:
    import torch

    return torch


def machine() -> Iterator[Finding]:
    """The machine without its devices."""
    yield Finding("machine", "wantrain", f"{__version__}{' of a checkout' if metrics.commit() else ''}")
    yield Finding("machine", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("machine", "cores", str(jobs.cores()))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding("machine", "memory", f"{num_bytes / 2**30:.0f} GiB")
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))), "")
    yield Finding("machine", "C compiler", compiler or "none", *() if compiler else (
        "torch.compile, Triton and DeepSpeed's own kernels are built when they are first used",
        "apt-get install gcc    or your system's like"))
    yield Finding("machine", "git", "there" if shutil.which("git") else "none (wantrain needs none)")
    left = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ and "MASTER_ADDR" not in os.environ]
    if left:
        yield Finding("machine", "environment", f"{' and '.join(left)} set without MASTER_ADDR", "left over from a "
                      "launcher: a training would look for other processes", f"unset {' '.join(left)}")


def gpu() -> Iterator[Finding]:
    """The devices, and what they can compute."""
    if why := fault_of_import("torch"):
        yield Finding("GPU", "torch", why, "nothing can be trained", "pip install --force-reinstall torch")
        return
    torch = _torch()
    driver = _driver()
    yield Finding("GPU", "driver", driver or "none")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        mend = "lspci | grep -i nvidia    says whether there is a card; then install its driver" if not driver else \
            "nvidia-smi    says whether the driver sees the card" if built else \
            "pip install --force-reinstall torch    for the wheel with CUDA"
        yield Finding("GPU", "devices", f"none; torch {torch.__version__} is built "
                      f"{f'for CUDA {built}' if built else 'without CUDA'}",
                      "only the tiny base trains in reasonable time on a CPU", mend)
        return
    for number in range(torch.cuda.device_count()):
        own = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        yield Finding("GPU", f"device {number}", f"{own.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} of it free, "
                      f"compute capability {own.major}.{own.minor}")
    major, minor = torch.cuda.get_device_capability()
    yield Finding("GPU", "CUDA", str(torch.version.cuda))
    yield Finding("GPU", "bf16", "yes" if major >= 8 else "emulated", *() if major >= 8 else (
        "bfloat16 is slow before compute capability 8.0 (Ampere)", "model.dtype=float32    where the memory allows it"))
    yield Finding("GPU", "fp8 products", "yes" if (major, minor) >= (8, 9) else
                  "no (memory.base=fp8 stores in fp8 all the same, and computes in model.dtype)")


def _driver() -> str:
    """The version of NVIDIA's driver; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], timeout=20,
                              capture_output=True, text=True, check=True)
        return done.stdout.partition("\n")[0].strip()
    return ""


def attention() -> Iterator[Finding]:
    """The kernels of attention: each computes a small product, forward and backward."""
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for backend, word in ATTENTION.items():
        with Caught() as caught:
            _attend(torch, device, getattr(torch.nn.attention.SDPBackend, backend))
        yield Finding("attention", word, f"runs on this {device}" if caught.fault is None else
                      f"does not run on this {device}")
    for package in KERNEL_PACKAGES:
        if version_of(package.replace("_", "-")):
            yield Finding("attention", package, fault_of_import(package) or "imports")
    yield Finding("attention", "triton", "not installed" if not version_of("triton") else
                  fault_of_import("triton") or f"{version_of('triton')}, imports")


def _attend(torch: Any, device: str, backend: Any) -> None:
    own = [torch.ones(1, 2, 8, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with torch.nn.attention.sdpa_kernel([backend]):
        torch.nn.functional.scaled_dot_product_attention(*own).sum().backward()


def video() -> Iterator[Finding]:
    """What reads and writes films."""
    for package, does in (("av", "no film can be read or written"), ("decord", "films cannot be decoded")):
        why = fault_of_import(package)
        yield Finding("video", package, why or f"{version_of(package)}, imports", *(
            (does, f"pip install --force-reinstall {package}") if why else ()))


def packages() -> Iterator[Finding]:
    """Versions, without importing anything."""
    for package in PACKAGES:
        version, needed_for = version_of(package), OPTIONAL.get(package, "")
        absent = f"not installed{f': {needed_for} needs it' if needed_for else ''}"
        yield Finding("packages", package, version or absent, *() if version or needed_for else (
            "wantrain needs it", f"pip install {package}"))


def engines() -> Iterator[Finding]:
    """DeepSpeed, which is found at import or not at all."""
    if version_of("deepspeed"):
        why = fault_of_import("deepspeed")
        yield Finding("engines", "DeepSpeed", why or "imports", *(
            ("ZeRO does not start", "pip install --force-reinstall deepspeed") if why else ()))


def disk() -> Iterator[Finding]:
    """Room and rights where the cache and the runs lie by default, seen from this folder."""
    for name, key in (("cache", "data.cache_dir"), ("runs", "run.dir")):
        place = next(path for path in (Path(name).absolute(), *Path(name).absolute().parents) if path.exists())
        mend = f"{key}=/a/folder/with/room"
        try:
            free_gib = free_bytes(place) / 2**30
        except OSError as error:
            yield Finding("disk", f"{name}/", f"not known: {error.strerror}", "nothing may be written there", mend)
            continue
        writable = os.access(place, os.W_OK)
        limits = "it cannot be written" if not writable else \
            "caches and checkpoints of a real base need more" if free_gib < LEAST_FREE_GIB else ""
        yield Finding("disk", f"{name}/", f"{free_gib:.1f} GiB free{'' if writable else ', read-only'}", limits,
                      mend if limits else "")


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the folder's disk."""
    return shutil.disk_usage(folder).free


def hubs() -> Iterator[Finding]:
    """Where models are downloaded to, and whether somebody is logged in."""
    state = downloads.state()
    above = next(path for path in (state.cache, *state.cache.parents) if path.exists())
    by = next((name for name in ("HF_HUB_CACHE", "HF_HOME") if os.environ.get(name)), "")
    writable = os.access(above, os.W_OK)
    yield Finding("hubs", "hub cache", f"{f'the folder of {by}' if by else state.cache}, "
                  f"{free_bytes(above) / 2**30:.1f} GiB free{'' if writable else ', read-only'}", *() if writable else (
                      "models cannot be downloaded", "export HF_HUB_CACHE=/a/folder/with/room"))
    yield Finding("hubs", "Hugging Face", "a token is there" if state.has_token else
                  "no token (open models need none; hf auth login)")
    if state.is_offline:
        yield Finding("hubs", "HF_HUB_OFFLINE", "set", "nothing is downloaded", "unset HF_HUB_OFFLINE")
    for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        if os.environ.get(name):
            yield Finding("hubs", name, "set")


def trackers() -> Iterator[Finding]:
    """How wandb would run."""
    yield Finding("trackers", "wandb", f"{'installed' if version_of('wandb') else 'not installed'}, "
                  f"{metrics.wandb_mode()}")


PARTS = (machine, gpu, attention, video, engines, disk, hubs, trackers, packages)
