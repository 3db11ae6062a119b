"""Named numbers: a line on the console, a line of JSON always, and the trackers, which may fail."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from wantrain.files import write_text
from wantrain.jobs import progress
from wantrain.outside import Caught, Outside, described
from wantrain.terms import unwritable

WANDB_INIT_S = 20.0
"""How long wandb may try to reach its server before the run goes on offline."""


class Metrics:
    """Progress bar, `metrics.jsonl` and trackers of one run. Silent on all but the main process."""

    def __init__(self, path: Path, log: Callable[[Mapping[str, float], int], None], start: int, stop: int,
                 main: bool) -> None:
        self._path, self._log, self._main = path, log, main
        self._bar = progress(stop, start, "step", main=main)
        if main:
            write_text(path, "".join(_line(line) for line in _lines(path) if line["step"] <= start))
            try:
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise unwritable(path, error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line of numbers for `step`; their names hold the units."""
        if self._main:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            try:
                self._file.write(_line({"step": step, **finite}))
                self._file.flush()
            except OSError as error:
                raise unwritable(self._path, error) from error
            self._log(values, step)

    def advance(self, shown: Mapping[str, str], *, is_usual: bool = True) -> None:
        """Move the bar on by one step, and show these numbers beside it. The time of a step that is not as others are
        says nothing of those to come.
        """
        if not is_usual:
            self._bar.unpause()
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._main:
            self._bar.write(text)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._bar.close()
        if self._main:
            self._file.close()


