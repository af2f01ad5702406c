"""Import, train, export, reload and score with the oldest and the newest supported releases.

`make test-oldest` runs this file alone, on the releases in constraints-oldest.txt.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

import lightning_draft
from lightning_draft import DDIM, Guidance, LoRA, StableDiffusion
from lightning_draft.assets import FOLDER
from lightning_draft.chain import SamplingChain
from lightning_draft.cli.run_trainer import RunTrainer
from lightning_draft.configs import __file__ as configs
from lightning_draft.rewards import CaptionRetrieval, CLIPScore, JPEGCompressibility

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "assets" / "emoji32"
CLIP = str(SMALL.with_name("emoji32-clip"))
QUICKSTART: dict[str, Any] = yaml.safe_load(Path(configs).with_name("quickstart.yaml").read_text())
MODEL: dict[str, Any] = QUICKSTART["model"]["init_args"]["model"]["init_args"]
PROMPTS = ["noto red apple", "twemoji cat"]
STEPS = 5


def run(folder: Path, *arguments: str) -> str:
    """Run `lightning-draft` with arguments in a folder, and return what it printed."""
    program = [sys.executable, "-m", "lightning_draft", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of three steps of the quickstart."""
    folder = tmp_path_factory.mktemp("smoke")
    run(folder, "fit", "--config", "quickstart", "--trainer.max_steps", "3")
    return folder / "runs" / "quickstart"


@torch.no_grad()
def sample(model: StableDiffusion, prompts: list[str], noise: Tensor, steps: int = STEPS) -> Tensor:
    """Sample with this package."""
    chain = SamplingChain(model, DDIM(steps), model.encode(prompts))
    return model.decode(chain.advance(chain.start(noise)).x).clamp(0, 1)


def sample_in_diffusers(noise: Tensor, *lora: Path) -> Tensor:
    """Sample with diffusers, with LoRA files loaded by its own loader."""
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / MODEL["pretrained"], dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for file in lora:
        pipeline.load_lora_weights(str(file))
    options = {"num_inference_steps": STEPS, "guidance_scale": MODEL["guidance"]["scale"], "output_type": "pt"}
    images: Tensor = pipeline(PROMPTS, latents=noise, **options).images
    return images


def noise_for(model: StableDiffusion, number: int) -> Tensor:
    return torch.randn(number, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def random_images() -> Tensor:
    """Images with values that are multiples of 1/255, so that PIL images are equal."""
    levels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


def test_every_module_imports() -> None:
    names = [module.name for module in walk_packages(lightning_draft.__path__, "lightning_draft.")]
    assert len(names) > 40
    for name in names:
        import_module(name)


@pytest.mark.skipif("OLDEST" not in os.environ, reason="only `make test-oldest` installs these releases")
def test_the_installed_releases_are_the_oldest_allowed() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    pins["torch"] = os.environ["OLDEST"]
    assert {name: version(name).partition("+")[0] for name in pins} == pins


def test_trainer_options_take_an_integer_as_a_count_of_batches() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(RunTrainer, "trainer")
    names = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")
    parsed = parser.parse_args([f"--trainer.{name}=1" for name in names]).trainer
    assert [(type(parsed[name]), parsed[name]) for name in names] == [(int, 1)] * len(names)


def test_32_px_model_generates_recognizable_images() -> None:
    """If the weights of the text encoder were not loaded, the CLIP would recognize almost no image."""
    captions = (SMALL.parent / "prompts" / "emoji32.txt").read_text().splitlines()[::60]
    model = StableDiffusion(str(SMALL), lora=None, guidance=Guidance(1.0))
    images = sample(model, captions, noise_for(model, len(captions)), steps=10)
    assert CaptionRetrieval(CLIP, str(SMALL.parent / "prompts" / "emoji32.txt"))(images, captions).mean() > 0.7


def test_exported_adapters_give_the_same_images_in_diffusers(trained: Path) -> None:
    file = trained / "lora" / "last.safetensors"
    model = StableDiffusion(MODEL["pretrained"], lora=LoRA(**MODEL["lora"]), guidance=Guidance(**MODEL["guidance"]))
    noise = noise_for(model, len(PROMPTS))
    before = sample_in_diffusers(noise)
    torch.testing.assert_close(sample(model, PROMPTS, noise), before, rtol=0, atol=2e-4)
    model.load_lora(file)
    after = sample_in_diffusers(noise, file)
    torch.testing.assert_close(sample(model, PROMPTS, noise), after, rtol=0, atol=2e-4)
    assert (after - before).abs().max() > 0.01


def test_a_finished_run_is_resumed_and_sampled(trained: Path) -> None:
    folder = trained.parents[1]
    resumed = run(folder, "fit", "--config", "runs/quickstart", "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert "step 4/4" in resumed
    run(folder, "sample", "runs/quickstart", "--max", "2", "-o", "samples.png")
    assert Image.open(folder / "samples.png").width > 0


def test_clip_score_is_the_similarity_that_transformers_computes() -> None:
    images = random_images()
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    pil_images = [Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    processor = CLIPProcessor.from_pretrained(CLIP)
    with torch.no_grad():
        inputs = processor(text=PROMPTS, images=pil_images, return_tensors="pt", padding="max_length")
        logits = clip(**inputs).logits_per_image
    expected = logits.diagonal() / clip.logit_scale.exp()
    torch.testing.assert_close(CLIPScore(CLIP)(images, PROMPTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reward", [CLIPScore(CLIP), JPEGCompressibility()], ids=["CLIP", "JPEG"])
def test_a_small_step_along_the_gradient_raises_the_reward(reward: torch.nn.Module) -> None:
    images = random_images().requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    with torch.no_grad():
        better = reward((images + 1e-2 * gradient / gradient.abs().max()).clamp(0, 1), PROMPTS)
    assert (better > scores).all()
