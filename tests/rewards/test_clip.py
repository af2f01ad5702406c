"""CLIP rewards against transformers' own processor and model on PIL images."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from lightning_draft import assets
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import CaptionRetrieval, CLIPClassification, CLIPScore, Prompt
from lightning_draft.rewards.clip_encoder import CLIPEncoder, Preprocessing

MakeImages = Callable[..., Tensor]
PROMPTS = ["red cat", "a bird", "cat"]
CAPTIONS = ["red cat", "cat", "red", "a dog"]


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]


def reference(folder: Path, images: Tensor, texts: list[str]) -> tuple[np.ndarray, float]:
    """Cosines `(images, texts)` and the logit scale, by transformers alone."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(text=texts, images=pil(images), return_tensors="pt", padding="max_length"))
    scale = model.logit_scale.exp().item()
    return (output.logits_per_image / scale).double().numpy(), scale


def altered(folder: Path, to: Path, file: str, **changes: Any) -> Path:
    """Copy a CLIP and change one of its JSON files; None removes the key."""
    shutil.copytree(folder, to)
    config = {**json.loads((to / file).read_text()), **changes}
    (to / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    "bilinear": {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 2},
    "squash": {"size": {"height": 16, "width": 16}, "do_center_crop": False},
    "margin": {"size": {"shortest_edge": 18}, "crop_size": {"height": 15, "width": 16}},
    "pad": {"size": {"shortest_edge": 13}, "crop_size": {"height": 16, "width": 16}},
    "no-resize": {"do_resize": False, "crop_size": {"height": 16, "width": 16}},
    "no-normalize": {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_normalize": False},
    "rescale": {
        "size": {"height": 16, "width": 16},
        "crop_size": {"height": 16, "width": 16},
        "rescale_factor": 1 / 127.5,
    },
    "no-rescale": {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}, "do_rescale": False},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (9, 14), (50, 33)])
def test_preprocessing_equals_the_image_processor(name: str, size: tuple[int, int], make_images: MakeImages) -> None:
    """Pillow rounds to bytes after each of two passes, tensors are not rounded: 1.2/255, and 0 without resizing."""
    processor = CLIPImageProcessor(**PROCESSORS[name])
    images = make_images(3, *size)
    theirs = processor(images=pil(images), return_tensors="pt")["pixel_values"]
    preprocess = Preprocessing.from_config(processor.to_dict())
    ours = preprocess(images)
    assert ours.shape == theirs.shape
    level = preprocess.scale / 255 / torch.tensor(preprocess.std).view(3, 1, 1)
    resized = name != "no-resize" and (size != (16, 16) or name in ("margin", "pad"))
    assert ((ours - theirs).abs() / level).max() < (1.2 if resized else 1e-3)


def test_sizes_in_the_format_of_old_configurations_are_read() -> None:
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    old = Preprocessing.from_config({**statistics, "size": 224, "crop_size": 200, "resample": 3})
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 200, "width": 200}}
    assert old == Preprocessing.from_config({**statistics, **new})


@pytest.mark.parametrize("changes", [{"resample": 0}, {"size": {"longest_edge": 224}}])
def test_unsupported_preprocessing_is_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="supported are shortest_edge or height and width, with resample 2"):
        Preprocessing.from_config({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **changes})


@pytest.mark.parametrize(("size", "tolerance"), [((16, 16), 1e-6), ((40, 24), 5e-3), ((9, 14), 5e-3), ((33, 50), 5e-3)])
def test_cosines_equal_those_of_transformers(
    size: tuple[int, int], tolerance: float, tiny_clip: Path, make_images: MakeImages
) -> None:
    """Equal up to rounding at the size of the processor; resized images within 0.005 on this network."""
    images = make_images(3, *size)
    cosines = reference(tiny_clip, images, PROMPTS)[0].diagonal()
    assert np.ptp(cosines) > 0.05
    assert CLIPScore(str(tiny_clip))(images, PROMPTS).numpy() == pytest.approx(cosines, abs=tolerance)
    clipped = CLIPScore(str(tiny_clip), "clipscore")(images, PROMPTS)
    assert clipped.numpy() == pytest.approx(2.5 * cosines.clip(0), abs=2.5 * tolerance)


def test_classification_equals_the_log_softmax_of_transformers(tiny_clip: Path, make_images: MakeImages) -> None:
    images = make_images(3, 16, 16)
    scores = CLIPClassification(str(tiny_clip), CAPTIONS)(images, PROMPTS)
    for score, image, prompt in zip(scores, images, PROMPTS, strict=True):
        candidates = [prompt, *(caption for caption in CAPTIONS if caption != prompt)]
        cosines, scale = reference(tiny_clip, image[None], candidates)
        assert score.item() == pytest.approx(
            math.log(np.exp(scale * cosines[0, 0]) / np.exp(scale * cosines).sum()), abs=1e-5
        )


