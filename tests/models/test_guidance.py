"""Options of classifier-free guidance and of the decoder, and batches of conditioning."""

import pytest
import torch

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import Conditioning, Guidance, Memory


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_negative_or_non_finite_scale_is_rejected(scale: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"guidance.scale={scale} must be .*; write 1 for no guidance"):
        Guidance(scale)


def test_other_invalid_options_are_rejected() -> None:
    with pytest.raises(ConfigurationError, match="guidance.gradient='off' is not .* full, conditional"):
        Guidance(gradient="off")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="memory.decode_chunk=0 must be at least 1"):
        Memory(decode_chunk=0)
    with pytest.raises(ConfigurationError, match="memory.vae_dtype='int8' is not a valid choice; write one of float32"):
        Memory(vae_dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"guidance.max_norm=0.0 must be .*; write 1.0, or leave it out"):
        Guidance(max_norm=0.0)
    with pytest.raises(ConfigurationError, match="guidance.scale='7' must be at least 0; write 1"):
        Guidance(scale="7")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"guidance.negative_prompt=\['a'\] must be text; write ''"):
        Guidance(negative_prompt=["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("embedded", [-1.0, float("inf"), float("nan"), "3"])
def test_an_embedded_scale_that_is_no_finite_number_is_rejected(embedded: float) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance.embedded=.* must be .*at least 0; write 3.5"):
        Guidance(embedded=embedded)


def test_a_limit_of_the_norm_without_guidance_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"guidance.max_norm=1.0 has no effect"):
        Guidance(1.0, max_norm=1.0).or_default(4.5)


def test_default_scale_is_used_if_none_is_given() -> None:
    assert Guidance(negative_prompt="blurry").or_default(4.5) == Guidance(4.5, "blurry")
    assert Guidance(0.0).or_default(4.5) == Guidance(0.0)


def batch() -> Conditioning:
    """Two prompts of different lengths, with a mask, and the negative prompt's conditioning."""
    lengths = (torch.full((1, 4), 1.0), torch.full((3, 4), 2.0))
    negative = Conditioning({"mask": torch.zeros(2, 3, dtype=torch.bool)}, {"text": (torch.zeros(2, 4),) * 2})
    return Conditioning({"mask": torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)}, {"text": lengths}, negative)


def test_conditioning_with_a_mask_and_ragged_embeddings_is_sliced_and_repeated() -> None:
    conditioning = batch()
    assert len(conditioning) == 2
    second = conditioning[1:2]
    assert second.ragged["text"][0].shape == (3, 4)
    assert second.tensors["mask"].tolist() == [[True, True, True]]
    assert second.negative is not None
    assert len(second.negative) == 1
    copies = conditioning.repeat(3)
    assert [len(each) for each in copies.ragged["text"]] == [1, 3, 1, 3, 1, 3]
    assert torch.equal(copies.tensors["mask"], conditioning.tensors["mask"].repeat(3, 1))
    assert copies.negative is not None
    assert len(copies.negative) == 6


def test_only_floating_point_tensors_change_their_dtype() -> None:
    half = batch().to(torch.bfloat16)
    assert half.tensors["mask"].dtype == torch.bool
    assert {each.dtype for each in half.ragged["text"]} == {torch.bfloat16}


def test_guidance_concatenates_ragged_batches_in_one_call() -> None:
    """With `e_u + w (e_c - e_u)` computed by hand."""
    conditioning, x = batch(), torch.ones(2, 1)
    sizes = []

    def network(x: torch.Tensor, given: Conditioning) -> torch.Tensor:
        sizes.append(len(x))
        return x * torch.stack([each.sum() for each in given.ragged["text"]])[:, None]

    assert Guidance(3.0).apply(network, x, conditioning).flatten().tolist() == [3 * 4.0, 3 * 24.0]
    assert Guidance(1.0).apply(network, x, conditioning).flatten().tolist() == [4.0, 24.0]
    assert sizes == [4, 2]
