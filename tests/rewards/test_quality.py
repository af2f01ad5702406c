"""The quality classifier: bound, resizing, errors, and scores of the shipped classifiers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.quality import CleanFraction, ImageQuality, network


def write(folder: Path, architecture: str, size: int = 64) -> str:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    save_file(
        network("convnet" if architecture == "unknown" else architecture).state_dict(), folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"architecture": architecture, "size": size}))
    return str(folder)


@pytest.mark.parametrize("architecture", ["convnet", "resnet"])
def test_bounded_score_equals_the_log_sigmoid_of_the_logit(
    architecture: str, tmp_path: Path, make_images: Callable[..., Tensor]
) -> None:
    folder = write(tmp_path / architecture, architecture)
    images = make_images(4, 64, 64)
    logits = ImageQuality(folder, bounded=False)(images, [""] * 4)
    torch.manual_seed(0)
    expected = network(architecture).eval()
    torch.testing.assert_close(logits, expected(images * 2 - 1).squeeze(1).detach())
    scores = ImageQuality(folder)(images, [""] * 4)
    torch.testing.assert_close(scores, torch.log(1 / (1 + torch.exp(-logits))))
    assert torch.equal(CleanFraction(folder)(images, [""] * 4), (logits > 0).float())


def test_other_sizes_are_resized(tmp_path: Path, make_images: Callable[..., Tensor]) -> None:
    reward = ImageQuality(write(tmp_path, "convnet"))
    large = make_images(2, 128, 96)
    resized = F.interpolate(large, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(reward(large, ["", ""]), reward(resized, ["", ""]))


def test_unreadable_classifiers_are_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="emoji64-judge"):
        ImageQuality(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"architecture='unknown'.*convnet or resnet"):
        ImageQuality(write(tmp_path, "unknown"))


@pytest.mark.parametrize("name", ["emoji64-judge", "emoji64-judge-eval"])
def test_shipped_classifiers_score_the_clean_image_highest(name: str) -> None:
    """A disc on white compared with noisy, low-contrast and blocky copies."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    distance = (x.square() + y.square()).sqrt()
    disc = ((0.75 - distance) * 32).clamp(0, 1)
    color = torch.tensor([0.9, 0.7, 0.2]).view(3, 1, 1)
    clean = 1 - disc * (1 - color) * (1 - 0.6 * (distance < 0.35))
    grains = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    noisy = clean + 0.25 * grains.repeat_interleave(2, 2)
    blocks = F.avg_pool2d(clean, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = torch.stack([clean, noisy, 0.4 * clean + 0.4, blocks])
    logits = ImageQuality(name, bounded=False)(images, [""] * 4)
    assert (logits[0] > logits[1:]).all(), logits
