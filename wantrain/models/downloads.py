"""Model ids: the local cache, and downloads into it, from Hugging Face or ModelScope. Asked by `hub`."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from httpx2 import HTTPError, Request
from huggingface_hub import DryRunFileInfo, HfApi, constants, get_session, get_token, parse_hf_uri, snapshot_download
from huggingface_hub.errors import FileMetadataError, HfUriError, IncompleteSnapshotError, OfflineModeIsEnabled

from wantrain.files import like
from wantrain.outside import Caught
from wantrain.terms import UserError

_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
_UNREACHED = (OSError, HTTPError, RuntimeError)
"""What a network's fault is; RuntimeError is hf_xet's."""
_SKIPPED = ["assets/*", "example*/*", "*.md", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.mp4", "*.mov", "*.wav"]
"""What no trainer reads of a whole repository."""


class _Hub(NamedTuple):
    name: str
    tool: str
    login: str
    cache_variable: str
    address_variable: str


_HUGGING_FACE = _Hub("Hugging Face", "hf", "hf auth login", "HF_HUB_CACHE", "HF_ENDPOINT")
_MODELSCOPE = _Hub("ModelScope", "modelscope", "modelscope login", "MODELSCOPE_CACHE", "MODELSCOPE_DOMAIN")
_HUBS = {"": _HUGGING_FACE, "hf": _HUGGING_FACE, "modelscope": _MODELSCOPE}


class _Wanted(NamedTuple):
    """A repository, or the file or folder `inside` it ("" is all of it); `where` is how the user wrote it."""

    where: str
    hub: _Hub
    repo: str
    revision: str | None
    inside: str


class State(NamedTuple):
    """What is set here of Hugging Face's hub: the folder of its cache, whether a token is there, whether downloads are
    forbidden.
    """

    cache: Path
    has_token: bool
    is_offline: bool


def state() -> State:
    """How this machine stands to the hub; nothing is asked of it."""
    token = None
    with Caught():  # its file may be unreadable
        token = get_token()
    return State(Path(constants.HF_HUB_CACHE), token is not None, constants.HF_HUB_OFFLINE)


def cached(where: str, whole: Callable[[Path], bool] | None) -> Path | None:
    """What the cache holds of a model id; None where it is not there. Raises UserError for what is no id."""
    return _cached(_parse(where), whole)


def downloaded(where: str) -> Path:
    """Download a model id into the cache. Raises UserError where that is not possible."""
    return _downloaded(_parse(where))


def command(where: str) -> str:
    """The hub's own command that brings a model id into its cache."""
    wanted = _parse(where)
    return shlex.join([wanted.hub.tool, "download", wanted.repo, *_part_of(wanted)])


def _parse(where: str) -> _Wanted:
    word, _, name = where.rpartition(":")
    close = like(where)  # of a file or folder within folders that are here: no id is meant
    with contextlib.suppress(HfUriError, KeyError):
        hub, id_ = _HUBS[word], parse_hf_uri(f"hf://{name}")
        # The parser takes off a leading slash and datasets/ or models/; with those it is a path, not a model's id.
        if name.startswith(id_.id) and ".." not in name and not (close and id_.path_in_repo) and (
                id_.path_in_repo or not id_.id.endswith(_WEIGHTS)):
            return _Wanted(where, hub, id_.id, id_.revision, id_.path_in_repo)
    raise UserError(f"{where} does not exist (looked at from {Path.cwd()}), and is no model id"
                    + (f"; did you mean {close}?" if close else ""),
                    "correct the path, or give an id: owner/name, with @revision or /file/or/folder/in/it behind and "
                    "hf: or modelscope: in front where it matters")


def _cached(wanted: _Wanted, whole: Callable[[Path], bool] | None) -> Path | None:
    with Caught() as caught:
        path = _fetch(wanted, offline=True) / wanted.inside
    if isinstance(caught.fault, UserError):
        raise caught.fault
    if isinstance(caught.fault, IncompleteSnapshotError) and whole is not None:
        path = Path(caught.fault.snapshot_path) / wanted.inside
    elif caught.fault is not None:
        return None
    return path if path.exists() and (whole is None or whole(path)) else None


def _downloaded(wanted: _Wanted) -> Path:
    with Caught() as caught:
        path = _fetch(wanted, offline=False) / wanted.inside
    if caught.fault is not None:
        raise _refused(wanted, caught.fault) from caught.fault
    if not path.exists():
        raise UserError(f"{wanted.where} is no local path, and {wanted.repo} holds no {wanted.inside or 'model'}",
                        "correct what stands behind the name, or give the name alone")
    return path


