"""What is compared: each experiment is a task and settings that train on it for the same CPU seconds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from examples.emoji_model.truth import ReferencePSNR, SceneRecognized
from lightning_draft.models import Guidance
from lightning_draft.rewards import CleanFraction, CLIPClassification, ImageQuality, Reward
from lightning_draft.surrogates import FlowBPBridge, FlowBPLagrange, LeapAlign
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, ReFL, Truncation


@dataclass(frozen=True)
class Setting:
    """A truncation of a chain of `num_steps` steps of a model, a learning rate, and options of model and training.

    Args:
        truncation: The truncation.
        num_steps: Sampling steps.
        model: Shipped name or folder of the model.
        lr: Learning rate.
        guidance: Guidance in training.
        merge: The option `lora.merge` in training.
        clip: The norm to which gradients are clipped.
        skip: Whether `GradientNormMonitor` skips steps whose gradient norm explodes.
    """

    truncation: Truncation
    num_steps: int
    model: str = "emoji64"
    lr: float = 1e-3
    guidance: Guidance = Guidance(1.0)
    merge: bool = False
    clip: float | None = 1.0
    skip: bool = False


@dataclass(frozen=True)
class Task:
    """A trained reward, its prompts and evaluation prompts, and rewards that are not trained on."""

    prompts: str
    reward: Callable[[], Reward]
    evaluation: Callable[[], dict[str, Reward]]


@dataclass(frozen=True)
class Experiment:
    """Settings compared on a task.

    Args:
        question: What is asked.
        task: The task.
        settings: The settings by label.
        seconds: CPU seconds of a run.
        batch_size: Prompts of a training step.
        fractions: Parts of the seconds after which a run evaluates.
        exact_chain: Whether evaluation images are generated in exact mode, with guidance in all steps; the rewards of
            images of the setting's own chain then have columns of their own.
    """

    question: str
    task: Task
    settings: dict[str, Setting]
    seconds: float = 48
    batch_size: int = 8
    fractions: tuple[float, ...] = (1 / 3, 1.0)
    exact_chain: bool = False


QUALITY = Task(
    "emoji64",
    lambda: ImageQuality("emoji64-judge"),
    lambda: {"evaluation": ImageQuality("emoji64-judge-eval"), "clean": CleanFraction("emoji64-judge-eval")},
)
COMPOSITIONS = Task(
    "emoji64_pairs",
    lambda: CLIPClassification("emoji64-clip", captions="emoji64_pairs"),
    lambda: {"evaluation": ImageQuality("emoji64-judge-eval")},
)


def truths(clean_images: Path) -> dict[str, Reward]:
    """Return the comparisons with the clean images of the captions, if there are such images."""
    if not clean_images.exists():
        return {}
    file = str(clean_images)
    return {"PSNR": ReferencePSNR(file), "recognized": SceneRecognized(file)}


def by_length(num_steps: int, *, lr: float = 1e-3) -> dict[str, Setting]:
    """Return `LastK` of 1, 5, 10, 25 and 50 steps, as many as the chain has, and the random truncations."""
    lengths = [k for k in (1, 5, 10, 25, 50) if k <= num_steps]
    fixed = {f"K = {k}": Setting(LastK(k), num_steps, lr=lr) for k in lengths}
    drtune = Setting(DRTune(k=5, m=0, rescale=0.5), num_steps, lr=lr)
    return {**fixed, "random K": Setting(RandomK(), num_steps, lr=lr), "DRTune": drtune}


def flow_bp(num_steps: int) -> dict[str, Setting]:
    """Return the truncations that the FlowBP paper compares, each with the options of its authors."""
    truncations: dict[str, Truncation] = {
        "FlowBP-Lagrange": FlowBPLagrange(),
        "FlowBP-Bridge": FlowBPBridge(k=5),
        "FlowBP-Sparse": DRTune(k=4, m=0, late_bias=1, rescale=0.5),
        "LeapAlign": LeapAlign(),
        "ReFL": ReFL(m=10),
        "DRTune": DRTune(k=5, m=10),
        "DRaFT-LV": LowVariance(2),
    }
    return {label: Setting(truncation, num_steps) for label, truncation in truncations.items()}


def fast_modes() -> dict[str, Setting]:
    """Return DRaFT-1 through 20 steps with guidance, in exact mode and with each option of fast mode."""
    exact = Setting(LastK(1), 20, guidance=Guidance(2.0))
    interval = replace(exact, guidance=replace(exact.guidance, interval=(0.0, 0.5)))
    return {
        "exact": exact,
        "lora.merge": replace(exact, merge=True),
        "guidance.interval [0, 0.5]": interval,
        "both": replace(interval, merge=True),
    }


def by_rate(*rates: float) -> dict[str, Setting]:
    """Return the quickstart's `Full` of 5 steps at several learning rates."""
    return {f"lr = {rate:g}": Setting(Full(), 5, lr=rate) for rate in rates}


def experiments(students: Path) -> dict[str, Experiment]:
    """Return the experiments by name; `students` has the results of `examples.emoji_model.few_step`."""
    few = {f"{n}-step model, full": Setting(Full(), n, str(students / str(n))) for n in (2, 4)}
    base = {
        "base, 4 steps, full": Setting(Full(), 4),
        "base, 10 steps, DRaFT-1": Setting(LastK(1), 10),
        "base, 10 steps, full": Setting(Full(), 10),
    }
    large = by_length(25, lr=1e-2)
    del large["K = 10"]
    large["K = 25, not clipped"] = Setting(Full(), 25, lr=1e-2, clip=None)
    large["K = 25, explosions skipped"] = Setting(Full(), 25, lr=1e-2, clip=None, skip=True)
    small = {"DRaFT-1": Setting(LastK(1), 10), "DRaFT-LV": Setting(LowVariance(2), 10), "ReFL": Setting(ReFL(4), 10)}
    question = "Does DRaFT-LV help where a step has {}?"
    return {
        "few_steps": Experiment("Is a few-step model cheaper to train through its whole chain?", QUALITY, few | base),
        "length_25": Experiment("How many of 25 steps need a gradient?", QUALITY, by_length(25), batch_size=4),
        "length_50": Experiment("How many of 50 steps need a gradient?", QUALITY, by_length(50), 96, 4),
        "layout_25": Experiment(
            "Do early steps need a gradient where the reward depends on the layout?", COMPOSITIONS, by_length(25), 96, 4
        ),
        "collapse_25": Experiment(
            "Which truncation survives a learning rate ten times too large?", QUALITY, large, 48, 4
        ),
        "fast": Experiment(
            "What does fast mode cost in reward, and what does it gain?",
            QUALITY,
            fast_modes(),
            96,
            fractions=(1.0,),
            exact_chain=True,
        ),
        "rates": Experiment("Which learning rate?", QUALITY, by_rate(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        "small_batch": Experiment(question.format("one prompt"), QUALITY, small, batch_size=1),
        "small_batch_2": Experiment(question.format("two prompts"), QUALITY, small, batch_size=2),
        "flow_bp_25": Experiment(
            "Is FlowBP ahead of ReFL, DRTune and DRaFT-LV, with 25 steps?", QUALITY, flow_bp(25), batch_size=4
        ),
    }
