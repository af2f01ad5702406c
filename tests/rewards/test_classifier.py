"""The classifier reward against transformers' own processor and model on PIL images; labels by name."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, ConvNextImageProcessor, ResNetConfig
from transformers import ResNetForImageClassification as ResNet

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import ClassifierTarget, Prompt
from lightning_draft.rewards.targets import Labels, target_values

MakeImages = Callable[..., Tensor]
LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "tiger cat", 4: "Egyptian_cat", 5: "LABEL_5"}


def reference(folder: Path, images: Tensor) -> Tensor:
    """Log-probabilities `(B, labels)` by transformers alone."""
    pil_images = [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    inputs = AutoImageProcessor.from_pretrained(folder)(images=pil_images, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()(**inputs).logits
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional classifier whose processor resizes and crops as that of ConvNeXT."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNet(config).train()
    with torch.no_grad():
        model(pixel_values=torch.randn(8, 3, 16, 16))
        model.classifier[1].weight.mul_(10)
    folder = tmp_path_factory.mktemp("resnets") / "resnet"
    model.eval().save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 28}, crop_pct=0.875).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "tolerance"), [((16, 16), 1e-5), ((40, 24), 0.05), ((9, 14), 0.05), ((50, 33), 0.05)])
def test_scores_are_those_of_transformers(
    size: tuple[int, int], tolerance: float, tiny_classifier: Path, make_images: MakeImages
) -> None:
    """Equal up to rounding at the size of the processor, else within 0.05 nats on this network."""
    images = make_images(4, *size)
    expected = reference(tiny_classifier, images)
    assert expected.std(0).max() > 0.05
    for number in range(4):
        ours = ClassifierTarget(str(tiny_classifier), number)(images, [""] * 4)
        torch.testing.assert_close(ours, expected[:, number], rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(28, 28), (50, 33)])
def test_scores_and_gradient_of_a_convolutional_classifier(
    size: tuple[int, int], tiny_resnet: Path, make_images: MakeImages, check_gradient: Callable[..., Tensor]
) -> None:
    """This processor resizes images of any size to 32 and crops them to 28."""
    images = make_images(3, *size)
    reward = ClassifierTarget(str(tiny_resnet), 2)
    torch.testing.assert_close(reward(images, [""] * 3), reference(tiny_resnet, images)[:, 2], rtol=0, atol=0.02)
    check_gradient(reward, images, [""] * 3)


def test_probabilities_sum_to_one(tiny_classifier: Path, make_images: MakeImages) -> None:
    image = make_images(1, 20, 20).expand(4, -1, -1, -1)
    reward = ClassifierTarget(str(tiny_classifier))
    targets = [Prompt("", {"target": target}) for target in ("red cat", "cat", 2, "3")]
    assert reward(image, targets).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_each_prompt_has_its_own_target(tiny_classifier: Path, make_images: MakeImages) -> None:
    images = make_images(2, 16, 16)
    expected = reference(tiny_classifier, images)
    scores = ClassifierTarget(str(tiny_classifier))(
        images, [Prompt("one", {"target": "Bird"}), Prompt("two", {"target": "feline"})]
    )
    torch.testing.assert_close(scores, torch.stack([expected[0, 2], expected[1, 1]]))
    with pytest.raises(ConfigurationError, match=r"ClassifierTarget has no 'target' for the prompt 'two'"):
        ClassifierTarget(str(tiny_classifier))(images, [Prompt("one", {"target": "bird"}), "two"])


def test_gradient_ascent_reaches_the_target(tiny_classifier: Path, make_images: MakeImages) -> None:
    images = make_images(3, 16, 16).requires_grad_()
    reward = ClassifierTarget(str(tiny_classifier), "bird")
    optimizer = torch.optim.Adam([images], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (-reward(images, [""] * 3).sum()).backward()
        optimizer.step()
    assert (reward(images, [""] * 3) > math.log(0.5)).all()


@pytest.mark.parametrize(
    ("label", "number"),
    [("tench", 0), ("tinca TINCA", 0), ("tench, Tinca tinca", 0), ("crane", 1), (2, 2), ("2", 2), ("egyptian cat", 4)],
)
def test_labels_are_found_by_name_alternative_name_and_number(label: Any, number: int) -> None:
    """By name, by one of several names, and by number; the first of two equal labels is found."""
    assert Labels(LABELS, "a model").number(label) == number


@pytest.mark.parametrize(
    ("label", "near"),
    [
        ("tigercat", "the nearest are tiger cat"),
        ("Egyptian cats", "the nearest are egyptian cat"),
        (6, "for example tench"),
        (-1, "for example tench"),
        ("qqqq", "for example tench"),
    ],
)
def test_unknown_labels_are_rejected(label: Any, near: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{label!r} is not among the 6 labels of a model; write .*{near}"):
        Labels(LABELS, "a model").number(label)


def test_unknown_target_is_rejected_in_the_constructor(tiny_classifier: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'birds' is not among the 4 labels .*the nearest are bird"):
        ClassifierTarget(str(tiny_classifier), "birds")


def test_target_comes_from_the_argument_or_the_metadata() -> None:
    prompts = [Prompt("a", {"count": 0}), Prompt("b", {"count": "2"})]
    assert target_values(prompts, "count", None, "R") == [0, "2"]
    assert target_values(prompts, "count", 5, "R") == [5, 5]
    for metadata in ({}, {"count": ""}, {"count": None}):
        with pytest.raises(ConfigurationError, match=r"no 'count' for the prompt 'c'.*\.csv file .*column count"):
            target_values([*prompts, Prompt("c", metadata)], "count", None, "R")


def test_folders_without_a_classifier_are_rejected(tiny_classifier: Path, tiny_clip: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), "no-such-owner/no-such-classifier"):
        with pytest.raises(ConfigurationError, match=f"no image classifier could be read from '{name}': .*google/vit"):
            ClassifierTarget(name, "cat")
    folder = tmp_path / "vit"
    shutil.copytree(tiny_classifier, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigurationError, match="no image classifier could be read"):
        ClassifierTarget(str(folder), "cat")
    with pytest.raises(ConfigurationError, match="dtype='int8' is not supported"):
        ClassifierTarget(str(tiny_classifier), "cat", "int8")  # type: ignore[arg-type]


def test_multi_label_classifiers_are_rejected(tiny_classifier: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(tiny_classifier)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "vit")
    shutil.copy(tiny_classifier / "preprocessor_config.json", tmp_path / "vit")
    with pytest.raises(ConfigurationError, match="is a multi-label classifier"):
        ClassifierTarget(str(tmp_path / "vit"), "cat")


def test_weights_are_frozen_in_eval_mode_and_in_the_given_precision(
    tiny_classifier: Path, make_images: MakeImages
) -> None:
    images = make_images(3, 16, 16)
    exact = ClassifierTarget(str(tiny_classifier), "cat")
    assert not any(parameter.requires_grad for parameter in exact.parameters())
    assert not any(module.training for module in exact.model.modules())
    half = ClassifierTarget(str(tiny_classifier), "cat", "bfloat16")(images, [""] * 3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact(images, [""] * 3), rtol=0, atol=0.05)
