"""Options given from Python, where no parser has checked their types."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import lightning_draft
from lightning_draft import callbacks, rewards
from lightning_draft.cli.hints import alternatives, choices, parameters
from lightning_draft.errors import ConfigurationError
from lightning_draft.models import Guidance, Memory, StableDiffusion
from lightning_draft.models.families import FAMILIES
from lightning_draft.rewards.color import Brightness
from lightning_draft.testing import LinearModel, LinearReward

NEEDED: dict[str, Any] = {
    "captions": ["a cat"],
    "endpoint": rewards.ChatEndpoint("http://localhost", "judge"),
    "function": "math.sqrt",
    "model": LinearModel(),
    "negative": "ugly",
    "positive": "pretty",
    "pretrained": "nowhere/",
    "prompts": ["a", "b", "c"],
    "reward": LinearReward(),
    "rewards": {"a": Brightness(), "b": Brightness()},
    "size": 1,
    "url": "http://localhost",
    "ZScoreSum.rewards": {"a": rewards.WeightedReward(Brightness())},
}
"""Values of options without a default."""


def option_classes() -> Iterator[type]:
    """Yield the public classes whose constructors can be called without a pipeline."""
    for module in (lightning_draft, callbacks, rewards):
        for name in module.__all__:
            kind = getattr(module, name)
            if isinstance(kind, type) and name not in FAMILIES and not inspect.isabstract(kind):
                yield kind


def needed(kind: type, option: str) -> dict[str, Any]:
    """Return values of the other options that a class needs."""
    signature = inspect.signature(kind).parameters.values()
    names = [each.name for each in signature if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    return {name: NEEDED.get(f"{kind.__name__}.{name}", NEEDED.get(name)) for name in names if name != option}


def options() -> Iterator[Any]:
    """Yield a class, an option and a value of the wrong type, of every number, switch and choice."""
    for kind in option_classes():
        for name, hint in parameters(kind).items():
            types = alternatives(hint)
            if str in types or not (choices(hint) or {int, float, bool} & {*types}):
                continue
            value = 1.5 if int in types and float not in types else "nonsense"
            yield pytest.param(kind, name, value, id=f"{kind.__name__}-{name}")


@pytest.mark.parametrize(("kind", "option", "value"), [*options()])
def test_a_wrong_value_is_rejected_in_the_constructor(kind: type, option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"\b{option}={value!r} "):
        kind(**{**needed(kind, option), option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 16.0, "width": 16}, r"height=16.0 must be an integer; write a number of pixels such as 512"),
        ({"height": 16, "width": "16"}, r"width='16' must be an integer; write a number of pixels such as 512"),
        ({"dtype": "float8"}, "dtype='float8' is not a valid choice"),
        ({"quantization": "int4"}, "quantization='int4' is not a valid choice"),
        ({"trainable": "all"}, "trainable: 'all' must be lora, full, or a list"),
    ],
)
def test_wrong_values_of_a_pipeline_are_rejected_before_it_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StableDiffusion("nowhere/", **options)


@pytest.mark.parametrize("value", ["tile", "true", 1, 0.0])
def test_the_decoder_recomputes_everything_blocks_or_nothing(value: Any) -> None:
    message = rf"memory.checkpoint_decoder={value!r} must be true, false or block; write block"
    with pytest.raises(ConfigurationError, match=message):
        Memory(checkpoint_decoder=value)
    for valid in (None, True, False, "block"):
        Memory(checkpoint_decoder=valid)


@pytest.mark.parametrize("interval", [(0.0, 0.5, 1.0), (0.5,), (0.5, 0.2), ("0", "1"), "01", 0.5, None])
def test_an_interval_of_guidance_is_two_increasing_numbers(interval: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance.interval=.* must be two increasing .*write \[0, 0.5\]"):
        Guidance(interval=interval)
    assert Guidance(interval=[0, 0.5]).covers(1, 4)
