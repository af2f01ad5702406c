"""The methods that are compared, and the tasks (rewards and prompts) on which they are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from examples.emoji_model.nearest import NearestImage
from lightning_draft.advantages import AdvantageEstimator, GroupRelative, LeaveOneOut, PerPromptStatistics
from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT, ForwardObjective
from lightning_draft.gradient_matching import AdjointMatching, GradientMatching, NablaGFlowNet, VGGFlow
from lightning_draft.group_objectives import CRD, DGPO, OnlineDPO
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.gradient_matching import GradientMatchingModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.objectives import APA, PPO, PRDP, Objective, Reinforce
from lightning_draft.preferences import BradleyTerry, WinRate
from lightning_draft.rewards import CaptionRetrieval, CLIPClassification, JPEGSize, Reward, Sharpness
from lightning_draft.samplers import DDIM
from lightning_draft.surrogates import DirectAlign, FlowBPBridge, FlowBPLagrange, LeapAlign
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation
from lightning_draft.trust_region import FlowDPPO, GRPOGuard, SampleDropout
from lightning_draft.value_baseline import ValueBaseline
from lightning_draft.windows import RandomWindow, SlidingWindow, StepWindow

LAYERS = ("attn2.to_k", "attn2.to_v", "add_embedding.proj", "time_emb_proj")
"""The layers whose input is the caption: cross-attention, and the pooled caption added to the time embedding."""


@dataclass(frozen=True)
class Setting:
    """Settings that all methods share.

    Args:
        model: A shipped name, pipeline folder or hub id.
        clip: The CLIP model of the rewards.
        prompts: Prompt list; its column `caption` is the caption that the image should be recognized as.
        many: A longer prompt list of the same kind.
        captions: The candidate captions of the classification reward.
        sampling_steps: T of DDPM ancestral sampling; all methods use it, as policy gradients need a stochastic sampler.
        images: File of the training images, for the nearest-image accuracy; `None` omits it.
        rank: Rank of the adapters.
    """

    model: str
    clip: str
    prompts: str
    many: str
    captions: str
    sampling_steps: int
    training_images: str | None = None
    rank: int = 8

    def eval_rewards(self) -> dict[str, Reward]:
        """Return rewards that no method of any task is trained on."""
        nearest = {} if self.training_images is None else {"nearest": NearestImage(self.training_images)}
        retrieval = CaptionRetrieval(self.clip, captions=self.captions, column="caption")
        return {"retrieval": retrieval, **nearest, "sharpness": Sharpness()}


@dataclass(frozen=True)
class Task:
    """A reward on a list of prompts.

    Args:
        reward: Builds the trained reward.
        eval_rewards: Builds the evaluation rewards.
        methods: The methods that can train on it.
        budget: Fraction of each method's budget.
        many: Whether to use the longer prompt list.
        tuned_on: The task whose tuned settings are reused; by default this task.
    """

    reward: Callable[[Setting], Reward]
    eval_rewards: Callable[[Setting], dict[str, Reward]]
    methods: tuple[str, ...]
    budget: float = 1.0
    many: bool = False
    tuned_on: str | None = None


@dataclass(frozen=True)
class Trial:
    """One setting of the tuned parameters.

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
        module: Builds the module from the value of the method's own parameter and the common arguments.
        lrs: Learning rates to tune over.
        batch_size: Prompts per step.
        budget: Multiple of the common budget; policy gradients get more because they need more queries.
        own: Name of a parameter that is tuned with the learning rate.
        values: Values to tune over.
    """

    module: Callable[..., RewardModule]
    lrs: tuple[float, ...]
    batch_size: int = 8
    budget: float = 1.0
    own: str = ""
    values: tuple[float, ...] = ()

    def trials(self, lrs: Sequence[float] | None = None) -> list[Trial]:
        """Return all settings to tune over."""
        return [Trial(lr, own) for own in self.values or (None,) for lr in lrs or self.lrs]

    def label(self, trial: Trial) -> str:
        """Return a label of the setting, such as `lr0.003-clip0.1`."""
        return f"lr{trial.lr:g}" + (f"-{self.own}{trial.own:g}" if trial.own is not None else "")

    def build(self, setting: Setting, task: str, trial: Trial, seed: int) -> RewardModule:
        """Build an untrained module."""
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


def direct(truncation: Callable[[], Truncation], checkpointing: Literal["auto", "none"] = "auto") -> Method:
    """Build a direct-gradient method; those with a gradient of one step are compared without recomputing it."""
    return Method(
        lambda _, **common: DraftModule(truncation=truncation(), checkpointing=checkpointing, **common),
        lrs=(3e-3, 1e-2, 3e-2),
    )


DIRECT = {
    "DRaFT": direct(Full),
    "DRaFT-3": direct(lambda: LastK(3)),
    "DRaFT-1": direct(lambda: LastK(1), "none"),
    "DRaFT-LV": direct(lambda: LowVariance(2), "none"),
    "ReFL": direct(lambda: ReFL(4), "none"),
    "AlignProp (paper)": direct(RandomK),
    "AlignProp (code)": direct(RandomSteps),
    "DRTune": direct(lambda: DRTune(3, 4)),
    "DRaFT+": Method(
        lambda weight, **common: DraftModule(truncation=LastK(1), kl_weight=weight, checkpointing="none", **common),
        lrs=(3e-3, 1e-2, 3e-2),
        own="kl_weight",
        values=(0.01, 0.1, 1.0),
    ),
    "FlowBP-Sparse": direct(lambda: DRTune(3, 0, late_bias=1.0, rescale=0.5)),
    "FlowBP-Bridge": direct(lambda: FlowBPBridge(3)),
    "FlowBP-Lagrange": direct(FlowBPLagrange),
    "LeapAlign": direct(LeapAlign),
    "Direct-Align": direct(DirectAlign, "none"),
    "SRPO branches": direct(lambda: DirectAlign(2, inversion=True)),
}


def matching(loss: Callable[[float], GradientMatching], scales: tuple[float, ...]) -> Method:
    """Build a gradient-matching method with three trained steps."""

    def module(scale: float | None, **common: Any) -> GradientMatchingModule:
        assert scale is not None
        return GradientMatchingModule(matching=loss(scale), trained_steps=3, **common)

    return Method(module, lrs=(3e-3, 1e-2, 3e-2), own="scale", values=scales)


MATCHING = {
    "Adjoint Matching": matching(AdjointMatching, (10.0, 100.0, 1000.0)),
    "VGG-Flow": matching(VGGFlow, (0.1, 1.0, 10.0)),
    "nabla-GFlowNet": matching(NablaGFlowNet, (100.0, 1000.0, 10000.0)),
}


def policy(
    objective: Callable[[Any], Objective],
    advantage_estimator: Callable[[], AdvantageEstimator],
    inner_epochs: int,
    own: str = "",
    values: tuple[float, ...] = (),
    window: StepWindow | None = None,
    value_baseline: Callable[[], ValueBaseline | None] = lambda: None,
) -> Method:
    """Build a policy-gradient method: rollouts of 4 samples for each of 4 prompts."""

    def module(value: float | None, **common: Any) -> PolicyGradientModule:
        return PolicyGradientModule(
            objective=objective(value),
            advantage_estimator=advantage_estimator(),
            samples_per_prompt=4,
            inner_epochs=inner_epochs,
            window=window,
            value_baseline=value_baseline(),
            checkpointing="none",
            **common,
        )

    return Method(module, lrs=(1e-3, 3e-3, 1e-2), batch_size=4, budget=4.0, own=own, values=values)


CLIPS = (0.03, 0.1, 0.3)


def standardized() -> GroupRelative:
    """Return the advantages of GRPO."""
    return GroupRelative(divide_by_std=True)


POLICY = {
    "REINFORCE": policy(lambda _: Reinforce("sum"), lambda: PerPromptStatistics(min_count=4), 1),
    "PPO": policy(lambda clip: PPO(clip, "sum"), lambda: PerPromptStatistics(min_count=4), 2, "clip", CLIPS),
    "LOOP": policy(lambda clip: PPO(clip, "sum"), LeaveOneOut, 2, "clip", CLIPS),
    "PRDP": policy(lambda beta: PRDP(beta, 0.1, "sum"), GroupRelative, 2, "beta", (0.001, 0.01, 0.1)),
    "PRDP on preferences": policy(lambda beta: PRDP(beta, 0.1, "sum"), BradleyTerry, 2, "beta", (0.01, 0.1, 1.0)),
    "GRPO": policy(lambda clip: PPO(clip, "sum"), standardized, 2, "clip", CLIPS),
    "MixGRPO": policy(lambda clip: PPO(clip, "sum"), standardized, 2, "clip", CLIPS, SlidingWindow(2, 1, rollouts=10)),
    "Flow-GRPO-Fast": policy(lambda clip: PPO(clip, "sum"), standardized, 2, "clip", CLIPS, RandomWindow(2)),
    "Pref-GRPO": policy(lambda clip: PPO(clip, "sum"), WinRate, 2, "clip", CLIPS),
    "LOOP with values": policy(
        lambda clip: PPO(clip, "sum"), LeaveOneOut, 2, "clip", CLIPS, value_baseline=lambda: ValueBaseline(4, 10.0)
    ),
    "GRPO-Guard": policy(lambda clip: GRPOGuard(clip, "sum"), standardized, 2, "clip", CLIPS),
    "Flow-DPPO": policy(lambda bound: FlowDPPO(bound, "sum"), standardized, 2, "max_kl", (0.003, 0.03, 0.3)),
    "Sample dropout": policy(lambda change: SampleDropout(change, "sum"), LeaveOneOut, 2, "max_change", CLIPS),
    "APA": policy(lambda strength: APA(strength, "sum"), LeaveOneOut, 2, "strength", (3.0, 10.0, 30.0)),
}


def forward(objective: Callable[[Any], ForwardObjective], own: str = "", values: tuple[float, ...] = ()) -> Method:
    """Build a forward-process method: rollouts of 4 samples for each of 4 prompts, one epoch."""

    def module(value: float | None, **common: Any) -> ForwardProcessModule:
        return ForwardProcessModule(objective=objective(value), samples_per_prompt=4, checkpointing="none", **common)

    return Method(module, lrs=(1e-3, 3e-3, 1e-2), batch_size=4, budget=4.0, own=own, values=values)


FORWARD = {
    "DiffusionNFT": forward(DiffusionNFT, "beta", (0.1, 0.3, 1.0)),
    "AWM": forward(lambda clip: AWM(PPO(clip)), "clip", CLIPS),
    "RWR": forward(RWR, "temperature", (0.3, 1.0, 3.0)),
    "Online DPO": forward(OnlineDPO, "beta", (10.0, 100.0, 1000.0)),
    "DGPO": forward(DGPO, "beta", (10.0, 100.0, 1000.0)),
    "CRD": forward(CRD, "beta", (0.1, 1.0, 10.0)),
}
METHODS: dict[str, Method] = {**DIRECT, **MATCHING, **POLICY, **FORWARD}


def _recognized(setting: Setting) -> Reward:
    return CLIPClassification(setting.clip, captions=setting.captions, column="caption")


TASKS = {
    "recognized": Task(
        _recognized, lambda setting: {**setting.eval_rewards(), "jpeg": JPEGSize()}, methods=tuple(METHODS)
    ),
    "jpeg": Task(lambda setting: JPEGSize(), lambda setting: setting.eval_rewards(), (*POLICY, *FORWARD), budget=0.5),
    "many": Task(
        _recognized,
        lambda setting: {**setting.eval_rewards(), "jpeg": JPEGSize()},
        methods=tuple(POLICY),
        many=True,
        tuned_on="recognized",
    ),
}
"""`recognized`: CLIP classification, differentiable. `jpeg`: true JPEG size, not differentiable. `many`:
`recognized` on the longer prompt list."""
