"""`wantrain prune`: what a run needs stays, what none needs goes, and nothing goes before the user says so."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch

from wantrain import cli
from wantrain.data.cache import LATENTS, MASK, TEXT, Cache
from wantrain.stages.prune import YOUNG_S
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip

WINDOWS = {name: PlannedClip(Clip(f"s/{name}", Path(name), "x", "s"), Bucket(5, 32, 48), MediaInfo(name, 3.0), 16.0)
           for name in "abc"}
WINDOWS["b"] = dataclasses.replace(WINDOWS["b"], partners={"mask": WINDOWS["a"]})
ONE = [(LATENTS, WINDOWS["a"]), (LATENTS, WINDOWS["b"]), (MASK, WINDOWS["b"]), (TEXT, "")]
TWO = [(LATENTS, WINDOWS["b"]), (LATENTS, WINDOWS["c"]), (TEXT, ""), (TEXT, "two")]
NO_ONES = (TEXT, "a caption of old")


@pytest.fixture
def cache(tmp_path):
    """Two runs that share two entries, and one entry that neither needs."""
    cache = Cache(tmp_path / "cache", "vae", "text", "wantrain cache recipe=r")
    for number, entry in enumerate([*ONE, *TWO, NO_ONES]):
        cache.write(entry, {"x": torch.full((2, 3), float(number))})
    cache.claim(Path("runs/one"), "one", {cache.path_of(entry): entry for entry in ONE})
    cache.claim(Path("runs/two"), "two/with a slash", {cache.path_of(entry): entry for entry in TWO})
    return cache


def files(cache):
    """Every file of the cache with its content."""
    return {path.relative_to(cache.folder): path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()}


def gone_after(cache, *arguments):
    """The files that a call takes away; it must change and add none."""
    before = files(cache)
    assert cli.main(["prune", str(cache.folder), *arguments]) == 0
    after = files(cache)
    assert after.items() <= before.items()
    return before.keys() - after.keys()


def names(cache, *entries):
    return {cache.path_of(entry).relative_to(cache.folder) for entry in entries}


def test_without_delete_nothing_goes_and_what_would_go_is_told(cache, capsys):
    assert gone_after(cache, "one") == set()
    shown = capsys.readouterr().out
    assert f"forgotten  one ({Path('runs/one').resolve()}): 4 entries" in shown
    assert f"needed     two/with a slash ({Path('runs/two').resolve()}): 4 entries" in shown
    assert "not needed 4 files" in shown
    assert shown.endswith(f"next: wantrain prune {cache.folder} one delete=yes\n")


def test_only_what_no_run_needs_goes(cache, capsys):
    assert gone_after(cache, "delete=yes") == names(cache, NO_ONES)
    capsys.readouterr()
    assert gone_after(cache, "delete=yes") == set()
    assert "not needed 0 files" in capsys.readouterr().out


def test_a_forgotten_run_takes_its_own_entries_and_no_shared_ones(cache, capsys):
    note, = (path.relative_to(cache.folder) for path in (cache.folder / "used_by").iterdir()
             if '"one"' in path.read_text())
    own = names(cache, *ONE) - names(cache, *TWO)
    assert len(own) == 2
    assert gone_after(cache, "one", "delete=yes") == own | names(cache, NO_ONES) | {note}
    assert gone_after(cache, "two/with a slash", "--delete", "yes") >= names(cache, *TWO)
    assert not list(cache.folder.rglob("*.safetensors"))
    assert cli.main(["prune", str(cache.folder), "one"]) == 2
    assert "no run 'one' uses" in capsys.readouterr().err


def test_a_new_claim_takes_the_place_of_the_runs_old_one(cache):
    cache.claim(Path("runs/one"), "one", {cache.path_of(entry): entry for entry in ONE[1:]})
    assert gone_after(cache, "delete=yes") == names(cache, NO_ONES, ONE[0])


def test_two_runs_of_one_name_keep_their_claims_and_are_told_apart_by_their_folders(cache, capsys):
    cache.claim(Path("elsewhere/one"), "one", {cache.path_of(entry): entry for entry in TWO})
    assert gone_after(cache, "delete=yes") == names(cache, NO_ONES)
    assert cli.main(["prune", str(cache.folder), "one"]) == 2
    assert str(Path("elsewhere/one").resolve()) in capsys.readouterr().err
    assert names(cache, ONE[0]) < gone_after(cache, "runs/one", "delete=yes")


def test_a_claim_of_an_earlier_version_still_counts(cache):
    note = next((cache.folder / "used_by").iterdir())
    content = json.loads(note.read_text())
    del content["folder"]
    note.write_text(json.dumps(content))
    assert gone_after(cache, "delete=yes") == names(cache, NO_ONES)


def leftover(cache, place, age_s):
    """A temporary file as a killed process leaves it."""
    path = cache.folder / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half of it")
    os.utime(path, (time.time() - age_s,) * 2)
    return path.relative_to(cache.folder)


def test_old_leftovers_go_and_young_ones_may_still_be_written(cache):
    place = cache.path_of(ONE[0]).relative_to(cache.folder)
    old = {leftover(cache, cache.path_of(entry).with_name(".x.safetensors.7.tmp"), YOUNG_S + 60) for entry in ONE}
    young = leftover(cache, place.with_name(".y.safetensors.8.tmp"), YOUNG_S - 60)
    assert gone_after(cache, "delete=yes") == old | names(cache, NO_ONES)
    assert (cache.folder / young).exists()


@pytest.mark.parametrize("folder", ["digests", "used_by", "fetched"])
def test_leftovers_of_everything_that_is_written_atomically_go(cache, folder):
    assert leftover(cache, f"{folder}/.name.9.tmp", YOUNG_S + 60) in gone_after(cache, "delete=yes")


def test_verify_finds_damage_and_delete_takes_it_though_a_run_needs_it(cache, capsys):
    damaged = cache.path_of(ONE[1])
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    empty = cache.path_of(TWO[-1])
    empty.write_bytes(b"")
    assert gone_after(cache, "verify=yes") == set()
    shown = capsys.readouterr().out
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("damaged")} == {str(damaged), str(empty)}
    assert "not needed 3 files" in shown
    assert gone_after(cache, "delete=yes") == names(cache, NO_ONES)
    assert gone_after(cache, "verify=yes", "delete=yes") == names(cache, ONE[1], TWO[-1])


def test_what_a_run_needs_and_is_not_there_is_no_fault(cache, capsys):
    cache.path_of(ONE[0]).unlink()
    assert gone_after(cache, "delete=yes") == names(cache, NO_ONES)
    assert "needed     one (" in capsys.readouterr().out


def test_files_that_are_not_ours_are_left_alone(cache):
    for name in ("notes.txt", "latents/notes.txt", "sources.jsonl", "faults.jsonl"):
        (cache.folder / name).write_text("mine")
    assert gone_after(cache, "one", "delete=yes").isdisjoint(map(Path, ("notes.txt", "latents/notes.txt",
                                                                         "sources.jsonl", "faults.jsonl")))


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "prune takes CACHE_FOLDER [RUN], and got 0: nothing"),
    (["nowhere"], "nowhere is no cache"),
    ([".", "three"], "no run 'three' uses .: "),
    ([".", "delete=maybe"], "delete=maybe is not allowed: no, yes"),
    ([".", "force=yes"], "force=yes is not known; there are delete, verify"),
])
def test_bad_arguments_are_told_and_delete_nothing(cache, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(cache.folder)
    before = files(cache)
    assert cli.main(["prune", *arguments, "delete=yes"] if "delete=maybe" not in arguments else
                    ["prune", *arguments]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "next: wantrain prune " in shown
    assert files(cache) == before


@pytest.mark.parametrize("content", ["", '{"run": "one"}', "[]"])
def test_a_damaged_note_is_named_and_nothing_is_deleted(cache, capsys, content):
    """Without it, what its run needs is not known."""
    note = next((cache.folder / "used_by").iterdir())
    note.write_text(content)
    before = files(cache)
    assert cli.main(["prune", str(cache.folder), "delete=yes"]) == 2
    assert note.name in capsys.readouterr().err
    assert files(cache) == before
