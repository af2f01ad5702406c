"""A client of OpenAI-compatible chat-completions endpoints: a cache on disk, a rate limit and a count of the cost."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_draft.arguments import at_least, integer_at_least, positive
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.rewards.http_client import (
    check_token,
    check_url,
    expand_url,
    json_headers,
    post,
    redact,
    with_retries,
)
from lightning_draft.rewards.vlm_answer import ChatAnswer, MalformedAnswerError

_PATH = "/chat/completions"


@dataclass(frozen=True)
class ChatEndpoint:
    """A chat-completions endpoint with the protocol of OpenAI: vLLM, Ollama, or a hosted model.

    Args:
        url: Address of the API, such as `http://localhost:8000/v1`; `/chat/completions` is appended. A secret in it is
            written as the name of an environment variable in braces.
        model: Name of the model, as the server knows it.
        token_variable: Name of the environment variable with the API key, sent as `Authorization: Bearer ...`; the key
            is never saved or printed.
        cache: Folder of the cache, created if it is missing; null for no cache. An answer is stored under the hash of
            the address and the whole request, including images, so that a repeated or resumed run makes no request
            twice.
        concurrency: Largest number of requests at the same time from each process.
        requests_per_minute: Largest rate of requests of each process, retries included; null for no limit.
        timeout: Seconds for one attempt.
        retries: Further attempts after the first if there is no connection, no complete answer in time, no readable
            score in the answer, or status 408, 425, 429, 500, 502, 503 or 504.
        backoff: Length of the first pause in seconds; the pauses double, and are at least those of `Retry-After`.
        max_tokens: Largest number of tokens of the answer; models that reason first need hundreds.
        request: Further fields of the request, such as `{max_completion_tokens: 16, max_tokens: null}`; null removes a
            field.
        input_price: Price of a million input tokens, for the cost in the log.
        output_price: Price of a million output tokens.

    Raises:
        ConfigurationError: An argument is not valid, or an environment variable is not set.
    """

    url: str
    model: str
    token_variable: str | None = None
    cache: str | None = "judge_cache"
    concurrency: int = 4
    requests_per_minute: float | None = None
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    max_tokens: int = 16
    request: dict[str, Any] | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        check_url(self.url)
        if not self.model:
            raise ConfigurationError("model='' is empty; write the name of a model that the endpoint serves")
        for name, minimum in (("concurrency", 1), ("max_tokens", 1), ("retries", 0)):
            integer_at_least(name, getattr(self, name), minimum)
        for name in ("backoff", "input_price", "output_price"):
            at_least(name, getattr(self, name), 0)
        positive("timeout", self.timeout)
        if self.requests_per_minute is not None:
            positive("requests_per_minute", self.requests_per_minute)
        if self.token_variable is not None:
            check_token(self.token_variable)

    @property
    def address(self) -> str:
        """The address of the requests, without the values of environment variables."""
        base, question, query = self.url.partition("?")
        base = base.rstrip("/")
        return (base if base.endswith(_PATH) else base + _PATH) + question + query

    def body(self, content: Sequence[Mapping[str, Any]]) -> str:
        """Return a request with one message; equal messages give equal text."""
        fields = {
            "model": self.model,
            "messages": [{"role": "user", "content": list(content)}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            **(self.request or {}),
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None}, sort_keys=True)


@dataclass
class Usage:
    """What a judge has used since the process started.

    Args:
        requests: Requests that were sent, retries included.
        cached: Answers from the cache.
        input_tokens: Tokens of the requests, as the server counts them.
        output_tokens: Tokens of the answers.
    """

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class ChatClient:
    """Ask an endpoint for scores; it may be called from several threads.

    Args:
        endpoint: The endpoint.

    Attributes:
        usage: What has been used.
    """

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self.endpoint = endpoint
        self.usage = Usage()
        self._lock = threading.Lock()
        self._next_start = 0.0

    def ask(
        self, content: Sequence[Mapping[str, Any]], read: Callable[[ChatAnswer], float], stopped: threading.Event
    ) -> float:
        """Return the value that `read` finds in the answer to a message.

        Args:
            content: Parts of the message, in the format of the API.
            read: Raises `MalformedAnswerError` if the answer has no value; the request is then repeated.
            stopped: Once it is set, no further request is made.

        Raises:
            FailedRequestError: All attempts failed.
        """
        body = self.endpoint.body(content)
        stored = self._load(body, read)
        if stored is not None:
            return stored
        answer, value = with_retries(
            lambda: self._send(body, read, stopped), self.endpoint.retries, self.endpoint.backoff, stopped
        )
        self._store(body, answer)
        return value

    def costs(self) -> dict[str, float]:
        """Return the usage by name, with the cost if there are prices."""
        endpoint, usage = self.endpoint, self.usage
        cost = (usage.input_tokens * endpoint.input_price + usage.output_tokens * endpoint.output_price) / 1e6
        priced = {"cost": cost} if endpoint.input_price or endpoint.output_price else {}
        return {**{name: float(value) for name, value in vars(usage).items()}, **priced}

    def _send(
        self, body: str, read: Callable[[ChatAnswer], float], stopped: threading.Event
    ) -> tuple[ChatAnswer, float]:
        self._wait_for_turn(stopped)
        with self._lock:
            self.usage.requests += 1
        headers = json_headers(self.endpoint.token_variable)
        answer = ChatAnswer.from_json(
            post(expand_url(self.endpoint.address), body.encode(), headers, self.endpoint.timeout)
        )
        with self._lock:
            self.usage.input_tokens += answer.input_tokens
            self.usage.output_tokens += answer.output_tokens
        return answer, read(answer)

    def _wait_for_turn(self, stopped: threading.Event) -> None:
        """Wait until a request may start, so that starts are at least `60 / requests_per_minute` seconds apart."""
        if self.endpoint.requests_per_minute is None:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + 60 / self.endpoint.requests_per_minute
        if stopped.wait(start - time.monotonic()):
            raise InterruptedError("stopped")

    def _path(self, body: str) -> Path | None:
        if self.endpoint.cache is None:
            return None
        key = hashlib.sha256(f"{redact(self.endpoint.address)}\n{body}".encode()).hexdigest()
        return Path(self.endpoint.cache) / key[:2] / f"{key[2:]}.json"

    def _load(self, body: str, read: Callable[[ChatAnswer], float]) -> float | None:
        path = self._path(body)
        if path is None:
            return None
        try:
            value = read(ChatAnswer.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MalformedAnswerError):
            return None
        with self._lock:
            self.usage.cached += 1
        return value

    def _store(self, body: str, answer: ChatAnswer) -> None:
        path = self._path(body)
        if path is not None:
            with self._lock, atomic_path(path) as partial:
                partial.write_text(json.dumps(answer.to_dict()), encoding="utf-8")
