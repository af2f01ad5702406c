"""The commands: files of a run, configuration, validation, sampling."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lightning_draft.cli.process import overridden_variables
from lightning_draft.image_generation import generate
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.samplers import DDIM
from lightning_draft.transition import Transition


def test_run_writes_all_files_to_its_folder(command: Callable, config: Path, tiny_sd: Path) -> None:
    result = command("fit", "--config", config)
    assert result.status == 0, result.err
    run = Path("runs/small")
    assert [path.name for path in Path().iterdir() if path.name != "runs"] == ["small.yaml"]
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "checkpoints", "lora", "samples"}
    assert list(run.glob("events.out.tfevents.*"))
    assert f"run folder: {run}" in result.out
    assert f'from_pretrained("{tiny_sd}")' in result.out
    assert f'pipe.load_lora_weights("{run}/lora/best.safetensors")' in result.out
    assert (run / "lora" / "best.safetensors").is_file()


def test_saved_config_repeats_the_run(command: Callable, config: Path) -> None:
    command("fit", "--config", config, "--model.truncation.k", "1", "--name", "first")
    again = command("fit", "--config", "runs/first")
    assert again.status == 0, again.err
    first, second = (load_file(Path("runs") / name / "lora/last.safetensors") for name in ("first", "first-2"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [yaml.safe_load((Path("runs") / name / "config.yaml").read_text()) for name in ("first", "first-2")]
    assert configs[0] == configs[1]
    assert configs[0]["model"]["init_args"]["truncation"]["init_args"]["k"] == 1


def test_callbacks_can_be_changed_removed_and_added(command: Callable, config: Path) -> None:
    options = ["--samples", "null", "--export.dirpath", "elsewhere", "--checkpoint", "null", "--gradients", "null"]
    assert command("fit", "--config", config, *options).status == 0
    names = {"best.safetensors", "last.safetensors", "best.comfy.safetensors", "last.comfy.safetensors", "README.md"}
    assert {path.name for path in Path("elsewhere").iterdir()} == names | {"images"}
    assert not {"samples", "lora", "checkpoints"} & {path.name for path in Path("runs/small").iterdir()}
    own = "[{class_path: ModelCheckpoint, init_args: {dirpath: kept, every_n_train_steps: 1}}]"
    assert command("fit", "--config", config, "--trainer.callbacks", own, "--ema.decay", "0.5").status == 0
    saved = yaml.safe_load(Path("runs/small-2/config.yaml").read_text())
    assert saved["ema"]["class_path"].endswith("AdapterEMA")
    assert list(Path("kept").glob("*.ckpt"))
    assert Path("runs/small-2/checkpoints/last.ckpt").is_file()


def test_run_without_logger_writes_nothing_to_the_current_folder(command: Callable, config: Path) -> None:
    assert command("fit", "--config", config, "--trainer.logger", "false").status == 0
    assert {path.name for path in Path().iterdir()} == {"runs", "small.yaml"}
    assert Path("runs/small/config.yaml").is_file()


def test_fast_dev_run_writes_no_files(command: Callable, config: Path) -> None:
    assert command("fit", "--config", config, "--trainer.fast_dev_run", "true").status == 0
    assert {path.name for path in Path().iterdir()} == {"small.yaml"}


def test_user_reward_in_the_current_folder_is_found(command: Callable, config: Path) -> None:
    Path("my_rewards.py").write_text(
        "from lightning_draft.rewards import Reward\n"
        "class Redness(Reward):\n"
        "    def forward(self, images, prompts):\n"
        "        return images[:, 0].mean((1, 2))\n"
    )
    text = config.read_text().replace("class_path: Brightness", "class_path: my_rewards.Redness")
    config.write_text(text.replace("      init_args: {target: 0.9}\n", ""))
    result = command("fit", "--config", config)
    assert result.status == 0, result.err
    assert "Redness" in result.out


def test_later_files_and_options_override_and_interpolations_are_resolved(command: Callable, config: Path) -> None:
    Path("more.yaml").write_text("data:\n  seed: 5\nmodel:\n  init_args:\n    seed: ${data.seed}\n    kl_weight: 0.5\n")
    args = ["fit", "--config", config, "--config", "more.yaml", "--model.kl_weight", "0.25", "--print_config"]
    printed = yaml.safe_load(command(*args).out)
    arguments = printed["model"]["init_args"]
    assert (arguments["seed"], arguments["kl_weight"]) == (5, 0.25)
    assert arguments["truncation"]["init_args"] == {"k": 2}


def test_printed_loading_code_opens_a_single_file(tmp_path: Path) -> None:
    from lightning_draft.cli.summary import loading_code

    file = tmp_path / "model.safetensors"
    file.touch()
    assert (
        loading_code(str(file), "StableDiffusionPipeline")
        == f'pipe = StableDiffusionPipeline.from_single_file("{file}")'
    )
    assert loading_code("org/model", "X") == 'pipe = X.from_pretrained("org/model")'


def test_curves_images_and_lines_count_completed_steps(command: Callable, config: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("fit", "--config", config, "--samples.every_n_steps", "1").status == 0
    events = EventAccumulator("runs/small", size_guidance={"scalars": 0, "images": 0}).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/reward"] == [1, 2]
    assert steps["val/reward"] == [2]
    assert "step" not in steps
    assert {event.step for tag in events.Tags()["images"] for event in events.Images(tag)} == {0, 1, 2}


def test_no_file_of_the_run_contains_secrets(command: Callable, config: Path) -> None:
    Path("mine.py").write_text(
        "from lightning_draft.rewards import Reward\n"
        "class Service(Reward):\n"
        "    def __init__(self, url: str, api_key: str):\n"
        "        super().__init__()\n"
        "        self.url, self.api_key = url, api_key\n"
        "    def forward(self, images, prompts):\n"
        "        return images.mean((1, 2, 3))\n"
    )
    text = config.read_text().replace("class_path: Brightness", "class_path: mine.Service")
    config.write_text(text.replace("{target: 0.9}", "{url: 'http://me:hush1@host/?token=hush2', api_key: hush3}"))
    result = command("fit", "--config", config)
    assert result.status == 0, result.err
    assert "hush" not in result.out + result.err
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert [path for path in files if b"hush" in path.read_bytes()] == []
    again = command("fit", "--config", "runs/small")
    assert again.status == 2
    assert "give the value again with --model.reward." in again.err


def test_terminal_codes_in_warnings_are_escaped(command: Callable, config: Path) -> None:
    Path("warning.py").write_text(
        "import lightning as L, warnings\n"
        "class Warn(L.Callback):\n"
        "    def on_train_start(self, *_):\n"
        "        warnings.warn('\\x1b[31mred')\n"
    )
    result = command("fit", "--config", config, "--trainer.callbacks", "[warning.Warn]", "--trainer.max_steps", "1")
    assert "warning: \\x1b[31mred\n" in result.err
    assert "\x1b" not in result.err


def test_an_environment_variable_that_a_config_overrides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of other commands, equal values and unknown names are not."""
    options = {"trainer.max_steps": 28, "trainer.precision": None, "name": "cat", "trainer.limit_val_batches": 0.5}
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "1")
    monkeypatch.setenv("PL_FIT__TRAINER__PRECISION", "null")
    monkeypatch.setenv("PL_FIT__TRAINER__LIMIT_VAL_BATCHES", "0.50")
    monkeypatch.setenv("PL_VALIDATE__NAME", "dog")
    monkeypatch.setenv("PL_FIT__NAME", "cat")
    assert list(overridden_variables("fit", options)) == [
        "PL_FIT__TRAINER__MAX_STEPS=1 has no effect, because a config or an argument sets trainer.max_steps to 28; "
        "write --trainer.max_steps 1"
    ]


