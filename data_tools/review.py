"""Read captions beside the playing clips, and edit them: a page on this machine only.

    python -m data_tools.review manifest.jsonl --trigger "mystyl style"

What is shown is what training sees: the span and nothing else, resampled to --fps by `wantrain.data.decode`, as a small
H.264 file made when the clip comes into sight (browsers play few of the codecs that sources have). An edit goes into
the manifest at once and atomically: one line changes, the others stay as they are bit by bit. Whoever else changes the
manifest meanwhile is never overwritten: an edit says what it found, and is refused where that is no longer there.

The mark is the column `keep`: 1 looked at and good, 0 out, absent not looked at. The recipe's data.limits.keep=[1,null]
trains on the first kind.

Only who knows the printed address, which holds a secret, can read or write anything, and only from this machine. No
path is ever taken from a request: clips go by a digest of their row, previews by one of their source and span.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import webbrowser
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from data_tools.command import Parser, absolute, add_job_arguments, answer, check_openable, positive, shown, stamp
from data_tools.editing import Conflict, Edit, Manifest, Piece, remedy
from data_tools.faults import UNREADABLE, fault_of
from wantrain import serving
from wantrain.files import digest_text
from wantrain.jobs import in_workers
from wantrain.terms import IMAGE_SUFFIXES, UserError

EDITED = ("caption", "captions", "keep")
"""The columns that the page may change."""

LEADS = (*EDITED, "video", "id", "start_s", "end_s")

PREVIEW_PX = 512
"""Longest side of a preview."""

PREVIEW_S = 20.0
"""Of a longer span this much is shown: 320 frames of 512x288 are 140 MB while they are made."""

PREVIEW_VERSION = 1
"""Raise this when previews come out otherwise."""

PAGE = Path(__file__).with_name("review.html")


@dataclass(frozen=True, slots=True)
class Preview:
    """What is to be shown of a source, and the file that shows it (its ending included)."""

    source: Path
    start_s: float
    end_s: float | None
    fps: float
    target: Path


def preview_of(values: Mapping[str, Any], folder: Path, fps: float, previews: Path) -> Preview:
    """The preview of a manifest's row; it has another name when the source, the span or `fps` change."""
    if "://" in values["video"]:
        raise UserError(f"{values['video']} is not on this machine", "make it local to look at it")
    source = absolute(folder / values["video"])
    start_s, end_s = float(values.get("start_s") or 0), values.get("end_s")
    name = digest_text(PREVIEW_VERSION, source, *stamp(source), start_s, end_s, fps)
    suffix = ".jpg" if source.suffix.lower() in IMAGE_SUFFIXES else ".mp4"
    return Preview(source, start_s, end_s, fps, previews / (name + suffix))


def write_preview(preview: Preview) -> str:
    """Write the preview's file. Returns what is wrong with the source, '' if nothing is."""
    from wantrain.data import preview as previews

    try:
        check_openable(preview.source)
        previews.write(preview.source, preview.target, preview.start_s, preview.end_s, fps=preview.fps,
                       longest_px=PREVIEW_PX, most_s=PREVIEW_S)
    except UNREADABLE as error:
        return fault_of(preview.source, error)
    return ""


