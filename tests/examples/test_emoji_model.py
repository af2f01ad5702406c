"""What the emoji scripts compute, without their data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from examples.emoji_model import export, parts
from examples.emoji_model.data import Emoji
from examples.emoji_model.nearest import NearestPicture


@pytest.fixture
def emoji() -> Emoji:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = ["cat", "cat", "dog", "dog", "bed", "bed"]
    return Emoji(
        images,
        names,
        ["noto", "twemoji"] * 3,
        drawn=torch.tensor([True, True, True, True, False, False]),
        held_out=torch.tensor([False, False, False, True, False, False]),
    )


def test_standardising_changes_the_latents_and_not_the_pictures(emoji: Emoji, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = parts.autoencoder().eval()
    state = {f"network.{key}": value for key, value in vae.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    standardised = export.standardised_autoencoder(tmp_path / "last.ckpt", emoji)
    images = emoji.images * 2 - 1
    with torch.no_grad():
        before, after = vae.encode(images).latent_dist, standardised.encode(images).latent_dist
        std, mean = torch.std_mean(before.mean, dim=(0, 2, 3), keepdim=True)
        torch.testing.assert_close(after.mean, (before.mean - mean) / std, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after.std, before.std / std, rtol=1e-3, atol=1e-4)
        pictures = standardised.decode(after.mean).sample
        torch.testing.assert_close(pictures, vae.decode(before.mean).sample, rtol=1e-3, atol=1e-3)


def test_nearest_looks_at_training_pictures_only(emoji: Emoji, tmp_path: Path) -> None:
    file = tmp_path / "emoji.npz"
    pictures = (emoji.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    drawn, held_out = emoji.drawn.numpy(), emoji.held_out.numpy()
    np.savez(file, images=pictures, names=emoji.names, styles=emoji.styles, drawn=drawn, held_out=held_out)
    judge = NearestPicture(str(file))
    noisy = (emoji.images + 0.01).clamp(0, 1)
    assert judge(noisy[:3], ["cat", "twemoji cat", "noto dog"]).tolist() == [1, 1, 1]
    assert judge(noisy[:3], ["dog", "noto dog", "cat"]).tolist() == [0, 0, 0]
    seen = emoji.drawn & ~emoji.held_out
    distances = (emoji.images[seen] - noisy[3]).square().flatten(1).sum(1)
    found = [name for name, used in zip(emoji.names, seen, strict=True) if used][int(distances.argmin())]
    assert judge(noisy[3:4].repeat(2, 1, 1, 1), [found, "bed"]).tolist() == [1, 0]


def test_captions_survive_the_tokenizer(tmp_path: Path) -> None:
    captions = ["noto red apple", "twemoji deciduous tree"]
    words = parts.tokenizer(captions, tmp_path)
    assert isinstance(words, CLIPTokenizer)
    tokens = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.shape == (2, parts.MAX_LENGTH)
    assert [words.decode(row, skip_special_tokens=True).strip() for row in tokens] == captions
