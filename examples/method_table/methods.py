"""What the table compares: the methods, and the rewards they are compared on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from examples.emoji_model.nearest import NearestPicture
from lightning_draft.advantages import AdvantageEstimator, GroupRelative, LeaveOneOut, PerPromptStatistics
from lightning_draft.methods.draft import DraftModule, RewardModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.objectives import PPO, PRDP, Objective, Reinforce
from lightning_draft.rewards import CaptionRetrieval, CLIPClassification, JPEGSize, Reward, Sharpness
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

LAYERS = ("attn2.to_k", "attn2.to_v", "add_embedding.proj", "time_emb_proj")
"""Where the caption enters: by attention, and pooled beside the time."""


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Args:
        model: The pipeline.
        clip: The CLIP of the rewards.
        prompts: What is drawn; the column `caption` says what the picture should be recognised as.
        many: The same, more of them.
        captions: What the CLIP tells prompts from.
        sampling_steps: T; DDPM's ancestral sampler for all, since policy gradients need a stochastic one.
        pictures: Prepared emoji pictures, to look for the nearest in; None leaves that figure out.
        rank: Of the adapters.
    """

    model: str
    clip: str
    prompts: str
    many: str
    captions: str
    sampling_steps: int
    pictures: str | None = None
    rank: int = 8

    def held_out(self) -> dict[str, Reward]:
        """Rewards that no method of any task is trained on."""
        nearest = {} if self.pictures is None else {"nearest": NearestPicture(self.pictures)}
        retrieval = CaptionRetrieval(self.clip, captions=self.captions, column="caption")
        return {"retrieval": retrieval, **nearest, "sharpness": Sharpness()}


@dataclass(frozen=True)
class Task:
    """A reward on a list of prompts.

    Args:
        reward: What is trained on.
        eval_rewards: What is only looked at.
        methods: Which methods can train on it.
        budget: Share of the methods' budgets.
        many: Whether the prompts are the many ones.
        tuned_on: The task whose choice of settings is taken over; by default its own.
    """

    reward: Callable[[Setting], Reward]
    eval_rewards: Callable[[Setting], dict[str, Reward]]
    methods: tuple[str, ...]
    budget: float = 1.0
    many: bool = False
    tuned_on: str | None = None


@dataclass(frozen=True)
class Trial:
    """A choice of what is tuned.

    Args:
        lr: Learning rate.
        own: Value of the method's own parameter, if it has one.
    """

    lr: float
    own: float | None = None


@dataclass(frozen=True)
class Method:
    """A method with its own settings.

    Args:
        module: Builds the module from the value of the method's own parameter and from what all methods share.
        lrs: Learning rates that tuning tries.
        batch_size: Prompts a step.
        budget: Share of the budget; policy gradients get more than direct methods, or there would be little to see.
        own: Name of a parameter that is tuned together with the learning rate.
        values: What is tried for it.
    """

    module: Callable[..., RewardModule]
    lrs: tuple[float, ...]
    batch_size: int = 8
    budget: float = 1.0
    own: str = ""
    values: tuple[float, ...] = ()

    def trials(self, lrs: Sequence[float] | None = None) -> list[Trial]:
        """All that tuning tries."""
        return [Trial(lr, own) for own in self.values or (None,) for lr in lrs or self.lrs]

    def label(self, trial: Trial) -> str:
        """The trial in a word, such as `lr0.003-clip0.1`."""
        return f"lr{trial.lr:g}" + (f"-{self.own}{trial.own:g}" if trial.own is not None else "")

    def build(self, setting: Setting, task: str, trial: Trial, seed: int) -> RewardModule:
        """A fresh module."""
        return self.module(
            trial.own,
            model=StableDiffusion(
                setting.model,
                lora=LoRA(rank=setting.rank, target_modules=LAYERS, seed=seed),
                guidance=Guidance(1.0),
            ),
            reward=TASKS[task].reward(setting),
            sampler=DDIM(setting.sampling_steps, eta=1.0),
            eval_rewards=TASKS[task].eval_rewards(setting),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=trial.lr, weight_decay=1e-4),
            seed=seed,
        )


def direct(truncation: Callable[[], Truncation]) -> Method:
    """Back-propagation through the sampler."""
    return Method(lambda _, **common: DraftModule(truncation=truncation(), **common), lrs=(3e-3, 1e-2, 3e-2))


DIRECT = {
    "DRaFT": direct(Full),
    "DRaFT-3": direct(lambda: LastK(3)),
    "DRaFT-1": direct(lambda: LastK(1)),
    "DRaFT-LV": direct(lambda: LowVariance(2)),
    "ReFL": direct(lambda: ReFL(4)),
    "AlignProp (paper)": direct(RandomK),
    "AlignProp (code)": direct(RandomSteps),
    "DRTune": direct(lambda: DRTune(3, 4)),
}


def policy(
    objective: Callable[[Any], Objective],
    advantage_estimator: Callable[[], AdvantageEstimator],
    inner_epochs: int,
    own: str = "",
    values: tuple[float, ...] = (),
) -> Method:
    """A policy gradient: rollouts of 4 samples for each of 4 prompts."""

    def module(value: float | None, **common: Any) -> PolicyGradientModule:
        return PolicyGradientModule(
            objective=objective(value),
            advantage_estimator=advantage_estimator(),
            samples_per_prompt=4,
            inner_epochs=inner_epochs,
            **common,
        )

    return Method(module, lrs=(1e-3, 3e-3, 1e-2), batch_size=4, budget=4.0, own=own, values=values)


CLIPS = (0.03, 0.1, 0.3)
POLICY = {
    "REINFORCE": policy(lambda _: Reinforce("sum"), lambda: PerPromptStatistics(min_count=4), 1),
    "PPO": policy(lambda clip: PPO(clip, "sum"), lambda: PerPromptStatistics(min_count=4), 2, "clip", CLIPS),
    "LOOP": policy(lambda clip: PPO(clip, "sum"), LeaveOneOut, 2, "clip", CLIPS),
    "PRDP": policy(lambda beta: PRDP(beta, 0.1, "sum"), GroupRelative, 2, "beta", (0.001, 0.01, 0.1)),
}
METHODS: dict[str, Method] = {**DIRECT, **POLICY}


def _recognised(setting: Setting) -> Reward:
    return CLIPClassification(setting.clip, captions=setting.captions, column="caption")


TASKS = {
    "recognised": Task(_recognised, lambda setting: {**setting.held_out(), "jpeg": JPEGSize()}, methods=tuple(METHODS)),
    "jpeg": Task(lambda setting: JPEGSize(), lambda setting: setting.held_out(), methods=tuple(POLICY), budget=0.5),
    "many": Task(
        _recognised,
        lambda setting: {**setting.held_out(), "jpeg": JPEGSize()},
        methods=tuple(POLICY),
        many=True,
        tuned_on="recognised",
    ),
}
"""The prompt recognised by the CLIP, which has a gradient; the true JPEG size, which has none; the first on many
prompts."""
