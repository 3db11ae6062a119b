"""`wantrain prune`: delete what no run needs any more from a cache, or find what is damaged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from wantrain.data import cache
from wantrain.jobs import progress
from wantrain.options import parse
from wantrain.terms import UserError

USAGE = "wantrain prune CACHE_FOLDER [RUN ...]"

OPTIONS = {"delete": ("no", "yes"), "verify": ("no", "yes")}

YOUNG_S = 3600
"""A temporary file younger than this may belong to a process that is still writing."""


def run(arguments: Sequence[str]) -> None:
    """List what each run needs, and what none does; with delete=yes remove that.

    A RUN that is named no longer counts. verify=yes reads every entry and counts the damaged as not needed, so that
    the next `wantrain cache` makes them anew.
    """
    files, options = parse(arguments, USAGE, OPTIONS)
    if not files or not cache.claims_folder(Path(files[0])).is_dir():
        raise UserError(f"{files[0]} is no cache" if files else "no cache folder is given", USAGE)
    folder, forgotten = Path(files[0]), files[1:]
    claims = cache.claims(folder)
    if unknown := sorted(set(forgotten) - set(claims)):
        raise UserError(f"no run {unknown[0]!r} uses {folder}: {', '.join(claims) or 'none does'}", USAGE)
    entries = list(cache.entry_files(folder))
    damaged = find_damaged(entries) if options["verify"] == "yes" else []
    needed = {folder / name for run, (_, names) in claims.items() if run not in forgotten for name in names}
    for name, (_, names) in claims.items():
        size = sum(path.stat().st_size for path in (folder / n for n in names) if path.exists())
        print(f"{'forgotten' if name in forgotten else 'needed':10} {name}: {len(names)} entries, {_gib(size)}")
    gone = [path for path in entries if path not in needed or path in damaged]
    gone += cache.leftovers(folder, time.time() - YOUNG_S)
    gone += [claims[name][0] for name in forgotten]
    for path in damaged:
        print(f"damaged    {path}")
    print(f"not needed {len(gone)} files, {_gib(sum(path.stat().st_size for path in gone))}")
    if options["delete"] == "yes":
        for path in gone:
            path.unlink(missing_ok=True)
        print("deleted")
    elif gone:
        print(f"next: wantrain prune {' '.join(arguments)} delete=yes")


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
