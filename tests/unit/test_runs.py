"""A run folder has one training; nothing outside a training ends it; what a run leaves is read whatever a crash did."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from tests.conftest import arguments_for
from tests.runs import state
from wantrain import cli, files, lock, logs, metrics, outside
from wantrain.engine import checkpoint, mirror, saved
from wantrain.engine.checkpoint import Writer
from wantrain.engine.saved import CheckpointStore, Progress, Record
from wantrain.metrics import Metrics, Trackers
from wantrain.stages import train
from wantrain.terms import Stalled, UserError

TENSORS = {"a|value": torch.zeros(2)}


# The lock


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.2)


def test_a_second_training_in_a_folder_is_told_who_holds_it(holding, impatient, tmp_path):
    pid = holding(tmp_path / "run" / "high")
    with pytest.raises(Stalled) as told, lock.held(tmp_path / "run" / "high", []):
        pass
    assert f"process {pid} on {os.uname().nodename}, since 2" in told.value.message
    assert f"kill -INT {pid}" in told.value.next_step
    with lock.held(tmp_path / "run" / "low", []):  # the other expert, side by side
        pass


def test_a_killed_process_holds_nothing(holding, tmp_path):
    pid = holding(tmp_path)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with lock.held(tmp_path, []):
        assert 0.2 < time.monotonic() - began < 3
        assert json.loads((tmp_path / lock.NAME).read_text() or "{}").get("pid") in (None, os.getpid())


def test_the_lock_is_one_that_nfs_carries_and_no_child_inherits(impatient, tmp_path):
    """A POSIX record lock: another's fcntl sees it, and a child that outlives its parent does not keep it."""
    with lock.held(tmp_path, []):
        pid = os.fork()
        if not pid:  # a child, while its parent still holds
            code = 0
            with (tmp_path / lock.NAME).open("r+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    code = 7
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_file_system_without_locks_is_told(monkeypatch, tmp_path, capsys):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with lock.held(tmp_path, []):
        assert "this file system has no locks" in capsys.readouterr().err


def test_train_refuses_a_folder_in_use_and_leaves_it_alone(wantrain, holding, impatient, tmp_path, capsys):
    holding(tmp_path / "run")
    assert wantrain("train") == 75
    told = capsys.readouterr().err
    assert f"run folder {tmp_path / 'run'} is in use" in told
    assert "run.name=ANOTHER" in told
    assert {path.name for path in (tmp_path / "run").iterdir()} == {lock.NAME, "logs"}


# Trackers and mirrors


class Odd(BaseException):
    """What no one catches by the name of its class."""


@pytest.mark.parametrize("fault", [RuntimeError("gone"), Odd("gone"), SystemExit(3), UserError("gone", "")])
def test_whatever_foreign_code_raises_is_told_once_and_what_follows_is_called(fault):
    def raises() -> None:
        raise fault

    calls, foreign = [], outside.Outside("tracker x", "nothing")
    for function in (raises, raises, lambda: calls.append(1)):
        foreign.call(function)
    assert foreign.wait(5)
    told = foreign.news()
    assert told.count("tracker x: ") == 1
    assert ("gone" in told) is not isinstance(fault, SystemExit)
    assert (calls, foreign.news(), foreign.fault) == ([1], "", "")


def test_ctrl_c_is_never_swallowed():
    with pytest.raises(KeyboardInterrupt), outside.Caught():
        raise KeyboardInterrupt


def test_a_call_that_hangs_holds_nobody_up_and_fills_no_memory(monkeypatch):
    monkeypatch.setattr(outside, "MOST_WAITING", 3)
    release, foreign = threading.Event(), outside.Outside("tracker x", "nothing")
    for _ in range(9):
        foreign.call(release.wait)
    assert not foreign.wait(0.05)
    assert foreign.news().count("does not answer") == 1
    release.set()
    assert foreign.wait(5)


def trackers(names: list[str], folder: Path, **settings: object) -> Trackers:
    found = Trackers()
    found.open(names, folder, "p", run_name="n", run_id="i", first_step=1, settings=settings)
    return found


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_does_not_import_costs_a_message(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    found = trackers([name], tmp_path)
    found.log({"loss": 1.0}, 1)
    told = found.close(20)
    assert told.count(f"tracker {name}: ModuleNotFoundError") == 1
    assert "metrics.jsonl" in told


def test_no_tracker_is_no_thread(tmp_path):
    before, none = threading.active_count(), trackers([], tmp_path)
    none.log({"loss": 1.0}, 1)
    assert (none.close(0), threading.active_count()) == ("", before)


def test_wandb_goes_on_offline_where_its_server_cannot_be_had(monkeypatch, tmp_path):
    """wandb's own init is replaced; the slow test asks the real one."""
    given, logged = [], []

    def init(**how: object) -> SimpleNamespace:
        given.append(how)
        if how["mode"] != "offline":
            raise Odd("no network")
        return SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None,
                               summary=summary)

    summary: dict[str, str] = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **limits: limits,
                                                              Video=lambda path, format: (path, format),
                                                              teardown=lambda: given.append({"mode": "ended"})))
    monkeypatch.setenv("WANDB_MODE", "online")
    found = trackers(["wandb"], tmp_path / "a run", rank=4)
    found.log({"loss": 1.0}, 7)
    found.show({"samples/000": tmp_path / "a.mp4"}, 7)
    found.tell("verdict", "Usable: steps 5 to 7.", 7)
    told = found.close(5)
    assert "Odd: no network; it goes on offline" in told
    assert f"wandb sync '{tmp_path}/a run/wandb'/offline-run-*" in told
    assert [how["mode"] for how in given] == ["online", "ended", "offline"]
    assert all(how["settings"]["init_timeout"] <= 30 and how["id"] == "i" for how in given[::2])
    assert logged == [({"train/loss": 1.0}, 7), ({"samples/000": (f"{tmp_path}/a.mp4", "mp4")}, 7)]
    assert summary == {"verdict": "Usable: steps 5 to 7."}


