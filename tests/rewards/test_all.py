"""Properties that every reward must have."""

import inspect
import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import lightning_draft.rewards as rewards
from examples.judge_server import Server, redness
from lightning_draft.rewards import Reward, WeightedReward
from tests.rewards.chat_server import ChatServer, gray

CAPTIONS = ["red cat", "cat", "red", "a dog"]
PROMPTS = ["red cat", "a bird", "cat"]


def parts(tiny: dict[str, str]) -> dict[str, WeightedReward]:
    return {
        "clip": WeightedReward(rewards.CLIPScore(tiny["clip"]), 2.0),
        "dark": WeightedReward(rewards.Brightness(0.0)),
    }


@cache
def vision_language_model() -> str:
    """The address of a chat-completions endpoint that runs during the tests."""
    return ChatServer(lambda text, images: f"{gray(images[0]):.3f}").url


@cache
def judge() -> str:
    """The address of a service that runs during the tests."""
    server = Server(redness)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


Tiny = dict[str, str]
Build = Callable[[Tiny], Reward]
EVERY: dict[str, tuple[Build, float, float]] = {
    "AestheticScore": (
        lambda tiny: rewards.AestheticScore("v2", tiny["clip"], f"{tiny['aesthetic']}/v2.pth"),
        -torch.inf,
        torch.inf,
    ),
    "Augmented": (lambda tiny: rewards.Augmented(rewards.Brightness(0.3), 2, seed=0), -2, 0),
    "Brightness": (lambda tiny: rewards.Brightness(0.3), -1, 0),
    "CLIPClassification": (lambda tiny: rewards.CLIPClassification(tiny["clip"], CAPTIONS), -torch.inf, 0),
    "CLIPScore": (lambda tiny: rewards.CLIPScore(tiny["clip"]), -1, 1),
    "CaptionRetrieval": (lambda tiny: rewards.CaptionRetrieval(tiny["clip"], CAPTIONS), 0, 1),
    "ClassifierTarget": (lambda tiny: rewards.ClassifierTarget(tiny["classifier"], "cat"), -torch.inf, 0),
    "CleanFraction": (lambda tiny: rewards.CleanFraction(tiny["judge"]), 0, 1),
    "ColorBalance": (lambda tiny: rewards.ColorBalance(), -1, 1),
    "ColorTarget": (lambda tiny: rewards.ColorTarget(1.0, 0.5, 0.0), -1, 0),
    "DetectedCount": (lambda tiny: rewards.DetectedCount(tiny["owlvit"], "cat"), 0, 16),
    "HPSv2": (lambda tiny: rewards.HPSv2(weights=f"{tiny['hps']}/tiny.pt", tokenizer=tiny["hps"]), -1, 1),
    "Ensemble": (
        lambda tiny: rewards.Ensemble({"dark": rewards.Brightness(0.0), "clip": rewards.CLIPScore(tiny["clip"])}),
        -2,
        1,
    ),
    "GradientNormSum": (lambda tiny: rewards.GradientNormSum(parts(tiny)), -3, 2),
    "HTTPReward": (lambda tiny: rewards.HTTPReward(judge()), -1, 1),
    "HumanVotes": (lambda tiny: rewards.HumanVotes(f"{tiny['clip']}/no_votes"), 0, 0),
    "ImageQuality": (lambda tiny: rewards.ImageQuality(tiny["judge"]), -torch.inf, 0),
    "ImageReward": (
        lambda tiny: rewards.ImageReward(f"{tiny['image_reward']}/small.pt", tokenizer=tiny["image_reward"]),
        -torch.inf,
        torch.inf,
    ),
    "JPEGCompressibility": (lambda tiny: rewards.JPEGCompressibility(), -1, 0),
    "JPEGIncompressibility": (lambda tiny: rewards.JPEGIncompressibility(), 0, 1),
    "JPEGRate": (lambda tiny: rewards.JPEGRate(), -torch.inf, 0),
    "JPEGSize": (lambda tiny: rewards.JPEGSize(), -torch.inf, 0),
    "ObjectAbsent": (lambda tiny: rewards.ObjectAbsent(tiny["owlv2"], "cat"), -torch.inf, 0),
    "ObjectCount": (lambda tiny: rewards.ObjectCount(tiny["owlvit"], "bird", 2), -196, 0),
    "ObjectPresent": (lambda tiny: rewards.ObjectPresent(tiny["yolos"], "cat"), -torch.inf, 0),
    "Offloaded": (lambda tiny: rewards.Offloaded(rewards.Brightness(0.3)), -1, 0),
    "PickScore": (lambda tiny: rewards.PickScore(tiny["clip"], tiny["clip"]), -100, 100),
    "PythonFunction": (
        lambda tiny: rewards.PythonFunction(lambda images, _: images.mean((1, 2, 3)) / 255, "numpy"),
        0,
        1,
    ),
    "Relative": (lambda tiny: rewards.Relative(rewards.CLIPScore(tiny["clip"]), "red", "a dog"), -2, 2),
    "ColorSaturation": (lambda tiny: rewards.ColorSaturation(), 0, 1),
    "Sharpness": (lambda tiny: rewards.Sharpness(), 0, 16),
    "Symmetry": (lambda tiny: rewards.Symmetry(), -1, 0),
    "VLMJudge": (
        lambda tiny: rewards.VLMJudge(rewards.ChatEndpoint(vision_language_model(), "tiny", cache=None), low=0),
        0,
        5,
    ),
    "WeightedSum": (lambda tiny: rewards.WeightedSum(parts(tiny)), -3, 2),
    "ZScoreSum": (lambda tiny: rewards.ZScoreSum(parts(tiny)), -3, 2),
}
BLACK_BOXES = {
    *("CaptionRetrieval", "CleanFraction", "DetectedCount", "HTTPReward", "HumanVotes", "JPEGSize", "PythonFunction"),
    "Offloaded",
    "VLMJudge",
}
DIFFERENTIABLE = sorted(set(EVERY) - BLACK_BOXES)

