"""Peak memory and cost of a training step, predicted before the diffusion model's weights are loaded."""

from lightning_draft.plan.replay import shared_calls
from lightning_draft.plan.step import StepPlan, call_flops, model_parts, plan_step
from lightning_draft.plan.tracker import Tracker

__all__ = ["StepPlan", "Tracker", "call_flops", "model_parts", "plan_step", "shared_calls"]
