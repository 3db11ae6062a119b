"""A page served from this machine, which only those can read who know its address: it holds a secret.

A page of another site can reach a server on this machine too, also under a name of its own (DNS rebinding). So every
request must bring the secret; on the loopback interface it must also name this machine as its host; and what writes
must come from the page itself.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import secrets
import select
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from wantrain.terms import UserError

LARGEST_BODY = 1 << 26


class Server(ThreadingHTTPServer):
    """A server at `address`, http://HOST:PORT/SECRET/; port 0 takes a free one. OSError where the port is taken."""

    daemon_threads = True

    def __init__(self, handler: type[Handler], host: str, port: int) -> None:
        super().__init__((host, port), handler)
        self.secret = secrets.token_urlsafe(24)
        reached = socket.gethostname() if host in ("", "0.0.0.0") else host  # that is every address of this machine
        self.address = f"http://{reached}:{self.server_port}/{self.secret}/"
        self.hosts = {f"{name}:{self.server_port}" for name in (host, "127.0.0.1", "localhost")}
        self.is_local = is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a server at this address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Handler(BaseHTTPRequestHandler):
    """Requests that may be answered, to `get` and `post`. ValueError of theirs is a request that the page does not
    send, UserError one that cannot be met.
    """

    server: Server
    printed_by = ""
    """The command that prints the address."""
    timeout = 60

    def get(self, name: str) -> None:
        """Answer a request for what is called `name`."""
        raise NotImplementedError

    def post(self, name: str, body: bytes) -> tuple[HTTPStatus, Any]:
        """Do what the page asks; the answer is sent as JSON."""
        raise NotImplementedError

    def do_GET(self) -> None:
        self._reply(self.get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def log_message(self, *_: object) -> None:
        """Print nothing for a request, so that the address stays visible in the terminal."""

    def _reply(self, work: Callable[[str], None]) -> None:
        """A request of anything but the page itself is refused before it is looked at."""
        _, _, rest = self.path.partition("/")
        secret, _, name = rest.partition("/")
        with contextlib.suppress(ConnectionError, TimeoutError):
            is_named = not self.server.is_local or self.headers["Host"] in self.server.hosts
            if not is_named or not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
                return self.fail(HTTPStatus.FORBIDDEN, f"open the address that {self.printed_by} printed")
            try:
                work(name)
            except UserError as error:
                self.fail(HTTPStatus.UNPROCESSABLE_ENTITY, error.message)
            except ValueError:
                self.fail(HTTPStatus.BAD_REQUEST, "not what the page sends")

    def _post(self, name: str) -> None:
        size = int(self.headers["Content-Length"] or -1)
        if self.headers["Origin"] != f"http://{self.headers['Host']}":
            self.fail(HTTPStatus.FORBIDDEN, "only the page itself may write")
        elif not 0 <= size <= LARGEST_BODY:
            raise ValueError("no body, or too long a one")
        else:
            self.send_json(*self.post(name, self.rfile.read(size)))

    def is_gone(self) -> bool:
        """Whether the browser has closed its end, as it does when a clip leaves the screen."""
        return bool(select.select([self.connection], [], [], 0)[0]) and not self.connection.recv(1, socket.MSG_PEEK)

    def fail(self, status: HTTPStatus, why: str) -> None:
        """Answer that it does not go."""
        self.send_json(status, {"error": why})

    def send_json(self, status: HTTPStatus, value: Any) -> None:
        """Answer with a value."""
        self.send(status, json.dumps(value).encode(), "application/json")

    def send_page(self, template: str) -> None:
        """Answer with a page whose scripts and styles have the word NONCE, for those alone are to run."""
        nonce = secrets.token_urlsafe(16)
        self.send(HTTPStatus.OK, template.replace("NONCE", nonce).encode(), "text/html", nonce)

    def send(self, status: HTTPStatus, body: bytes, kind: str, nonce: str = "") -> None:
        """Answer with bytes of this MIME type."""
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
