"""Remove secrets from text that is written to files or printed."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

HIDDEN = "REDACTED"
_SECRET = re.compile(
    r"(?:^|[_\-])(?:(?:api|access|secret|private)[_\-]?key|apikey|token|bearer|cookie|secret|passw(?:or)?d|passphrase|authorization|credentials?|sig(?:nature)?)$",
    re.I,
)
_SECRET_IN_URL = re.compile(rf"{_SECRET.pattern}|^key$", re.I)


def redact(value: Any, name: str = "") -> Any:
    """Return `value` with secrets replaced by `REDACTED`, in mappings and lists too.

    Secrets are strings under names such as `api_key`, `token` and `password`, and in URLs the user part and parameters
    with such names.

    Args:
        value: Any value; only strings are changed.
        name: The option that has the value.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _SECRET.search(name) else _redact_url(value)


def _redact_url(text: str) -> str:
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    user, at, host = parts.netloc.rpartition("@")
    query = parse_qsl(parts.query, keep_blank_values=True)
    if not user and not any(_SECRET_IN_URL.search(key) for key, _ in query):
        return text
    hidden = [(key, HIDDEN if _SECRET_IN_URL.search(key) else item) for key, item in query]
    netloc = f"{HIDDEN}{at}{host}" if user else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(hidden, quote_via=quote)))
