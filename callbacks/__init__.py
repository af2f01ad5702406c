"""Lightning callbacks: samples, exported adapters, gradient norms, averaged weights, checkpoints, progress."""

from lightning_draft.callbacks.cost import CostMonitor
from lightning_draft.callbacks.ema import AdapterEMA
from lightning_draft.callbacks.gradient_norm import GradientNormMonitor
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.callbacks.lora_export import LoRAExport
from lightning_draft.callbacks.over_optimization import OverOptimizationGuard
from lightning_draft.callbacks.progress import ProgressBar
from lightning_draft.callbacks.random_state import RandomState
from lightning_draft.callbacks.reward_conflict import RewardConflict
from lightning_draft.callbacks.sample_logger import SampleLogger

__all__ = [
    "AdapterEMA",
    "CostMonitor",
    "GradientNormMonitor",
    "LastCheckpoint",
    "LoRAExport",
    "OverOptimizationGuard",
    "ProgressBar",
    "RandomState",
    "RewardConflict",
    "SampleLogger",
]
