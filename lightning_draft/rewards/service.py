"""A reward from an HTTP service: a preference model, a vision-language judge, or any other that returns numbers.

A request is `POST` with `Content-Type: application/json`:

    {"images": ["<base64 of a PNG or JPEG file>", ...],
     "prompts": ["a cat", ...],
     "metadata": [{"count": 2}, ...]}

The three lists have the same length, at most `batch_size`. `metadata` contains the columns of the prompt's row, or `{}`
if there are none. The answer is status 200 and `{"scores": [0.7, ...]}`, one finite number per image, in order.
`examples/judge_server.py` is an example service.
"""

import json
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_draft.arguments import at_least, integer_at_least, one_of, positive
from lightning_draft.errors import RewardServiceError
from lightning_draft.prompt import metadata_of
from lightning_draft.rewards.background import run_all
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.blackbox import parse_scores, to_base64, to_pil
from lightning_draft.rewards.http_client import (
    FailedRequestError,
    check_token,
    check_url,
    expand_url,
    hide_secrets,
    json_headers,
    post,
    redact,
    with_retries,
)
from lightning_draft.rewards.inputs import quote_prompts
from lightning_draft.rewards.jpeg_codec import check_quality


class HTTPReward(Reward):
    """Score images with an HTTP service, in batches. Black box: for policy gradients or evaluation.

    A request is repeated if there was no connection, no complete answer in time, or status 408, 425, 429, 500, 502, 503
    or 504. The pauses are `backoff`, `2 backoff`, `4 backoff`, ... seconds, or those of the service's `Retry-After`
    header, at most a minute. Any other failure, or a failure of the last attempt, ends the run with an error that names
    the prompts: a missing score is never replaced by 0. The service defines the range of scores.

    Args:
        url: `http://` or `https://`. A secret in it is written as the name of an environment variable in braces,
            `https://host/score?key={JUDGE_KEY}`, so that it appears in no config, file or message.
        batch_size: Largest number of images in one request.
        concurrency: Largest number of requests at the same time from each process.
        timeout: Seconds for one attempt.
        retries: Further attempts after the first.
        backoff: Length of the first pause in seconds.
        encoding: `png`, which is exact, or `jpeg`.
        quality: Quality of the JPEG, 1 to 100.
        token_variable: Name of the environment variable with a token, sent as `Authorization: Bearer ...`; the token
            itself is never saved.
        time_limit: Seconds for all requests of one call including repetitions; None for no limit.

    Raises:
        ConfigurationError: An argument is not valid, or an environment variable is not set.
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
        time_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.url = check_url(url)
        self.batch_size = integer_at_least("batch_size", batch_size, 1)
        self.concurrency = integer_at_least("concurrency", concurrency, 1)
        self.timeout = positive("timeout", timeout)
        self.retries = integer_at_least("retries", retries, 0)
        self.backoff = at_least("backoff", backoff, 0)
        self.encoding = one_of("encoding", encoding, ("png", "jpeg"))
        self.quality = check_quality(quality)
        self.token_variable = token_variable if token_variable is None else check_token(token_variable)
        self.time_limit = None if time_limit is None else positive("time_limit", time_limit)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, clamped to [0, 1] and rounded to bytes, to `(B,)`.

        Raises:
            RewardServiceError: The service gave no scores for some prompts.
        """
        files = [to_base64(image, self.encoding, self.quality) for image in to_pil(images)]
        batches = [slice(start, start + self.batch_size) for start in range(0, len(files), self.batch_size)]
        stopped = threading.Event()
        calls = [partial(self._score, files[batch], prompts[batch], stopped) for batch in batches]
        try:
            return torch.cat(run_all(calls, self.concurrency, self.time_limit)).to(images.device)
        except TimeoutError as error:
            raise RewardServiceError(
                f"{redact(self.url)} did not score {quote_prompts(prompts)} within time_limit={self.time_limit:g} s"
            ) from error
        finally:
            stopped.set()

    def _score(self, files: list[str], prompts: Sequence[str], stopped: threading.Event) -> Tensor:
        """Return the scores `(b,)` of one request; it is not repeated once `stopped` is set."""
        metadata = [to_json(dict(metadata_of(prompt))) for prompt in prompts]
        content = {"images": files, "prompts": [str(prompt) for prompt in prompts], "metadata": metadata}
        answer = self._ask(json.dumps(content, allow_nan=False).encode(), prompts, stopped)
        try:
            scores = json.loads(answer)["scores"]
            if not all(type(score) in (int, float) for score in scores):
                raise ValueError("its scores are not numbers")
            return parse_scores(scores, prompts, "it")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            start = self._hide(answer.decode("utf-8", "replace"))[:200]
            raise RewardServiceError(
                f'{redact(self.url)} must answer {{"scores": [...]}} with {len(prompts)} finite numbers for '
                f"{quote_prompts(prompts)}, and answered {start!r} ({self._hide(str(error))})"
            ) from None

    def _ask(self, content: bytes, prompts: Sequence[str], stopped: threading.Event) -> bytes:
        """Return the body of the answer; repeat the request after a temporary failure."""
        send = partial(post, expand_url(self.url), content, json_headers(self.token_variable), self.timeout)
        try:
            return with_retries(send, self.retries, self.backoff, stopped)
        except FailedRequestError as error:
            raise RewardServiceError(
                f"{redact(self.url)} gave no scores for {quote_prompts(prompts)} after {self._hide(str(error))}"
            ) from None

    def _hide(self, text: str) -> str:
        return hide_secrets(text, self.url, self.token_variable)


def to_json(value: Any) -> Any:
    """Convert metadata to values that JSON supports.

    Arrays, tensors and numpy numbers become lists and numbers, NaN and infinity become null, and any other object
    becomes its string.
    """
    try:
        return _to_json(value)
    except RecursionError:
        return str(type(value).__name__)


def _to_json(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        value = value.tolist()
    if isinstance(value, float):
        return value if -float("inf") < value < float("inf") else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_to_json(item) for item in value]
    return str(value)
