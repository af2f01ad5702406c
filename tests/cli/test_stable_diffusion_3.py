"""A command-line run with Stable Diffusion 3: its output, and the use of its files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

CONFIG = """\
# A run of seconds.
model:
  class_path: DraftModule
  init_args:
    model:
      class_path: StableDiffusion3
      init_args: {{pretrained: {model}, guidance: {{scale: 2.0}}, text: {{max_length: 20}}, lora: {{rank: 2}}}}
    sampler:
      class_path: FlowEuler
      init_args: {{num_steps: 3}}
    truncation:
      class_path: LastK
      init_args: {{k: 2}}
    reward:
      class_path: Brightness
      init_args: {{target: 0.9}}
    optimizer:
      class_path: AdamW
      init_args: {{lr: 0.05}}
data:
  prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer]
  val_size: 2
  batch_size: 2
trainer:
  max_steps: 2
  accelerator: cpu
  val_check_interval: 2
gradients: {{figure_every_n_steps: 0}}
"""


@pytest.fixture
def config(workplace: Path, tiny_sd3: Path) -> Path:
    path = workplace / "flow.yaml"
    path.write_text(CONFIG.format(model=tiny_sd3))
    return path


def test_printed_code_and_sample_command_work(command: Callable, config: Path, tiny_sd3: Path) -> None:
    """The printed code for diffusers runs, and `sample` works with the run, and with the file and its base model."""
    result = command("fit", "--config", config)
    assert result.status == 0, result.err
    lines = re.findall(r"^    (pipe.*)$", result.out, re.MULTILINE)
    assert lines[0] == f'pipe = StableDiffusion3Pipeline.from_pretrained("{tiny_sd3}")'
    names: dict = {"StableDiffusion3Pipeline": StableDiffusion3Pipeline}
    exec("\n".join(lines), names)
    adapted = dict(names["pipe"].transformer.named_parameters())
    saved = load_file("runs/flow/lora/best.safetensors")
    assert len(saved) == 38
    for name, value in saved.items():
        layer, factor, _ = name.removeprefix("transformer.").rsplit(".", 2)
        assert torch.equal(adapted[f"{layer}.{factor}.default_0.weight"], value)

    result = command("sample", "runs/flow", "--scale", "0", "1", "--prompt", "red", "-o", "run.png")
    assert result.status == 0, result.err
    rewards = re.findall(r"reward ([\d.e+-]+)", result.out)
    assert len(set(rewards)) == 2
    file = Path("runs/flow/lora/last.safetensors").rename("my.safetensors")
    alone = command("sample", file, "--prompt", "a cat", "--steps", "2", "-o", "one.png")
    assert alone.status == 2
    assert "write --model and the pipeline's folder" in alone.err
    named = command("sample", file, "--model", tiny_sd3, "--prompt", "a cat", "--steps", "2", "-o", "two.png")
    assert named.status == 0, named.err
    assert Path("two.png").is_file()


def test_file_with_fewer_layers_adapts_only_these_layers(command: Callable, config: Path, tiny_sd3: Path) -> None:
    """A file for one of two attentions does not need the other."""
    from lightning_draft.models import LoRA, StableDiffusion3

    model = StableDiffusion3(str(tiny_sd3), lora=LoRA(rank=3, target_modules=["attn.to_q", "ff.net.2"]))
    model.save_lora("some.safetensors")
    again = StableDiffusion3(str(tiny_sd3), lora=None)
    again.load_lora("some.safetensors")
    ours, theirs = dict(again.trainable_parameters()), dict(model.trainable_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_wrong_model_class_or_sampler_is_named_in_the_error(command: Callable, config: Path, tiny_sd: Path) -> None:
    other = command("fit", "--config", config, "--model.model.pretrained", tiny_sd)
    assert other.status != 0
    assert "open it with StableDiffusion\n" in other.err
    sampler = command("fit", "--config", config, "--model.sampler", "DDIM")
    assert sampler.status != 0
    assert "use FlowEuler or FlowSDE" in sampler.err
