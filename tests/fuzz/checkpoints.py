"""Mutated checkpoints, resumed and exported: nothing but a UserError leaves the reader.

Their checksums are written anew, as by a tool that edits them: damage that a checksum notices is
tests/unit/test_checkpoint_damage.py.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from wantrain import cli, config
from wantrain.engine import checkpoint, saved
from wantrain.engine.saved import CHECKSUMS, STATE, TENSORS, CheckpointStore, Progress, Record
from wantrain.terms import UserError

VALUES: tuple[Any, ...] = (None, True, -1, 0, 1e308, 10**30, "", "x", "\ud800", [], {}, [[1]], {"a": {"b": 1}}, "nan")


@cache
def _arguments() -> tuple[str, ...]:
    return ("recipe=demo_anime", "lora.rank=4", "lora.alpha=4")


@cache
def _record() -> Record:
    own = config.resume_keys(config.load(_arguments()))
    return Record(own, "lora", {"blocks.0.attn1.to_q": 1.0, "blocks.1.ffn.net.2": 1.0}, {"wantrain.trigger": "x"})


def _tensors() -> dict[str, torch.Tensor]:
    sizes = {"blocks.0.attn1.to_q": (192, 192), "blocks.1.ffn.net.2": (768, 192)}
    return {f"{module}.lora_{half}.default.weight|value": torch.ones(shape)
            for module, (inside, outside) in sizes.items() for half, shape in (("A", (4, inside)), ("B", (outside, 4)))}


def one(random: Random, folder: Path) -> None:
    """Export a run whose newest checkpoint is mutated."""
    place = CheckpointStore(folder / "run" / "checkpoints")
    path = checkpoint.save(place, Progress(3), _tensors(), _record())
    for _ in range(random.randint(1, 3)):
        random.choice((mutate_state, mutate_bytes, mutate_folder))(random, path)
    if path.is_dir() and (path / TENSORS).is_file() and (path / STATE).is_file() \
            and not (path / CHECKSUMS).is_dir() and random.random() < 0.9:
        (path / CHECKSUMS).write_text(saved.checksums(path))
    code = cli.main(["export", *_arguments(), f"run.dir={folder / 'run'}"])
    assert code in (0, 2), code
    with contextlib.suppress(UserError):
        checkpoint.newest_whole(place, _record().fingerprint, config.formerly())


def mutate_state(random: Random, path: Path) -> None:
    """Another value, or none, somewhere in the state."""
    file = path / STATE
    if not file.is_file():
        return
    try:
        state = json.loads(file.read_text())
    except ValueError:
        return
    inside = state
    if isinstance(state, dict) and state:
        for _ in range(random.randint(0, 1)):
            deeper = [value for value in inside.values() if isinstance(value, dict) and value]
            inside = random.choice(deeper) if deeper else inside
        key = random.choice(list(inside))
        if random.random() < 0.3:
            del inside[key]
        else:
            inside[key] = random.choice(VALUES)
    else:
        state = random.choice(VALUES)
    file.write_text(json.dumps(state))


def mutate_bytes(random: Random, path: Path) -> None:
    """Bytes of a file changed, cut or added."""
    file = path / random.choice((TENSORS, TENSORS, STATE, CHECKSUMS))
    if not file.is_file():
        return
    data = bytearray(file.read_bytes())
    way = random.randrange(3)
    if way == 0 and data:
        for _ in range(random.randint(1, 8)):
            data[random.randrange(min(len(data), 1200))] = random.randrange(256)
    elif way == 1:
        del data[random.randrange(len(data) + 1) :]
    else:
        data += bytes(random.randrange(256) for _ in range(8))
    file.write_bytes(data)


def mutate_folder(random: Random, path: Path) -> None:
    """A file gone, or a folder in its place, or another name."""
    file = path / random.choice((TENSORS, STATE, CHECKSUMS))
    if not file.exists():
        return
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink()
    if random.random() < 0.5:
        file.mkdir()
