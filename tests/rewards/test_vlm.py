"""The vision-language judge against a local server: scores, preferences, cache, limits, failures and costs."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import ChatEndpoint, RewardServiceError, VLMJudge
from lightning_draft.rewards.vlm_answer import ChatAnswer, MalformedAnswerError, read_preference, read_score
from tests.rewards.chat_server import Answer, ChatServer, completion, gray

GRAYS = torch.tensor([0.2, 0.6, 0.8, 0.4])
IMAGES = GRAYS.view(4, 1, 1, 1).expand(4, 3, 8, 8)
PROMPTS = ["a cat", "a dog", "a {low} bird", "a bed"]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], ChatServer]]:
    """Start servers, which are closed afterwards."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[ChatServer] = []

    def start(answer: Answer) -> ChatServer:
        servers.append(ChatServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(server: ChatServer, cache: Path | None = None, **options: Any) -> VLMJudge:
    endpoint = {name: options.pop(name) for name in list(options) if name in ChatEndpoint.__dataclass_fields__}
    folder = None if cache is None else str(cache)
    return VLMJudge(ChatEndpoint(server.url, "tiny-vlm", cache=folder, **{"backoff": 0.01, **endpoint}), **options)


def test_score_is_the_expected_value_over_the_scale(serve: Callable) -> None:
    """Two tokens spell the same number, and tokens that are no number of the scale do not count."""
    log_probs = {"4": math.log(0.3), " 4": math.log(0.2), "5": math.log(0.1), "1": math.log(0.2), "The": math.log(0.2)}
    server = serve(lambda text, images: [("Score:", {}), (" 4", log_probs), (".", {})])
    scores = judge(server)(IMAGES[:1], ["a cat"])
    assert scores.item() == pytest.approx((4 * 0.5 + 5 * 0.1 + 1 * 0.2) / 0.8)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", 4.0),
        ("Score: 3.5", 3.5),
        ("**2**", 2.0),
        ("4/5", 4.0),
        ("I give it 4 out of 5.", 4.0),
        ('{"score": 1}', 1.0),
        ("<think>1 is too low, 2 too</think>\n3", 3.0),
        ([("<think>", {}), ("4", {"4": 0.0}), ("</think>", {}), ("2", {"2": 0.0}), ("<|end|>", {})], 2.0),
    ],
)
def test_number_is_found_in_the_answer(answer: Any, expected: float) -> None:
    assert read_score(ChatAnswer.from_json(completion(answer)), 1, 5) == expected


@pytest.mark.parametrize("answer", ["", "good", "6", "-1", "between 3 and 4", "1 2", "4th", "a4"])
def test_answers_without_one_number_of_the_scale_are_malformed(answer: str) -> None:
    with pytest.raises(MalformedAnswerError, match="must contain one number from 1 to 5"):
        read_score(ChatAnswer(answer), 1, 5)


def test_scales_with_two_digits_use_the_number_itself() -> None:
    """A token "1" may be the number 1 or the start of 10."""
    answer = ChatAnswer.from_json(completion([("1", {"1": -0.1, "9": -2.0}), ("0", {"0": 0.0})]))
    assert read_score(answer, 1, 10) == 10.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A", 1.0),
        ("Image B.", 0.0),
        ([("B", {"A": math.log(0.3), "B": math.log(0.5), "C": math.log(0.2)})], 0.375),
        ("<think>A or B?</think> B", 0.0),
    ],
)
def test_preference_is_the_probability_of_the_letter_a(answer: Any, expected: float) -> None:
    assert read_preference(ChatAnswer.from_json(completion(answer))) == pytest.approx(expected)
    with pytest.raises(MalformedAnswerError, match="must be A or B"):
        read_preference(ChatAnswer("A rather than B"))


