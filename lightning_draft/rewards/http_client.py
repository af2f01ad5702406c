"""HTTP requests of rewards: URLs without secrets, attempts with a time limit, and repetition after temporary errors."""

import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, IncompleteRead
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from lightning_draft.errors import ConfigurationError
from lightning_draft.redaction import HIDDEN

Result = TypeVar("Result")

LARGEST_ANSWER = 1 << 26
LONGEST_PAUSE = 60.0
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_VARIABLE = re.compile(r"\{(\w+)\}")
_SECRET = re.compile(r"key|token|secret|passw|pwd|auth|sig|credential", re.IGNORECASE)


class FailedRequestError(RuntimeError):
    """No attempt of a request was successful; the message gives the number of attempts and the last error."""


def check_url(url: str) -> str:
    """Return `url` if it is the address of a service and contains no secret.

    Raises:
        ConfigurationError: It is not an HTTP address, it contains a password or a key in plain text, or an environment
            variable that it names is not set.
    """
    shown = redact(url)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[!-~]+", url):
        raise ConfigurationError(f"url={shown!r} is not the address of a service; write http://host:port/path")
    try:
        parts.port  # noqa: B018 (reading it checks it)
    except ValueError as error:
        raise ConfigurationError(f"url={shown!r}: {error}; write http://host:port/path") from error
    if parts.username or parts.password:
        raise ConfigurationError("url contains a password, which would be saved with the config; use token_variable")
    for name, value in parse_qsl(parts.query):
        if _SECRET.search(name) and not _VARIABLE.fullmatch(value):
            raise ConfigurationError(
                f"url contains the value of {name!r}, which would be saved with the config; put it into an environment "
                f"variable and write {shown}?{name}={{VARIABLE}}, or use token_variable"
            )
    expand_url(url)
    return url


def expand_url(url: str) -> str:
    """Replace each `{VARIABLE}` by the environment variable's value.

    Raises:
        ConfigurationError: A variable is not set, or its value cannot be part of a URL.
    """
    for name in _VARIABLE.findall(url):
        if name not in os.environ:
            raise ConfigurationError(f"the environment variable {name}, which url names, is not set; export it")
        if not re.fullmatch(r"[!-~]*", os.environ[name]):
            raise ConfigurationError(
                f"the environment variable {name}, which url names, has spaces or special characters; write them as "
                "%20 and so on"
            )
    return _VARIABLE.sub(lambda match: os.environ[match[1]], url)


def hide_secrets(text: str, url: str, token_variable: str | None) -> str:
    """Replace the values of the environment variables of a request, which a server may repeat in its answer."""
    names = [*_VARIABLE.findall(url), *([] if token_variable is None else [token_variable])]
    secrets = {os.environ.get(name, "").strip() for name in names} - {""}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact(url: str) -> str:
    """Return the address without user name, password, query and fragment, for messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else url.partition("?")[0]


def check_token(variable: str) -> str:
    """Return the name of an environment variable that contains a token.

    Raises:
        ConfigurationError: It is not set, empty, or cannot be sent in a header.
    """
    token = os.environ.get(variable)
    if token is None:
        raise ConfigurationError(f"the environment variable {variable} is not set; put the token there")
    if not re.fullmatch(r"[!-~]+", token.strip()):
        raise ConfigurationError(
            f"the environment variable {variable} contains no valid token: it is empty, or has spaces "
            "or special characters"
        )
    return variable


def json_headers(token_variable: str | None) -> dict[str, str]:
    """Return the headers of a JSON request, with the token of an environment variable if one is named."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token_variable is not None:
        headers["Authorization"] = f"Bearer {os.environ[token_variable].strip()}"
    return headers


def post(url: str, content: bytes, headers: Mapping[str, str], timeout: float) -> bytes:
    """Send one request and return the body of the answer.

    Args:
        url: Address.
        content: Body of the request.
        headers: Its headers.
        timeout: Seconds for the whole attempt, and for each wait for data within it.

    Raises:
        OSError: There is no connection, no answer in time, or a status that is an error.
        HTTPException: The answer is incomplete or not valid.
    """
    request = urllib.request.Request(url, content, dict(headers), method="POST")
    deadline = time.monotonic() + timeout
    body = bytearray()
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as answer:
        while piece := answer.read1(65536):
            body += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete answer within {timeout:g} s")
            if len(body) > LARGEST_ANSWER:
                raise HTTPException(f"the answer is longer than {LARGEST_ANSWER} bytes")
        expected = answer.headers.get("Content-Length", "")
    if expected.isdecimal() and len(body) < int(expected):
        raise IncompleteRead(bytes(body), int(expected) - len(body))
    return bytes(body)


def with_retries(
    send: Callable[[], Result], retries: int, backoff: float, stopped: threading.Event | None = None
) -> Result:
    """Return the result of `send`, which is called again after temporary failures.

    The pauses are `backoff`, `2 backoff`, `4 backoff`, ... seconds, or those of the `Retry-After` header, at most a
    minute.

    Args:
        send: One attempt, such as a call of `post`.
        retries: Further attempts after the first, at least 0.
        backoff: Length of the first pause in seconds, at least 0.
        stopped: Once it is set, no further attempt is made.

    Raises:
        FailedRequestError: A failure is permanent, or the last attempt failed.
    """
    stopped = threading.Event() if stopped is None else stopped
    for attempt in range(retries + 1):
        try:
            return send()
        except (OSError, HTTPException) as error:
            pause = min(LONGEST_PAUSE, max(backoff * 2**attempt, retry_after(error)))
            if attempt == retries or not is_transient(error) or stopped.wait(pause):
                attempts = f"{attempt + 1} attempt{'s' * (attempt > 0)}"
                raise FailedRequestError(f"{attempts}: {reason(error)}") from None
    raise AssertionError("unreachable: the last attempt returns or raises")


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _TRANSIENT
    return not isinstance(_cause(error), ssl.SSLCertVerificationError)


def retry_after(error: Exception) -> float:
    """Return the seconds in the answer's `Retry-After` header, 0 if there is none."""
    headers = error.headers if isinstance(error, urllib.error.HTTPError) else None
    seconds = "" if headers is None else str(headers.get("Retry-After", ""))
    return float(seconds) if seconds.isdecimal() else 0.0


def reason(error: Exception) -> str:
    """Describe a failure for a message."""
    if isinstance(error, urllib.error.HTTPError):
        with error:
            return f"status {error.code} {error.reason}: {_start_of(error)!r}"
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{cause}; install the service's certificate, or name its file in the variable SSL_CERT_FILE"
    if isinstance(error, IncompleteRead):
        return f"the answer was cut short: {len(error.partial)} bytes arrived and {error.expected} are missing"
    return str(cause) or type(error).__name__


def _start_of(error: urllib.error.HTTPError) -> str:
    """Return the start of the body of an answer, empty if it does not arrive."""
    try:
        return error.read(200).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the request would arrive without its body, and the token would be sent to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Return None, so that the status becomes the error."""


def _cause(error: Exception) -> object:
    return error.reason if isinstance(error, urllib.error.URLError) else error
