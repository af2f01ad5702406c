"""PickScore against its authors' pipeline: transformers' processor and model on PIL images."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.pickscore import PickScore

MakeImages = Callable[..., Tensor]
PROMPTS = ["red cat", "a bird", "cat " * 40]
MODEL_FILES = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def parts(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model and processor apart, as they are published."""
    folder = tmp_path_factory.mktemp("pickscore")
    for part in ("model", "processor"):
        (folder / part).mkdir()
    for file in tiny_clip.iterdir():
        shutil.copy(file, folder / ("model" if file.name in MODEL_FILES else "processor") / file.name)
    return {"pretrained": str(folder / "model"), "processor": str(folder / "processor")}


@pytest.mark.parametrize(("size", "tolerance"), [((16, 16), 2e-5), ((40, 24), 0.1), ((9, 14), 0.1), ((33, 50), 0.1)])
def test_scores_are_those_of_transformers(
    size: tuple[int, int], tolerance: float, parts: dict[str, str], make_images: MakeImages, parity: ModuleType
) -> None:
    """Equal up to rounding at the size of the processor; resized images within 0.1 on this network."""
    images = make_images(3, *size)
    pil = [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    theirs = torch.tensor(parity.by_clip(pil, PROMPTS, scaled=True, **parts))
    assert theirs.std() > 0.5
    torch.testing.assert_close(PickScore(**parts)(images, PROMPTS), theirs, rtol=0, atol=tolerance)


def test_one_point_of_score_multiplies_the_odds_by_e(parts: dict[str, str], make_images: MakeImages) -> None:
    """The probability of being picked is the softmax of the scores (equation 1), as transformers computes it."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(parts["pretrained"]), CLIPProcessor.from_pretrained(parts["processor"])
    images = make_images(2, 16, 16)
    inputs = processor(text=["red cat"], images=list(images), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        picked = model(**inputs).logits_per_text.softmax(-1)[0]
    scores = PickScore(**parts)(images, ["red cat"] * 2)
    assert math.log(picked[0] / picked[1]) == pytest.approx((scores[0] - scores[1]).item(), abs=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.4), ("float16", 0.05)])
def test_half_precision_weights_change_scores_little(
    dtype: Any, tolerance: float, parts: dict[str, str], make_images: MakeImages
) -> None:
    images = make_images(3, 20, 16)
    half, exact = PickScore(**parts, dtype=dtype), PickScore(**parts)
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert half.encoder.logit_scale == exact.encoder.logit_scale
    torch.testing.assert_close(scores, exact(images, PROMPTS), rtol=0, atol=tolerance)


def test_missing_files_are_named_in_the_error(parts: dict[str, str]) -> None:
    advice = r".*give the folder or hub id of yuvalkirstain/PickScore_v1 \(config.json, model.safetensors\) as `pretrai"
    for name, arguments in (
        ("yuvalkirstain/PickScore_v1", {"processor": parts["processor"]}),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", {"pretrained": parts["pretrained"]}),
    ):
        with pytest.raises(ConfigurationError, match=f"no CLIP could be read from '{name}'{advice}"):
            PickScore(**arguments)