def test_probabilities_of_all_captions_sum_to_one(tiny_clip: Path, make_images: MakeImages) -> None:
    image = make_images(1, 16, 16).expand(len(CAPTIONS), -1, -1, -1)
    assert CLIPClassification(str(tiny_clip), CAPTIONS)(image, CAPTIONS).exp().sum().item() == pytest.approx(
        1, abs=1e-6
    )


def test_captions_that_differ_only_in_case_count_once(tiny_clip: Path, make_images: MakeImages) -> None:
    images = make_images(1, 16, 16)
    plain = CLIPClassification(str(tiny_clip), CAPTIONS)
    repeated = CLIPClassification(str(tiny_clip), [*CAPTIONS, "Red  CAT", "cat"])
    assert len(repeated.captions) == len(CAPTIONS)
    for prompt in ("red cat", "RED cat ", "a bird"):
        assert torch.allclose(repeated(images, [prompt]), plain(images, ["red cat" if "cat" in prompt else prompt]))


def test_captions_are_read_from_a_file(tiny_clip: Path, tmp_path: Path, make_images: MakeImages) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    images = make_images(3, 16, 16)
    listed, read = (CLIPClassification(str(tiny_clip), x) for x in (CAPTIONS, str(tmp_path / "captions.txt")))
    assert torch.equal(read(images, PROMPTS), listed(images, PROMPTS))
    with pytest.raises(ConfigurationError, match="no prompts"):
        CLIPClassification(str(tiny_clip), [])


def test_retrieval_equals_the_argmax(tiny_clip: Path, make_images: MakeImages) -> None:
    images = make_images(24, 16, 16)
    best = reference(tiny_clip, images, CAPTIONS)[0].argmax(1)
    assert len(set(best)) > 1
    prompts = [CAPTIONS[index % 4] for index in range(24)]
    scores = CaptionRetrieval(str(tiny_clip), CAPTIONS)(images, prompts)
    assert scores.tolist() == [float(b == index % 4) for index, b in enumerate(best)]
    assert 0 < scores.sum() < 24


def test_gradient_ascent_on_the_classification_retrieves_the_caption(tiny_clip: Path, make_images: MakeImages) -> None:
    reward, retrieved = CLIPClassification(str(tiny_clip), CAPTIONS), CaptionRetrieval(str(tiny_clip), CAPTIONS)
    images = make_images(4, 16, 16).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    before = retrieved(images, CAPTIONS).mean()
    for _ in range(60):
        optimizer.zero_grad()
        (-reward(images, CAPTIONS).sum()).backward()
        optimizer.step()
    assert retrieved(images, CAPTIONS).mean() == 1 > before


def test_text_features_are_encoded_once_and_follow_the_weights(
    tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CLIPEncoder.load(str(tiny_clip))
    encoded: list[str] = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda texts: [encoded.extend(texts), encode(texts)][1])
    first = encoder.texts(["cat", "red", "cat"])
    assert torch.equal(first[0], first[2])
    assert torch.equal(encoder.texts(["red", "cat"]), first[[1, 0]])
    assert sorted(encoded) == ["cat", "red"]
    assert encoder.double().texts(["cat"]).dtype == torch.float64
    torch.testing.assert_close(encoder.texts(["cat"])[0].float(), first[0])


def test_the_oldest_text_features_are_evicted_from_the_cache(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_draft.rewards.clip_encoder.MAX_CACHED", 2)
    encoder = CLIPEncoder.load(str(tiny_clip))
    texts = ["red", "cat", "a dog"]
    assert encoder.texts(texts).shape[0] == 3
    assert list(encoder._texts) == ["cat", "a dog"]


def test_long_prompts_are_truncated_as_in_transformers(tiny_clip: Path) -> None:
    processor, model = CLIPProcessor.from_pretrained(tiny_clip), CLIPModel.from_pretrained(tiny_clip).eval()
    texts = ["red cat " * 20, "cat"]
    tokens = processor(text=texts, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        output = model.get_text_features(**tokens)
    features = output if isinstance(output, Tensor) else output.pooler_output
    expected = torch.nn.functional.normalize(features, dim=-1)
    torch.testing.assert_close(CLIPEncoder.load(str(tiny_clip)).texts(texts), expected)


def test_features_cached_under_inference_mode_can_be_used_in_training(tiny_clip: Path, make_images: MakeImages) -> None:
    """Text features that validation cached must be usable in a graph."""
    images = make_images(3, 16, 16)
    for reward in (CLIPScore(str(tiny_clip)), CLIPClassification(str(tiny_clip), CAPTIONS)):
        with torch.inference_mode():
            before = reward(images, PROMPTS).clone()
        leaf = images.clone().requires_grad_()
        scores = reward(leaf, PROMPTS)
        scores.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.any()
        assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 3e-3)])