def test_request_contains_prompt_image_and_settings(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server = serve(lambda text, images: f"{1 + 4 * gray(images[0]):.2f}")
    options = {"token_variable": "JUDGE_KEY", "request": {"seed": 1, "max_tokens": None}, "encoding": "png"}
    scores = judge(server, **options)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, 1 + 4 * GRAYS, rtol=0, atol=0.02)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    request = server.requests[0]
    assert {name: request.get(name) for name in ("model", "temperature", "seed", "max_tokens", "logprobs")} == {
        **{"model": "tiny-vlm", "temperature": 0, "seed": 1, "max_tokens": None, "logprobs": True}
    }
    texts = [request["messages"][0]["content"][0]["text"] for request in server.requests]
    assert any("Prompt: a {low} bird\n" in text and "from 1 to 5" in text for text in texts)


def test_second_run_makes_no_request(serve: Callable, tmp_path: Path) -> None:
    server = serve(lambda text, images: str(1 + round(4 * gray(images[0]))))
    first = judge(server, tmp_path, input_price=2.0, output_price=10.0)
    scores = first(IMAGES, PROMPTS)
    assert first.usage() == {
        **{"requests": 4, "cached": 0, "input_tokens": 400, "output_tokens": 40},
        "cost": pytest.approx((400 * 2 + 40 * 10) / 1e6),
    }
    second = judge(server, tmp_path)
    assert torch.equal(second(IMAGES, PROMPTS), scores)
    assert second.usage() == {"requests": 0, "cached": 4, "input_tokens": 0, "output_tokens": 0}
    assert len(server.requests) == 4
    judge(server, tmp_path, low=0)(IMAGES[:1], PROMPTS[:1])
    judge(server, tmp_path)(IMAGES[:1] + 0.1, PROMPTS[:1])
    assert len(server.requests) == 6, "another question and another image are new requests"


def test_interrupted_scoring_continues_with_the_missing_images(serve: Callable, tmp_path: Path) -> None:
    failing = {"a bed"}
    server = serve(lambda text, images: 404 if any(prompt in text for prompt in failing) else "3")
    with pytest.raises(RewardServiceError, match="no score for the prompt 'a bed' after 1 attempt: status 404"):
        judge(server, tmp_path, concurrency=1)(IMAGES, PROMPTS)
    failing.clear()
    assert judge(server, tmp_path)(IMAGES, PROMPTS).tolist() == [3.0] * 4
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    "damaged",
    [
        '{"text": ',
        "[]",
        '{"text": "3", "tokens": [["3", [0]]], "usage": [1, 1]}',
        '{"text": "3", "tokens": [["3", {"3": Infinity}]], "usage": [1, 1]}',
    ],
)
def test_damaged_cache_entries_are_replaced(serve: Callable, tmp_path: Path, damaged: str) -> None:
    server = serve(lambda text, images: "3")
    judge(server, tmp_path)(IMAGES[:1], ["a cat"])
    (entry,) = tmp_path.rglob("*.json")
    entry.write_text(damaged)
    assert judge(server, tmp_path)(IMAGES[:1], ["a cat"]).tolist() == [3.0]
    assert judge(server, tmp_path)(IMAGES[:1], ["a cat"]).tolist() == [3.0]
    assert len(server.requests) == 2


@pytest.mark.parametrize("failure", [429, 503, "no number", b"{}", b"<html>", 0.3])
def test_temporary_failures_are_repeated(serve: Callable, failure: Any) -> None:
    script = [failure, "2"]
    server = serve(lambda text, images: script.pop(0))
    model = judge(server, timeout=0.2)
    assert model(IMAGES[:1], ["a cat"]).tolist() == [2.0]
    assert model.usage()["requests"] == 2


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        ("very good", {"retries": 1}, "'a cat' after 2 attempts: the answer 'very good' must contain one number"),
        (429, {"retries": 2}, "'a cat' after 3 attempts: status 429"),
        (401, {}, "'a cat' after 1 attempt: status 401"),
        (b'{"choices": []}', {"retries": 0}, "is not a chat completion"),
        ([("3", {"3": math.nan})], {"retries": 0}, "nan is not a log-probability"),
        ([("3", {"3": math.inf})], {"retries": 0}, "inf is not a log-probability"),
        ([("3", {"3": 800.0})], {"retries": 0}, "800.0 is not a log-probability"),
        (completion([("3", {})]).replace(b'"token": "3"', b'"token": 3'), {"retries": 0}, "is not a chat completion"),
        (completion("3").replace(b"100", b"1e999", 1), {"retries": 0}, "is not a chat completion"),
        (completion("x").replace(b'"x"', b"null"), {"retries": 0}, "its text is None, finish_reason='stop'"),
        (1.0, {"timeout": 0.1, "retries": 0}, "after 1 attempt: timed out"),
        (1.0, {"time_limit": 0.1}, "did not score the prompt 'a cat' within time_limit=0.1 s"),
    ],
)
def test_lasting_failures_name_the_prompt(serve: Callable, answer: Any, options: dict[str, Any], message: str) -> None:
    server = serve(lambda text, images: answer)
    start = time.monotonic()
    with pytest.raises(RewardServiceError, match=message):
        judge(server, **options)(IMAGES[:1], ["a cat"])
    assert time.monotonic() - start < 1