def _fetch(wanted: _Wanted, *, offline: bool) -> Path:
    """The folder that stands for the whole repository; `offline` raises OSError when the cache does not hold it."""
    inside = glob.escape(wanted.inside)
    files: dict[str, Any] = {"allow_patterns": [inside, f"{inside}/*"]} if inside else {"ignore_patterns": _SKIPPED}
    if wanted.hub is _MODELSCOPE:
        return _fetch_modelscope(wanted.repo, revision=wanted.revision, local_files_only=offline, **files)
    if not offline:
        if _limit not in (hooks := get_session().event_hooks["request"]):
            hooks.append(_limit)
        # Asked first, because snapshot_download answers for a hub out of reach with whatever the cache holds.
        HfApi().repo_info(wanted.repo, revision=wanted.revision)
        _tell_size(wanted, snapshot_download(wanted.repo, revision=wanted.revision, dry_run=True, **files))
    return Path(snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=offline, **files))


def _tell_size(wanted: _Wanted, files: Sequence[DryRunFileInfo]) -> None:
    """Say how much is about to be downloaded, and where it will lie. huggingface_hub shows how far it is."""
    coming = [file for file in files if file.will_download]
    size_gb = sum(file.file_size or 0 for file in coming) / 1e9
    print(f"note: {wanted.where} is not here: {len(coming)} files, {size_gb:.1f} GB, are downloaded into "
          f"{constants.HF_HUB_CACHE}", file=sys.stderr)


def _limit(request: Request) -> None:
    """Give a time limit to the requests that huggingface_hub makes without one."""
    limits = request.extensions["timeout"]
    limits |= {what: constants.HF_HUB_DOWNLOAD_TIMEOUT for what, limit in limits.items() if limit is None}


def _fetch_modelscope(repo: str, **options: Any) -> Path:
    try:
        from modelscope.hub.errors import HubError
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise UserError(f"modelscope:{repo} is no local path, and the package modelscope is not installed",
                        'pip install "wantrain[modelscope]"') from error
    try:
        return Path(snapshot_download(repo, **options))
    except HubError as error:
        raise OSError(str(error)) from error


def _refused(wanted: _Wanted, error: BaseException) -> UserError:
    """What happened, where the model was looked for, and what to run."""
    hub, causes = wanted.hub, list(_causes(error))
    cache = os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope") if hub is _MODELSCOPE else constants.HF_HUB_CACHE
    first_line = str(causes[-1]).partition("\n")[0]
    said = f"{type(causes[-1]).__name__}: {first_line}"
    status = next((code for e in causes for source in (e, getattr(e, "response", None))
                   if (code := getattr(source, "status_code", None))), None)
    if any(getattr(e, "filename", None) or re.search("No space left|quota exceeded", str(e)) for e in causes):
        what, step = f"it cannot be written there ({said})", f"make room there, or set {hub.cache_variable} elsewhere"
    elif any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        what, step = "HF_HUB_OFFLINE=1 forbids the download", f"unset HF_HUB_OFFLINE, or {_by_hand(wanted)}"
    elif status in (401, 403):
        what = f"{hub.name} refuses it ({status}): it is gated or private, or its name is wrong"
        step = f"check the name, accept the terms on its page, then run `{hub.login}`"
    elif status == 404:
        what, step = f"{hub.name} has no such repository or revision (404)", "check the name and the revision"
    elif status:
        what, step = f"{hub.name} answers {status}", f"try again later, or {_by_hand(wanted)}"
    elif any(isinstance(e, FileMetadataError) for e in causes) or not any(isinstance(e, _UNREACHED) for e in causes):
        what = f"what answers in its place is not {hub.name}, or the cache is damaged ({said})"
        step = f"look at {hub.address_variable} and at the settings of a proxy; or {_by_hand(wanted)}"
    else:
        what, step = f"{hub.name} cannot be reached: is there a network? ({said})", _by_hand(wanted)
    return UserError(f"{wanted.where} is no local path, and the cache {cache} does not hold it whole; {what}", step)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from; of a ModelScope download, each file's error too."""
    while error is not None:
        yield error
        for failed in getattr(error, "failed_files", {}).values():
            yield from _causes(failed)
        error = error.__cause__


def _by_hand(wanted: _Wanted) -> str:
    """What to do on two machines, for a model that this one cannot download."""
    folder, inside = Path("models", wanted.repo.partition("/")[2]), wanted.inside
    command = shlex.join([wanted.hub.tool, "download", wanted.repo, *_part_of(wanted), "--local-dir", str(folder)])
    return (f"run `{command}` on a machine with a network, copy {folder} here, and write {folder / inside} instead of "
            "the id")


def _part_of(wanted: _Wanted) -> list[str]:
    """Of a repository, the words of a download command that name the part and the revision."""
    inside = wanted.inside
    is_file = Path(inside).suffix[1:].isalpha()
    part = [] if not inside else [inside] if is_file else ["--include", f"{inside}/*"]
    return [*part, *(["--revision", wanted.revision] if wanted.revision else [])]
