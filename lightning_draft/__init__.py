"""Fine-tune text-to-image diffusion models on a reward by back-propagating through the sampler.

The names below are the public interface; each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_draft.advantages import AdvantageEstimator, GroupRelative, LeaveOneOut, PerPromptStatistics
    from lightning_draft.data import PromptDataModule
    from lightning_draft.errors import ConfigurationError
    from lightning_draft.methods.base import RewardModule
    from lightning_draft.methods.draft import DraftModule
    from lightning_draft.methods.policy_gradient import PolicyGradientModule
    from lightning_draft.models.base import DiffusionModel
    from lightning_draft.models.decoder import Memory
    from lightning_draft.models.guidance import Guidance
    from lightning_draft.models.lora import LoRA
    from lightning_draft.models.stable_diffusion import StableDiffusion
    from lightning_draft.models.stable_diffusion_3 import StableDiffusion3
    from lightning_draft.models.stable_diffusion_xl import StableDiffusionXL
    from lightning_draft.objectives import PPO, PRDP, Objective, Reinforce
    from lightning_draft.rewards.base import Prompt, Reward
    from lightning_draft.rewards.combine import WeightedReward, WeightedSum
    from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
    from lightning_draft.surrogates import DirectAlign, FlowBPBridge, LeapAlign
    from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

__version__ = "0.1.0"

_MODULES = {
    "advantages": ("AdvantageEstimator", "GroupRelative", "LeaveOneOut", "PerPromptStatistics"),
    "data": ("PromptDataModule",),
    "errors": ("ConfigurationError",),
    "methods.base": ("RewardModule",),
    "methods.draft": ("DraftModule",),
    "methods.policy_gradient": ("PolicyGradientModule",),
    "models.base": ("DiffusionModel",),
    "models.decoder": ("Memory",),
    "models.guidance": ("Guidance",),
    "models.lora": ("LoRA",),
    "models.stable_diffusion": ("StableDiffusion",),
    "models.stable_diffusion_3": ("StableDiffusion3",),
    "models.stable_diffusion_xl": ("StableDiffusionXL",),
    "objectives": ("Objective", "PPO", "PRDP", "Reinforce"),
    "rewards.base": ("Prompt", "Reward"),
    "rewards.combine": ("WeightedReward", "WeightedSum"),
    "samplers": ("DDIM", "DPMSolverPlusPlus", "FlowEuler", "FlowSDE", "Sampler"),
    "surrogates": ("DirectAlign", "FlowBPBridge", "LeapAlign"),
    "truncation": ("DRTune", "Full", "LastK", "LowVariance", "RandomK", "RandomSteps", "ReFL", "Truncation"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DDIM",
    "PPO",
    "PRDP",
    "AdvantageEstimator",
    "ConfigurationError",
    "DPMSolverPlusPlus",
    "DRTune",
    "DiffusionModel",
    "DirectAlign",
    "DraftModule",
    "FlowBPBridge",
    "FlowEuler",
    "FlowSDE",
    "Full",
    "GroupRelative",
    "Guidance",
    "LastK",
    "LeapAlign",
    "LeaveOneOut",
    "LoRA",
    "LowVariance",
    "Memory",
    "Objective",
    "PerPromptStatistics",
    "PolicyGradientModule",
    "Prompt",
    "PromptDataModule",
    "RandomK",
    "RandomSteps",
    "ReFL",
    "Reinforce",
    "Reward",
    "RewardModule",
    "Sampler",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Truncation",
    "WeightedReward",
    "WeightedSum",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names for tab completion."""
    return [*globals(), *__all__]
