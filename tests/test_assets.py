"""The shipped models are small and give equal results in this package, diffusers and transformers."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lightning_draft.assets import FOLDER
from lightning_draft.chain import SamplingChain
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import CaptionRetrieval
from lightning_draft.samplers import DDIM

MEBIBYTE = 2**20


@pytest.mark.parametrize(("name", "most"), [("emoji64", 25), ("emoji64-clip", 4.5), (".", 40)])
def test_shipped_models_are_small(name: str, most: int) -> None:
    size = sum(file.stat().st_size for file in (FOLDER / name).rglob("*") if file.is_file())
    assert 1 < size / MEBIBYTE < most


def test_weights_are_half_precision() -> None:
    from safetensors import safe_open

    for file in FOLDER.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}, file


def test_text_encoder_has_the_weight_names_of_published_checkpoints() -> None:
    """Every supported release of transformers reads these names; newer releases would write others."""
    from safetensors import safe_open

    files = list(FOLDER.glob("*/text_encoder/model.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as weights:
            assert all(key.startswith("text_model.") for key in weights.keys()), file  # noqa: SIM118


def test_diffusers_generates_the_same_images() -> None:
    """The loop of the pipeline against the chain: guidance, scheduler, decoder."""
    prompts = ["noto pear", "twemoji crab"]
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "emoji64", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *StableDiffusion("emoji64").latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(prompts, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="pt").images
    model = StableDiffusion("emoji64", lora=None, guidance=Guidance(3.0))
    with torch.no_grad():
        chain = SamplingChain(model, DDIM(5), model.encode(prompts))
        ours = model.decode(chain.advance(chain.start(noise)).x).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["emoji64", "emoji64_scenes", "emoji64_pairs"])
def test_evaluation_captions_name_other_things_than_those_for_fine_tuning(name: str) -> None:
    tuned, evaluated = ({prompt.split(" ", 1)[1] for prompt in read_prompts(f"{name}{end}")} for end in ("", "_eval"))
    assert len(evaluated) >= 40
    assert not tuned & evaluated


def test_64_px_clip_distinguishes_compositions() -> None:
    reward = CaptionRetrieval("emoji64-clip", "emoji64_scenes")
    captions = read_prompts("emoji64_scenes")
    features = reward.encoder.texts(captions)
    assert ((features @ features.T).argmax(1) == torch.arange(len(captions))).float().mean() > 0.98
