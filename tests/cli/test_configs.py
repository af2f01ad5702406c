"""Every shipped config runs: the small ones for one step, those of real size on a small random pipeline."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_draft.cli import shipped

NAMES = shipped.names()
EMOJI = [name for name in NAMES if not name.startswith("sd")]
METHODS = {
    "draft": "Full",
    "draft_k": "LastK",
    "draft_lv": "LowVariance",
    "draft_plus": "LastK",
    "refl": "ReFL",
    "alignprop": "RandomSteps",
    "alignprop_paper": "RandomK",
    "drtune": "DRTune",
}
TINY = {
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1,
    "gradients.figure_every_n_steps": 0,
    "samples.max_samples": 1,
    "model.sampler.num_steps": 10,
    "model.micro_batch_size": "null",
    "data.batch_size": 2,
    "data.val_size": 1,
}


def _options(values: dict[str, object]) -> list[str]:
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def _content(name: str) -> dict:
    return yaml.safe_load(shipped.locate(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_runs(command: Callable, name: str, tiny_sd: Path, tiny_sd3: Path, tiny_clip: Path) -> None:
    arguments = _content(name)["model"]["init_args"]
    models = {"model.model.pretrained": tiny_sd}
    if arguments["model"]["class_path"] == "StableDiffusion3":
        models = {"model.model.pretrained": tiny_sd3, "model.model.resolution": 16}
    reward = arguments["reward"]
    if isinstance(reward, dict) and "pretrained" in reward.get("init_args", {}):
        models["model.reward.pretrained"] = tiny_clip
    if isinstance(reward, dict) and "captions" in reward.get("init_args", {}):
        models["model.reward.captions"] = "animals"
    if name in EMOJI:
        models |= {"data.prompts": "animals", "data.val_prompts": "null", "model.watch": "null"}
    result = command("fit", "--config", name, *_options(TINY | models))
    assert result.status == 0, result.err
    assert Path(f"runs/{name}/lora/best.safetensors").is_file()


def test_quickstart_on_the_shipped_model(command: Callable) -> None:
    result = command("fit", "--config", "quickstart", *_options(TINY | {"data.batch_size": 1}))
    assert result.status == 0, result.err
    assert Path("runs/quickstart/lora/last.safetensors").is_file()


def test_there_is_one_for_every_method() -> None:
    from lightning_draft.cli.hints import subclasses
    from lightning_draft.truncation import Truncation

    trained = {name: _content(name)["model"]["init_args"]["truncation"] for name in METHODS}
    classes = {name: value if isinstance(value, str) else value["class_path"] for name, value in trained.items()}
    assert classes == METHODS
    known = {kind.__name__ for kind in subclasses((Truncation,)) if kind.__module__.startswith("lightning_draft.")}
    assert set(METHODS.values()) == known
    assert set(EMOJI) == {*METHODS, "quickstart"}


def test_methods_differ_in_the_method_alone() -> None:
    def rest(name: str) -> dict:
        content = _content(name)
        arguments = content["model"]["init_args"]
        return {**content, "model": {k: v for k, v in arguments.items() if k not in ("truncation", "kl_weight")}}

    assert all(rest(name) == rest("draft") for name in METHODS)


def test_listing_says_what_each_is(command: Callable) -> None:
    listed = command("configs", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    assert NAMES[0] == "quickstart"
    assert all(len(line.split()) > 5 and line.rstrip().endswith(".") for line in listed)
    assert command("configs", "show", "draft_k").out == shipped.locate("draft_k").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_opens_with_one_or_two_lines(name: str) -> None:
    lines = shipped.locate(name).read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert 1 <= len(comments) <= 2
    assert lines[: len(comments)] == comments
