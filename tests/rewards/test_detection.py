"""Rewards from detectors against transformers' processors, models and post-processing on PIL images."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
)

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import DetectedCount, ObjectAbsent, ObjectCount, ObjectPresent, Prompt
from lightning_draft.rewards.detection import log_probability_any
from lightning_draft.rewards.detector import open_detector

MakeImages = Callable[..., Tensor]
Folders = dict[str, Path]
KINDS = ["owlvit", "owlv2", "yolos", "detr", "conditional_detr", "rt_detr"]
SIGMOID = ["owlvit", "owlv2", "conditional_detr", "rt_detr"]
OWN = {"owlvit": (16, 16), "owlv2": (16, 16), "rt_detr": (32, 32)}
OBJECTS = ["cat", "bird"]
QUERY = "a photo of a {}"


def prompts(objects: Sequence[str], **metadata: Any) -> list[str]:
    return [Prompt("an image", {"object": name, **metadata}) for name in objects]


def reference(kind: str, folder: Path, images: Tensor, name: str, threshold: float = 0.5) -> tuple[Tensor, list[int]]:
    """Probabilities `(B, Q)` of one object, and how many boxes post-processing keeps, by transformers alone."""
    pil_images = [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    processor = AutoImageProcessor.from_pretrained(folder)
    if kind == "owlv2":  # its processor needs scipy; it is compared with recorded figures elsewhere
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        inputs = {"pixel_values": (images - mean) / std}
    else:
        inputs = processor(images=pil_images, return_tensors="pt")
    if kind.startswith("owl"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [QUERY.replace("{}", name)] * len(pil_images)
        tokens = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt", truncation=True)
        with torch.no_grad():
            output = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()(**inputs, **tokens)
        found = processor.post_process_object_detection(output, threshold=threshold)
        return output.logits[..., 0].sigmoid(), [len(boxes["scores"]) for boxes in found]
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**inputs)
    number = ["red cat", "cat, feline", "bird", "N/A"].index({"cat": "cat, feline"}.get(name, name))
    found = processor.post_process_object_detection(output, threshold=threshold)
    scores = output.logits.sigmoid() if kind in SIGMOID else output.logits.softmax(-1)
    return scores[..., number], [int((boxes["labels"] == number).sum()) for boxes in found]


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_equal_those_of_transformers(kind: str, tiny_detectors: Folders, make_images: MakeImages) -> None:
    """Equal up to rounding without a resize, else within 0.05 on these networks."""
    detector = open_detector(str(tiny_detectors[kind]), QUERY, "float32")
    for size in (OWN.get(kind, (32, 48)), (40, 24)):
        images = make_images(2, *size)
        tolerance = 1e-5 if size != (40, 24) else 0.05
        for name in OBJECTS:
            if kind == "owlv2" and size != OWN[kind]:
                continue
            theirs, _ = reference(kind, tiny_detectors[kind], images, name)
            ours = detector(images, [name] * 2).sigmoid()
            assert theirs.std() > 1e-4
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_uses_the_object_of_its_prompt(kind: str, tiny_detectors: Folders, make_images: MakeImages) -> None:
    detector = open_detector(str(tiny_detectors[kind]), QUERY, "float32")
    images = make_images(2, 16, 16)
    mixed = detector(images, OBJECTS)
    for index, name in enumerate(OBJECTS):
        torch.testing.assert_close(mixed[index], detector(images, [name] * 2)[index], rtol=1e-5, atol=1e-5)
    assert (detector(images[:1], ["cat"]) - detector(images[:1], ["bird"])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_equal_their_formulas(kind: str, tiny_detectors: Folders, make_images: MakeImages) -> None:
    """Products of probabilities, box by box, in float64."""
    folder = str(tiny_detectors[kind])
    images = make_images(2, *OWN.get(kind, (32, 48)))
    p = torch.stack([reference(kind, Path(folder), images, name)[0][i] for i, name in enumerate(OBJECTS)]).double()
    none = (1 - p).prod(-1)
    wanted = prompts(OBJECTS, count=3)
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(ObjectAbsent(folder)(images, wanted).double(), none.log(), **close)
    torch.testing.assert_close(ObjectPresent(folder)(images, wanted).double(), (1 - none).log(), **close)
    torch.testing.assert_close(ObjectCount(folder)(images, wanted).double(), -((p.sum(-1) - 3) ** 2), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_count_equals_that_of_post_processing(kind: str, tiny_detectors: Folders, make_images: MakeImages) -> None:
    """The threshold is the median probability, so that some boxes count and some do not."""
    folder, images = tiny_detectors[kind], make_images(6, *OWN.get(kind, (32, 48)))
    found = []
    for name in ("red cat", "N/A") if kind == "rt_detr" else OBJECTS:
        threshold = reference(kind, folder, images, name)[0].median().item()
        _, numbers = reference(kind, folder, images, name, threshold)
        assert DetectedCount(str(folder), name, threshold=threshold)(images, [""] * 6).tolist() == numbers
        found += numbers
    error = DetectedCount(str(folder), score="error", threshold=threshold)(images, prompts([name] * 6, count=2))
    assert error.tolist() == [-((number - 2) ** 2) for number in numbers]
    assert len(set(found)) > 1


@pytest.mark.parametrize("kind", ["owlvit", "conditional_detr"])
def test_soft_count_at_low_temperature_equals_the_count(
    kind: str, tiny_detectors: Folders, make_images: MakeImages
) -> None:
    folder, images = str(tiny_detectors[kind]), make_images(6, 16, 16)
    hard = DetectedCount(folder, "cat", threshold=0.3)(images, [""] * 6)
    soft = ObjectCount(folder, "cat", 0, threshold=0.3, temperature=1e-5)(images, [""] * 6)
    torch.testing.assert_close(soft, -(hard**2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rt_detr"])
@pytest.mark.parametrize("size", [(16, 16), (21, 14)])
def test_gradients_equal_finite_differences(
    kind: str,
    size: tuple[int, int],
    tiny_detectors: Folders,
    make_images: MakeImages,
    check_gradient: Callable[..., Tensor],
) -> None:
    reward = ObjectCount(str(tiny_detectors[kind]), "bird", 2)
    check_gradient(reward, make_images(1, *size), [""])


def test_rt_detr_gradient_is_partial_but_not_zero(tiny_detectors: Folders, make_images: MakeImages) -> None:
    """The network detaches its proposals, so the gradient is smaller than that of finite differences, but not zero."""
    images = make_images(2, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(
        ObjectCount(str(tiny_detectors["rt_detr"]), "bird", 2)(images, ["", ""]).sum(), images
    )
    assert gradient.isfinite().all()
    assert gradient.any()


def test_log_probability_any_is_accurate_for_all_logits() -> None:
    """Compared with exact arithmetic if possible, else with the limits."""
    logits = torch.linspace(-25, 12, 80, dtype=torch.float64).unsqueeze(1) + torch.tensor([0.0, -1.0, -3.0]).double()
    product = (1 - logits.sigmoid()).prod(-1)
    direct = (1 - product).log()
    torch.testing.assert_close(log_probability_any(logits)[30:], direct[30:], rtol=1e-9, atol=1e-12)
    few = torch.tensor([[-60.0, -61.0], [-200.0, -201.0]], dtype=torch.float64)
    torch.testing.assert_close(log_probability_any(few), few.logsumexp(-1), rtol=1e-12, atol=0)
    edge = torch.tensor([[math.log(1e-12) - 1e-6], [math.log(1e-12) + 1e-6]], dtype=torch.float64)
    torch.testing.assert_close(log_probability_any(edge), edge[:, 0], rtol=1e-12, atol=0)
    sure = torch.full((1, 3), 20.0)
    assert log_probability_any(sure).item() == pytest.approx(-math.exp(-60), rel=1e-4)


def test_log_probability_any_has_a_finite_gradient() -> None:
    for low in (-150.0, -30.0, -5.0, 0.0, 9.0):
        logits = torch.tensor([[low, low - 1, low - 2]], requires_grad=True)
        (gradient,) = torch.autograd.grad(log_probability_any(logits).sum(), logits)
        exact = logits.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(log_probability_any(exact).sum(), exact)
        assert gradient.isfinite().all()
        assert gradient.all()
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=0)
    exact = torch.linspace(-40, 15, 40, dtype=torch.float64).unsqueeze(1).expand(-1, 2).clone().requires_grad_()
    assert torch.autograd.gradcheck(log_probability_any, exact, eps=1e-5, atol=1e-7, rtol=1e-5)


def test_gradient_ascent_makes_the_object_present_or_absent(tiny_detectors: Folders, make_images: MakeImages) -> None:
    folder = str(tiny_detectors["owlvit"])
    for reward, sign in ((ObjectPresent(folder, "cat"), 1), (ObjectAbsent(folder, "cat"), -1)):
        number = DetectedCount(folder, "cat", threshold=0.5)
        images = make_images(3, 16, 16).requires_grad_()
        before = number(images, [""] * 3).sum()
        optimizer = torch.optim.Adam([images], lr=0.03)
        for _ in range(30):
            optimizer.zero_grad()
            (-reward(images, [""] * 3).sum()).backward()
            optimizer.step()
        assert sign * (number(images, [""] * 3).sum() - before) > 0


def test_the_query_sets_the_text_of_the_detector(tiny_detectors: Folders, make_images: MakeImages) -> None:
    folder, images = str(tiny_detectors["owlvit"]), make_images(1, 16, 16)
    asked = ObjectPresent(folder, "cat", query="red {}")(images, [""])
    torch.testing.assert_close(asked, ObjectPresent(folder, "red cat", query="{}")(images, [""]))
    assert asked != ObjectPresent(folder, "cat", query="{}")(images, [""])
    with pytest.raises(ConfigurationError, match=r"query='a cat' has no place for the object; write \{\} there"):
        ObjectPresent(folder, "cat", query="a cat")


def test_missing_object_or_count_is_an_error(tiny_detectors: Folders, make_images: MakeImages) -> None:
    images = make_images(2, 16, 16)
    for name in ("owlvit", "yolos"):
        reward = ObjectCount(str(tiny_detectors[name]))
        with pytest.raises(
            ConfigurationError, match=r"ObjectCount has no 'object' for the prompt 'two'.*column object"
        ):
            reward(images, [Prompt("one", {"object": "cat"}), "two"])
        with pytest.raises(ConfigurationError, match=r"has no 'count' for the prompt .* set count among"):
            reward(images, prompts(OBJECTS))
        with pytest.raises(ConfigurationError, match="'count' of the prompts must be numbers"):
            reward(images, prompts(OBJECTS, count="many"))
        assert torch.equal(reward(images, prompts(OBJECTS, count="2")), reward(images, prompts(OBJECTS, count=2.0)))


def test_unknown_labels_are_rejected_and_the_nearest_are_named(
    tiny_detectors: Folders, make_images: MakeImages
) -> None:
    folder = str(tiny_detectors["yolos"])
    for build in (ObjectPresent, ObjectAbsent, ObjectCount, DetectedCount):
        with pytest.raises(ConfigurationError, match=r"'bird s' is not among the 4 labels of .*the nearest are bird"):
            build(folder, "bird s")
    with pytest.raises(ConfigurationError, match="'zebra' is not among the 4 labels"):
        ObjectPresent(folder)(make_images(1, 16, 16), prompts(["zebra"]))
    for name in ("CAT", "feline", "cat, feline", "1"):
        assert torch.equal(
            ObjectPresent(folder, name)(make_images(1, 16, 16), [""]),
            ObjectPresent(folder, "cat")(make_images(1, 16, 16), [""]),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"threshold": 1.0}, "threshold=1.0 must be a probability above 0 and below 1"),
        ({"dtype": "int8"}, "dtype='int8' is not supported"),
    ],
)
def test_options_out_of_range_are_rejected(options: dict[str, Any], message: str, tiny_detectors: Folders) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ObjectCount(str(tiny_detectors["yolos"]), "cat", 1, **options)
    for other, text in (({"score": "mean"}, "score='mean' is not known"), ({"threshold": 0}, "threshold=0 must")):
        with pytest.raises(ConfigurationError, match=text):
            DetectedCount(str(tiny_detectors["yolos"]), "cat", **other)


def test_default_thresholds_equal_those_of_transformers(tiny_detectors: Folders) -> None:
    assert DetectedCount(str(tiny_detectors["owlv2"]), "cat").threshold == 0.1
    assert DetectedCount(str(tiny_detectors["detr"]), "cat").threshold == 0.5


def test_boxes_are_counted_in_images_rounded_to_bytes(tiny_detectors: Folders, make_images: MakeImages) -> None:
    reward, images = DetectedCount(str(tiny_detectors["owlvit"]), "cat", threshold=0.3), make_images(4, 16, 16)
    assert torch.equal(reward(3 * images - 1, [""] * 4), reward((3 * images - 1).clamp(0, 1), [""] * 4))


def test_weights_are_frozen_in_eval_mode_and_in_the_given_precision(
    tiny_detectors: Folders, make_images: MakeImages
) -> None:
    images = make_images(2, 16, 16)
    for kind in ("owlvit", "yolos"):
        exact = ObjectAbsent(str(tiny_detectors[kind]), "cat")
        assert not any(parameter.requires_grad for parameter in exact.parameters())
        assert not any(module.training for module in exact.detector.model.modules())
        half = ObjectAbsent(str(tiny_detectors[kind]), "cat", dtype="bfloat16")
        scores = half(images, ["", ""])
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact(images, ["", ""]), rtol=0.05, atol=0.1)


def test_folders_without_a_detector_are_rejected(tiny_detectors: Folders, tiny_clip: Path, tmp_path: Path) -> None:
    advice = "give the folder or hub id of a detector as transformers saves it, such as google/owlv2"
    for name in (str(tmp_path / "nothing"), "no-such-owner/no-such-detector", str(tiny_clip)):
        with pytest.raises(ConfigurationError, match=f"no detector could be read from '{name}': .*{advice}"):
            ObjectPresent(name, "cat")
    folder = tmp_path / "yolos"
    shutil.copytree(tiny_detectors["yolos"], folder)
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in weights if name.startswith("class_labels_classifier") and name.endswith("weight"))
    save_file({k: v for k, v in weights.items() if k != removed}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"its weights lack {removed}"):
        ObjectPresent(str(folder), "cat")
    (folder / "preprocessor_config.json").unlink()
    shutil.copy(tiny_detectors["yolos"] / "model.safetensors", folder)
    with pytest.raises(ConfigurationError, match="no detector could be read"):
        ObjectPresent(str(folder), "cat")


def test_old_configurations_of_owl_are_read(tiny_detectors: Folders, tmp_path: Path, make_images: MakeImages) -> None:
    """The size is a list of two lengths, and the key is the old name of feature extractors."""
    shutil.copytree(tiny_detectors["owlvit"], tmp_path / "owl")
    (tmp_path / "owl" / "processor_config.json").unlink(missing_ok=True)
    old = {"feature_extractor_type": "OwlViTFeatureExtractor", "size": [16, 16], "do_center_crop": False}
    (tmp_path / "owl" / "preprocessor_config.json").write_text(json.dumps(old))
    scores = [
        ObjectAbsent(str(folder), "cat")(make_images(2, 20, 30), ["", ""])
        for folder in (tiny_detectors["owlvit"], tmp_path / "owl")
    ]
    assert torch.equal(*scores)