def test_trackers_sort_numbers_by_kind_and_losses_by_sigma():
    names = ["validation_sigma_0.7500", "loss", "validation_sigma_0.2500", "validation_minus_base_ci95",
             "validation_sigma_0.7500_minus_base", "step_s", "validation_drift_sigma_0.7500"]
    assert sorted(map(metrics.tracked, names)) == [
        "train/loss", "train/step_s", "validation/minus_base_ci95", "validation_by_sigma/0.2500",
        "validation_by_sigma/0.7500", "validation_by_sigma_minus_base/0.7500", "validation_drift_by_sigma/0.7500"]


def test_a_login_that_cannot_be_read_is_none(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").mkdir()
    assert metrics.wandb_mode() == "offline"
    (tmp_path / ".netrc").rmdir()
    (tmp_path / ".netrc").write_bytes(b"\xff machine api.wandb.ai login u password p")
    assert metrics.wandb_mode() == "online"


@pytest.mark.parametrize("fault", [Odd("bucket"), RuntimeError("bucket"), OSError("bucket")])
def test_a_mirror_that_raises_anything_costs_a_message_and_is_caught_up(monkeypatch, tmp_path, fault):
    def refuse(*_: object, **__: object) -> None:
        raise fault

    writer = Writer(CheckpointStore(tmp_path / "run", str(tmp_path / "mirror"), keep=3))
    with monkeypatch.context() as broken:
        broken.setattr("fsspec.implementations.local.LocalFileSystem.put_file", refuse)
        for step in (1, 2):
            writer.write(Progress(step), TENSORS, Record({}))
        assert "bucket" in writer.close()
        told = writer.news()
        assert told.count("train.mirror") == 1
        assert writer.news() == ""
    writer.write(Progress(3), TENSORS, Record({}))
    assert writer.close() == ""
    assert sorted(p.name for p in (tmp_path / "mirror").iterdir()) == [f"step_00000{i}" for i in (1, 2, 3)]


def test_a_mirror_that_hangs_holds_a_training_up_once(monkeypatch, tmp_path):
    release = threading.Event()
    monkeypatch.setattr(mirror, "put", lambda *_: release.wait())
    store, began = CheckpointStore(tmp_path / "run", str(tmp_path / "mirror")), time.monotonic()
    writer = Writer(store, patience_s=0.2)
    for step in range(1, 6):
        writer.write(Progress(step), TENSORS, Record({}))
    assert writer.close() == "it hangs"
    assert time.monotonic() - began < 2
    assert "took no checkpoint within 0.2 s" in writer.news()
    assert saved.steps_on_disk(tmp_path / "run")[-1].name == "step_000005"
    release.set()


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def make(fault: BaseException) -> None:
        def names(self: object, *_: object, **__: object) -> None:
            raise fault

        monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.exists", names)

    return make


def test_a_mirror_that_cannot_be_read_is_told_where_the_folder_has_a_checkpoint(tmp_path, unreadable):
    place = CheckpointStore(tmp_path / "run", str(tmp_path / "mirror"))
    checkpoint.save(place, Progress(4), TENSORS, Record({}))
    unreadable(Odd("network down"))
    found = checkpoint.newest_whole(place, {})
    assert found is not None
    assert (found.progress.step, "network down" in found.passed[0]) == (4, True)


@pytest.mark.parametrize(("fault", "passes"), [(Odd("down"), True), (PermissionError("denied"), False)])
def test_an_unreadable_mirror_and_an_empty_folder_begin_nothing_anew(tmp_path, unreadable, fault, passes):
    unreadable(fault)
    with pytest.raises(UserError, match=r"train\.mirror") as told:
        checkpoint.newest_whole(CheckpointStore(tmp_path / "run", str(tmp_path / "mirror")), {})
    assert isinstance(told.value, Stalled) is passes  # another start may go through


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., threading.Event]]:
    """A local file system of which one method does its work; the call `number` hangs then until its event is set."""
    release = threading.Event()

    def make(method: str, number: int = 1) -> threading.Event:
        whole, calls = getattr(LocalFileSystem, method), itertools.count(1)

        def hang(*arguments: object, **options: object) -> object:
            result = whole(*arguments, **options)
            if next(calls) >= number:
                release.wait(30)
            return result

        monkeypatch.setattr(LocalFileSystem, method, hang)
        monkeypatch.setattr(mirror, "ANSWER_S", 0.1)
        return release

    yield make
    release.set()


