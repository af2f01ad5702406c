"""Peak memory and cost of a training step, predicted before any weight is loaded."""

from lightning_draft.plan.step import StepPlan, model_parts, plan_step
from lightning_draft.plan.tracker import Tracker

__all__ = ["StepPlan", "Tracker", "model_parts", "plan_step"]
