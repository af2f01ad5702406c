"""Answers of chat-completions endpoints: their text, their token probabilities, and the score that they give.

The format is that of OpenAI's `POST /v1/chat/completions`, which vLLM, Ollama and most hosts of models follow. With
`logprobs` and `top_logprobs` in the request, `choices[0].logprobs.content` lists each token of the answer with its most
probable alternatives; servers without this feature leave the field out.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")
_OF_TOTAL = re.compile(r"(?:/|\bout of)\s*$")
_LETTER = re.compile(r"(?<![A-Za-z])[AB](?![A-Za-z])")
_END_OF_REASONING = "</think>"


class MalformedAnswerError(HTTPException):
    """An answer cannot be read as a score; asking again may help."""


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Args:
        text: Its text.
        log_probs: Log-probabilities of the most probable tokens at its position, by their text; the same text may
            belong to several tokens, whose probabilities are added.
    """

    text: str
    log_probs: Mapping[str, float]


@dataclass(frozen=True)
class ChatAnswer:
    """The answer of a chat-completions endpoint.

    Args:
        text: The text.
        tokens: Its tokens; empty if the server sends no log-probabilities.
        input_tokens: Number of tokens of the request, as the server counts them.
        output_tokens: Number of tokens of the answer.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def from_json(cls, body: bytes) -> "ChatAnswer":
        """Read the body of a response.

        Raises:
            MalformedAnswerError: It has another format, or no text.
        """
        try:
            content = json.loads(body)
            choice = content["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise ValueError(f"its text is {text!r}, finish_reason={choice.get('finish_reason')!r}")
            usage = content.get("usage") or {}
            counts = (max(0, int(usage.get(name) or 0)) for name in ("prompt_tokens", "completion_tokens"))
            return cls(text, _tokens(choice.get("logprobs")), *counts)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            start = body[:200].decode("utf-8", "replace")
            raise MalformedAnswerError(f"the answer {start!r} is not a chat completion ({error!r})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        tokens = [[token.text, dict(token.log_probs)] for token in self.tokens]
        return {"text": self.text, "tokens": tokens, "usage": [self.input_tokens, self.output_tokens]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ChatAnswer":
        """Restore an answer from `to_dict`."""
        tokens = tuple(
            Token(text, {name: _log_prob(value) for name, value in log_probs.items()})
            for text, log_probs in values["tokens"]
        )
        return cls(values["text"], tokens, *values["usage"])


def read_score(answer: ChatAnswer, low: int, high: int) -> float:
    """Return the score of an answer that contains one number from `low` to `high`.

    If the log-probabilities of the number's token are known and the scale has only numbers of one digit, the score is
    the expected value over the scale, `sum_s s p(s) / sum_s p(s)`; otherwise it is the number. Text before `</think>`
    and a total, as in `4/5` and `4 out of 5`, are ignored.

    Raises:
        MalformedAnswerError: There is no such number, or more than one.
    """
    found = [
        match
        for match in _NUMBER.finditer(answer.text, _start(answer.text))
        if not _OF_TOTAL.search(answer.text, 0, match.start())
    ]
    if len(found) != 1 or not low <= float(found[0][0]) <= high:
        raise MalformedAnswerError(f"the answer {answer.text[:200]!r} must contain one number from {low} to {high}")
    scale = {str(value): float(value) for value in range(low, high + 1)} if low >= 0 and high <= 9 else {}
    return _expected(answer, found[0], scale, float(found[0][0]))


def read_preference(answer: ChatAnswer) -> float:
    """Return the probability of A if the answer is A or B: 1 or 0 if log-probabilities are not known.

    Raises:
        MalformedAnswerError: The answer contains neither of the letters, or both.
    """
    found = list(_LETTER.finditer(answer.text, _start(answer.text)))
    if len({match[0] for match in found}) != 1:
        raise MalformedAnswerError(f"the answer {answer.text[:200]!r} must be A or B")
    return _expected(answer, found[0], {"A": 1.0, "B": 0.0}, float(found[0][0] == "A"))


def _expected(answer: ChatAnswer, match: re.Match[str], values: Mapping[str, float], plain: float) -> float:
    """Return the expected value over the alternatives of the matched token, or `plain` if they are not known."""
    token = _token_at(answer, match.start())
    if token is None or token.text.strip() != match[0] or match[0] not in values:
        return plain
    masses = {text: math.exp(value) for text, value in token.log_probs.items() if text in values}
    total = sum(masses.values())
    return sum(values[text] * mass for text, mass in masses.items()) / total if total > 0 else plain


def _start(text: str) -> int:
    place = text.rfind(_END_OF_REASONING)
    return 0 if place < 0 else place + len(_END_OF_REASONING)


def _token_at(answer: ChatAnswer, offset: int) -> Token | None:
    """Return the token that contains a character of the text; None if the tokens do not spell the text."""
    end = -"".join(token.text for token in answer.tokens).find(answer.text)
    for token in answer.tokens if end <= 0 else ():
        end += len(token.text)
        if offset < end:
            return token
    return None


def _tokens(log_probs: Any) -> tuple[Token, ...]:
    tokens = []
    for entry in (log_probs or {}).get("content") or ():
        alternatives: dict[str, float] = {}
        for other in entry.get("top_logprobs") or [entry]:
            text, value = other["token"].strip(), _log_prob(other["logprob"])
            alternatives[text] = _log_add(alternatives[text], value) if text in alternatives else value
        tokens.append(Token("".join(entry["token"]), alternatives))
    return tuple(tokens)


def _log_prob(value: Any) -> float:
    """Return a log-probability, at most 0 but for rounding."""
    number = float(value)
    if not number <= 0.01:
        raise ValueError(f"{number} is not a log-probability")
    return number


def _log_add(first: float, second: float) -> float:
    """Return `log(exp(first) + exp(second))`."""
    high, low = max(first, second), min(first, second)
    return high if high == -math.inf else high + math.log1p(math.exp(low - high))