@pytest.mark.parametrize("method", ["exists", "ls"])
def test_a_mirror_that_hangs_while_it_is_read_is_told_once_the_time_is_up(tmp_path, hanging, method):
    place = CheckpointStore(tmp_path / "run", f"file://{tmp_path}")
    hanging(method)
    with pytest.raises(Stalled, match=r"train\.mirror = .*: Silent: no answer within 0\.1 s") as told:
        checkpoint.newest_whole(place, {})
    assert "train.mirror=null" in told.value.next_step
    checkpoint.save(place, Progress(4), TENSORS, Record({}))
    found = checkpoint.newest_whole(place, {})
    assert found is not None
    assert (found.progress.step, "no answer" in found.passed[0]) == (4, True)


def test_a_mirror_that_hangs_while_it_is_probed_is_told_and_the_training_goes_on(tmp_path, hanging):
    hanging("pipe_file")
    told, = saved.refuse_unwritable(CheckpointStore(tmp_path / "run", f"file://{tmp_path / 'mirror'}"))
    assert "no answer within 0.1 s" in told


def test_a_checkpoint_that_comes_after_it_was_given_up_changes_nothing(tmp_path, hanging):
    place = CheckpointStore(tmp_path / "run", f"file://{tmp_path / 'mirror'}")
    checkpoint.save(CheckpointStore(tmp_path / "mirror"), Progress(4), TENSORS, Record({}))
    (place.folder / "step_000004").mkdir(parents=True)
    running = set(threading.enumerate())
    release = hanging("get_file", number=3)
    with pytest.raises(UserError, match="no answer within"):
        checkpoint.newest_whole(place, {})
    left = set(threading.enumerate()) - running
    release.set()
    for thread in left:
        thread.join()
    assert left
    assert [path.name for path in place.folder.iterdir()] == ["step_000004"]


def test_a_mirror_that_hangs_is_asked_once_until_it_answers(tmp_path, hanging, monkeypatch):
    place = CheckpointStore(tmp_path / "run", f"file://{tmp_path / 'mirror'}")
    for step in (4, 5, 6):
        checkpoint.save(CheckpointStore(tmp_path / "mirror", keep=3), Progress(step), TENSORS, Record({}))
    asked, before = [], set(threading.enumerate())
    release = hanging("get_file")
    hang = LocalFileSystem.get_file
    monkeypatch.setattr(LocalFileSystem, "get_file", lambda *a, **k: (asked.append(a), hang(*a, **k)))
    with pytest.raises(UserError, match="no answer within"):
        checkpoint.newest_whole(place, {})
    assert len(asked) == 1
    release.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    found = checkpoint.newest_whole(place, {})
    assert found is not None
    assert found.progress.step == 6


