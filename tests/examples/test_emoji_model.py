"""The computations of the emoji scripts, without their data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter
from torch import Tensor
from transformers import CLIPTokenizer

from examples.emoji_model import degradations, export, few_step, latents, mixture, parts, train, truth
from examples.emoji_model.compositions import COLORS, Scene, boxes, render
from examples.emoji_model.data import Emoji
from examples.emoji_model.evaluate import open_pipeline
from examples.emoji_model.nearest import NearestImage
from lightning_draft.assets import FOLDER

NAMES = (*mixture.COMPOSED, "cat", "dog", "bed")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Random blocks of color with holes in the format of `data.prepare`; the last name has no image."""
    generator = np.random.default_rng(0)
    count = 2 * len(NAMES)
    rgba = generator.integers(0, 256, (count, 8, 8, 4), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    rgba[..., 3] = np.where(rgba[..., 3] > 100, 255, 0)
    drawn = np.arange(count) < count - 2
    np.savez(
        tmp_path / "emoji.npz",
        rgba=rgba,
        names=np.repeat(NAMES, 2),
        styles=np.array(["noto", "twemoji"] * len(NAMES)),
        drawn=drawn,
        held_out=np.arange(count) == 1,
    )
    return tmp_path / "emoji.npz"


def smooth_image(size: int = 64) -> Tensor:
    """A disc on a gradient, `(3, size, size)`."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()
    return torch.stack([0.3 + 0.6 * disc, 0.4 + 0.4 * x, 0.8 - 0.5 * disc])


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def test_images_are_composited_on_white_as_in_pillow(file: Path) -> None:
    emoji = Emoji.load(file)
    with np.load(file) as arrays:
        image = Image.fromarray(arrays["rgba"][3])
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.abs(np.asarray(pil(emoji.images[3])).astype(int) - np.asarray(expected)).max() <= 1
    assert emoji.captions[emoji.row("twemoji", emoji.names[3])] == emoji.captions[3]


def test_every_caption_parses_back_to_its_scene(file: Path) -> None:
    for kind, some in mixture.scenes(Emoji.load(file)).items():
        for scene in some:
            assert scene.kind == kind
            assert Scene.parse(scene.caption) == scene


def test_scene_shows_its_parts_in_their_boxes_and_its_background_elsewhere(file: Path) -> None:
    emoji = Emoji.load(file)
    single = emoji.images[emoji.row("noto", "bell")]
    torch.testing.assert_close(render(Scene("noto", ("bell",)), emoji), single)
    two = render(Scene("noto", ("bell", "bell")), emoji)
    small = np.asarray(pil(single).resize((36, 36), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(np.asarray(pil(two[:, :28, :28])).astype(int) - small[:28, :28]).max() <= 3
    assert (two[:, 40:, :24] == 1).all()
    ground = render(Scene("twemoji", ("bell",), "blue"), emoji)
    assert torch.allclose(ground[:, :8], torch.tensor(COLORS["blue"]).view(3, 1, 1).expand(3, 8, 64))
    assert boxes(Scene("twemoji", ("bell",), "blue"), 64) == [(8, 8, 48)]


def test_fine_tuning_and_evaluation_share_nothing_but_the_style(file: Path) -> None:
    for some in mixture.scenes(Emoji.load(file)).values():
        tuned, evaluated = mixture.split(some)
        assert len(tuned) + len(evaluated) == len(some)
        shown = [{caption.removeprefix("noto ").removeprefix("twemoji ") for caption in c} for c in (tuned, evaluated)]
        assert evaluated
        assert not shown[0] & shown[1]


def test_blur_equals_the_gaussian_blur_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(degradations, "_uniform", lambda low, high: 3.0)
    image = smooth_image()
    theirs = torch.from_numpy(np.array(pil(image).filter(ImageFilter.GaussianBlur(3.0)))).permute(2, 0, 1) / 255
    assert (degradations.blur(image) - theirs).abs()[:, 8:-8, 8:-8].max() < 0.02


def test_every_degradation_lowers_the_psnr_visibly() -> None:
    torch.manual_seed(0)
    image = smooth_image()
    for kind in degradations.KINDS:
        errors = torch.stack([(kind(image).clamp(0, 1) - image).square().mean() for _ in range(8)])
        assert (-10 * errors.log10() < 32).all(), kind.__name__


def test_low_contrast_is_affine_and_color_cast_is_a_gain_per_channel() -> None:
    image = smooth_image()
    washed = degradations.wash(image)
    slope = (washed.max() - washed.min()) / (image.max() - image.min())
    assert torch.allclose(washed - washed.min(), slope * (image - image.min()), atol=1e-5)
    gains = degradations.cast(image) / image
    assert torch.allclose(gains, gains.mean((1, 2), keepdim=True).expand_as(gains), atol=1e-5)


@torch.no_grad()
def test_exported_scaling_factor_gives_the_latents_unit_standard_deviation(file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = Emoji.load(file).images[:8]
    training = train.Autoencoder(steps=1)
    training.latent_std.copy_(training.network.encode(images * 2 - 1).latent_dist.mean.std())
    torch.save({"state_dict": training.state_dict()}, tmp_path / "last.ckpt")
    vae = export.autoencoder(tmp_path / "last.ckpt")
    encoded = latents.encode(images, vae)
    assert encoded.shape == (8, 4, 16, 16)
    assert encoded.std().item() == pytest.approx(1, abs=1e-4)
    processor = VaeImageProcessor(vae_scale_factor=4)
    decoded = vae.decode(encoded / vae.config.scaling_factor).sample
    theirs = processor.postprocess(vae(images * 2 - 1, sample_posterior=False).sample, output_type="pt")
    torch.testing.assert_close(processor.postprocess(decoded, output_type="pt"), theirs, atol=1e-4, rtol=0)


def test_true_scene_scores_highest_for_any_contrast(file: Path) -> None:
    emoji = Emoji.load(file)
    scenes = [
        Scene("noto", ("bell",)),
        Scene("", ("key",)),
        Scene("noto", ("bell",) * 2),
        Scene("noto", ("pig",), "red"),
    ]
    images = torch.stack([render(scene, emoji, "twemoji") for scene in scenes])
    captions = [scene.caption for scene in scenes]
    recognized = truth.SceneRecognized(str(file))
    assert recognized(0.4 * images + 0.3, captions).tolist() == [1, 1, 1, 1]
    assert recognized(images, ["noto key", "bell", "noto bell", "noto pig on blue"]).tolist() == [0, 0, 0, 0]
    psnr = truth.ReferencePSNR(str(file))(images + torch.tensor([0.1, -0.1]).repeat(32), captions)
    errors = ((images + torch.tensor([0.1, -0.1]).repeat(32)).clamp(0, 1) - images).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr, -10 * errors.log10())


def test_nearest_image_is_searched_among_training_images_only(file: Path) -> None:
    emoji = Emoji.load(file)
    nearest = NearestImage(str(file))
    noisy = (emoji.images + 0.01).clamp(0, 1)
    name = emoji.names[0]
    assert nearest(noisy[:1].repeat(2, 1, 1, 1), [name, f"noto {name}"]).tolist() == [1, 1]
    assert nearest(noisy[:1], ["dog"]).tolist() == [0]
    unseen = torch.nonzero(~emoji.drawn).squeeze(1)
    assert nearest(noisy[unseen], [emoji.names[row] for row in unseen.tolist()]).tolist() == [0, 0]


def test_captions_are_unchanged_by_the_tokenizer_and_fit_its_length(file: Path, tmp_path: Path) -> None:
    captions = mixture.captions(Emoji.load(file))
    parts.tokenizer(captions, tmp_path / "tokenizer")
    words = parts.tokenizer(captions[:3], tmp_path / "tokenizer")
    assert isinstance(words, CLIPTokenizer)
    tokens = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.shape == (len(captions), parts.MAX_LENGTH)
    assert [words.decode(row, skip_special_tokens=True).strip() for row in tokens] == captions
    with pytest.raises(ValueError, match="at most 16 tokens"):
        parts.tokenizer(["cat " * 20], tmp_path / "tokenizer")


def test_each_clip_caption_matches_one_image_of_its_batch(file: Path) -> None:
    """Similar scenes share a batch; a caption loses its style only where no other has the same words."""
    emoji = Emoji.load(file)
    singles = mixture.scenes(emoji)["single"]
    torch.manual_seed(0)
    styles_dropped = 0
    for _ in range(20):
        chosen = mixture.without_needless_styles(mixture.with_similar(singles, 12))
        captions = [scene.caption for scene in chosen]
        assert len(set(captions)) == len(captions)
        bare = [scene.names for scene in chosen if not scene.style]
        assert all(sum(scene.names == names for scene in chosen) == 1 for names in bare)
        styles_dropped += len(bare)
    assert styles_dropped > 0


def test_a_similar_scene_differs_in_one_thing() -> None:
    torch.manual_seed(0)
    for scene in (Scene("noto", ("a",)), Scene("noto", ("a", "b")), Scene("twemoji", ("a",), "red")):
        for _ in range(10):
            other = mixture.similar(scene)
            changes = (other.style != scene.style, other.names != scene.names, other.color != scene.color)
            assert sum(changes) == 1
            assert sorted(other.names) == sorted(scene.names)


def distillation(substeps: int) -> few_step.Distillation:
    torch.manual_seed(0)
    return few_step.Distillation(open_pipeline(FOLDER / "emoji64"), 4, substeps, 4, steps=10)


def test_the_teacher_steps_of_the_distillation_are_those_of_the_pipeline() -> None:
    module = distillation(5)
    module.restart(["noto pear"] * 4)
    noise = module.x
    for _ in range(4):
        module.x, module.position = module.teacher_step(), module.position + 1
    pipe = open_pipeline(FOLDER / "emoji64")
    expected = pipe(
        ["noto pear"] * 4, latents=noise, num_inference_steps=20, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(module.x, expected, atol=2e-5, rtol=0)


def test_a_student_of_as_many_steps_as_its_teacher_starts_with_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = distillation(1)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    for step in range(3):
        assert module.training_step(["noto pear"] * 4, step).item() < 1e-10
        assert sorted(module.position.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("steps", "substeps"), [("3", 6), ("0", 20)])
def test_a_number_of_steps_that_the_grid_does_not_have_is_rejected(
    steps: str, substeps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["few_step", "--num-steps", steps])
    with pytest.raises(SystemExit):
        few_step.main()
    assert f"--num-steps {steps} times --substeps {substeps} must divide 1000" in capsys.readouterr().err
