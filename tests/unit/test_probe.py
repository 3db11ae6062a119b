"""What probe says about odd files, held against what their maker knows and what another ffmpeg decodes."""

import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_tools import command, probe, probing
from tests import odd_files
from wantrain import journal
from wantrain.data import decode
from wantrain.jobs import Ending, Failure
from wantrain.terms import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every odd file, one of them in a folder below, and two that are no matter."""
    folder = tmp_path_factory.mktemp("odd")
    odd_files.make(folder, odd_files.FINE | odd_files.FAULTY)
    (folder / "below").mkdir()
    (folder / "still.bmp").rename(folder / "below" / "still.bmp")
    (folder / "README").write_text("hello")
    (folder / "below" / "notes.txt").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """(what the command found by file name, ignored files, where it wrote)."""
    out = tmp_path_factory.mktemp("out") / "probe.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "in_workers", in_this_process(probing.probe_file))
        found, ignored = probe.run([folder], out, jobs=1, timeout_s=60)
    return {Path(p.path).name: p for p in found}, ignored, out


@pytest.mark.parametrize("name", odd_files.FINE)
def test_what_is_said_is_what_the_maker_knows(done, name):
    found = done[0][name]
    assert found.fault == ""
    expected = odd_files.FINE[name][1]
    assert {field: getattr(found, field) for field in expected} == expected


@pytest.mark.parametrize("name", [n for n, (_, facts) in odd_files.FINE.items() if facts["kind"] == "video"])
def test_as_many_frames_as_another_ffmpeg_decodes(done, name):
    assert done[0][name].num_frames == odd_files.count_by_ffmpeg(Path(done[0][name].path))


@pytest.mark.parametrize("name", odd_files.FAULTY)
def test_a_faulty_file_is_named_with_its_cause(done, name):
    fault = done[0][name].fault
    assert name in fault
    assert odd_files.FAULTY[name][1] in fault


def test_nothing_is_dropped_in_silence(done, folder):
    found, ignored, _ = done
    assert sorted(p.name for p in ignored) == ["README", "notes.txt"]
    everything = [p for p in folder.rglob("*") if not p.is_dir()]
    assert len(everything) == len(found) + len(ignored)
    shown = probe.summary(list(found.values()), ignored)
    faulty = len(odd_files.FAULTY)
    assert f"found {len(everything)} = {len(found) - faulty} probed + {faulty} faulty + 2 ignored" in shown
    assert all(f"fault: {p.fault}" in shown for p in found.values() if p.fault)


def test_the_size_and_times_are_those_of_the_cache(done):
    for found in done[0].values():
        if not found.fault:
            seen = decode.probe(Path(found.path))
            assert (found.width, found.height) == (seen.width, seen.height)
            if found.kind == "video":
                assert found.num_frames == len(seen.times_s)


def test_lines_read_back_with_paths_that_open(done):
    found, _, out = done
    assert {Path(p.path).name: p for p in probe.read(out)} == found
    assert all(not Path(json.loads(line)["path"]).is_absolute() for line in out.read_text().splitlines())


def in_this_process(function):
    """Takes the place of the workers."""
    return lambda _, paths, jobs, timeout_s, **__: ((path, function(path), None) for path in paths)


def noted(path):
    """A probe that leaves a note of each call (it runs in a worker)."""
    with path.with_name("calls").open("a") as file:
        file.write(path.name + "\n")
    return probing.probe_file(path)


def crash_on_b(path):
    if path.name == "b.png":
        os.kill(os.getpid(), 11)
    return noted(path)


def hang_on_b(path):
    if path.name == "b.png":
        time.sleep(600)
    return noted(path)


@pytest.fixture
def three(tmp_path):
    for name in "abc":
        odd_files.make(tmp_path, ["still.png"])
        (tmp_path / "still.png").rename(tmp_path / f"{name}.png")
    return tmp_path


def test_a_second_call_looks_only_at_what_changed(three, monkeypatch):
    files, calls, out = command.find_files([three])[0], three / "calls", three / "out" / "probe.jsonl"
    monkeypatch.setattr(journal, "in_workers", in_this_process(noted))
    first = probe.run(files, out, 1, 60)
    assert calls.read_text().split() == ["a.png", "b.png", "c.png"]
    assert probe.run(files, out, 1, 60) == first
    assert calls.read_text().split() == ["a.png", "b.png", "c.png"]
    odd_files.make(three, ["turned.jpeg"])
    (three / "turned.jpeg").rename(three / "b.png")
    again, _ = probe.run(files, out, 1, 60)
    assert calls.read_text().split()[3:] == ["b.png"]
    assert [p.rotation_deg for p in again] == [0, 270, 0]
    assert probe.read(out) == again


def test_a_kill_loses_nothing(three, monkeypatch):
    def killed(_, paths, jobs, timeout_s, **__):
        yield from in_this_process(noted)(_, paths[:2], jobs, timeout_s)
        raise KeyboardInterrupt

    calls, out = three / "calls", three / "out" / "probe.jsonl"
    files = command.find_files([three])[0]
    monkeypatch.setattr(journal, "in_workers", killed)
    with pytest.raises(KeyboardInterrupt):
        probe.run(files, out, 1, 60)
    assert not out.exists()
    with out.with_name("probe.jsonl.journal").open("a") as memory:
        memory.write('{"path": "../c.png", "size_by')
    monkeypatch.setattr(journal, "in_workers", in_this_process(noted))
    assert len(probe.run(files, out, 1, 60)[0]) == 3
    assert calls.read_text().split() == ["a.png", "b.png", "c.png"]
    assert [p.name for p in out.parent.iterdir()] == ["probe.jsonl"]


@pytest.mark.parametrize(("function", "timeout_s", "ending", "cause"), [
    (hang_on_b, 2, Ending.TIMED_OUT, "not finished after 2 s; allow more with --timeout-s"),
    (crash_on_b, 60, Ending.CRASHED, "its reader crashed (exit code -11)"),
])
def test_a_file_that_hangs_or_crashes_its_reader_stops_nothing(three, function, timeout_s, ending, cause):
    began = time.monotonic()
    files = {path.name: path for path in sorted(three.glob("*.png"))}
    outcomes = {name: outcome for some in journal.by_workers(function, files, probing.failed, 1, timeout_s)(files)
                for name, outcome in some.items()}
    found = {name: outcome.result for name, outcome in outcomes.items()}
    assert time.monotonic() - began < 100
    assert {name: p.fault for name, p in found.items()} == {
        "a.png": "", "b.png": f"{three / 'b.png'}: {cause}", "c.png": ""}
    assert [outcome.ending for _, outcome in sorted(outcomes.items())] == [Ending.DONE, ending, Ending.DONE]
    assert found["b.png"].size_bytes == (three / "b.png").stat().st_size


def test_a_file_that_ran_into_the_limit_is_tried_again_and_one_that_crashed_is_not(three, monkeypatch):
    files, out = command.find_files([three])[0], three / "out" / "probe.jsonl"
    failures = {"b.png": Failure(Ending.TIMED_OUT, "late"), "c.png": Failure(Ending.CRASHED, "not finished after 1 s")}

    def some_fail(_, paths, jobs, timeout_s, **__):
        yield from ((path, None if path.name in failures else noted(path), failures.get(path.name)) for path in paths)

    monkeypatch.setattr(journal, "in_workers", some_fail)
    found, _ = probe.run(files, out, 1, 1)
    assert [(p.fault.rpartition(": ")[2], p.is_timed_out) for p in found] == [
        ("", False), ("late", True), ("not finished after 1 s", False)]
    monkeypatch.setattr(journal, "in_workers", in_this_process(noted))
    assert [bool(p.fault) for p in probe.run(files, out, 1, 60)[0]] == [False, False, True]
    assert (three / "calls").read_text().split() == ["a.png", "b.png"]


@pytest.mark.parametrize(("times_s", "tick", "claim", "expected"), [
    (np.arange(100) / 24, Fraction(1, 24000), Fraction(24), (24.0, False)),
    (np.arange(100) / 24, Fraction(1, 24000), Fraction(30), (24.0, False)),  # the header lies
    (np.round(np.arange(100) * 1.001 / 24, 3), Fraction(1, 1000), Fraction(24000, 1001), (23.976024, False)),
    (np.delete(np.arange(100), 50) / 24, Fraction(1, 24), Fraction(24), (23.758, True)),  # a dropped frame
    (np.concatenate([np.arange(50) / 24, 50 / 24 + np.arange(50) / 30]), Fraction(1, 90000), None, (26.637, True)),
    (np.zeros(1), Fraction(1, 24), Fraction(24), (0.0, False)),
])
def test_the_rate_is_what_the_times_say(times_s, tick, claim, expected):
    assert probing.rate(times_s, tick, [claim])[:2] == expected


def test_a_named_file_is_never_ignored_and_links_are_followed_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    for name in ("a.mp4", "b.txt", "c.txt"):
        (tmp_path / "in" / name).touch()
    wanted, ignored = command.find_files([tmp_path / "in", tmp_path / "in" / "b.txt"])
    assert [p.name for p in wanted] == ["a.mp4", "b.txt"]
    assert [p.name for p in ignored] == ["c.txt"]
    with pytest.raises(UserError, match="nowhere does not exist"):
        command.find_files([tmp_path / "nowhere"])


def test_a_name_that_is_not_utf8_is_a_fault_and_can_be_written(tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"))
    odd_files.make(tmp_path, ["still.png"])
    (tmp_path / "still.png").rename(path)
    found = probing.probe_file(path)
    assert "not UTF-8" in found.fault
    (tmp_path / "probe.jsonl").write_text(probe._line(found, tmp_path / "probe.jsonl"))
    assert probe.read(tmp_path / "probe.jsonl") == [found]
    print(probe.summary([found], []))


def test_help_loads_nothing_that_reads_pictures():
    code = ("import contextlib, sys\nfrom data_tools import probe\nwith contextlib.suppress(SystemExit):\n"
            "    probe.main(['--help'])\nprint('loaded:', *{'av', 'numpy', 'PIL', 'tqdm'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nloaded:\n")
    assert "--timeout-s" in done.stdout


def test_the_command_and_its_faults(three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(journal, "in_workers", in_this_process(probing.probe_file))
    assert probe.main([str(three), "--out", str(tmp_path / "p.jsonl"), "--jobs", "1"]) == 0
    assert "found 3 = 3 probed + 0 faulty + 0 ignored" in capsys.readouterr().out
    assert probe.main([str(three / "none")]) == 2
    assert "none does not exist\n  next: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        probe.main([str(three), "--jobs", "0"])
    assert "not a number above 0" in capsys.readouterr().err
