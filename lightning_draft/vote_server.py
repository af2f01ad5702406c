"""A web server on this machine that shows pairs of images and stores votes.

It listens on the loopback address only. A vote is accepted only from the page itself: the request must have the page's
origin and its token, and the host must be this machine, so that other sites cannot vote. Only the images of known pairs
are served, by the keys of their pixels; no path comes from a request.
"""

import io
import secrets
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from lightning_draft.errors import ConfigurationError
from lightning_draft.image_files import UnreadableImageError, read_image
from lightning_draft.vote_page import finished_page, vote_page
from lightning_draft.votes import WINNERS, Pair, VoteFolder

_HOSTS = frozenset({"127.0.0.1", "localhost"})
_LARGEST_FORM = 4096
_TYPES = {".jpg": "image/jpeg"} | {
    f".{kind}": f"image/{kind}" for kind in ("png", "jpeg", "webp", "bmp", "gif", "avif")
}


class VoteServer(ThreadingHTTPServer):
    """Show the pairs without a vote, one after the other, and store the votes.

    Args:
        folder: The folder of votes.
        pairs: Pairs to vote on; None for those that training runs ask for, which are read again for each page.
        files: Files of the images of `pairs` by their keys.
        port: Port on the loopback address; 0 chooses a free one (`server_port`).
    """

    daemon_threads = True

    def __init__(
        self,
        folder: VoteFolder,
        pairs: list[Pair] | None = None,
        files: Mapping[str, Path] | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.fixed_pairs = pairs
        self.files = dict(files or {})
        self.token = secrets.token_urlsafe(16)
        self.last: Pair | None = None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    def pairs(self) -> list[Pair]:
        """Return all pairs."""
        return self.folder.pairs() if self.fixed_pairs is None else self.fixed_pairs

    def find(self, key: str) -> Pair | None:
        """Return the pair with this key, None if there is none."""
        return next((pair for pair in self.pairs() if pair.key == key), None)

    def image(self, key: str) -> Path | None:
        """Return the file of an image of a pair, None if there is none."""
        if self.fixed_pairs is not None:
            return self.files.get(key)
        return self.folder.image(key) if any(key in (pair.first, pair.second) for pair in self.pairs()) else None

    def page(self, wanted: str, nonce: str) -> str:
        """Return the page for the pair with the key `wanted`, or for the next pair without a vote."""
        pairs, votes = self.pairs(), self.folder.votes()
        done = sum(pair.id in votes for pair in pairs)
        pair = self.find(wanted) or next((pair for pair in pairs if pair.id not in votes), None)
        if pair is None:
            return finished_page(nonce, len(pairs), self.fixed_pairs is None)
        return vote_page(pair, self.token, nonce, done, len(pairs), self.last)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, but not of a connection that the browser has closed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    timeout = 30

    def do_GET(self) -> None:
        """Answer with a page or an image."""
        self._answer_with(self._get)

    def do_POST(self) -> None:
        """Store a vote and show the next pair."""
        self._answer_with(self._post)

    def log_message(self, *_: Any) -> None:
        """Do not log requests."""

    def _answer_with(self, method: Callable[[], None]) -> None:
        """Show the errors of files; those of connections go to `handle_error`."""
        try:
            method()
        except ConnectionError:
            raise
        except (OSError, ConfigurationError) as error:
            self._answer(500, str(error).encode("utf-8", "replace"))

    def _get(self) -> None:
        path, _, query = self.path.partition("?")
        if not self._is_local():
            self._answer(403, b"this page is served to this machine only")
        elif path == "/":
            nonce = secrets.token_urlsafe(16)
            wanted = parse_qs(query).get("pair", [""])[0]
            self._answer(200, self.server.page(wanted, nonce).encode(), "text/html; charset=utf-8", nonce)
        elif path.startswith("/image/"):
            self._send_image(path.removeprefix("/image/"))
        elif path == "/favicon.ico":  # browsers ask for it
            self._answer(204, b"")
        else:
            self._answer(404, b"there is no such page")

    def _post(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/vote" or not length.isdecimal() or int(length) > _LARGEST_FORM:
            self._answer(400, b"this is not a vote")
            return
        form = {name: values[0] for name, values in parse_qs(self.rfile.read(int(length)).decode("latin-1")).items()}
        is_own = self.headers.get("Origin") == f"http://{self.headers.get('Host')}"
        if not (self._is_local() and is_own and secrets.compare_digest(form.get("token", "").encode(), self._token())):
            self._answer(403, b"this vote does not come from the current page; load the page again")
            return
        pair = self.server.find(form.get("pair", ""))
        if pair is None or form.get("winner") not in WINNERS:
            self._answer(400, b"there is no such pair or answer")
            return
        self.server.folder.add_vote(pair, form["winner"])
        self.server.last = pair
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _token(self) -> bytes:
        return self.server.token.encode()

    def _is_local(self) -> bool:
        """Return whether the page was opened under this machine's name; other names may belong to other sites."""
        return self.headers.get("Host", "").rpartition(":")[0] in _HOSTS

    def _send_image(self, key: str) -> None:
        path = self.server.image(key)
        try:
            content, kind = _image_file(path) if path is not None else (b"", "")
        except (OSError, UnreadableImageError):
            content, kind = b"", ""
        if kind:
            self._answer(200, content, kind)
        else:
            self._answer(404, b"there is no such image")

    def _answer(self, status: int, content: bytes, kind: str = "text/plain; charset=utf-8", nonce: str = "") -> None:
        allowed = f"; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'" if nonce else ""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "same-origin")
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'{allowed}",
        )
        self.end_headers()
        self.wfile.write(content)


def _image_file(path: Path) -> tuple[bytes, str]:
    """Return a file and its type; a format that browsers do not show is converted to PNG."""
    kind = _TYPES.get(path.suffix.lower())
    if kind is not None:
        return path.read_bytes(), kind
    file = io.BytesIO()
    read_image(path).save(file, "png")
    return file.getvalue(), "image/png"
