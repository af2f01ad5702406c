"""The command `sample` with a LoRA file and a model's folder, for every model family, and the pixel-space models."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_draft
from lightning_draft.callbacks.image_grid import comparison
from lightning_draft.cli.generation import default_sampler
from lightning_draft.image_generation import generate
from lightning_draft.models import LoRA
from lightning_draft.models.families import FAMILIES
from lightning_draft.models.loading import opener
from lightning_draft.models.pipeline import PipelineModel
from tests.tiny_families import WRITERS, write

FIXTURES = ["tiny_sd", "tiny_sdxl", "tiny_sd3"]
NAMES = {
    "tiny_sd": "StableDiffusion",
    "tiny_sdxl": "StableDiffusionXL",
    "tiny_sd3": "StableDiffusion3",
    "flux": "Flux",
    "flux_2_klein": "Flux2Klein",
    "pixart_sigma": "PixArtSigma",
    "sana": "Sana",
    "sana_sprint": "SanaSprint",
    "chroma": "Chroma",
    "z_image": "ZImage",
    "qwen_image": "QwenImage",
    "pixels": "PixelDiffusion",
    "pixels_of_classes": "PixelDiffusion",
}
PROMPTS = ["3", "7"]  # of classes; other models read them as text


def tuned(folder: Path, side: int, file: Path) -> PipelineModel:
    """A model with adapters that do something, which are written to a file."""
    kind = getattr(lightning_draft, str(opener(str(folder))))
    model: PipelineModel = kind(str(folder), lora=LoRA(2), height=side, width=side)
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.5 * torch.randn(value.shape, generator=generator)
    model.save_lora(file, {"base": folder.name})
    return model


def means(output: str) -> dict[str, float]:
    """The printed means of the reward Symmetry, by label."""
    found = re.findall(r"^(.*?) +(?:reward \S+ +)?Symmetry (\S+)", output, re.MULTILINE)
    return {label: float(value) for label, value in found}


@pytest.mark.parametrize("name", NAMES)
def test_sample_with_a_file_and_a_model_gives_the_images_of_the_model_that_wrote_the_file(
    command: Callable, name: str, workplace: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name) if name in FIXTURES else write(name, workplace / name)
    side = 32 if name.startswith("sana") else 16
    model = tuned(folder, side, workplace / "lora.safetensors")
    options = ["--prompt", *PROMPTS, "--steps", 2, "--height", side, "--width", side]
    result = command("sample", "lora.safetensors", "--model", folder, *options)
    assert result.status == 0, result.err
    sampler = default_sampler(model, 2)
    images = {
        label: generate(model, sampler, PROMPTS, 0, scale).images for label, scale in (("base", 0.0), ("scale 1", 1.0))
    }
    with Image.open("sample.png") as written:
        difference = np.asarray(written, int) - np.asarray(comparison(PROMPTS, images), int)
    assert abs(difference).max() <= 1
    assert (images["scale 1"] - images["base"]).abs().max() > 4 / 255
    assert type(model).__name__ == NAMES[name]


def test_every_family_is_sampled() -> None:
    assert set(NAMES.values()) == set(FAMILIES)
    assert set(NAMES) - set(FIXTURES) == set(WRITERS) - {"flux_schnell"}


RUN = """\
model:
  class_path: DraftModule
  init_args:
    model:
      class_path: PixelDiffusion
      init_args: {{pretrained: {folder}, lora: {{rank: 2}}}}
    sampler: {{class_path: DDIM, init_args: {{num_steps: 2}}}}
    reward: Brightness
data: {{prompts: ["1", "2"], val_prompts: ["3", "7"]}}
"""


@pytest.fixture
def pixel_run(workplace: Path) -> Path:
    """The folder of a run of a class-conditional model, as training writes it."""
    run = workplace / "run"
    folder = write("pixels_of_classes", workplace / "classes")
    tuned(folder, 16, run / "lora" / "best.safetensors")
    (run / "config.yaml").write_text(RUN.format(folder=folder))
    return run


def test_a_run_of_classes_is_sampled_guided_and_merged(command: Callable, pixel_run: Path) -> None:
    """By the held-out classes of its config, or those on the command line; a merged pipeline is the tuned model."""
    sampled = command("sample", pixel_run, "--scale", 0, 1, "--reward", "Symmetry")
    file, config = (pixel_run / "lora/best.safetensors").rename("a.safetensors"), pixel_run / "config.yaml"
    given = command("sample", file, "--config", config, "--prompt", 3, 7, "--reward", "Symmetry")
    assert means(sampled.out) == means(given.out)
    guided = command("guide", file, "--config", config, "--method", "best_of_n:2", "dno:1")
    assert guided.status == 0, guided.err
    assert all(label in guided.out for label in ("base", "best_of_n 2", "dno 1", "tuned"))
    options = ["--prompt", 3, 7, "--steps", 2, "--reward", "Symmetry"]
    merged = means(command("lora", "merge", file, "--model", "classes", "-o", "merged", *options).out)
    assert merged["merged (merged)"] == pytest.approx(merged["a.safetensors"], abs=5e-6)
    assert merged["a.safetensors"] == pytest.approx(means(sampled.out)["scale 1"], abs=5e-6)


def test_prompts_that_are_no_classes_and_sizes_beside_a_config_give_one_message(
    command: Callable, pixel_run: Path
) -> None:
    text = command("sample", pixel_run, "--prompt", "a cat")
    assert (text.status, text.err.count("\n")) == (2, 1)
    assert "prompt 'a cat' must be the number of a class of this model, 0 to 9, such as '0'" in text.err
    size = command("sample", pixel_run, "--height", 16, "--width", 16)
    assert size.status == 2
    assert "--height and --width need --model NAME" in size.err


def test_models_without_text_are_sampled_without_prompts(command: Callable, workplace: Path) -> None:
    options = ["--steps", 1, "--reward", "Symmetry", "--max", 2]
    unconditional, classes = write("pixels", workplace / "any"), write("pixels_of_classes", workplace / "classes")
    assert command("sample", "--model", unconditional, *options).status == 0
    without = command("sample", "--model", classes, *options)
    assert means(without.out) == means(command("sample", "--model", classes, *options, "--prompt", 0, 1).out)


def test_a_model_that_is_no_pipeline_is_rejected_with_the_reason(command: Callable, workplace: Path) -> None:
    (workplace / "plain_model.py").write_text(
        "from lightning_draft.testing import LinearModel\n\n"
        "class Plain(LinearModel):\n    def __init__(self) -> None:\n        super().__init__()\n"
    )
    text = RUN.format(folder="x").replace("PixelDiffusion", "plain_model.Plain")
    lines = [line for line in text.splitlines() if "pretrained" not in line]
    Path("plain.yaml").write_text("\n".join(lines) + "\n")
    result = command("sample", "--config", "plain.yaml")
    assert result.status == 2
    assert "plain.yaml: sample does not support a Plain: only a PipelineModel can load LoRA files" in result.err
