"""LAION's predictors against their layers, applied one by one to transformers' embeddings of PIL images."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.aesthetic import AESTHETIC_FILES, AESTHETIC_ORIGINAL, AestheticScore, collapse
from lightning_draft.rewards.clip_encoder import CLIPEncoder, ImageEncoder
from lightning_draft.rewards.weights import read_tensors

MakeImages = Callable[..., Tensor]
CHAIN = ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("size", "tolerance"), [((16, 16), 1e-6), ((40, 24), 0.01), ((9, 14), 0.01)])
def test_scores_equal_the_layers_applied_one_by_one(
    version: Any,
    size: tuple[int, int],
    tolerance: float,
    tiny: dict[str, str],
    make_images: MakeImages,
    parity: ModuleType,
) -> None:
    """In units of the head's slope, equal up to rounding at CLIP's size; resized images within 0.01 on this network."""
    head, images = f"{tiny['aesthetic']}/{version}.pth", make_images(6, *size)
    reward = AestheticScore(version, tiny["clip"], head)
    slope = reward.head.weight.norm().item()
    theirs = torch.tensor(parity.by_laion(pil(images), [""] * 6, head, version, tiny["clip"]))
    assert theirs.std() > 0.02 * slope
    torch.testing.assert_close(reward(images, [""] * 6), theirs, rtol=0, atol=tolerance * slope)


def test_collapsed_layers_equal_the_chain_of_linear_layers(tiny: dict[str, str]) -> None:
    tensors = read_tensors(Path(tiny["aesthetic"]) / "v2.pth")
    inputs = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = inputs
    for layer in CHAIN:
        outputs = outputs @ tensors[f"{layer}weight"].double().T + tensors[f"{layer}bias"].double()
    head = collapse(tensors, CHAIN, "file")
    torch.testing.assert_close(head.double()(inputs), outputs, rtol=1e-6, atol=1e-7)


def test_scores_of_unit_embeddings_lie_in_the_stated_range(tiny: dict[str, str], make_images: MakeImages) -> None:
    reward = AestheticScore("v2", tiny["clip"], f"{tiny['aesthetic']}/v2.pth")
    weight, bias = reward.head.weight[0], reward.head.bias
    best = nn.functional.normalize(weight, dim=0)
    assert reward.head(best).item() == pytest.approx((bias + weight.norm()).item())
    scores = reward(make_images(8, 16, 16), [""] * 8)
    assert ((scores - bias).abs() <= weight.norm()).all()


def test_image_encoder_alone_gives_the_features_of_the_whole_clip(tiny_clip: Path, make_images: MakeImages) -> None:
    images = make_images(3, 20, 16)
    alone, both = ImageEncoder.load(str(tiny_clip)), CLIPEncoder.load(str(tiny_clip))
    assert torch.equal(alone.images(images), both.images(images))
    tower = CLIPModel.from_pretrained(tiny_clip)
    vision = [*tower.vision_model.parameters(), *tower.visual_projection.parameters()]
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in vision)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 3e-3)])
def test_half_precision_weights_change_scores_little(
    dtype: Any, tolerance: float, tiny: dict[str, str], make_images: MakeImages
) -> None:
    images, head = make_images(3, 20, 16), f"{tiny['aesthetic']}/v2.pth"
    scores = AestheticScore("v2", tiny["clip"], head, dtype)(images, [""] * 3)
    assert scores.dtype == torch.float32
    exact = AestheticScore("v2", tiny["clip"], head)
    slope = exact.head.weight.norm().item()
    torch.testing.assert_close(scores, exact(images, [""] * 3), rtol=0, atol=tolerance * slope)


def test_published_files_are_verified(tmp_path: Path, tiny: dict[str, str]) -> None:
    for version, published in (("v1", AESTHETIC_FILES["v1"]), ("v2", AESTHETIC_ORIGINAL)):
        (tmp_path / published.name).write_bytes(Path(tiny["aesthetic"], f"{version}.pth").read_bytes())
        for head in (tmp_path, tmp_path / published.name):
            with pytest.raises(ConfigurationError, match=r"is not .* of GitHub repository .*: it has [\d,]+ bytes and"):
                AestheticScore(version, tiny["clip"], str(head))  # type: ignore[arg-type]
    (tmp_path / AESTHETIC_FILES["v2"].name).write_bytes(Path(tiny["aesthetic"], "v2.pth").read_bytes())
    assert AestheticScore("v2", tiny["clip"], str(tmp_path / AESTHETIC_FILES["v2"].name)).head.in_features == 8


def test_missing_files_are_named_in_the_error(tiny: dict[str, str]) -> None:
    message = (
        r"sa_0_4_vit_l_14_linear.pth of GitHub repository LAION-AI/.* write head=FOLDER/sa_0_4_vit_l_14_linear.pth"
    )
    with pytest.raises(ConfigurationError, match=message):
        AestheticScore("v1", tiny["clip"])
    with pytest.raises(ConfigurationError, match=r"aesthetic-model.pth of hub repository trl-lib/.* write head=FOLDER"):
        AestheticScore("v2", tiny["clip"])
    with pytest.raises(ConfigurationError, match="version='v3' is not known; write v1 or v2"):
        AestheticScore("v3", tiny["clip"])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no CLIP could be read from 'openai/clip-vit-large-patch14'"):
        AestheticScore("v1", head=f"{tiny['aesthetic']}/v1.pth")


def test_heads_of_other_sizes_are_rejected(tmp_path: Path, tiny: dict[str, str]) -> None:
    linear, chain = (read_tensors(Path(tiny["aesthetic"]) / f"{version}.pth") for version in ("v1", "v2"))
    relu = {name.replace("layers.7", "layers.11"): tensor for name, tensor in chain.items()}
    cases: list[tuple[Any, dict[str, Tensor], str]] = [
        ("v1", chain, "differs in bias, layers.0.bias"),
        ("v2", linear, "differs in bias, layers.0.bias"),
        ("v2", relu, "differs in layers.11.bias, layers.11.weight, layers.7.bias from 5 linear layers"),
        ("v2", {**chain, "layers.4.weight": torch.ones(10, 3)}, "do not lead from an embedding to one number"),
        ("v1", {"weight": torch.ones(3, 8), "bias": torch.ones(3)}, "do not lead from an embedding to one number"),
        ("v1", {"weight": torch.ones(1, 5), "bias": torch.ones(1)}, "reads embeddings of length 5, .* have length 8"),
    ]
    for version, tensors, message in cases:
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(ConfigurationError, match=message):
            AestheticScore(version, tiny["clip"], str(tmp_path / "head.pth"))
