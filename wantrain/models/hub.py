"""Model ids where a path is accepted: the local path first, then the local cache, then a download into it.

The libraries of the hubs (`downloads`) are imported where something is no local path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path


def local(where: str, whole: Callable[[Path], bool] | None = None) -> Path:
    """The path that `where` stands for: itself if it exists, else a model id, from the cache or downloaded into it.

    `whole` says whether a cached file or folder has everything that is needed; None trusts the hub's own list of files
    (ModelScope's cache has none: what exists there is taken). What a download gave is not asked of `whole`: the code
    that reads it names better what it lacks. Raises UserError when `where` is neither, or cannot be downloaded.
    """
    if found := here(where, whole):
        return found
    from wantrain.models import downloads

    return downloads.downloaded(where)


def here(where: str, whole: Callable[[Path], bool] | None = None) -> Path | None:
    """As `local`, and None for a model id that is not in the cache: nothing is asked of the network."""
    with contextlib.suppress(RuntimeError):  # a ~user that this machine does not know
        if (path := Path(where).expanduser()).exists():
            return path
    from wantrain.models import downloads

    return downloads.cached(where, whole)


def download_command(where: str) -> str:
    """The hub's own command that brings a model id into its cache."""
    from wantrain.models import downloads

    return downloads.command(where)