def test_environment_variables_set_options(command: Callable, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "7")
    printed = command("fit", "--config", config, "--data.batch_size", "1", "--print_config").out
    assert yaml.safe_load(printed)["data"]["batch_size"] == 1
    monkeypatch.setenv("PL_FIT__NAME", "other")
    assert yaml.safe_load(command("fit", "--config", config, "--print_config").out)["name"] == "other"


def test_a_file_in_the_current_folder_does_not_replace_a_package(config: Path) -> None:
    (config.parent / "omegaconf.py").write_text("raise SystemExit('replaced')\n")
    args = [sys.executable, "-m", "lightning_draft", "fit", "--config", str(config), "--trainer.max_steps", "0"]
    done = subprocess.run(args, cwd=config.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == ("lightning-draft: --trainer.max_steps=0 must be at least 1, or -1 for no limit; write 200\n")
    assert done.stdout == ""


def test_validate_uses_the_checkpoint(command: Callable, trained: Path) -> None:
    base = command("validate", "--config", "runs/small")
    assert "no --ckpt_path: these are the scores of the base model" in base.out
    tuned = command("validate", "--config", "runs/small", "--ckpt_path", "last")
    assert _table(base.out)["val/gain"] == 0
    assert _table(tuned.out)["val/gain"] != 0
    assert {path.name for path in Path("runs").iterdir()} == {"small"}


def test_sample_writes_a_grid_at_the_given_scales(command: Callable, trained: Path) -> None:
    result = command(
        "sample", "runs/small", "--scale", "0", "1", "2", "--seed", "0", "1", "--prompt", "red", "-o", "a/b.png"
    )
    assert result.status == 0, result.err
    rewards = _table(result.out.replace(" reward", ""))
    assert list(rewards) == ["base", "scale 1", "scale 2"]
    assert len(set(rewards.values())) == 3
    with Image.open("a/b.png") as image:
        assert 6 * 128 < image.width < 7 * 128


def test_sample_of_a_moved_file_needs_its_local_base_model_and_prompts(
    command: Callable, trained: Path, tiny_sd: Path
) -> None:
    lora = Path("runs/small/lora/last.safetensors").rename("my.safetensors")
    assert "write --model and the pipeline's folder" in command("sample", lora, "--prompt", "a cat").err
    assert "write --prompt" in command("sample", lora, "--model", tiny_sd).err
    named = command("sample", lora, "--model", tiny_sd, "--prompt", "a cat", "--steps", "2", "-o", "two.png")
    assert named.status == 0
    assert Path("two.png").is_file()


class Forgetful(DDIM):
    """Every step uses new noise."""

    def step(self, schedule: Any, x: torch.Tensor, *_: Any) -> Any:
        return Transition(torch.zeros_like(x), 1.0), None


def test_sample_uses_different_noise_for_the_start_and_the_steps(tiny_sd: Path) -> None:
    model = StableDiffusion(str(tiny_sd), guidance=Guidance(1.0), lora=None)
    start = model.noise(9, torch.Generator().manual_seed(3))
    ours = generate(model, Forgetful(1), ["red"] * 9, 3, 1.0).images
    for i in range(9):
        assert not torch.isclose(ours[i], model.decode(start[i : i + 1])[0], atol=1e-3).all()


def _table(text: str) -> dict[str, float]:
    """Parse the lines `name number` of a text."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            continue
    return found