def _line(values: Mapping[str, float | None]) -> str:
    return json.dumps(values) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines by rising step; of several of one step the last. What a crash cut off or blotted out is left out."""
    found = {}
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
            found[int(line["step"])] = line
        except (ValueError, TypeError, KeyError):
            continue
    return [found[step] for step in sorted(found)]


def read(path: Path) -> list[dict[str, float]]:
    """All lines of a `metrics.jsonl`, each step once; nan stands for what was not finite."""
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in _lines(path)]


_OF_A_SIGMA = re.compile(r"validation_(drift_)?sigma_([\d.]+)(\w*)")


def tracked(name: str) -> str:
    """What trackers call a number, so that they sort it to its kind, and losses of sigmas by sigma: train/loss,
    validation/gap, validation_by_sigma/0.7500, validation_by_sigma_minus_base/0.7500.
    """
    if found := _OF_A_SIGMA.fullmatch(name):
        return f"validation_{found[1] or ''}by_sigma{found[3]}/{found[2]}"
    kind, _, rest = name.partition("_")
    return f"validation/{rest}" if kind == "validation" else f"train/{name}"


class Tracker(Protocol):
    """Where numbers go beside the JSONL, and sampled videos and texts. Each call may fail, or not come back."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def show(self, videos: Mapping[str, Path], step: int) -> None: ...
    def tell(self, name: str, text: str, step: int) -> None: ...
    def finish(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; those of steps from `first_step` on, which an earlier part of the run wrote, are hidden.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._writer.add_hparams(dict(settings), {})
        self._writer.flush()

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, videos: Mapping[str, Path], step: int) -> None:
        """Their middle frames: TensorBoard plays no mp4."""
        from wantrain import pictures

        for name, path in videos.items():
            self._writer.add_image(name, pictures.middle_frame(path), step)
        self._writer.flush()

    def tell(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, in `folder`/wandb; offline, and told so, where its server cannot be had."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], own: Mapping[str, Any], tell: Callable[[str], None]
                 ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        limits = wandb.Settings(init_timeout=WANDB_INIT_S, login_timeout=WANDB_INIT_S)
        start: Callable[..., Any] = partial(wandb.init, dir=str(folder), config=dict(settings), resume="allow",
                                            settings=limits, **own)
        with Caught() as caught:
            self._run = start(mode=wandb_mode())
        if caught.fault is not None:
            tell(f"tracker wandb: {described(caught.fault)}; it goes on offline\n  next: wandb sync "
                 f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*    sends it later")
            with Caught():
                wandb.teardown()  # its service holds the id of the run that did not begin
            self._run = start(mode="offline")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, videos: Mapping[str, Path], step: int) -> None:
        import wandb

        self._run.log({name: wandb.Video(str(path), format="mp4") for name, path in videos.items()}, step=step)

    def tell(self, name: str, text: str, step: int) -> None:
        self._run.summary[name] = text

    def finish(self) -> None:
        self._run.finish()


class Trackers:
    """The trackers of one training, each in a thread of its own, so that none can hold it up or end it."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Outside, list[Tracker]]] = {}

    def open(self, names: Sequence[str], folder: Path, project: str, *, run_name: str, run_id: str, first_step: int,
             settings: Mapping[str, Any]) -> None:
        """Begin to open the trackers of these names; their files go to `folder`."""
        for name in dict.fromkeys(names):
            outside = Outside(f"tracker {name}", "nothing: the training goes on, and its numbers are in metrics.jsonl")
            makers: dict[str, Callable[[], Tracker]] = {
                "tensorboard": partial(TensorBoard, folder / "trackers" / project, settings, first_step),
                "wandb": partial(Wandb, folder, settings, {"project": project, "name": run_name, "id": run_id},
                                 outside.tell)}
            opened: list[Tracker] = []
            outside.call(partial(_open, makers[name], opened))
            self._open[name] = outside, opened

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand the numbers of a step to all trackers."""
        self._each(lambda tracker: tracker.log({tracked(name): value for name, value in values.items()}, step))

    def show(self, videos: Mapping[str, Path], step: int) -> None:
        """Hand sampled mp4 files to all trackers."""
        self._each(lambda tracker: tracker.show(videos, step))

    def tell(self, name: str, text: str, step: int) -> None:
        """Hand a text to all trackers."""
        self._each(lambda tracker: tracker.tell(name, text, step))

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for outside, opened in self._open.values():
            outside.call(partial(_do, work, opened))

    def news(self) -> str:
        """Problems with the trackers since the last call, each told once."""
        return "\n".join(filter(None, (outside.news() for outside, _ in self._open.values())))

    def close(self, limit_s: float) -> str:
        """Close the trackers, waiting at most `limit_s` seconds for each. Returns problems that were not yet told."""
        for name, (outside, opened) in self._open.items():
            outside.call(partial(_do, lambda tracker: tracker.finish(), opened))
            if not outside.wait(limit_s):
                outside.tell(f"tracker {name} did not end within {limit_s:g} s: its last numbers may be in "
                             "metrics.jsonl alone")
        return self.news()


def _open(make: Callable[[], Tracker], opened: list[Tracker]) -> None:
    opened.append(make())


def _do(work: Callable[[Tracker], None], opened: Sequence[Tracker]) -> None:
    for tracker in opened:
        work(tracker)


def wandb_mode() -> str:
    """`online` only when the user is logged in, else `offline`; WANDB_MODE wins."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    try:
        netrc = Path("~/.netrc").expanduser()
        is_known = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in netrc.read_text(errors="replace")
    except (OSError, RuntimeError):  # no file, or no home
        is_known = False
    return "online" if is_known else "offline"


def commit() -> str | None:
    """The commit of the checkout that this package is a tracked part of; None outside one, or where it cannot be read.

    Read without git, which may be missing, or refuse a checkout of another user's.
    """
    root = Path(__file__).parents[1]
    try:
        return _commit_of(root)
    except (OSError, ValueError):
        return None


def _commit_of(root: Path) -> str | None:
    """The commit of `root`/.git, where its index has wantrain/__init__.py."""
    git = root / ".git"
    if git.is_file():  # of a worktree or submodule: says where
        git = root / git.read_text("utf-8").removeprefix("gitdir:").strip()
    if not _tracks((git / "index").read_bytes(), b"wantrain/__init__.py"):
        return None
    common = git / (git / "commondir").read_text("utf-8").strip() if (git / "commondir").exists() else git
    name = (git / "HEAD").read_text("utf-8").strip()
    for _ in range(5):  # git's own limit of references to references
        if not name.startswith("ref:"):
            break
        name = _resolved(git, common, name.removeprefix("ref:").strip())
    return name if re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", name) else None


def _resolved(git: Path, common: Path, reference: str) -> str:
    """What a reference's file says, or the list of packed ones; empty where neither has it."""
    for folder in (git, common):
        if (folder / reference).is_file():
            return (folder / reference).read_text("utf-8").strip()
    packed = common / "packed-refs"
    lines = packed.read_text("utf-8").splitlines() if packed.exists() else []
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {reference}")), "")


def _tracks(index: bytes, name: bytes) -> bool:
    """Whether a git index, of version 2 or 3, has a file of exactly this name: flags that end in its length, then it.
    """
    found = re.search(rb"[\x00\x80]" + re.escape(bytes([len(name)]) + name) + rb"\x00", index)
    return index.startswith(b"DIRC") and found is not None


