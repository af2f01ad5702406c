"""HPSv2 against figures of the hpsv2 package, recorded by `tests/rewards/recorded/hpsv2.py`."""

import gzip
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import Reward
from lightning_draft.rewards.hps import HPSv2
from lightning_draft.rewards.hpsv2_reference import HPSv2Reference, bpe_merges, import_hpsv2
from lightning_draft.rewards.open_clip import clean_text
from lightning_draft.rewards.preprocessing import CLIP_MEAN, CLIP_STD, LongestSide

RECORDER = Path(__file__).parent / "recorded" / "hpsv2.py"
RECORD = json.loads(RECORDER.with_suffix(".json").read_text())
tiny = SimpleNamespace(**runpy.run_path(str(RECORDER)))


@pytest.fixture(scope="module")
def files(tiny_hps: Path) -> dict[str, str]:
    """The small checkpoint and the tokenizer that the figures were recorded with."""
    return {"weights": str(tiny_hps / "tiny.pt"), "tokenizer": str(tiny_hps)}


@pytest.fixture(scope="module")
def reward(files: dict[str, str]) -> HPSv2:
    return HPSv2(**files)


@pytest.mark.parametrize("size", tiny.SIZES)
def test_scores_equal_those_of_the_hpsv2_package(size: tuple[int, int], reward: HPSv2) -> None:
    """Equal up to rounding in single precision for any size, because the package resizes tensors too."""
    recorded = torch.tensor(RECORD["scores"]["x".join(map(str, size))])
    assert recorded.std() > 0.05
    torch.testing.assert_close(reward(tiny.make_images(*size), tiny.PROMPTS), recorded, rtol=0, atol=2e-6)


def test_tokens_equal_those_of_the_hpsv2_package(files: dict[str, str]) -> None:
    words = AutoTokenizer.from_pretrained(files["tokenizer"])
    ours = words([clean_text(prompt) for prompt in tiny.PROMPTS], truncation=True, max_length=tiny.CONTEXT)["input_ids"]
    for row, recorded in zip(ours, RECORD["tokens"], strict=True):
        theirs = [int(token) for token in recorded.split()]
        assert row == theirs[: theirs.index(words.eos_token_id) + 1]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Tom &amp;amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("\u2018a\u2019 \u201cb\u201d", "'a' \"b\""),
        ("\ufb01lm \uff33\uff24\uff01\u3000x", "film SD! x"),
        (" two\n lines\t\x07", "two lines"),
        ("cafe\u0301 \u4e2d\u6587 \u2014 \u2082 \u00bd", "caf\u00e9 \u4e2d\u6587 \u2014 \u2082 \u00bd"),
    ],
)
def test_texts_are_cleaned_as_by_ftfy_and_html(text: str, plain: str) -> None:
    assert clean_text(text) == plain


def test_image_with_a_longest_side_of_the_input_size_is_only_padded(reward: HPSv2) -> None:
    """The package does not pad such images and then cannot score them."""
    images = tiny.make_images(tiny.IMAGE, 21)
    padded = F.pad(images, (5, 6, 0, 0))
    torch.testing.assert_close(reward(images, tiny.PROMPTS), reward(padded, tiny.PROMPTS))


@pytest.mark.parametrize("size", [(40, 91), (91, 40), (700, 1), (12, 12)])
@pytest.mark.parametrize("antialias", [True, False])
def test_longest_side_resize_equals_interpolation_and_padding(size: tuple[int, int], antialias: bool) -> None:
    images = tiny.make_images(*size).double()
    pixels = LongestSide(32, antialias)(images)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    black = (pixels * std + mean).abs().amax((0, 1)) < 1e-12
    height, width = (max(1, round(32 * side / max(size))) for side in size)
    top, left = (32 - height) // 2, (32 - width) // 2
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(~black, inside)
    resized = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close((pixels * std + mean)[:, :, inside].unflatten(2, (height, width)), resized)


def test_antialiasing_can_be_switched_off(files: dict[str, str], reward: HPSv2) -> None:
    images = tiny.make_images(150, 150)
    old = HPSv2(**files, antialias=False)(images, tiny.PROMPTS)
    assert not torch.allclose(old, reward(images, tiny.PROMPTS), atol=1e-6)
    small = tiny.make_images(32, 32)
    assert torch.equal(HPSv2(**files, antialias=False)(small, tiny.PROMPTS), reward(small, tiny.PROMPTS))


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_every_supported_file_format_is_read(
    version: Any, tmp_path: Path, files: dict[str, str], reward: HPSv2
) -> None:
    tensors = tiny.weights()
    (tmp_path / "folder").mkdir()
    published = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}[version]
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "folder" / published)
    save_file(tensors, tmp_path / "converted.safetensors")
    images = tiny.make_images(32, 32)
    for weights in (tmp_path / "folder", tmp_path / "converted.safetensors"):
        scores = HPSv2(version, str(weights), files["tokenizer"])(images, tiny.PROMPTS)
        assert torch.equal(scores, reward(images, tiny.PROMPTS))


