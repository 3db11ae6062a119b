"""Shared fixtures: small clips as a user has them, a cached recipe on the embedded base, `--require-gpu`."""

from __future__ import annotations

import copy
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from wantrain import cli, pictures
from wantrain.config import composing

SIZE = (32, 48)
NUM_FRAMES = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a skipped gpu test is a failure")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords hold the names of its folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes the shipped files once for each choice of them: that is three quarters of loading a config.

    What is typed as key=value comes in after it, and folders of a user's own are composed each time.
    """
    compose, kept = composing._composed, dict[Any, Any]()

    def composed(groups: Mapping[str, str], own: Sequence[Any]) -> Any:
        if own:
            return compose(groups, own)
        key = tuple(groups.items())
        if key not in kept:
            kept[key] = compose(groups, own)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composing, "_composed", composed)
        yield


def moving_square(seed: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    """frames_FCHW uint8: a bright square that drifts over a coloured ground."""
    generator = torch.Generator().manual_seed(seed)
    ground, colour = torch.randint(0, 256, (2, 3, 1, 1), generator=generator, dtype=torch.uint8)
    frames = ground.expand(num_frames, 3, height, width).clone()
    side = height // 3
    for f in range(num_frames):
        left = (4 * f + seed) % (width - side)
        frames[f, :, side : 2 * side, left : left + side] = colour
    return frames


def write_clips(folder: Path, number: int, caption: str, first_seed: int = 0) -> Path:
    """A folder of `number` mp4 files at 16 fps with sidecar captions."""
    for i in range(number):
        pictures.write_mp4(folder / f"clip_{i}.mp4", moving_square(first_seed + i, 9, 2 * SIZE[0], 2 * SIZE[1]), 16)
        (folder / f"clip_{i}.txt").write_text(caption.format(i))
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A shard of (name, bytes), in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_style(folder: Path) -> Path:
    """style/ (6 clips with a trigger), plain/ (2) and heldout/ (2)."""
    write_clips(folder / "style", 6, "sqstyle, square number {}")
    write_clips(folder / "plain", 2, "square number {}", 50)
    write_clips(folder / "heldout", 2, "sqstyle, unseen square {}", 100)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_style(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


Wantrain = Callable[..., int]


def opened(arguments, refuse=True):
    """(the recipe of these overrides, its clips)."""
    from wantrain.config import load
    from wantrain.recipe.clips import open_clips
    from wantrain.recipe.recipe import open_recipe

    recipe = open_recipe(load(arguments))
    return recipe, open_clips(recipe, arguments, refuse=refuse)


def arguments_for(clips: Path, cache_dir: Path, run_dir: Path) -> list[str]:
    """Overrides that turn the anime demo into a run of seconds: 5 frames of 32x48 px, 8 clips, batch 4."""
    return [
        "recipe=demo_anime", "tracker=none", f"run.dir={run_dir}", f"data.cache_dir={cache_dir}",
        f"data.sources.style.path={clips / 'style'}", f"data.sources.regularisation.path={clips / 'plain'}",
        f"data.heldout={clips / 'heldout'}", "data.trigger=sqstyle", f"data.num_frames=[{NUM_FRAMES}]",
        f"data.resolutions=[[{SIZE[0]},{SIZE[1]}]]", "data.batch_size=4", "train.micro_batch_size=4",
        "train.num_steps=4", "train.save_every=100", "validation.every_steps=0", "lora.rank=4", "lora.alpha=4",
        "optim.warmup_steps=0", "sampler.every_steps=0", "sampler.num_steps=2",
        "sigma.distribution=uniform", "sigma.shift=null", "sampler.prompts=[a square]", "evaluate.prompts=[a square]",
        "evaluate.combined=[]", "evaluate.unrelated=[]",
    ]


@pytest.fixture
def arguments(clips: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    return arguments_for(clips, cache_dir, tmp_path / "run")


@pytest.fixture(scope="session")
def cached(clips: Path, cache_dir: Path) -> None:
    """The session's cache is built."""
    assert cli.main(["cache", *arguments_for(clips, cache_dir, cache_dir / "run")]) == 0


@pytest.fixture
def wantrain(arguments: list[str], cached: None) -> Wantrain:
    """Run a verb of the small recipe in this process: wantrain("train", "train.seed=1") -> exit code."""

    def call(verb: str, *more: str, base: Sequence[str] | None = None) -> int:
        return cli.main([verb, *(arguments if base is None else base), *more])

    return call


@pytest.fixture
def trained(wantrain, tmp_path):
    """trained("name", overrides...) -> run folder after `wantrain train`."""

    def call(name, *more):
        assert wantrain("train", f"run.dir={tmp_path / name}", *more) == 0
        return tmp_path / name

    return call