def test_half_precision_weights_change_scores_little(
    dtype: Any, tolerance: float, tiny_clip: Path, make_images: MakeImages
) -> None:
    images = make_images(3, 16, 16)
    exact, reward = CLIPScore(str(tiny_clip)), CLIPScore(str(tiny_clip), dtype=dtype)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact(images, PROMPTS), rtol=0, atol=tolerance)


def test_half_precision_files_are_read_into_single_precision(
    tiny_clip: Path, tmp_path: Path, make_images: MakeImages
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(tmp_path / "clip")
    reward = CLIPScore(str(tmp_path / "clip"))
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float32}
    images = make_images(3, 16, 16)
    torch.testing.assert_close(reward(images, PROMPTS), CLIPScore(str(tiny_clip))(images, PROMPTS), rtol=0, atol=2e-3)


def test_weights_are_frozen_and_in_eval_mode(tiny_clip: Path) -> None:
    reward = CLIPScore(str(tiny_clip))
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.encoder.model.modules())


def test_image_processor_is_read_from_processor_config(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    expected = CLIPEncoder.load(str(folder)).preprocess
    for file in ("preprocessor_config.json", "processor_config.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match="no preprocessor_config.json .*CLIPImageProcessor"):
        CLIPEncoder.load(str(folder))
    config = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).to_dict()
    for file, content in (("processor_config.json", {"image_processor": config}), ("preprocessor_config.json", config)):
        (folder / file).write_text(json.dumps(content))
        assert CLIPEncoder.load(str(folder)).preprocess == expected
        (folder / file).unlink()


def test_shipped_names_open_the_shipped_clip(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_images: MakeImages
) -> None:
    monkeypatch.setattr(assets, "FOLDER", tmp_path)
    for name in assets.NAMES:
        with pytest.raises(ConfigurationError, match=f"'{name}' is missing from .* install the package again"):
            assets.resolve(name)
    shutil.copytree(tiny_clip, tmp_path / "emoji64-clip")
    assert assets.resolve("emoji64-clip") == tmp_path / "emoji64-clip"
    images = make_images(3, 16, 16)
    assert torch.equal(CLIPScore("emoji64-clip")(images, PROMPTS), CLIPScore(str(tiny_clip))(images, PROMPTS))
    for name in ("openai/clip-vit-base-patch32", "./emoji64-clip", str(tiny_clip), ""):
        assert assets.resolve(name) == name


def test_folders_without_a_clip_are_rejected(tiny_clip: Path, tiny_sd: Path, tmp_path: Path) -> None:
    advice = "give the folder or hub id of a transformers CLIPModel"
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nothing"): "",
        str(tmp_path / "empty"): "",
        "no-such-owner/no-such-clip": "",
        str(tiny_sd / "text_encoder"): "contains a model of type 'clip_text_model'",
        str(altered(tiny_clip, tmp_path / "bert", "config.json", model_type="bert")): "contains a model of type 'bert'",
    }
    for name, reason in cases.items():
        with pytest.raises(ConfigurationError, match=f"{name}.*{reason}.*{advice}"):
            CLIPScore(name)


def test_incomplete_weights_are_rejected(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="its weights lack visual_projection.weight"):
        CLIPScore(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no CLIP could be read"):
        CLIPScore(str(folder))


def test_unknown_options_are_rejected(tiny_clip: Path) -> None:
    with pytest.raises(ConfigurationError, match="variant='dot' is not known; write cosine or clipscore"):
        CLIPScore(str(tiny_clip), "dot")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="dtype='int8' is not supported; write float32, bfloat16, float16"):
        CLIPScore(str(tiny_clip), dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [CLIPClassification, CaptionRetrieval])
def test_caption_can_be_read_from_the_metadata(kind: type, tiny_clip: Path, make_images: MakeImages) -> None:
    images = make_images(3, 16, 16)
    named = [Prompt("x", {"shown": prompt}) for prompt in PROMPTS]
    by_column = kind(str(tiny_clip), CAPTIONS, column="shown")
    assert torch.equal(by_column(images, named), kind(str(tiny_clip), CAPTIONS)(images, PROMPTS))
    with pytest.raises(ConfigurationError, match="no 'shown' for the prompt"):
        by_column(images, PROMPTS)
