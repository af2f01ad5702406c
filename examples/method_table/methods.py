"""What is compared: every shipped config that trains the shipped model on its quality reward."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_draft.cli.build import BuildCLI
from lightning_draft.cli.process import process_arguments
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.base import RewardModule

CONFIGS = Path(__file__).parents[2] / "configs"
LR = "model.optimizer.init_args.lr"
KINDS = {
    "DraftModule": "direct gradients",
    "GradientMatchingModule": "gradient matching",
    "ForwardProcessModule": "forward process",
    "PolicyGradientModule": "policy gradients",
}
QUALITY = {"class_path": "ImageQuality", "init_args": {"pretrained": "emoji64-judge"}}


@dataclass(frozen=True)
class Parameter:
    """A method's own parameter, tuned with the learning rate between `low` and `high`.

    Args:
        option: The option without the leading dashes.
        low: The smallest value.
        high: The largest value.
    """

    option: str
    low: float
    high: float


OWN = {
    "draft_plus": Parameter("model.kl_weight", 0.01, 1.0),
    "adjoint_matching": Parameter("model.matching.init_args.scale", 10, 1000),
    "vgg_flow": Parameter("model.matching.init_args.scale", 10, 1000),
    "nabla_gflownet": Parameter("model.matching.init_args.scale", 100, 10_000),
    "ppo": Parameter("model.objective.init_args.clip", 0.03, 0.3),
    "loop": Parameter("model.objective.init_args.clip", 0.03, 0.3),
    "prdp": Parameter("model.objective.init_args.beta", 0.001, 0.1),
    "nft": Parameter("model.objective.init_args.beta", 0.1, 1.0),
    "awm": Parameter("model.objective.init_args.policy.init_args.clip", 0.03, 0.3),
    "rwr": Parameter("model.objective.init_args.temperature", 0.3, 3.0),
    "online_dpo": Parameter("model.objective.init_args.beta", 10, 1000),
    "dgpo": Parameter("model.objective.init_args.beta", 10, 1000),
    "crd": Parameter("model.objective.init_args.beta", 0.1, 10),
}


def shipped_configs() -> list[str]:
    """Return the names of the compared configs: all methods on the shipped model with its quality reward.

    `quickstart` is left out, because it is `draft` with a chain of 5 steps.
    """
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return [name for name in names if name != "quickstart" and _is_compared(_options(name))]


def kind(config: str) -> str:
    """Return which kind of method a config has."""
    return KINDS[yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["class_path"]]


def written(config: str, option: str) -> float:
    """Return the value that a config has for a numeric option."""
    value: Any = _options(config)
    for key in option.removeprefix("model.").split("."):
        value = value[key]
    return float(value)


def build(config: str, seed: int, options: Iterable[str]) -> tuple[RewardModule, PromptDataModule, dict[str, Any]]:
    """Return the module and the data of a config with changed options, and its options of the Trainer.

    The seed determines the noise and the order of the prompts; the adapters start from those of the config.
    """
    seeds = [f"--{name}={seed}" for name in ("seed_everything", "model.seed", "data.seed")]
    words = ["--config", str(CONFIGS / f"{config}.yaml"), *seeds, *options]
    with process_arguments(["fit", *words]):
        cli = BuildCLI("fit")
    trainer = cli.config_init["fit"]["trainer"]
    kept = {name: trainer[name] for name in ("accumulate_grad_batches", "gradient_clip_val")}
    return cli.model, cli.datamodule, kept


def _options(config: str) -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"]
    return options


def _is_compared(options: dict[str, Any]) -> bool:
    return bool(options["model"]["init_args"].get("pretrained") == "emoji64" and options["reward"] == QUALITY)