def test_a_mirror_that_is_slow_and_not_silent_is_waited_for(tmp_path, monkeypatch):
    place = CheckpointStore(tmp_path / "run", f"file://{tmp_path / 'mirror'}")
    checkpoint.save(CheckpointStore(tmp_path / "mirror"), Progress(4), TENSORS, Record({}))

    def slowly(self: object, there: str, here: str) -> None:
        with Path(here).open("wb") as file:
            for byte in Path(there).read_bytes():
                file.write(bytes([byte]))
                file.flush()
                time.sleep(0.001)

    monkeypatch.setattr(LocalFileSystem, "get_file", slowly)
    monkeypatch.setattr(mirror, "ANSWER_S", 0.1)
    began, found = time.monotonic(), checkpoint.newest_whole(place, {})
    assert found is not None
    assert found.progress.step == 4
    assert time.monotonic() - began > 0.3


def test_what_the_mirror_has_beyond_the_folder_stays(tmp_path):
    place = CheckpointStore(tmp_path / "run", str(tmp_path / "mirror"), keep=2)
    ahead = Writer(place)
    ahead.write(Progress(9), TENSORS, Record({}))
    ahead.close()
    shutil.rmtree(place.folder)
    writer = Writer(place)
    for step in (1, 2, 3):
        writer.write(Progress(step), TENSORS, Record({}))
    assert writer.close() == ""
    assert sorted(p.name for p in (tmp_path / "mirror").iterdir()) == ["step_000002", "step_000003", "step_000009"]


# Temporary names


def test_temporary_names_differ_over_machines_whose_processes_have_one_id(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / ("é" * 120 + ".safetensors")
    assert len({files.temporary_for(path) for _ in range(100)}) == 100
    assert len(os.fsencode(files.temporary_for(path).name)) <= files.NAME_MAX
    files.write_text(path, "x")  # a name that is just short enough itself
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_two_pods_of_one_process_id_write_one_file_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "x"
    with files.atomic_path(path) as first:
        first.write_text("first")
        with files.atomic_path(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_goes_with_the_next_save_and_start(tmp_path):
    (tmp_path / "checkpoints" / ".step_000004.0123456789ab.tmp").mkdir(parents=True)
    checkpoint.save(CheckpointStore(tmp_path / "checkpoints"), Progress(5), TENSORS, Record({}))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]
    old, new = tmp_path / ".config.yaml.0123456789ab.tmp", tmp_path / ".run.json.0123456789ab.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    with train.held([SimpleNamespace(run_dir=tmp_path)], []):
        assert not old.exists()
        assert new.exists()


# Folders that cannot be written


@pytest.mark.parametrize(("run_dir", "advice"), [
    ("file", "this is a file"), ("file/inside", "this is a file"),
    ("x" * 300, "shorter"),
])
def test_a_run_folder_that_cannot_be_is_told_by_its_path(wantrain, tmp_path, capsys, run_dir, advice):
    (tmp_path / "file").write_text("")
    assert wantrain("train", f"run.dir={tmp_path / run_dir}") == 2
    told = capsys.readouterr().err
    assert "run.dir = " in told
    assert str(tmp_path / run_dir) in told
    assert advice in told


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ESTALE, errno.EIO])
def test_every_fault_of_a_write_is_a_message_with_the_path(monkeypatch, tmp_path, code):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for act in (lambda: files.write_text(tmp_path / "a" / "b", ""),
                lambda: saved.refuse_unwritable(CheckpointStore(tmp_path)),
                lambda: lock.held(tmp_path, []).__enter__(), lambda: logs.kept(tmp_path, 0, []).__enter__()):
        with pytest.raises(UserError, match=f"could not write {tmp_path}.*{os.strerror(code)}"):
            act()


