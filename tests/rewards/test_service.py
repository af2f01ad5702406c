"""Rewards by a service: requests, retries, how failures are reported, and settings that are rejected."""

import itertools
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.judge_server import Server, redness
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import Prompt
from lightning_draft.rewards.http_client import is_transient, reason
from lightning_draft.rewards.service import HTTPReward, RewardServiceError

PROMPTS = ["a cat", "a dog", "a red bird", "bread", "a bed"]


class Flaky(ThreadingHTTPServer):
    """Answer from a list with one entry per request; the last entry is repeated.

    An entry is a status, a body, a list of pieces of a body, seconds to sleep, or `("short", body)` for an answer that
    announces five bytes more than it has.
    """

    daemon_threads = True

    def __init__(self, *script: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Scripted)
        self.script = list(script)
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.lock = threading.Lock()


class _Scripted(BaseHTTPRequestHandler):
    server: Flaky

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
            entry = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if isinstance(entry, float):
            time.sleep(entry)
            return
        short = isinstance(entry, tuple)
        entry = entry[1] if short else entry
        status, *rest = (entry,) if isinstance(entry, int) else (200, entry)
        self.send_response(status)
        if short:
            self.send_header("Content-Length", str(len(entry) + 5))
        if status == 503:
            self.send_header("Retry-After", "1")
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()
        if rest and isinstance(rest[0], list):
            with suppress(BrokenPipeError):
                for piece in rest[0]:
                    self.wfile.write(piece)
                    time.sleep(0.1)
        elif rest:
            self.wfile.write(rest[0])

    def do_GET(self) -> None:
        raise AssertionError("a redirect was followed")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], str]]:
    """Start a server on a free port of this machine and return its address; the servers are closed afterwards."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(server: ThreadingHTTPServer) -> str:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/score"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_a_service_receives_exact_pixels_in_batches(serve: Callable, make_images: Callable[..., Tensor]) -> None:
    seen: list[tuple[int, list[str], list[dict]]] = []

    def judge(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        seen.append((len(images), prompts, metadata))
        return [
            float(np.asarray(image).astype(int).sum()) + 1000 * len(p) for image, p in zip(images, prompts, strict=True)
        ]

    images = make_images(5, 7, 9)
    prompts = [Prompt("a cat", {"count": 2}), *PROMPTS[1:]]
    scores = HTTPReward(serve(Server(judge)), batch_size=2, concurrency=3)(images.requires_grad_(), prompts)
    expected = (images.detach() * 255).round().sum((1, 2, 3)) + torch.tensor([1000.0 * len(p) for p in PROMPTS])
    assert scores.tolist() == expected.tolist()
    assert not scores.requires_grad
    assert sorted(size for size, *_ in seen) == [1, 2, 2]
    assert [{"count": 2}, {}] in [metadata for *_, metadata in seen]


def test_the_example_server_scores_jpeg_files(serve: Callable) -> None:
    images = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.4, 0.6]]).view(2, 3, 1, 1).expand(2, 3, 16, 16)
    scores = HTTPReward(serve(Server(redness)), encoding="jpeg", quality=90)(images, ["red", "blue"])
    torch.testing.assert_close(scores, torch.tensor([1.0, -0.3]), rtol=0, atol=0.02)


def test_concurrency_bounds_the_number_of_parallel_requests(serve: Callable) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def judge(images: list[Image.Image], prompts: list[str], metadata: list[dict]) -> list[float]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return [float(prompt) for prompt in prompts]

    prompts = [str(number) for number in range(6)]
    url = serve(Server(judge))
    for limit in (1, 3):
        most = 0
        scores = HTTPReward(url, batch_size=1, concurrency=limit)(torch.zeros(6, 3, 4, 4), prompts)
        assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert most == limit


def test_transient_failures_are_repeated_with_growing_pauses(serve: Callable) -> None:
    server = Flaky(500, 429, 502, b'{"scores": [0.25]}')
    reward = HTTPReward(serve(server), backoff=0.05)
    assert reward(torch.zeros(1, 3, 4, 4), ["a cat"]).tolist() == [0.25]
    pauses = [after - before for before, after in itertools.pairwise(server.times)]
    assert all(pause >= wanted for pause, wanted in zip(pauses, [0.05, 0.1, 0.2], strict=True))
    assert sum(pauses) < 2


def test_retry_after_header_delays_the_next_attempt(serve: Callable) -> None:
    server = Flaky(503, b'{"scores": [1]}')
    HTTPReward(serve(server), backoff=0.0)(torch.zeros(1, 3, 4, 4), ["a cat"])
    assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize(
    ("script", "options", "requests", "message"),
    [
        ([500], {"retries": 2}, 3, "'a dog' after 3 attempts: status 500 Internal Server Error"),
        ([404], {}, 1, "gave no scores for the prompts 'a cat', 'a dog' after 1 attempt: status 404 Not Found"),
        ([302], {}, 1, "after 1 attempt: status 302 Found"),
        ([2.0], {"timeout": 0.2, "retries": 1}, 2, "after 2 attempts: timed out"),
        ([[b"{"] * 9], {"timeout": 0.25, "retries": 0}, 1, "after 1 attempt: no complete answer within 0.25 s"),
        ([b"<html>"], {}, 1, "2 finite numbers for the prompts 'a cat', 'a dog', and answered '<html>'"),
        ([b'{"scores": [1]}'], {}, 1, r"it returned shape \(1,\) for 2 images"),
        ([b'{"scores": [1, NaN]}'], {}, 1, "not finite for the prompt 'a dog'"),
        ([b'{"scores": [1, null]}'], {}, 1, "its scores are not numbers"),
        ([b'{"scores": [1, "2"]}'], {}, 1, "its scores are not numbers"),
        ([b'{"scores": [1, true]}'], {}, 1, "its scores are not numbers"),
        ([b'{"scores": [1, 1' + b"0" * 400 + b"]}"], {}, 1, "2 finite numbers"),
        ([b'{"values": [1, 2]}'], {}, 1, r"'scores'"),
        ([b"[" * 100_000], {}, 1, "recursion"),
        ([b"\xff\xfe{}"], {}, 1, "must answer"),
        ([5.0], {"time_limit": 0.3}, 1, "did not score the prompts 'a cat', 'a dog' within time_limit=0.3 s"),
    ],
)
def test_a_failure_is_an_error_that_names_the_prompts(
    serve: Callable, script: list[Any], options: dict[str, Any], requests: int, message: str
) -> None:
    server = Flaky(*script)
    reward = HTTPReward(serve(server), **{"backoff": 0.01, **options})
    start = time.monotonic()
    with pytest.raises(RewardServiceError, match=message):
        reward(torch.zeros(2, 3, 4, 4), ["a cat", "a dog"])
    assert time.monotonic() - start < 3
    assert len(server.times) == requests


def test_a_refused_connection_is_an_error() -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    reward = HTTPReward(f"http://127.0.0.1:{closed.server_port}", retries=1, backoff=0.01)
    with pytest.raises(RewardServiceError, match="for the prompt 'a cat' after 2 attempts: .*refused"):
        reward(torch.zeros(1, 3, 4, 4), ["a cat"])


def test_permanent_failure_stops_the_retries_of_other_requests(serve: Callable) -> None:
    """One request fails permanently while another waits a minute for its next attempt."""
    server = Flaky(500, 404)
    reward = HTTPReward(serve(server), batch_size=1, concurrency=2, backoff=60.0)
    start = time.monotonic()
    with pytest.raises(RewardServiceError, match="404"):
        reward(torch.zeros(2, 3, 4, 4), ["a cat", "a dog"])
    assert time.monotonic() - start < 5


def test_the_token_comes_from_the_environment(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    server = Flaky(b'{"scores": [1]}')
    reward = HTTPReward(serve(server), token_variable="JUDGE_TOKEN")
    reward(torch.zeros(1, 3, 4, 4), ["a cat"])
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(vars(reward))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "file:///etc/hosts"}, "is not the address of a service; write http://host:port/path"),
        ({"url": "localhost:8000"}, "is not the address of a service"),
        ({"url": "http://me:secret@host/"}, "url contains a password, which would be saved.* use token_variable"),
        ({"url": "http://host", "encoding": "webp"}, "encoding='webp' is not a valid choice; write one of png, jpeg"),
        ({"url": "http://host", "concurrency": 0}, "concurrency=0 must be at least 1"),
        ({"url": "http://host", "timeout": 0.0}, "timeout=0.0 must be a positive number"),
        ({"url": "http://host", "quality": 0}, "quality=0 is not a JPEG quality"),
        ({"url": "http://host", "token_variable": "NO_SUCH"}, "the environment variable NO_SUCH is not set"),
        ({"url": "http://host", "token_variable": "EMPTY"}, "the environment variable EMPTY contains no valid token"),
        ({"url": "http://host/x y"}, "is not the address of a service"),
        ({"url": "http://host:port/"}, "url='http://host:port/': Port could not be cast"),
        ({"url": "http://host/?key=s3cret"}, "url contains the value of 'key'.* write http://host/[?]key={VARIABLE}"),
        ({"url": "http://host/?api_key=s3cret"}, "url contains the value of 'api_key'"),
        ({"url": "http://host/?key={NO_SUCH}"}, "the environment variable NO_SUCH, which url names, is not set"),
        ({"url": "http://host/?key={SPACED}"}, "the environment variable SPACED, which url names, has spaces"),
        ({"url": "http://host", "retries": -1}, "retries=-1 must be at least 0"),
        ({"url": "http://host", "time_limit": 0.0}, "time_limit=0.0 must be a positive number"),
    ],
)
def test_invalid_service_settings_are_rejected(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", " ")
    monkeypatch.setenv("SPACED", "s3cret key")
    with pytest.raises(ConfigurationError, match=message) as caught:
        HTTPReward(**arguments)
    assert "s3cret" not in str(caught.value)


def test_a_key_in_the_url_stays_in_the_environment(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server = Flaky(404)
    reward = HTTPReward(serve(server) + "?key={JUDGE_KEY}")
    with pytest.raises(RewardServiceError, match="/score gave no scores") as caught:
        reward(torch.zeros(1, 3, 4, 4), ["a cat"])
    assert server.paths == ["/score?key=s3cret"]
    assert "s3cret" not in str(caught.value) + str(vars(reward))


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_a_key_that_the_service_repeats_is_hidden(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    url = answer_once(f"HTTP/1.0 {status}\r\n\r\nno key s3cret".encode(), wait=False)
    with pytest.raises(RewardServiceError, match="no key REDACTED") as caught:
        HTTPReward(url + "?key={JUDGE_KEY}", retries=0)(torch.zeros(1, 3, 4, 4), ["a cat"])
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("head", "wait"), [("Content-Length: 9", True), ("Transfer-Encoding: chunked\r\n\r\nzz", False)]
)
def test_status_is_named_if_the_body_of_the_error_does_not_arrive(head: str, wait: bool) -> None:
    url = answer_once(f"HTTP/1.1 500 Broken\r\n{head}\r\n\r\n".encode(), wait)
    with pytest.raises(RewardServiceError, match="'a cat' after 1 attempt: status 500 Broken"):
        HTTPReward(url, retries=0, timeout=0.2)(torch.zeros(1, 3, 4, 4), ["a cat"])


def answer_once(answer: bytes, wait: bool) -> str:
    """Send bytes to the first client, then close the connection, or keep it for half a second; return the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_client() -> None:
        with listener, listener.accept()[0] as client:
            client.recv(1 << 20)
            client.sendall(answer)
            client.shutdown(socket.SHUT_WR) if not wait else time.sleep(0.5)
            client.settimeout(0.5)
            client.recv(1 << 20)

    threading.Thread(target=serve_client, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_metadata_is_sent_as_json_values(serve: Callable) -> None:
    metadata = {
        "array": np.array([1, 2]),
        "flag": np.bool_(True),
        "number": np.float32(0.5),
        "tensor": torch.tensor([[1.5]]),
        "nan": float("nan"),
        "infinite": [np.inf, 1.0],
        "nested": {"path": Path("a")},
        "none": None,
    }
    seen: list[dict[str, Any]] = []

    def judge(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        seen.extend(metadata)
        return [0.0]

    HTTPReward(serve(Server(judge)))(torch.zeros(1, 3, 4, 4), [Prompt("a cat", metadata)])
    assert seen == [
        {
            "array": [1, 2],
            "flag": True,
            "number": 0.5,
            "tensor": [[1.5]],
            "nan": None,
            "infinite": [None, 1.0],
            "nested": {"path": "a"},
            "none": None,
        }
    ]


def test_truncated_answer_is_requested_again(serve: Callable) -> None:
    server = Flaky(("short", b'{"scores": [1]}'), b'{"scores": [2]}')
    assert HTTPReward(serve(server), backoff=0.0)(torch.zeros(1, 3, 4, 4), ["a cat"]).tolist() == [2.0]
    server = Flaky(("short", b'{"scores": [1]}'))
    with pytest.raises(RewardServiceError, match="cut short: 15 bytes arrived and 5 are missing"):
        HTTPReward(serve(server), retries=0)(torch.zeros(1, 3, 4, 4), ["a cat"])


def test_certificate_errors_are_not_repeated() -> None:
    error = urllib.error.URLError(ssl.SSLCertVerificationError(1, "self-signed certificate"))
    assert not is_transient(error)
    assert "SSL_CERT_FILE" in reason(error)
    assert is_transient(urllib.error.URLError(ConnectionRefusedError()))


def score_and_note_signals(url: str, folder: Path) -> None:
    """Score an image in this process, with a handler that only records SIGTERM, as that of Lightning's Trainer."""
    sys.stdout, sys.stderr = ((folder / name).open("w", buffering=1) for name in ("out", "err"))
    signal.signal(signal.SIGTERM, lambda *_: print("noted"))
    HTTPReward(url)(torch.zeros(1, 3, 4, 4), ["a cat"])
    print("scored")


def test_sigterm_ends_the_wait_for_a_silent_service_and_the_process(serve: Callable, tmp_path: Path) -> None:
    server = Flaky(60.0)
    start_process = multiprocessing.get_context("fork").Process
    process = start_process(target=score_and_note_signals, args=(serve(server), tmp_path))
    process.start()
    while not server.times:
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    start = time.monotonic()
    process.join(30)
    assert time.monotonic() - start < 15
    assert process.exitcode is not None
    assert (tmp_path / "out").read_text() == "noted\n"
    assert "Error" not in (tmp_path / "err").read_text()
