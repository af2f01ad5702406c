"""The command `score`: rewards on folders of existing images."""

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_draft import rewards
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.explain import explain
from lightning_draft.cli.messages import INTERRUPTED, print_error
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.pairwise_score import compare_pairs, report_pairs
from lightning_draft.progress import ProgressLine
from lightning_draft.rewards.base import Reward, check_name
from lightning_draft.rewards.pairwise import PairwiseReward
from lightning_draft.rewards.usage import total_usage
from lightning_draft.score_report import compare, contact_sheet, report
from lightning_draft.score_table import ScoredImage, write_parquet
from lightning_draft.scoring import score_folder

_OPTION_OF_FIT = re.compile(r"; write --rewards?\.\S+ VALUE$")


def main(args: Sequence[str]) -> int:
    """Score one folder, or score and compare two folders; return the exit status.

    Raises:
        ConfigurationError: The arguments are not valid.
    """
    options = parser().parse_args(args)
    if len(options.folders) > 2:
        raise ConfigurationError(f"{len(options.folders)} folders were given; give one, or two to compare")
    built = build_rewards(options.reward, options.rewards)
    judges = _judges(built, options) if options.pairwise else {}
    try:
        scored = [_score(number, built, options) for number in range(len(options.folders))]
    except KeyboardInterrupt:
        print_error(f"stopped by Ctrl-C; the finished rows are in {options.output}: the same command continues there")
        return INTERRUPTED
    if len(scored) == 2:
        names = _titles(options.folders)
        text = report(compare(scored[0], scored[1]), *names)
        if judges:
            compared = compare_pairs(options.folders, scored, judges, options.output)
            text += "\n" + report_pairs(compared, *names)
        with atomic_path(Path(options.output) / "comparison.md") as partial:
            partial.write_text(text, encoding="utf-8")
        print(text, end="")
    for name, reward in built.items():
        if used := total_usage([reward]):
            print(f"{name} used: {', '.join(f'{key} {value:g}' for key, value in used.items())}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parsed = CommandParser("lightning-draft score")
    parsed.add_argument("folders", nargs="+", metavar="FOLDER")
    parsed.add_argument("--reward", nargs="+", default=[], metavar="NAME")
    parsed.add_argument("--rewards", metavar="FILE")
    parsed.add_argument("--prompts", default="auto")
    parsed.add_argument("--output", default="scores")
    parsed.add_argument("--batch_size", type=int, default=8)
    parsed.add_argument("--device", default="auto")
    parsed.add_argument("--unreadable", choices=["stop", "skip"], default="stop")
    parsed.add_argument("--parquet", action="store_true")
    parsed.add_argument("--pairwise", action="store_true")
    return parsed


def build_rewards(names: Sequence[str], file: str | None) -> dict[str, Reward]:
    """Build rewards from class names and from a YAML file.

    Raises:
        ConfigurationError: There are no rewards, or they cannot be built.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    config: dict[str, Any] = {name.rpartition(".")[2]: {"class_path": name} for name in names}
    if file is not None:
        config.update(_read(Path(file)))
    if not config:
        raise ConfigurationError(
            f"there are no rewards; write --reward NAME or --rewards FILE; the rewards are {', '.join(_reward_names())}"
        )
    for name in config:
        check_name(str(name))
    option = "reward" if file is None else "rewards"
    build = ArgumentParser(exit_on_error=False)
    build.add_argument(f"--{option}", type=dict[str, Reward])
    try:
        built: dict[str, Reward] = build.instantiate(build.parse_object({option: config}))[option]
    except ArgumentError as error:
        text = explain(error, {option: dict[str, Reward]})
        raise ConfigurationError(_OPTION_OF_FIT.sub("; write it in a YAML file for --rewards", text)) from error
    return built


def _judges(built: dict[str, Reward], options: argparse.Namespace) -> dict[str, PairwiseReward]:
    judges = {name: reward for name, reward in built.items() if isinstance(reward, PairwiseReward)}
    if not judges or len(options.folders) != 2:
        raise ConfigurationError(
            "--pairwise compares two folders with rewards that compare images; give two folders, and a reward such as "
            "VLMJudge"
        )
    return judges


def _reward_names() -> list[str]:
    classes = {name: getattr(rewards, name) for name in rewards.__all__}
    kinds = {name: kind for name, kind in classes.items() if isinstance(kind, type) and issubclass(kind, Reward)}
    return [name for name, kind in kinds.items() if not inspect.isabstract(kind)]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigurationError(f"--rewards {path} cannot be read: {' '.join(str(error).split())}") from error
    content = content.get("rewards", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ConfigurationError(f"--rewards {path} must map names to rewards, such as `hps: {{class_path: HPSv2}}`")
    return dict(content)


def _titles(folders: Sequence[str]) -> list[str]:
    """Return the names of the folders, or the paths as given if the names are equal."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def _score(number: int, built: dict[str, Reward], options: argparse.Namespace) -> list[ScoredImage]:
    folder = Path(options.folders[number])
    output = Path(options.output)
    if len(options.folders) == 2:
        output = output / f"{number + 1}-{folder.resolve().name}"
    progress = ProgressLine("images")
    rows = score_folder(
        folder,
        built,
        output,
        prompts=options.prompts,
        batch_size=options.batch_size,
        device=options.device,
        unreadable=options.unreadable,
        progress=progress,
    )
    progress.finish()
    for name in built:
        with atomic_path(output / f"contact_sheet_{name}.png") as partial:
            contact_sheet(folder, rows, name).save(partial, format="PNG")
        values = [row.scores[name] for row in rows]
        print(f"{folder}  {name}: mean {sum(values) / len(values):.4g}, range {min(values):.4g} to {max(values):.4g}")
    print(f"wrote {output / 'scores.csv'}")
    if options.parquet:
        write_parquet(rows, output / "scores.parquet")
    return rows
