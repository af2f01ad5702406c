"""ImageReward against figures recorded from the reference implementation, and the files that it reads."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import ImageReward
from lightning_draft.rewards.image_reward import preprocess

MakeImages = Callable[..., Tensor]
FOLDER = Path(__file__).parent / "recorded"
RECORDED: dict[str, Any] = json.loads((FOLDER / "image_reward.json").read_text())
RECORDER = runpy.run_path(str(FOLDER / "image_reward.py"))
PROMPTS: list[str] = RECORDED["prompts"]


def open_reward(folder: Path, **options: Any) -> ImageReward:
    return ImageReward(**{"weights": str(folder / "small.pt"), "tokenizer": str(folder), **options})


def recorded_images(size: str) -> Tensor:
    height, width = (int(length) for length in size.split("x"))
    arrays = [np.array(RECORDER["make_image"](height, width, seed)) for seed in range(len(PROMPTS))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).double() / 255


def test_scores_equal_the_recorded_ones(tiny_image_reward: Path) -> None:
    """At the input size of the network, in float64: vision transformer, cross-attention, head, truncated prompts."""
    scores = open_reward(tiny_image_reward).double()(recorded_images("32x32"), PROMPTS)
    expected = torch.tensor(RECORDED["scores"]["32x32"], dtype=torch.float64)
    assert expected.std() > 1
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", ["48x33", "40x91", "20x27"])
def test_scores_of_resized_images_are_close_to_the_recorded_ones(size: str, tiny_image_reward: Path) -> None:
    """Pillow rounds to bytes after each pass of the resize, which changes scores of about 5 by up to 0.1."""
    scores = open_reward(tiny_image_reward)(recorded_images(size).float(), PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(RECORDED["scores"][size]), rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [(32, 32), (48, 33), (40, 91), (20, 27), (33, 38), (200, 31)])
def test_pixels_equal_those_of_pillow(size: tuple[int, int]) -> None:
    """The difference is at most 1.6/255, without a resize only rounding; the crop has the same position."""
    pil_image = RECORDER["make_image"](*size, 0)
    image = torch.from_numpy(np.array(pil_image)).permute(2, 0, 1).unsqueeze(0).double() / 255
    level = 1 / 255 / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    gap = (preprocess(image, 32)[0] - RECORDER["pixels"](pil_image)).abs() / level
    assert gap.max() < (1e-9 if min(size) == 32 else 1.6)


def test_prompts_are_truncated_to_35_tokens(tiny_image_reward: Path, make_images: MakeImages) -> None:
    reward, images = open_reward(tiny_image_reward), make_images(1, 32, 32)
    long = reward(images, ["cat " * 33])
    assert torch.equal(reward(images, ["cat " * 60]), long)
    assert not torch.equal(reward(images, ["cat " * 32]), long)


def test_score_depends_on_prompt_and_image(tiny_image_reward: Path, make_images: MakeImages) -> None:
    reward, images = open_reward(tiny_image_reward), make_images(2, 32, 32)
    scores = torch.stack([reward(images, [prompt] * 2) for prompt in PROMPTS])
    assert scores.std(0).min() > 0.1
    assert (scores[:, 0] - scores[:, 1]).abs().min() > 1e-3


def test_additional_words_of_blip_are_single_tokens(tiny_image_reward: Path) -> None:
    """They follow the last word of the vocabulary; with the published one they are 30522 and 30523."""
    tokenizer = open_reward(tiny_image_reward).tokenizer
    words = len((tiny_image_reward / "vocab.txt").read_text().splitlines())
    assert tokenizer("[DEC] [ENC]")["input_ids"][1:-1] == [words, words + 1]
    assert RECORDER["CONFIG"]["vocab_size"] == words + 2


def test_weights_can_be_a_safetensors_file(tiny_image_reward: Path, tmp_path: Path, make_images: MakeImages) -> None:
    save_file(RECORDER["state_dict"](), tmp_path / "small.safetensors")
    images = make_images(3, 32, 32)
    config, tokenizer = str(tiny_image_reward / "med_config.json"), str(tiny_image_reward)
    other = ImageReward(str(tmp_path / "small.safetensors"), config, tokenizer)
    assert torch.equal(other(images, PROMPTS), open_reward(tiny_image_reward)(images, PROMPTS))


def test_file_with_the_published_name_is_verified(tiny_image_reward: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_image_reward / "small.pt", tmp_path / "ImageReward.pt")
    shutil.copy(tiny_image_reward / "med_config.json", tmp_path)
    with pytest.raises(ConfigurationError, match=r"is not ImageReward.pt of hub repository THUDM/ImageReward: its SHA"):
        ImageReward(str(tmp_path), tokenizer=str(tiny_image_reward))


def test_missing_files_are_named(tiny_image_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"ImageReward.pt of hub .*could not be downloaded.*write weights="):
        ImageReward(tokenizer=str(tiny_image_reward))
    with pytest.raises(ConfigurationError, match=r"weights='nowhere': nowhere does not exist"):
        ImageReward("nowhere")
    shutil.copy(tiny_image_reward / "small.pt", tmp_path)
    with pytest.raises(ConfigurationError, match=r"med_config.json of hub .*could not be downloaded.*write config="):
        open_reward(tmp_path, tokenizer=str(tiny_image_reward))
    with pytest.raises(ConfigurationError, match=r"vocab.txt of hub .*google-bert/bert.*write tokenizer=FOLDER/vocab"):
        ImageReward(str(tiny_image_reward / "small.pt"))


def test_other_tokenizers_are_rejected(tiny_image_reward: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"tokenizer='.*: .*vocab.txt does not exist; give a file or its folder"
    ):
        open_reward(tiny_image_reward, tokenizer=str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ConfigurationError, match=r"makes a tokenizer of 8 words .* has 66; give vocab.txt of hub"):
        open_reward(tiny_image_reward, tokenizer=str(tmp_path))


def test_other_files_are_rejected(tiny_image_reward: Path, tmp_path: Path) -> None:
    def expect_error(weights: dict[str, Tensor], config: Any, message: str) -> None:
        torch.save(weights, tmp_path / "small.pt")
        (tmp_path / "med_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        with pytest.raises(ConfigurationError, match=message):
            open_reward(tmp_path, tokenizer=str(tiny_image_reward))

    weights, config = RECORDER["state_dict"](), RECORDER["CONFIG"]
    lacking = {
        name: tensor
        for name, tensor in weights.items()
        if name != "blip.text_encoder.encoder.layer.1.output.dense.bias"
    }
    expect_error(lacking, config, "lacks tensors \\(1\\), among them text.encoder.layer.1.output.dense.bias")
    expect_error({"weight": torch.ones(1)}, config, "is not a checkpoint of ImageReward: it lacks 'blip.visual_encoder")
    expect_error(weights, {**config, "hidden_size": 32}, "does not fit: .* has shape")
    expect_error(
        weights, {"hidden_size": 32}, r"med_config.json lacks vocab_size, .*give med_config.json of hub repository"
    )
    expect_error(weights, "{", "med_config.json is not a JSON object")


def test_weights_are_frozen_in_eval_mode_and_in_the_given_precision(
    tiny_image_reward: Path, make_images: MakeImages
) -> None:
    images, exact = make_images(3, 32, 32), open_reward(tiny_image_reward)
    assert not any(parameter.requires_grad for parameter in exact.parameters())
    assert not any(module.training for module in exact.modules() if module is not exact)
    half = open_reward(tiny_image_reward, dtype="bfloat16")(images, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact(images, PROMPTS), rtol=0, atol=0.3)
    with pytest.raises(ConfigurationError, match="dtype='int8' is not supported"):
        open_reward(tiny_image_reward, dtype="int8")


def test_script_compares_scores_with_the_published_ones(
    tiny_image_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script, with other weights and images, computes the same scores and reports differences."""
    from examples import image_reward_published as published

    reward = open_reward(tiny_image_reward)
    for seed, name in enumerate(published.PUBLISHED):
        RECORDER["make_image"](40, 52, seed).save(tmp_path / name, lossless=True)
    images = recorded_images("32x32").new_empty(4, 3, 40, 52)
    for seed, image in enumerate(images):
        image.copy_(torch.from_numpy(np.array(RECORDER["make_image"](40, 52, seed))).permute(2, 0, 1) / 255)
    expected = reward(images.float(), [published.PROMPT] * 4).tolist()
    arguments = [str(tmp_path), f"weights={tiny_image_reward}/small.pt", f"tokenizer={tiny_image_reward}"]
    assert published.main(arguments) == 1
    monkeypatch.setattr(published, "PUBLISHED", dict(zip(published.PUBLISHED, expected, strict=True)))
    assert published.main(arguments) == 0
    assert "allowed 0.05" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        published.main([str(tmp_path), "weights"])