class Review(serving.Server):
    """The server of one manifest on this machine; `port` 0 takes a free one. OSError where taken."""

    def __init__(self, manifest: Manifest, previews: Path, fps: float, trigger: str, port: int, *, jobs: int,
                 timeout_s: float) -> None:
        super().__init__(_Handler, "127.0.0.1", port)
        self.manifest, self.previews, self.fps, self.trigger = manifest, previews, fps, trigger
        self.jobs, self.timeout_s = threading.Semaphore(jobs), timeout_s
        self.num_saved = 0
        self._makers: dict[Path, threading.Lock] = {}

    def rows(self) -> dict[str, Any]:
        """Everything that the page shows, except the previews."""
        found = self.manifest.content()
        return {"manifest": shown(self.manifest.path), "trigger": self.trigger, "fps": self.fps,
                "preview_s": PREVIEW_S, "faults": found.faults, "further": not self.manifest.is_csv,
                "rows": [_row(key, found.pieces[place]) for key, place in found.places.items()]}

    def save(self, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        """Edits of the page into the manifest. ValueError for what the page does not send."""
        edits = _edits(body, self.manifest.is_csv)
        try:
            pieces, refused = self.manifest.save(edits)
        except Conflict:
            return HTTPStatus.CONFLICT, {"error": "another program writes the manifest at this moment: save again"}
        self.num_saved += len(edits) - len(refused)
        rows = [_row(key, piece) if piece else {"key": key, "gone": True} for key, piece in pieces.items()]
        return HTTPStatus.CONFLICT if refused else HTTPStatus.OK, {"rows": rows, "refused": refused}

    def preview(self, key: str, is_gone: Callable[[], bool]) -> Path | None:
        """The file that shows a row, made where it is missing; None where nobody waits for it any more.

        UserError for a source that cannot be shown, and for a row that is not there.
        """
        found = self.manifest.content()
        if key not in found.places:
            raise UserError("this clip is no longer in the manifest", "load the page again")
        values = found.pieces[found.places[key]].values or {}
        preview = preview_of(values, self.manifest.path.parent, self.fps, self.previews)
        with self._makers.setdefault(preview.target, threading.Lock()):
            if preview.target.exists():
                return preview.target
            with self.jobs:
                if is_gone():
                    return None
                [(_, fault, failure)] = in_workers(write_preview, [preview], 1, self.timeout_s)
                if fault or failure:
                    raise UserError(fault or f"{shown(preview.source)}: {failure}", "mend the file or drop the clip")
        return preview.target


def _row(key: str, piece: Piece) -> dict[str, Any]:
    values = piece.values or {}
    others = [f"{column} {value if isinstance(value, str) else json.dumps(value)}"
              for column, value in values.items() if column not in LEADS and value not in (None, "")]
    return {"key": key, "name": str(values.get("id") or values.get("video")), "others": ", ".join(others),
            "start_s": values.get("start_s") or 0, "end_s": values.get("end_s"),
            **{column: piece.value(column) for column in EDITED}}


def _edits(body: bytes, is_csv: bool) -> list[Edit]:
    """The edits that a page sends; ValueError unless they change only what it may change, to what may stand there."""
    try:
        edits = [Edit(str(e["key"]), dict(e["was"]), dict(e["now"])) for e in json.loads(body)]
    except (KeyError, TypeError) as error:
        raise ValueError("no list of edits") from error
    for edit in edits:
        captions = edit.now.get("captions", [])
        sound = {set(edit.now) == set(edit.was), set(edit.now) <= set(EDITED), edit.now.get("keep") in (None, 0, 1),
                 isinstance(edit.now.get("caption", ""), str), isinstance(captions, list) and not (is_csv and captions),
                 all(isinstance(text, str) for text in captions)}
        if sound != {True}:
            raise ValueError(f"an edit of {sorted(edit.now)} to what may not stand there")
    return edits


class _Handler(serving.Handler):
    server: Review
    printed_by = "wantrain-review"

    def get(self, name: str) -> None:
        if name == "":
            self.send_page(PAGE.read_text("utf-8"))
        elif name == "rows":
            self.send_json(HTTPStatus.OK, self.server.rows())
        elif name.startswith("preview/"):
            file = self.server.preview(name.removeprefix("preview/"), self.is_gone)
            if file:
                self.send(HTTPStatus.OK, file.read_bytes(), "image/jpeg" if file.suffix == ".jpg" else "video/mp4")
        else:
            self.fail(HTTPStatus.NOT_FOUND, "there is nothing here")

    def post(self, name: str, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        if name != "rows":
            raise ValueError(f"nothing is to be written to {name}")
        return self.server.save(body)


def summary(pieces: Collection[Piece], num_saved: int) -> str:
    """Counts that add up."""
    rows = [piece for piece in pieces if piece.values is not None]
    keeps = [piece.value("keep") for piece in rows]
    empty = sum(not piece.value("caption").strip() for piece in rows)
    good, out = (sum(k is not None and (k >= 1) == is_good for k in keeps) for is_good in (True, False))
    return (f"{num_saved} edit(s) saved\n{len(rows)} clips = {len(rows) - empty} captioned + {empty} empty\n"
            f"{len(rows)} clips = {good} kept + {out} dropped + {len(rows) - good - out} not marked; "
            "data.limits.keep=[1,null] trains on the kept")


def serve(args: argparse.Namespace) -> str:
    """Show the page until Ctrl-C; what came of it."""
    manifest = Manifest(args.manifest)
    if faults := manifest.content().faults:
        raise UserError(f"{shown(manifest.path)} has {len(faults)} fault(s):\n  " + "\n  ".join(faults),
                        remedy(manifest.path))
    if not manifest.content().places:
        raise UserError(f"{shown(manifest.path)} has no rows", "python -m data_tools.manifest build FOLDER --out "
                        "manifest.jsonl")
    previews = args.previews or manifest.path.with_name(f".{manifest.path.name}.previews")
    try:
        server = Review(manifest, previews.absolute(), args.fps, args.trigger, args.port or 0, jobs=args.jobs,
                        timeout_s=args.timeout_s)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port} cannot be used: {error}",
                        "leave --port out: a free one is found") from error
    print(f"{server.address}\nopen it in a browser on this machine; Ctrl-C ends", flush=True)
    if args.open:
        webbrowser.open(server.address)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()
    return summary(manifest.content().pieces, server.num_saved)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 (after Ctrl-C, which is how it ends) or 2."""
    parser = Parser(
        prog="python -m data_tools.review", description="Read captions beside the playing clips in a browser on this "
        "machine, edit them, mark clips as kept or dropped. Sources are only read, and nothing is sent elsewhere.",
        epilog="Every edit is saved at once. On another machine, forward the port (ssh -L 8000:127.0.0.1:8000 ...) and "
        "give --port 8000 here.")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a .jsonl or .csv; its captions are edited")
    parser.add_argument("--trigger", default="", metavar="WORDS",
                        help="trigger words, so that captions without them are found (default: none)")
    parser.add_argument("--fps", type=positive(float), default=16.0, metavar="X",
                        help="clips are resampled to this, as training will (default: %(default)g, Wan's; 24 for "
                        "Wan2.2 5B)")
    parser.add_argument("--port", type=positive(int), metavar="N", help="default: a free one")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--previews", type=Path, metavar="FOLDER",
                        help="where previews are kept; may be deleted at any time (default: .MANIFEST.previews beside "
                        "the manifest)")
    add_job_arguments(parser, 60)
    return answer(parser, serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