# The value of this sum is not what its gradient is the gradient of.
OF_A_FUNCTION = [name for name in DIFFERENTIABLE if name != "GradientNormSum"]


def build(name: str, tiny: Tiny) -> Reward:
    return EVERY[name][0](tiny).requires_grad_(False).eval()


def test_list_covers_every_reward() -> None:
    classes = {name: getattr(rewards, name) for name in rewards.__all__ if inspect.isclass(getattr(rewards, name))}
    assert set(EVERY) == {
        name
        for name, kind in classes.items()
        if issubclass(kind, Reward) and not inspect.isabstract(kind) and not kind.uses_latents
    }


@pytest.mark.parametrize("name", EVERY)
def test_attribute_differentiable_agrees_with_the_gradient(
    name: str, tiny: Tiny, make_images: Callable[..., Tensor]
) -> None:
    reward = build(name, tiny)
    scores = reward(make_images(3, 16, 16).requires_grad_(), PROMPTS)
    assert scores.requires_grad is reward.differentiable is (name in DIFFERENTIABLE)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("name", OF_A_FUNCTION)
@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_gradient_equals_finite_differences(
    name: str,
    size: tuple[int, int],
    tiny: Tiny,
    make_images: Callable[..., Tensor],
    check_gradient: Callable[..., Tensor],
) -> None:
    check_gradient(build(name, tiny), make_images(3, *size), PROMPTS)


@pytest.mark.parametrize("name", OF_A_FUNCTION)
def test_pixels_outside_the_range_keep_their_gradient(
    name: str, tiny: Tiny, make_images: Callable[..., Tensor], check_gradient: Callable[..., Tensor]
) -> None:
    images = 1.05 + 0.2 * make_images(3, 16, 16)
    gradient = check_gradient(build(name, tiny), images, PROMPTS)
    assert (gradient != 0).double().mean() > 0.9


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (40, 12), (33, 65)])
def test_batch_scores_equal_scores_of_single_images(
    name: str, size: tuple[int, int], tiny: Tiny, make_images: Callable[..., Tensor]
) -> None:
    reward = build(name, tiny)
    images = make_images(3, *size)
    single = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_scores_lie_in_the_stated_range(name: str, tiny: Tiny, make_images: Callable[..., Tensor]) -> None:
    _, lowest, highest = EVERY[name]
    checkerboard = ((torch.arange(16).view(16, 1) + torch.arange(16)) % 2).float().expand(3, 16, 16)
    images = torch.stack(
        [
            torch.zeros(3, 16, 16),
            torch.ones(3, 16, 16),
            checkerboard,
            torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)).round(),
        ]
    )
    prompts = ["cat", "red", "a dog", "x"]
    scores = build(name, tiny)(torch.cat([images, make_images(4, 16, 16)]), prompts * 2)
    assert scores.min() >= lowest
    assert scores.max() <= highest
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_images_are_scored_in_single_precision(
    name: str, tiny: Tiny, make_images: Callable[..., Tensor]
) -> None:
    reward = build(name, tiny)
    images = make_images(3, 16, 16).bfloat16()
    exact = reward(images.float(), PROMPTS)
    double = build(name, tiny).double()(images.double(), PROMPTS)
    torch.testing.assert_close(exact.double(), double.double(), rtol=1e-3, atol=1e-5)
    assert torch.equal(reward(images, PROMPTS), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reward(images, PROMPTS), exact, rtol=1e-6, atol=1e-7)
    if reward.differentiable:
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
        assert gradient.dtype == torch.bfloat16
        assert gradient.isfinite().all()
        assert gradient.any()