def test_checkpoints_that_cannot_be_written_are_told_before_the_base_is_loaded(wantrain, monkeypatch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    monkeypatch.setattr(train, "prepare", lambda *_: pytest.fail("the base is loaded"))
    assert wantrain("train") == 2
    assert f"could not write {tmp_path / 'run' / 'checkpoints'}" in capsys.readouterr().err


# What is done already


def done(place: CheckpointStore, step: int) -> None:
    checkpoint.save(place, Progress(step), TENSORS, Record({}))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any checkpoint's fingerprint fits, and nothing heavy may be loaded."""
    monkeypatch.setattr(train, "run_fingerprint", lambda recipe, clips, form: {})
    monkeypatch.setattr(train, "prepare", lambda *_: pytest.fail("the base is loaded"))


def test_fewer_steps_than_done_are_refused_and_as_many_are_told(wantrain, light, tmp_path, capsys):
    done(CheckpointStore(tmp_path / "run" / "checkpoints"), 9)
    assert wantrain("train", "train.num_steps=8") == 2
    told = capsys.readouterr().err
    assert "train.num_steps = 8" in told
    assert "step_000009 has done 9 already" in told
    assert "train.num_steps=9 or more" in told
    assert wantrain("train", "train.num_steps=9") == 0
    told = capsys.readouterr().out
    assert "all 9 steps are done already" in told
    assert "next: wantrain export" in told


def test_what_is_done_is_copied_to_a_mirror_that_lacks_it(wantrain, light, tmp_path, capsys):
    done(CheckpointStore(tmp_path / "run" / "checkpoints"), 9)
    (tmp_path / "mirror").write_text("in the way")
    own = ("train.num_steps=9", f"train.mirror={tmp_path / 'mirror'}")
    assert wantrain("train", *own) == 0
    assert f"WARNING: {tmp_path / 'mirror'}/ lacks the last checkpoint" in capsys.readouterr().err
    (tmp_path / "mirror").unlink()
    assert wantrain("train", *own) == 0
    assert [p.name for p in (tmp_path / "mirror").iterdir()] == ["step_000009"]


@pytest.mark.parametrize("where", ["run/checkpoints", "mirror"])
def test_resume_never_refuses_a_folder_and_a_mirror_alike(wantrain, light, tmp_path, capsys, where):
    done(CheckpointStore(tmp_path / where), 2)
    assert wantrain("train", "train.resume=never", f"train.mirror={tmp_path / 'mirror'}") == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / where}" in told
    assert "step_000002 and train.resume=never" in told


# Numbers


def test_nulls_repeats_and_what_a_crash_left_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 9.0}\n'
                     b'\0\0\0\xff\n[1]\n{"loss": 2.0}\n{"step": 3, "loss": 3.0, "validation_loss": null}\n'
                     b'{"step": 4, "lo')
    found = metrics.read(path)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert math.isnan(found[1]["loss"])
    assert found[2]["loss"] == 3.0
    with Metrics(path, lambda *_: None, 2, 9, main=True) as board:
        board.write(3, {"loss": math.inf})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": None}]


