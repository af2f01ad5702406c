"""The command `guide`: compare inference-time methods with the base model and a LoRA."""

import argparse
from collections.abc import Sequence

import torch

from lightning_draft.callbacks.image_grid import comparison
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.cli.generation import BATCH, Generation, add_options, captions, prepare
from lightning_draft.cli.messages import as_configuration_error
from lightning_draft.errors import ConfigurationError
from lightning_draft.files import atomic_path
from lightning_draft.guide.comparison import GuidedImages, as_sample, run_method, summary, write_csv, write_json
from lightning_draft.guide.methods import METHODS, Method, parse_method
from lightning_draft.image_generation import generate
from lightning_draft.methods.checks import check_reward
from lightning_draft.rewards.base import Reward

_MIN_SIZE = 192  # pixels, so that the captions fit
_PANEL_IMAGES = 8  # images in a row of the grid


def main(args: Sequence[str]) -> int:
    """Parse the arguments, run the methods, write the grid and the tables, and return the exit status.

    Raises:
        ConfigurationError: The arguments are not valid.
    """
    options = _parse(args)
    methods = [parse_method(text) for text in options.method or []]
    with as_configuration_error():
        _guide(options, methods)
    return 0


def _guide(options: argparse.Namespace, methods: Sequence[Method]) -> None:
    generation = prepare(options, "guide")
    if not generation.rewards:
        raise ConfigurationError("there is no reward; write --reward NAME, --rewards FILE or --config NAME")
    name, reward = next(iter(generation.rewards.items()))
    methods = _usable(methods, reward)
    if reward.needs_calibration:
        _calibrate(reward, generation, options.seed[0])
    width = max(len(label) for label in ("base", "tuned", *(method.label for method in methods)))
    print(f"reward: {name}; evaluation: {', '.join(list(generation.rewards)[1:]) or 'none'}", flush=True)
    results: dict[str, GuidedImages] = {}

    def run(label: str, method: Method | None = None, scale: float = 0.0) -> None:
        """Generate and score images with a method, and print its line."""
        results[label] = run_method(
            generation.model,
            generation.sampler,
            generation.prompts,
            generation.score,
            None if method is None else as_sample(method, reward),
            scale=scale,
            seeds=options.seed,
            batch_size=BATCH,
        )
        print(f"{label:{width}}  {_line(results, label)}", flush=True)

    run("base")
    if any(method.needs_gradient for method in methods):
        _check_gradient(reward, results["base"], generation)
    for method in methods:
        run(method.label, method)
    if generation.lora is not None:
        run("tuned", scale=1.0)
    _write(results, name, generation, options)


def _usable(methods: Sequence[Method], reward: Reward) -> list[Method]:
    """Return the methods that can use the reward; by default all that can.

    Raises:
        ConfigurationError: A chosen method needs the gradient of a reward that has none.
    """
    blind = [method for method in methods if method.needs_gradient and not reward.differentiable]
    if blind:
        raise ConfigurationError(
            f"--method {blind[0].name} needs the gradient of the reward, and {type(reward).__name__} is not "
            "differentiable; write --method best_of_n, or choose a differentiable reward"
        )
    return list(methods) or [each for each in METHODS.values() if reward.differentiable or not each.needs_gradient]


@torch.no_grad()
def _calibrate(reward: Reward, generation: Generation, seed: int) -> None:
    """Compute the reward's statistics from images of the base model."""
    prompts = generation.prompts
    samples = generate(generation.model, generation.sampler, prompts, seed, 0.0, BATCH)
    reward.update_statistics(reward.breakdown(samples.clamped().to(generation.model.device), prompts)[1])


def _check_gradient(reward: Reward, base: GuidedImages, generation: Generation) -> None:
    """Raise if the gradient of the reward is missing, zero or not finite at the first image of the base model."""
    with torch.enable_grad():
        check_reward(reward, base.samples[:1].to(generation.model.device), generation.prompts[:1])


def _line(results: dict[str, GuidedImages], label: str) -> str:
    """Return the scores, gains and costs of a method in one line."""
    (row,) = [each for each in summary(results) if each["method"] == label]
    scores = []
    for name, mean in row["mean"].items():
        gain, error = row["gain"][name], row["standard_error_of_gain"][name]
        spread = "" if error is None else f" ± {error:.2g}"
        scores.append(f"{name} {mean:8.4g}" + ("" if label == "base" else f" ({gain:+.3g}{spread})"))
    passes = f"{row['forwards_per_image']:g} + {row['backwards_per_image']:g} passes per image"
    return f"{'  '.join(scores)}  {passes}, {row['seconds']:.1f} s"


def _write(results: dict[str, GuidedImages], reward: str, generation: Generation, options: argparse.Namespace) -> None:
    """Write the image grid, the table of all images, and the summary."""
    grid = comparison(
        captions(generation.prompts, options.seed),
        {label: found.samples.content for label, found in results.items()},
        {label: found.scores[reward] for label, found in results.items()},
        min_size=_MIN_SIZE,
        per_row=max(1, _PANEL_IMAGES // len(results)),
    )
    output = options.output
    with atomic_path(output) as partial:
        grid.save(partial)
    write_csv(results, generation.prompts, options.seed, output.with_suffix(".csv"))
    settings = {
        "model": generation.model.source,
        "lora": None if generation.lora is None else str(generation.lora),
        "sampler": type(generation.sampler).__name__,
        "steps": generation.sampler.num_steps,
        "reward": reward,
        "prompts": len(generation.prompts),
        "seeds": options.seed,
    }
    write_json(results, settings, output.with_suffix(".json"))
    print(f"wrote {output}, {output.with_suffix('.csv').name} and {output.with_suffix('.json').name}")


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("lightning-draft guide")
    add_options(parser, "guide.png")
    parser.add_argument("--method", nargs="+", metavar="NAME[:VALUE]")
    return parser.parse_args(args)
