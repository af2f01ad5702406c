"""The example of a custom reward: its gradient, and its use in a run by class path."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_draft.__main__ import main

ROOT = Path(__file__).parents[2]
FRAGMENT = ROOT / "examples" / "custom_reward.yaml"


def test_value_and_gradient_equal_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.custom_reward import Warmth

    colors = torch.tensor([[1.0, 0.3, 0.2], [0.1, 0.9, 0.5]])
    images = colors.view(2, 3, 1, 1).expand(2, 3, 4, 5).clone().requires_grad_()
    scores = Warmth(0.3)(images, ["a cat", "a dog"])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    warmth = torch.tensor([0.8, -0.4])
    torch.testing.assert_close(scores, -((warmth - 0.3) ** 2))
    slope = -2 * (warmth - 0.3) / 20
    expected = torch.stack([slope, torch.zeros(2), -slope], 1).view(2, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("class_path", ["examples.custom_reward.Warmth", "my_rewards.Warmth"])
def test_reward_is_found_in_the_current_folder(
    class_path: str,
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The shipped example, and a copy in a file with another name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    if class_path.startswith("examples"):
        monkeypatch.syspath_prepend(str(ROOT))
    else:
        shutil.copy(ROOT / "examples" / "custom_reward.py", "my_rewards.py")
    fragment = Path("reward.yaml")
    fragment.write_text(FRAGMENT.read_text().replace("examples.custom_reward.Warmth", class_path))
    small = {
        "model.init_args.model.init_args.pretrained": tiny_sd,
        "model.init_args.model.init_args.lora": "{rank: 2}",
        "model.init_args.sampler.init_args.num_steps": 3,
        "model.init_args.eval_rewards": "null",
        "data.prompts": "[a cat, a red cat, red, a bed]",
        "data.batch_size": 2,
        "data.val_prompts": "null",
        "data.val_size": 2,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.accelerator": "cpu",
        **dict.fromkeys(("samples", "export", "gradients", "checkpoint"), "null"),
        "name": "warm",
    }
    options = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    status = main(["fit", "--config", "quickstart", "--config", str(fragment), *options])
    assert status == 0, capsys.readouterr().err
    saved = yaml.safe_load(Path("runs/warm/config.yaml").read_text())
    assert saved["model"]["init_args"]["reward"] == {"class_path": class_path, "init_args": {"target": 0.3}}
