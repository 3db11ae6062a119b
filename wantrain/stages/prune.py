"""`wantrain prune`: delete what no run needs any more from a cache, or find what is damaged."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from wantrain.data import cache
from wantrain.jobs import progress
from wantrain.terms import UserError

YOUNG_S = 3600
"""A temporary file younger than this may belong to a process that is still writing."""


def run(given: argparse.Namespace) -> None:
    """List what each run needs, and what none does; with delete=yes remove that.

    A RUN that is named, or given as its folder, no longer counts. verify=yes reads every entry and counts the damaged
    as not needed, so that the next `wantrain cache` makes them anew.
    """
    folder = Path(given.CACHE_FOLDER)
    if not cache.claims_folder(folder).is_dir():
        raise UserError(f"{folder} is no cache: no run has noted there what it needs", "wantrain prune CACHE_FOLDER, "
                        "the data.cache_dir of a recipe")
    claims = cache.claims(folder)
    forgotten = [_claim(claims, run, folder) for run in given.RUN]
    entries = list(cache.entry_files(folder))
    damaged = find_damaged(entries) if given.verify == "yes" else []
    needed = {folder / name for claim in claims if claim not in forgotten for name in claim.entries}
    for claim in claims:
        size = sum(path.stat().st_size for path in (folder / name for name in claim.entries) if path.exists())
        word = "forgotten" if claim in forgotten else "needed"
        print(f"{word:10} {claim}: {len(claim.entries)} entries, {_gib(size)}")
    gone = [path for path in entries if path not in needed or path in damaged]
    gone += cache.leftovers(folder, time.time() - YOUNG_S)
    gone += [claim.note for claim in forgotten]
    for path in damaged:
        print(f"damaged    {path}")
    print(f"not needed {len(gone)} files, {_gib(sum(path.stat().st_size for path in gone))}")
    if given.delete == "yes":
        for path in gone:
            path.unlink(missing_ok=True)
        print("deleted")
    elif gone:
        print(f"next: wantrain prune {shlex.join([str(folder), *given.RUN])} delete=yes")


def _claim(claims: Sequence[cache.Claim], run: str, folder: Path) -> cache.Claim:
    """The claim of the run of this name or folder. UserError where there is none, or more than one."""
    found = [claim for claim in claims if run == claim.run or str(Path(run).resolve()) == claim.folder]
    if not found:
        raise UserError(f"no run {run!r} uses {folder}: {', '.join(map(str, claims)) or 'none does'}",
                        "wantrain prune CACHE_FOLDER    lists them")
    if len(found) > 1:
        raise UserError(f"{len(found)} runs are called {run!r}: {', '.join(claim.folder for claim in found)}",
                        f"give the folder: {shlex.join(['wantrain', 'prune', str(folder), found[0].folder])}")
    return found[0]


def find_damaged(entries: Sequence[Path]) -> list[Path]:
    """The entries whose bytes are not those that were written."""
    damaged = []
    with progress(len(entries), 0, "entry", "verify") as bar:
        for path in entries:
            try:
                cache.read_entry(path)
            except UserError:
                damaged.append(path)
            bar.update()
    return damaged


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
