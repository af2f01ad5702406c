"""Tensor preprocessing against transformers' own processors on PIL images."""

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.image_processor import SUPPORTED, PixelValues, owlv2_resize

MakeImages = Callable[..., Tensor]
RECORDED = Path(__file__).parent / "recorded"
SQUARE, CROP = {"height": 20, "width": 20}, {"crop_size": {"height": 16, "width": 16}}
EDGES = {"size": {"shortest_edge": 32, "longest_edge": 50}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Beit": ("Beit", {"size": SQUARE, **CROP, "do_center_crop": True}),
    "Bit": ("Bit", {"size": {"shortest_edge": 18}, **CROP}),
    "CLIP": ("CLIP", {"size": {"shortest_edge": 18}, **CROP}),
    "ConditionalDetr": ("ConditionalDetr", EDGES),
    "ConvNext": ("ConvNext", {"size": {"shortest_edge": 16}, "crop_pct": 0.875}),
    "ConvNext from 384": ("ConvNext", {"size": {"shortest_edge": 384}}),
    "DeformableDetr": ("DeformableDetr", EDGES),
    "DeiT": ("DeiT", {"size": SQUARE, **CROP}),
    "Detr": ("Detr", EDGES),
    "Detr unresized": ("Detr", {**EDGES, "do_resize": False}),
    "MobileNetV1": ("MobileNetV1", {"size": {"shortest_edge": 18}, **CROP}),
    "MobileNetV2": ("MobileNetV2", {"size": {"shortest_edge": 18}, **CROP}),
    "OwlViT": ("OwlViT", {"size": SQUARE}),
    "RTDetr": ("RTDetr", {"size": SQUARE}),
    "Siglip": ("Siglip", {"size": SQUARE}),
    "ViT": ("ViT", {"size": SQUARE}),
    "Yolos": ("Yolos", {"size": {"shortest_edge": 40, "longest_edge": 70}}),
}
SIZES = [(20, 20), (40, 24), (9, 14), (50, 33), (20, 61)]


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]


def test_every_supported_processor_is_compared() -> None:
    assert {kind for kind, _ in PROCESSORS.values()} | {"Owlv2"} == set(SUPPORTED)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_those_of_the_processor(name: str, size: tuple[int, int], make_images: MakeImages) -> None:
    """Pillow rounds to bytes after each of two passes, tensors are not rounded: at most 1.6/255."""
    kind, options = PROCESSORS[name]
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    images = make_images(2, *size)
    theirs = processor(images=pil(images), return_tensors="pt")["pixel_values"]
    pixels = PixelValues(processor.to_dict())
    ours = pixels(images)
    assert ours.shape == theirs.shape
    level = pixels.steps.scale / 255 / torch.tensor(pixels.steps.std).view(3, 1, 1)
    assert ((ours - theirs).abs() / level).max() < 1.6


@pytest.mark.parametrize("size", ["16x16", "24x40", "9x14", "50x33"])
def test_owlv2_pixels_equal_the_recorded_ones(size: str) -> None:
    """Within 0.5/255, except for the outermost rows and columns, which scipy mirrors and the tensor version repeats."""
    height, width = (int(length) for length in size.split("x"))
    pil_image = runpy.run_path(str(RECORDED / "image_reward.py"))["make_image"](height, width, 0)
    image = torch.from_numpy(np.array(pil_image)).permute(2, 0, 1).unsqueeze(0) / 255
    pixels = PixelValues(transformers.Owlv2ImageProcessor(size={"height": 16, "width": 16}).to_dict())
    theirs = torch.tensor(json.loads((RECORDED / "owlv2.json").read_text())[size])
    level = 1 / 255 / torch.tensor(pixels.steps.std).view(3, 1, 1)
    places = torch.arange(3 * 16 * 16).view(3, 16, 16)
    gap = torch.full((3 * 16 * 16,), 0.0)
    gap[::5] = (pixels(image)[0].flatten()[::5] - theirs).abs()
    gap = gap[places] / level
    assert gap[:, 1:-1, 1:-1].max() < 0.5
    assert gap.max() < 12


def test_owlv2_pads_with_gray_below_and_to_the_right() -> None:
    white = torch.ones(1, 3, 10, 20)
    resized = owlv2_resize(white, (20, 20))
    assert torch.equal(resized[..., :10, :], torch.ones(1, 3, 10, 20))
    assert torch.equal(resized[..., 10:, :], torch.full((1, 3, 10, 20), 0.5))


@pytest.mark.parametrize("frequency", [0.1, 0.4, 0.8])
def test_owlv2_smooths_before_downsampling(frequency: float) -> None:
    """A wave is filtered by a Gaussian of (4 - 1) / 2 pixels, then by the mean of two neighboring pixels."""
    x = torch.arange(128, dtype=torch.float64)
    wave = (frequency * x).cos().expand(1, 1, 128, 128)
    small = owlv2_resize(wave, (32, 32))[0, 0]
    new = 4 * torch.arange(32, dtype=torch.float64) + 1.5
    gain = math.exp(-((1.5 * frequency) ** 2) / 2) * math.cos(frequency / 2)
    expected = gain * (frequency * new).cos().expand(32, 32)
    assert (small - expected)[:, 2:-2].abs().max() < 2e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "EfficientNetImageProcessor"}, "EfficientNetImageProcessor is not supported.*Yolos"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 8}}, "supported are height and width"),
        ({"image_processor_type": "ViTImageProcessor", "size": SQUARE, "resample": 0}, "resample 2 .bilinear. or 3"),
    ],
)
def test_unsupported_processors_are_rejected(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PixelValues({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **config})


@pytest.mark.parametrize("ending", ["ImageProcessor", "ImageProcessorFast", "FeatureExtractor", "ImageProcessorPil"])
def test_all_names_of_a_processor_are_supported(ending: str) -> None:
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": SQUARE}
    assert PixelValues({**config, "image_processor_type": f"Detr{ending}"}).kind == "Detr"
