"""A reward behind HTTP: a preference model, a vision-language judge, anything that answers with numbers.

A request is `POST` with `Content-Type: application/json`:

    {"images": ["<base64 of a PNG or JPEG file>", ...],
     "prompts": ["a cat", ...],
     "metadata": [{"count": 2}, ...]}

with the three lists of one length, at most `batch_size`; `metadata` holds what the data's columns say of each prompt,
`{}` where nothing. The answer is status 200 and `{"scores": [0.7, ...]}`, one finite number an image, in order.
`examples/judge_server.py` serves it.
"""

import base64
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.blackbox import parse_scores, quote_prompts, to_pil
from lightning_draft.rewards.jpeg_codec import check_quality

LONGEST_PAUSE = 60.0
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class RewardServiceError(RuntimeError):
    """A reward service gave no scores; the message names the prompts."""


class HTTPReward(Reward):
    """Scores by a service behind HTTP, in batches. Black box: for policy gradients, or evaluation.

    What may pass is tried again, with pauses of `backoff`, `2 backoff`, `4 backoff`, ... seconds (or what the service's
    `Retry-After` asks for, up to a minute): no connection, no answer in time, and status 408, 425, 429, 500, 502, 503
    and 504. Anything else, and the last failure, ends the run with an error that names the prompts; a score is never
    made up. The range is the service's.

    Args:
        url: `http://` or `https://`.
        batch_size: Images a request, at most.
        concurrency: Requests under way at a time, at most, from each process.
        timeout: Seconds for one attempt.
        retries: Further attempts after the first.
        backoff: Seconds of the first pause.
        encoding: `png`, which is exact, or `jpeg`.
        quality: Of the JPEG, 1 to 100.
        token_variable: Name of the environment variable with a token, sent as `Authorization: Bearer ...`; the token
            itself never enters a config.

    Raises:
        ConfigurationError: One of them cannot be used, or the variable is not set.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        batch_size: int = 8,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        encoding: Literal["png", "jpeg"] = "png",
        quality: int = 95,
        token_variable: str | None = None,
    ) -> None:
        super().__init__()
        self.url = _check_url(url)
        if encoding not in ("png", "jpeg"):
            raise ConfigurationError(f"encoding={encoding!r} is not known; write png or jpeg")
        if min(batch_size, concurrency) < 1 or min(retries, backoff) < 0 or not timeout > 0:
            raise ConfigurationError(
                "HTTPReward: batch_size and concurrency must be at least 1, timeout positive, and retries and backoff "
                "not negative"
            )
        if token_variable is not None and token_variable not in os.environ:
            raise ConfigurationError(f"the environment variable {token_variable} is not set; put the token there")
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.encoding = encoding
        self.quality = check_quality(quality)
        self.token_variable = token_variable

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, clamped and rounded to bytes, to `(B,)`.

        Raises:
            RewardServiceError: The service gave no scores for some prompts.
        """
        files = [self._encode(picture) for picture in to_pil(images)]
        batches = [slice(start, start + self.batch_size) for start in range(0, len(files), self.batch_size)]
        given_up = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [pool.submit(self._score, files[batch], prompts[batch], given_up) for batch in batches]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return torch.cat([future.result() for future in futures]).to(images.device)
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, picture: Image.Image) -> str:
        file = io.BytesIO()
        picture.save(file, self.encoding, **({"quality": self.quality} if self.encoding == "jpeg" else {}))
        return base64.b64encode(file.getvalue()).decode("ascii")

    def _score(self, files: list[str], prompts: Sequence[str], given_up: threading.Event) -> Tensor:
        """Scores `(b,)` of one request, which is not tried again once the others have given up."""
        metadata = [dict(getattr(prompt, "metadata", {})) for prompt in prompts]
        content = {"images": files, "prompts": [str(prompt) for prompt in prompts], "metadata": metadata}
        answer = self._ask(json.dumps(content, default=str).encode(), prompts, given_up)
        try:
            scores = json.loads(answer)["scores"]
            if not all(type(score) in (int, float) for score in scores):
                raise ValueError("its scores are not numbers")
            return parse_scores(scores, prompts, "it")
        except (ValueError, TypeError, KeyError) as error:
            start = answer[:200].decode("utf-8", "replace")
            raise RewardServiceError(
                f'{self.url} was to answer {{"scores": [...]}} with {len(prompts)} finite numbers for '
                f"{quote_prompts(prompts)}, and answered {start!r} ({error})"
            ) from error

    def _ask(self, content: bytes, prompts: Sequence[str], given_up: threading.Event) -> bytes:
        """The answer's body, tried again where that may help."""
        for attempt in range(self.retries + 1):
            try:
                return self._post(content)
            except (OSError, HTTPException) as error:
                pause = min(LONGEST_PAUSE, max(self.backoff * 2**attempt, _retry_after(error)))
                if attempt == self.retries or not _is_transient(error) or given_up.wait(pause):
                    tries = f"{attempt + 1} attempt{'s' * (attempt > 0)}"
                    raise RewardServiceError(
                        f"{self.url} gave no scores for {quote_prompts(prompts)} after {tries}: {_reason(error)}"
                    ) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _post(self, content: bytes) -> bytes:
        """One attempt; the whole of it ends within the time limit, to the length of one wait for data."""
        request = urllib.request.Request(self.url, content, self._headers(), method="POST")
        deadline = time.monotonic() + self.timeout
        body = b""
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
            while piece := answer.read1(65536):
                body += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete answer within {self.timeout:g} s")
        return body

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_variable]}"
        return headers


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive empty, and take the token along."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the status becomes the error."""


def _is_transient(error: Exception) -> bool:
    return error.code in _TRANSIENT if isinstance(error, urllib.error.HTTPError) else True


def _retry_after(error: Exception) -> float:
    """Seconds that the service asks to be left alone."""
    headers: Mapping[str, Any] = getattr(error, "headers", None) or {}
    seconds = str(headers.get("Retry-After", ""))
    return float(seconds) if seconds.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    if not isinstance(error, urllib.error.HTTPError):
        return str(getattr(error, "reason", error)) or type(error).__name__
    with error:
        return f"status {error.code} {error.reason}: {error.read(200).decode('utf-8', 'replace')!r}"


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"url={url!r} is not the address of a service; write http://host:port/path")
    if parts.username or parts.password:
        raise ConfigurationError("url holds a password, which would be saved with the config; use token_variable")
    return url