def test_key_appears_in_no_file_and_no_message(
    serve: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the server repeats it."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    script: list[Any] = ["3", "the key sk-secret is not valid"]
    server = serve(lambda text, images: script.pop(0))
    model = judge(server, tmp_path, token_variable="JUDGE_KEY", retries=0)
    model(IMAGES[:1], ["a cat"])
    with pytest.raises(RewardServiceError, match="the key REDACTED is not valid") as raised:
        model(IMAGES[1:2], ["a cat"])
    assert "sk-secret" not in str(raised.value)
    assert all(b"sk-secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_requests_per_minute_limits_the_rate(serve: Callable) -> None:
    server = serve(lambda text, images: "3")
    judge(server, requests_per_minute=1200)(IMAGES, PROMPTS)
    assert server.times[-1] - server.times[0] >= 3 * 0.05 - 0.02


def brighter(text: str, images: list[Image.Image]) -> list[tuple[str, dict[str, float]]]:
    """Prefer brighter images, with a bias for the first position."""
    first = 1 / (1 + math.exp(-4 * (gray(images[0]) - gray(images[1])) - 0.5))
    return [("A" if first > 0.5 else "B", {"A": math.log(first), "B": math.log(1 - first)})]


def test_pairs_are_compared_in_both_orders(serve: Callable) -> None:
    server = serve(brighter)
    table = judge(server, encoding="png").preferences(IMAGES, ["a cat", "a cat", "a dog", "a dog"], 2)
    gap = -0.4 * 4
    both = (1 / (1 + math.exp(-gap - 0.5)) + 1 - 1 / (1 + math.exp(gap - 0.5))) / 2
    expected = torch.tensor([[[0.5, both], [1 - both, 0.5]], [[0.5, 1 - both], [both, 0.5]]])
    torch.testing.assert_close(table, expected, rtol=0, atol=0.01)
    assert len(server.requests) == 4
    once = judge(server, encoding="png", both_orders=False).preferences(IMAGES[:2], ["a cat"] * 2, 2)
    assert once[0, 0, 1].item() == pytest.approx(1 / (1 + math.exp(-gap - 0.5)), abs=0.01)


def test_equal_images_are_a_tie_in_both_orders(serve: Callable) -> None:
    """The bias for a position cancels."""
    table: Tensor = judge(serve(brighter)).preferences(IMAGES[:1].repeat(3, 1, 1, 1), ["a cat"] * 3, 3)
    torch.testing.assert_close(table, torch.full((1, 3, 3), 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChatEndpoint("localhost:8000", "m"), "is not the address of a service"),
        (lambda: ChatEndpoint("http://h/v1?api_key=abc", "m"), "url contains the value of 'api_key'"),
        (lambda: ChatEndpoint("http://h/v1", ""), "model='' is empty"),
        (lambda: ChatEndpoint("http://h/v1", "m", token_variable="NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE is not set"),
        (lambda: ChatEndpoint("http://h/v1", "m", requests_per_minute=0), "requests_per_minute=0 must be a positive"),
        (lambda: VLMJudge(ChatEndpoint("http://h/v1", "m"), low=5), "high=5 must be greater than low=5"),
        (lambda: VLMJudge(ChatEndpoint("http://h/v1", "m"), template="Rate it."), "must contain {prompt}"),
    ],
)
def test_invalid_settings_are_rejected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