# The commit


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *arguments],
                          capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository; the package seems to lie in it."""
    folder = tmp_path / "checkout"
    (folder / "wantrain").mkdir(parents=True)
    (folder / "wantrain" / "__init__.py").write_text("")
    (folder / "other").write_text("")
    git(folder, "init", "-q")
    monkeypatch.setattr(metrics, "__file__", str(folder / "wantrain" / "metrics.py"))
    return folder


def test_the_commit_is_the_checkouts_however_git_keeps_it(checkout, tmp_path, monkeypatch):
    git(checkout, "add", ".")
    assert metrics.commit() is None  # no commit yet
    git(checkout, "commit", "-qm", "x")
    expected = git(checkout, "rev-parse", "HEAD")
    assert metrics.commit() == expected
    git(checkout, "pack-refs", "--all")
    assert metrics.commit() == expected
    git(checkout, "worktree", "add", "-q", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "y")
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "tree" / "wantrain" / "metrics.py"))
    assert metrics.commit() == git(tmp_path / "tree", "rev-parse", "HEAD") != expected
    git(tmp_path / "tree", "checkout", "-q", "--detach", expected)
    assert metrics.commit() == expected


def test_there_is_no_commit_in_somebody_elses_repository_nor_in_none(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")  # nor is git asked
    assert metrics.commit() is None
    monkeypatch.undo()
    git(checkout, "add", "other")
    git(checkout, "commit", "-qm", "x")
    monkeypatch.setattr(metrics, "__file__", str(checkout / "wantrain" / "metrics.py"))
    assert metrics.commit() is None  # a commit, which does not track the package
    monkeypatch.setattr(metrics, "__file__", str(checkout / "lib" / "wantrain" / "metrics.py"))
    assert metrics.commit() is None  # installed below somebody's repository
    shutil.rmtree(checkout / ".git")
    (checkout / ".git").write_text("gitdir: nowhere")
    monkeypatch.setattr(metrics, "__file__", str(checkout / "wantrain" / "metrics.py"))
    assert metrics.commit() is None


# The real ones


@pytest.mark.slow
def test_wandb_without_network_and_a_broken_tensorboard_cost_no_training(wantrain, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(metrics, "WANDB_INIT_S", 3.0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert wantrain("train", "tracker=wandb", "train.num_steps=2") == 0
    told = "".join(capfd.readouterr())
    assert "tracker tensorboard: ModuleNotFoundError" in told
    assert "it goes on offline" in told
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1, told
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, clips, cache_dir):
    """The folder of a training with both trackers, one of them named twice, with validation and samples."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    own = [*arguments_for(clips, cache_dir, run), "tracker=tensorboard", "validation.every_steps=2",
           "tracker.names=[tensorboard,wandb,tensorboard]", "validation.sigmas=[0.5]", "validation.unrelated=[]",
           "sampler.every_steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for verb in ("cache", "train"):
            assert cli.main([verb, *own]) == 0
    return run


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_lines_samples_curves_by_sigma_and_the_verdict(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "trackers" / "wantrain"))
    events.Reload()
    lines = metrics.read(tracked / "metrics.jsonl")
    for name in ("loss", "grad_norm", "lr"):
        assert [(event.step, event.value) for event in events.Scalars(f"train/{name}")] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    judged = json.loads((tracked / "judgement.json").read_text())
    assert [(event.step, event.value) for event in events.Scalars("validation_by_sigma/0.5000")] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in zip([2, 4], judged["by_sigma"]["0.5000"]["loss"],
                                                                    strict=True)]
    for name, column in (("samples", "step_000004"), ("samples_base", "base")):
        [shown] = events.Images(f"{name}/000")
        picture = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))).astype(int)
        with av.open(str(tracked / "live" / f"{column}_000.mp4")) as container:
            third = list(container.decode(video=0))[2].to_ndarray(format="rgb24").astype(int)
        assert shown.step == 4
        assert abs(picture - third).mean() < 2, "the third of five frames"
    told = events.Tensors("verdict/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert told == "\n\n".join(judged["verdict"]["sentences"])


def wandb_records(data):
    """The records of a .wandb file: behind 7 bytes a log of LevelDB, whose blocks of 32 KiB hold parts of records, each
    behind (checksum, length, kind); kinds 1 and 4 end a record.
    """
    from wandb.proto.wandb_internal_pb2 import Record as Logged

    place, found = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        found += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Logged.FromString(found)
            found = b""


@pytest.mark.slow
def test_wandb_has_the_videos_curves_by_sigma_and_the_verdict(tracked):
    [file], history, summary = (tracked / "wandb").glob("offline-run-*/*.wandb"), {}, {}
    for record in wandb_records(file.read_bytes()):
        for kept, items in ((history, record.history.item), (summary, record.summary.update)):
            kept.update({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    judged = json.loads((tracked / "judgement.json").read_text())
    assert history["validation_by_sigma/0.5000"] == judged["by_sigma"]["0.5000"]["loss"][-1]
    assert summary["verdict"] == "\n\n".join(judged["verdict"]["sentences"])
    video = file.parent / "files" / history["samples/000/path"]
    assert video.read_bytes() == (tracked / "live" / "step_000004_000.mp4").read_bytes()


@pytest.mark.slow
def test_two_trainings_at_once_in_one_folder_end_in_one(arguments, cached, tmp_path):
    command = [sys.executable, "-m", "wantrain", "train", *arguments, "train.num_steps=240"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)]
    said = {process.communicate(timeout=120)[0]: process.returncode for process in both}
    assert sorted(said.values()) == [0, 75]
    assert "is in use" in next(text for text, code in said.items() if code == 75)
    assert state(tmp_path / "run")[0] == 240
