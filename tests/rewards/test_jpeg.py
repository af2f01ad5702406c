"""The tensor codec against that of Pillow, the rewards against files."""

import io
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import JPEGCompressibility, JPEGIncompressibility, JPEGRate, JPEGSize
from lightning_draft.rewards.jpeg import straight_through
from lightning_draft.rewards.jpeg_codec import JPEGCodec, dct_matrix, quantization_tables

MakeImages = Callable[..., Tensor]


def jpeg_file(image: Tensor, quality: int) -> io.BytesIO:
    file = io.BytesIO()
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file


def decoded(images: Tensor, quality: int) -> Tensor:
    files = [Image.open(jpeg_file(image, quality)) for image in images]
    return torch.stack([torch.from_numpy(np.array(file)).permute(2, 0, 1).double() / 255 for file in files])


def varied(count: int) -> Tensor:
    """32x32 images from smooth to noisy, `(count, 3, 32, 32)`, whole bytes."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(count):
        coarse = torch.rand(1, 3, 2 + index % 7, 2 + index % 5, generator=generator)
        smooth = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
        noise = torch.randn(1, 3, 32, 32, generator=generator)
        images.append(smooth + 0.3 * (index / count) ** 2 * noise)
    return torch.cat(images).clamp(0, 1).mul(255).round() / 255


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_quantization_tables_equal_those_of_pillow(quality: int) -> None:
    theirs = Image.open(jpeg_file(torch.zeros(3, 8, 8), quality)).quantization
    for ours, table in zip(quantization_tables(quality), (theirs[0], theirs[1]), strict=True):
        assert ours.flatten().tolist() == list(table)


def test_dct_equals_its_formula() -> None:
    matrix = dct_matrix()
    for u, x in np.ndindex(8, 8):
        scale = math.sqrt((1 if u == 0 else 2) / 8)
        assert matrix[u, x].item() == pytest.approx(scale * math.cos((2 * x + 1) * u * math.pi / 16))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("size", [(32, 32), (17, 23), (8, 40), (31, 16), (3, 50), (1, 1)])
@pytest.mark.parametrize(("quality", "mean", "largest"), [(100, 1.0, 6), (75, 2.0, 32)])
def test_decoded_images_equal_those_of_pillow(
    size: tuple[int, int], quality: int, mean: float, largest: int, make_images: MakeImages
) -> None:
    """In units of 1/255. libjpeg computes with integers and sometimes rounds a coefficient differently."""
    images = make_images(6, *size).double()
    codec = JPEGCodec(quality)
    ours = codec.decode(codec.encode(images).map(torch.round))
    error = 255 * (ours - decoded(images, quality)).abs()
    assert error.mean() < mean
    assert error.max() < largest


@pytest.mark.parametrize("size", [(32, 32), (17, 23), (8, 40)])
def test_without_rounding_only_chroma_detail_is_lost(size: tuple[int, int], make_images: MakeImages) -> None:
    codec = JPEGCodec(50)
    gray = make_images(3, *size).double().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    colored = gray + torch.tensor([0.1, -0.05, 0.02], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(codec.decode(codec.encode(colored)), colored, rtol=0, atol=1e-7)


def test_distortion_equals_that_of_pillow(make_images: MakeImages) -> None:
    images = make_images(8, 32, 32)
    true = -((images.double() - decoded(images, 50)) ** 2).mean((1, 2, 3))
    scores = JPEGCompressibility(50)(images, [""] * 8)
    assert scores.numpy() == pytest.approx(true.numpy(), rel=0.03)
    assert torch.equal(JPEGIncompressibility(50)(images, [""] * 8), -scores)


def test_straight_through_gradient_of_luma_is_zero(make_images: MakeImages) -> None:
    images = make_images(2, 16, 16).double().mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous().requires_grad_()
    for rounding, vanishes in (("exact", False), ("straight_through", True)):
        (gradient,) = torch.autograd.grad(JPEGCompressibility(50, rounding)(images, ["", ""]).sum(), images)
        # A change of luma changes all three channels alike.
        assert (gradient.sum(1).abs().max() < 1e-8) == vanishes


def test_straight_through_rounds_with_slope_one() -> None:
    values = torch.tensor([-1.6, 0.4, 2.5], requires_grad=True)
    rounded = straight_through(values)
    (gradient,) = torch.autograd.grad(rounded.sum(), values)
    assert rounded.tolist() == [-2.0, 0.0, 2.0]
    assert gradient.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_size_equals_the_file_that_pillow_writes(quality: int) -> None:
    images = varied(6)
    sizes = [len(jpeg_file(image, quality).getvalue()) / 1000 for image in images]
    assert JPEGSize(quality)(images, [""] * 6).tolist() == pytest.approx([-size for size in sizes])
    assert JPEGSize(quality, compress=False)(images, [""] * 6).tolist() == pytest.approx(sizes)


def test_jpeg_size_clamps_images() -> None:
    images = varied(2)
    stretched = 3 * images - 1
    assert torch.equal(JPEGSize()(stretched, ["", ""]), JPEGSize()(stretched.clamp(0, 1), ["", ""]))


@pytest.mark.parametrize("quality", [75, 95])
def test_rate_correlates_with_the_file_size(quality: int) -> None:
    images = varied(60)
    rate, size = (reward(quality)(images, [""] * 60).double() for reward in (JPEGRate, JPEGSize))
    assert torch.corrcoef(torch.stack([ranks(rate), ranks(size)]))[0, 1] > 0.98
    slope = torch.linalg.lstsq(torch.stack([rate, torch.ones_like(rate)], 1), size).solution[0]
    assert 2 < slope < 3.2
    assert torch.equal(JPEGRate(quality, compress=False)(images, [""] * 60).double(), -rate)


def test_rate_of_one_block_equals_its_formula() -> None:
    """Gray 8x8 images have one block of luma; the chroma is exactly 0."""
    gray = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = 255 * gray[0, 0].numpy() - 128
    table = quantization_tables(95)[0].numpy()
    bits = 0.0
    for u, v in np.ndindex(8, 8):
        cosines = np.outer(*(np.cos((2 * np.arange(8) + 1) * w * np.pi / 16) for w in (u, v)))
        scale = 0.25 * (0.5**0.5 if u == 0 else 1) * (0.5**0.5 if v == 0 else 1)
        bits += math.log2(1 + abs(scale * (levels * cosines).sum() / table[u, v]))
    assert JPEGRate(95)(gray.expand(1, 3, 8, 8), [""]).item() == pytest.approx(-bits / 8000, rel=1e-6)


def test_dc_coefficients_are_differences_in_file_order() -> None:
    """Flat gray blocks, two rows of four: with 4:2:0 chroma they are coded as two squares of four."""
    levels = torch.tensor([[30.0, 90.0, 200.0, 40.0], [60.0, 150.0, 10.0, 250.0]], dtype=torch.float64)
    image = levels.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(1, 3, 16, 32) / 255
    coded = [levels[place].item() - 128 for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3))]
    steps = [coded[0], *(after - before for before, after in itertools.pairwise(coded))]
    bits = sum(math.log2(1 + abs(8 * step / 2)) for step in steps)
    assert JPEGRate(95)(image, [""]).item() == pytest.approx(-bits / 8000, rel=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (24, 40)])
def test_average_color_adds_rate_only_in_the_first_block(size: tuple[int, int]) -> None:
    flat = torch.tensor([0.9, 0.3, 0.6]).view(1, 3, 1, 1).expand(1, 3, *size)
    assert JPEGRate()(flat, [""]).item() == pytest.approx(JPEGRate()(flat[..., :16, :16], [""]).item(), rel=1e-3)


def test_gradient_ascent_on_the_rate_shrinks_the_file() -> None:
    images = varied(12)
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (-JPEGRate(95)(pixels, [""] * 12).sum()).backward()
        optimizer.step()
    before, after = (JPEGSize(95)(x.detach(), [""] * 12).mean() for x in (images, pixels))
    assert after > 0.93 * before


@pytest.mark.parametrize("reward", [JPEGCompressibility, JPEGIncompressibility, JPEGRate, JPEGSize])
@pytest.mark.parametrize("quality", [0, 101, 92.5])
def test_other_qualities_than_integers_from_1_to_100_are_rejected(reward: type, quality: float) -> None:
    with pytest.raises(ConfigurationError, match=f"quality={quality} is not a JPEG quality; write an integer from 1"):
        reward(quality)


def test_unknown_roundings_are_rejected() -> None:
    with pytest.raises(ConfigurationError, match="rounding='soft' is not known; write exact or straight_through"):
        JPEGCompressibility(rounding="soft")  # type: ignore[arg-type]