def test_half_precision_checkpoints_and_computation(tmp_path: Path, files: dict[str, str], reward: HPSv2) -> None:
    """Checkpoints can contain half-precision weights, and the network can run in half precision."""
    torch.save({"state_dict": {name: tensor.half() for name, tensor in tiny.weights().items()}}, tmp_path / "half.pt")
    half = HPSv2(weights=str(tmp_path / "half.pt"), tokenizer=files["tokenizer"])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    images = tiny.make_images(40, 30)
    exact = reward(images, tiny.PROMPTS)
    torch.testing.assert_close(half(images, tiny.PROMPTS), exact, rtol=0, atol=2e-3)
    for dtype, tolerance in (("bfloat16", 0.02), ("float16", 3e-3)):
        scores = HPSv2(**files, dtype=dtype)(images, tiny.PROMPTS)  # type: ignore[arg-type]
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact, rtol=0, atol=tolerance)


def test_gradient_ascent_raises_the_score_most_for_its_own_text(reward: HPSv2) -> None:
    images = tiny.make_images(32, 32).requires_grad_()
    before = reward(images, tiny.PROMPTS).detach()
    optimizer = torch.optim.Adam([images], lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        (-reward(images, tiny.PROMPTS).sum()).backward()
        optimizer.step()
    own = reward(images, tiny.PROMPTS).detach()
    other = reward(images, tiny.PROMPTS[1:] + tiny.PROMPTS[:1]).detach()
    assert (own > before + 0.1).all()
    assert own.mean() > other.mean() + 0.1


def test_checkpoints_of_other_models_are_rejected(tmp_path: Path, files: dict[str, str]) -> None:
    tensors = tiny.weights()
    without = {name: tensor for name, tensor in tensors.items() if name != "visual.ln_post.weight"}
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    extra = {**tensors, "score_predictor.layers.0.weight": torch.ones(2, 2)}
    for content, message in (
        (without, "lacks tensors \\(1\\), among them vision_model.post_layernorm.weight"),
        (text, r"has no visual.conv1.weight, which every open_clip checkpoint"),
        (extra, "has unexpected tensors \\(1\\), among them score_predictor"),
        ({**tensors, "visual.ln_pre.bias": torch.zeros(7)}, r"pre_layrnorm.bias has shape \(7,\) instead of \(32,\)"),
    ):
        torch.save({"state_dict": content}, tmp_path / "other.pt")
        with pytest.raises(ConfigurationError, match=f"other.pt does not fit: .*{message}"):
            HPSv2(weights=str(tmp_path / "other.pt"), tokenizer=files["tokenizer"])


def test_missing_files_are_named_in_the_error(files: dict[str, str], tiny_clip: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"HPS_v2.1_compressed.pt of hub repository xswu/HPSv2 .* write weights="
    ):
        HPSv2(tokenizer=files["tokenizer"])
    with pytest.raises(ConfigurationError, match=r"version='v3' of HPSv2 is not known; write v2.0 or v2.1"):
        HPSv2("v3", **files)  # type: ignore[arg-type]
    for name in ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", files["weights"] + "-none"):
        with pytest.raises(ConfigurationError, match=f"tokenizer='{name}' cannot be read: .* vocab.json"):
            HPSv2(weights=files["weights"], tokenizer=name)
    with pytest.raises(ConfigurationError, match="ends texts with token 57 and the weights expect 520; give"):
        HPSv2(weights=files["weights"], tokenizer=str(tiny_clip))


def test_vocabulary_missing_from_the_package_is_provided(
    files: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    """A package that opens its vocabulary and imports `turtle` as hpsv2 1.2.0 does, and stores what it read."""
    inner = tmp_path / "hpsv2" / "src" / "open_clip"
    inner.mkdir(parents=True)
    for folder in (inner.parent.parent, inner.parent):
        (folder / "__init__.py").write_text("")
    (inner / "__init__.py").write_text(
        "import gzip, os\nfrom turtle import forward\n"
        "path = os.path.join(os.path.dirname(__file__), 'bpe_simple_vocab_16e6.txt.gz')\n"
        "lines = gzip.open(path).read().decode().split('\\n')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before, tokenizer = gzip.open, AutoTokenizer.from_pretrained(files["tokenizer"])
    monkeypatch.delitem(sys.modules, "turtle", raising=False)
    try:
        package = import_hpsv2(bpe_merges(tokenizer))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "hpsv2"]:
            del sys.modules[name]
    assert package.lines == ["#version: 0.2", *(" ".join(merge) for merge in tiny.MERGES)]
    assert gzip.open is before
    assert "turtle" not in sys.modules


@pytest.mark.parametrize("name", ["HPSv2", "lightning_draft.rewards.hpsv2_reference.HPSv2Reference"])
def test_reward_can_be_configured_in_yaml(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    parsed = parser.parse_string(f"reward:\n  class_path: {name}\n  init_args:\n    version: v2.0\n")
    assert parsed.reward.init_args.version == "v2.0"
    assert parser.parse_string(parser.dump(parsed)) == parsed


def test_reference_without_the_package_explains_the_installation(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    message = r"--no-deps hpsv2==1.2.0 .*'lightning-draft\[hpsv2\]'.* HPSv2 computes the same"
    with pytest.raises(ConfigurationError, match=message):
        HPSv2Reference(**files)
