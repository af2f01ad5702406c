"""A vision-language model as a judge, behind a chat-completions endpoint.

References:
    Liu et al., "G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment", arXiv:2303.16634: the score is the
        expected value over the numbers of a scale, weighted with their token probabilities.
    Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685: position bias, and
        comparison in both orders.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_draft.arguments import boolean, integer, one_of, positive
from lightning_draft.errors import ConfigurationError, RewardServiceError
from lightning_draft.rewards.background import run_all
from lightning_draft.rewards.blackbox import to_base64, to_pil
from lightning_draft.rewards.http_client import FailedRequestError, hide_secrets, redact
from lightning_draft.rewards.inputs import quote_prompts
from lightning_draft.rewards.jpeg_codec import check_quality
from lightning_draft.rewards.pairwise import PairwiseReward
from lightning_draft.rewards.vlm_answer import ChatAnswer, read_preference, read_score
from lightning_draft.rewards.vlm_client import ChatClient, ChatEndpoint

if TYPE_CHECKING:
    from PIL import Image

TEMPLATE = """\
Rate how well this image fits the prompt, on a scale from {low} to {high}: {low} means that it does not show what the \
prompt describes or is badly damaged, {high} that it shows all of it and has no visible faults.
Prompt: {prompt}
Answer with one number from {low} to {high} and nothing else."""

PAIR_TEMPLATE = """\
Which image fits the prompt better and has fewer visible faults, the first image (A) or the second image (B)?
Prompt: {prompt}
Answer with one letter, A or B, and nothing else."""

Part = Mapping[str, Any]


class VLMJudge(PairwiseReward):
    """Score images with a vision-language model. Black box: for policy gradients or evaluation.

    The model is asked for a number from `low` to `high`. If the answer has log-probabilities, the score is the expected
    value over the scale, `sum_s s p(s) / sum_s p(s)` with the probabilities of the number's token; otherwise, and for
    scales with numbers of two digits, it is the number itself.

    To compare two images, the model is asked for A or B. The preference is the probability of A, or 0 or 1 without
    log-probabilities; with `both_orders` it is the mean over both orders of the images, because models prefer one
    position.

    A failure that remains after all attempts ends the run with an error that names the prompt; a missing score is never
    replaced. Answers are cached, so that the run can be continued without asking again.

    Args:
        endpoint: The endpoint, the model and the limits of the requests.
        template: Question for a score; `{prompt}`, `{low}` and `{high}` are replaced.
        pair_template: Question for a preference; `{prompt}` is replaced.
        low: Lowest number of the scale.
        high: Highest number of the scale.
        both_orders: Whether each pair is compared in both orders, with two requests.
        encoding: `jpeg`, or `png`, which is exact and larger.
        quality: Quality of the JPEG, 1 to 100.
        time_limit: Seconds for all requests of one call including repetitions; None for no limit.

    Raises:
        ConfigurationError: An argument is not valid, or an environment variable is not set.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        template: str = TEMPLATE,
        pair_template: str = PAIR_TEMPLATE,
        low: int = 1,
        high: int = 5,
        both_orders: bool = True,
        encoding: Literal["jpeg", "png"] = "jpeg",
        quality: int = 95,
        time_limit: float | None = None,
    ) -> None:
        super().__init__()
        if not integer("low", low) < integer("high", high):
            raise ConfigurationError(f"high={high} must be greater than low={low}; write for example {low + 4}")
        self.low = low
        self.high = high
        self.template = _check_template("template", template)
        self.pair_template = _check_template("pair_template", pair_template)
        self.both_orders = boolean("both_orders", both_orders)
        self.encoding = one_of("encoding", encoding, ("jpeg", "png"))
        self.quality = check_quality(quality)
        self.time_limit = None if time_limit is None else positive("time_limit", time_limit)
        self.judge = {"url": redact(endpoint.url), "model": endpoint.model, "request": endpoint.request}
        self.client = ChatClient(endpoint)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `(B, 3, H, W)`, clamped to [0, 1] and rounded to bytes, to `(B,)` in `[low, high]`.

        Raises:
            RewardServiceError: The endpoint gave no score for some prompts.
        """
        questions = [self._question(self.template, prompt) for prompt in prompts]
        messages = [[question, self._part(image)] for question, image in zip(questions, to_pil(images), strict=True)]
        return self._ask(messages, prompts, partial(read_score, low=self.low, high=self.high)).to(images.device)

    def prefer(self, first: "Sequence[Image.Image]", second: "Sequence[Image.Image]", prompts: Sequence[str]) -> Tensor:
        """Return the probabilities `(B,)` that the first image fits its prompt better than the second.

        Args:
            first: `B` images.
            second: `B` images.
            prompts: `B` prompts.

        Raises:
            RewardServiceError: The endpoint gave no preference for some prompts.
        """
        encoded = {id(image): self._part(image) for image in (*first, *second)}
        pairs = [(encoded[id(a)], encoded[id(b)]) for a, b in zip(first, second, strict=True)]
        questions = [self._question(self.pair_template, prompt) for prompt in prompts]
        messages = [[question, a, b] for question, (a, b) in zip(questions, pairs, strict=True)]
        if not self.both_orders:
            return self._ask(messages, prompts, read_preference)
        swapped = [[question, b, a] for question, (a, b) in zip(questions, pairs, strict=True)]
        wins = self._ask(messages + swapped, [*prompts, *prompts], read_preference)
        return (wins[: len(prompts)] + 1 - wins[len(prompts) :]) / 2

    def usage(self) -> Mapping[str, float]:
        """Return the requests, cached answers, tokens and, if there are prices, the cost since the process started."""
        return self.client.costs()

    def _ask(
        self, messages: Sequence[Sequence[Part]], prompts: Sequence[str], read: Callable[[ChatAnswer], float]
    ) -> Tensor:
        stopped = threading.Event()
        calls = [
            partial(self._ask_one, message, prompt, read, stopped)
            for message, prompt in zip(messages, prompts, strict=True)
        ]
        try:
            return torch.tensor(run_all(calls, self.client.endpoint.concurrency, self.time_limit))
        except TimeoutError as error:
            raise RewardServiceError(
                f"{self.judge['url']} did not score {quote_prompts(prompts)} within time_limit={self.time_limit:g} s"
            ) from error
        finally:
            stopped.set()

    def _ask_one(
        self, message: Sequence[Part], prompt: str, read: Callable[[ChatAnswer], float], stopped: threading.Event
    ) -> float:
        try:
            return self.client.ask(message, read, stopped)
        except FailedRequestError as error:
            endpoint = self.client.endpoint
            shown = hide_secrets(str(error), endpoint.url, endpoint.token_variable)
            raise RewardServiceError(
                f"{self.judge['url']} gave no score for {quote_prompts([prompt])} after {shown}"
            ) from None

    def _question(self, template: str, prompt: str) -> Part:
        text = template.replace("{low}", str(self.low)).replace("{high}", str(self.high))
        return {"type": "text", "text": text.replace("{prompt}", prompt)}

    def _part(self, image: "Image.Image") -> Part:
        content = to_base64(image, self.encoding, self.quality)
        return {"type": "image_url", "image_url": {"url": f"data:image/{self.encoding};base64,{content}"}}


def _check_template(name: str, template: str) -> str:
    if "{prompt}" not in template:
        raise ConfigurationError(f"{name}={template[:60]!r} must contain {{prompt}}, which the prompt replaces")
    return template
