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
import hmac
import json
import math
import secrets
import select
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data_tools.command import absolute, add_job_arguments, answer, check_openable, positive, shown, stamp
from data_tools.editing import Conflict, Edit, Manifest, Piece, remedy
from data_tools.faults import UNREADABLE, fault_of
from wantrain.data import films, media
from wantrain.files import atomic_path, digest_text
from wantrain.jobs import in_workers
from wantrain.terms import IMAGE_SUFFIXES, Bucket, UserError

EDITED = ("caption", "captions", "keep")
"""The columns that the page may change."""

LEADS = (*EDITED, "video", "id", "start_s", "end_s")

PREVIEW_PX = 512
"""Longest side of a preview."""

PREVIEW_S = 20.0
"""Of a longer span this much is shown: 320 frames of 512x288 are 140 MB while they are made."""

PREVIEW_VERSION = 1
"""Raise this when previews come out otherwise."""

LARGEST_BODY = 1 << 26

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
    try:
        check_openable(preview.source)
        if preview.target.suffix == ".jpg":
            image = media.read_image(preview.source).convert("RGB")
            image.thumbnail((PREVIEW_PX, PREVIEW_PX))
            with atomic_path(preview.target) as temporary:
                image.save(temporary, "JPEG", quality=92)
        else:
            _write_film(preview)
    except UNREADABLE as error:
        return fault_of(preview.source, error)
    return ""


def _write_film(preview: Preview) -> None:
    from wantrain.data import decode
    from wantrain.pictures import write_mp4

    found = media.probe(preview.source)
    available = films.count_frames(found, preview.start_s, preview.end_s, preview.fps)
    if available < 1:
        raise ValueError(f"the span from {preview.start_s:g} s on is empty: it is {found.duration_s:.2f} s long")
    scale = min(1.0, PREVIEW_PX / max(found.width, found.height)) / 2
    height, width = (2 * max(1, round(side * scale)) for side in (found.height, found.width))
    bucket = Bucket(min(available, math.ceil(PREVIEW_S * preview.fps)), height, width)
    frames_FCHW = decode.read_clip(preview.source, preview.start_s, preview.end_s, preview.fps, bucket)
    write_mp4(preview.target, frames_FCHW, preview.fps)


class Review(ThreadingHTTPServer):
    """The server of one manifest at http://127.0.0.1:PORT/SECRET/; `port` 0 takes a free one. OSError where taken."""

    daemon_threads = True

    def __init__(self, manifest: Manifest, previews: Path, fps: float, trigger: str, port: int, *, jobs: int,
                 timeout_s: float) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.manifest, self.previews, self.fps, self.trigger = manifest, previews, fps, trigger
        self.jobs, self.timeout_s = threading.Semaphore(jobs), timeout_s
        self.secret, self.num_saved = secrets.token_urlsafe(24), 0
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.address = f"http://127.0.0.1:{self.server_port}/{self.secret}/"
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


class _Handler(BaseHTTPRequestHandler):
    server: Review

    timeout = 60

    def do_GET(self) -> None:
        self._reply(self._get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def log_message(self, *_: object) -> None:
        """Print nothing for a request, so that the address stays visible in the terminal."""

    def _reply(self, work: Callable[[str], None]) -> None:
        """A request of anything but the page itself is refused before it is looked at."""
        _, _, rest = self.path.partition("/")
        secret, _, name = rest.partition("/")
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self.headers["Host"] not in self.server.hosts or not hmac.compare_digest(
                    secret.encode(), self.server.secret.encode()):
                return self._fail(HTTPStatus.FORBIDDEN, "open the address that wantrain-review printed")
            try:
                work(name)
            except UserError as error:
                self._fail(HTTPStatus.UNPROCESSABLE_ENTITY, error.message)
            except ValueError:
                self._fail(HTTPStatus.BAD_REQUEST, "not what the page sends")

    def _get(self, name: str) -> None:
        if name == "":
            nonce = secrets.token_urlsafe(16)
            self._send(HTTPStatus.OK, PAGE.read_text("utf-8").replace("NONCE", nonce).encode(), "text/html", nonce)
        elif name == "rows":
            self._send_json(HTTPStatus.OK, self.server.rows())
        elif name.startswith("preview/"):
            file = self.server.preview(name.removeprefix("preview/"), self._is_gone)
            if file:
                self._send(HTTPStatus.OK, file.read_bytes(), "image/jpeg" if file.suffix == ".jpg" else "video/mp4")
        else:
            self._fail(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self, name: str) -> None:
        size = int(self.headers["Content-Length"] or -1)
        if self.headers["Origin"] != f"http://{self.headers['Host']}":
            self._fail(HTTPStatus.FORBIDDEN, "only the page itself may write")
        elif name != "rows" or not 0 <= size <= LARGEST_BODY:
            self._fail(HTTPStatus.BAD_REQUEST, "not what the page sends")
        else:
            self._send_json(*self.server.save(self.rfile.read(size)))

    def _is_gone(self) -> bool:
        """Whether the browser has closed its end, as it does when a clip leaves the screen."""
        return bool(select.select([self.connection], [], [], 0)[0]) and not self.connection.recv(1, socket.MSG_PEEK)

    def _fail(self, status: HTTPStatus, why: str) -> None:
        self._send_json(status, {"error": why})

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, nonce: str = "") -> None:
        allowed = (f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; media-src blob:; "
                   "connect-src 'self'; ") if nonce else ""
        self.send_response(status)
        for header, value in {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "Content-Security-Policy": f"default-src 'none'; {allowed}base-uri 'none'; form-action 'none'; "
                                       "frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
        }.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)


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
    parser = argparse.ArgumentParser(
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
