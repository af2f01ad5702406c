"""Peak memory and cost of a training step, predicted before the diffusion model's weights are loaded."""

from lightning_draft.plan.replay import shared_calls
from lightning_draft.plan.step import TRAINED, EmbeddingPlan, StepPlan, call_flops, model_parts, plan_step
from lightning_draft.plan.tracker import OTHER, Tracker

__all__ = [
    "OTHER",
    "TRAINED",
    "EmbeddingPlan",
    "StepPlan",
    "Tracker",
    "call_flops",
    "model_parts",
    "plan_step",
    "shared_calls",
]
