"""A folder as a source: media with their sidecars and partners, and an account of every other file in it."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from wantrain.data.tables import SUFFIXES, Row, suffixes_of, text_of
from wantrain.files import owner
from wantrain.terms import PARTNERS

MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Account:
    """What in a source is no clip: how many captions and partners go with clips, and the names of all that was passed
    over, by what it is.
    """

    with_clips: Counter[str] = field(default_factory=Counter)
    passed: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, what: str, name: str) -> None:
        """Note that this is not used. (A name that is not UTF-8 is written with escapes.)"""
        self.passed.setdefault(what, []).append(name.encode("utf-8", "backslashreplace").decode())

    @property
    def num_passed(self) -> int:
        return sum(map(len, self.passed.values()))

    def lines(self) -> list[str]:
        """A line for each kind of what was passed over, with its first names."""
        return [f"{len(names)} {what}: {', '.join(names[:MOST_NAMED])}" + (" ..." if len(names) > MOST_NAMED else "")
                for what, names in sorted(self.passed.items())]


def folded(name: str) -> str:
    """The name in lower case and with accents in one form. Names that some disks take for the same become equal."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_folder(path: str, account: Account) -> Iterator[tuple[str, Row | str]]:
    """(name, row, or what is wrong with it) of every medium of the folder or URL.

    Captions are NAME.txt and NAME.*.txt (further ones), partners NAME.* in control/, mask/, ...; a name that differs
    in case or in the form of its accents belongs to the clip as well, where there is one such clip alone.
    """
    import fsspec  # the data tools need the rest of this module, and no other file system

    filesystem, root = fsspec.core.url_to_fs(path)
    files, folders = _entries(filesystem, root, "", account)
    for name in folders:
        if name not in PARTNERS:
            inside = _num_media(filesystem, f"{root}/{name}")
            account.pass_over("subfolders", f"{name}/" + f" ({inside} videos and images in it)" * (inside > 0))
    media = {name: PurePosixPath(name).stem for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES}
    stems = Stems(media.values())
    texts = _texts([name for name in files if name.lower().endswith(".txt")], stems, account)
    for name in files:
        if name not in media and not name.lower().endswith(".txt"):
            account.pass_over(PurePosixPath(name).suffix.lower() or "without an ending", name)
    partners = {kind: _partners(filesystem, root, kind, stems, account) for kind in PARTNERS}
    for name, stem in media.items():
        found = {kind: by_stem[stem] for kind, by_stem in partners.items() if stem in by_stem}
        twice = [both for both in (*_same(texts.get(stem, [])), *found.values()) if len(both) > 1]
        if twice:
            yield name, f"{' and '.join(twice[0])} have its name: which of them is meant?"
            continue
        captions, fault = _read(filesystem, root, texts.get(stem, []))
        yield name, fault or {"video": name, "captions": captions, **{kind: one for kind, (one,) in found.items()}}


class Stems:
    """Names of clips without their endings, found exactly, or else regardless of case and of the form of accents."""

    def __init__(self, stems: Iterable[str]) -> None:
        self._exact = {*stems}
        alike: dict[str, list[str]] = defaultdict(list)
        for stem in self._exact:
            alike[folded(stem)].append(stem)
        self._folded = {key: some[0] for key, some in alike.items() if len(some) == 1}

    def owner(self, sidecar: str) -> str:
        """The clip that a sidecar belongs to, '' where there is none."""
        return owner(sidecar, self._exact) or self._folded.get(owner(folded(sidecar), self._folded), "")

    def like(self, stem: str) -> str:
        """The clip of exactly this name, else the one that differs in case or accents only; '' for none."""
        return stem if stem in self._exact else self._folded.get(folded(stem), "")


def _entries(filesystem: Any, root: str, folder: str, account: Account) -> tuple[list[str], list[str]]:
    """(names of files, names of folders) in `folder` below the root, sorted; hidden ones are passed over."""
    files: list[str] = []
    folders: list[str] = []
    where = f"{root}/{folder}".rstrip("/")
    for entry in filesystem.ls(where, detail=True):
        if entry["name"].strip("/") == where.strip("/"):
            continue  # object stores list a folder's own marker
        name = PurePosixPath(entry["name"]).name
        is_folder = entry["type"] == "directory" or (entry.get("islink") and filesystem.isdir(entry["name"]))
        is_pipe = name.lower().endswith(".txt") and not is_folder and not filesystem.isfile(entry["name"])
        if is_pipe:  # or a link to nowhere: to open it could wait for ever
            account.pass_over("no files", f"{folder}{name}")
        elif name.startswith("."):
            account.pass_over("hidden", f"{folder}{name}{'/' * bool(is_folder)}")
        else:
            is_like_a_clip = PurePosixPath(name).suffix.lower() in SUFFIXES  # a fault, by its name
            (folders if is_folder and not is_like_a_clip else files).append(name)
    return sorted(files), sorted(folders)


def _num_media(filesystem: Any, folder: str) -> int:
    """How many videos and images are in the folder; 0 where it cannot be listed."""
    try:
        names = filesystem.ls(folder, detail=False)
    except OSError:
        return 0
    return sum(PurePosixPath(name).suffix.lower() in SUFFIXES for name in names)


def _texts(names: Iterable[str], stems: Stems, account: Account) -> dict[str, list[str]]:
    """The captions of each clip, NAME.txt first."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if stem := stems.owner(name):
            found[stem].append(name)
            account.with_clips["captions"] += 1
        else:
            account.pass_over("captions without a clip", name)
    return {stem: sorted(some, key=lambda name: folded(name) != folded(f"{stem}.txt")) for stem, some in found.items()}


def _same(names: Sequence[str]) -> list[list[str]]:
    """The names in groups of those that are one name, but for case and the form of accents."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[folded(name)].append(name)
    return list(groups.values())


def _partners(filesystem: Any, root: str, kind: str, stems: Stems, account: Account) -> dict[str, list[str]]:
    """The files of one kind of partners by the clip that they belong to, relative to the root."""
    if not filesystem.isdir(f"{root}/{kind}"):
        return {}
    files, folders = _entries(filesystem, root, f"{kind}/", account)
    for name in folders:
        account.pass_over("subfolders", f"{kind}/{name}/")
    found: dict[str, list[str]] = defaultdict(list)
    for name in files:
        path = PurePosixPath(name)
        if path.suffix.lower() not in suffixes_of(kind):
            account.pass_over(path.suffix.lower() or "without an ending", f"{kind}/{name}")
        elif stem := stems.like(path.stem):
            found[stem].append(f"{kind}/{name}")
            account.with_clips["partners"] += 1
        else:
            account.pass_over(f"{kind} without a clip", f"{kind}/{name}")
    return found


def _read(filesystem: Any, root: str, names: Iterable[str]) -> tuple[list[str], str]:
    """(the texts, '') or ([], why one cannot be read)."""
    texts = []
    for name in names:
        try:
            texts.append(text_of(filesystem.cat_file(f"{root}/{name}")))
        except (OSError, ValueError) as error:
            return [], f"its caption {name} cannot be read: {error}"
    return texts, ""


