"""Fine-tune text-to-image diffusion models on a reward by back-propagating through the sampler.

The names below are the public interface; each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_draft.models.families import FAMILIES

if TYPE_CHECKING:
    from lightning_draft.advantages import AdvantageEstimator, GroupRelative, LeaveOneOut, PerPromptStatistics
    from lightning_draft.data import PromptDataModule
    from lightning_draft.diversity import DiversityAware
    from lightning_draft.errors import ConfigurationError
    from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT, ForwardObjective
    from lightning_draft.gradient_matching import AdjointMatching, GradientMatching, NablaGFlowNet, VGGFlow
    from lightning_draft.group_objectives import CRD, DGPO, OnlineDPO
    from lightning_draft.guide.best_of_n import best_of_n
    from lightning_draft.guide.gradient import gradient_guidance, norm_matched_guidance
    from lightning_draft.guide.latent_score import latent_score
    from lightning_draft.guide.noise import dno, reno
    from lightning_draft.kl_gate import KLGate, MovingReference
    from lightning_draft.methods.anchor import Anchor
    from lightning_draft.methods.base import RewardModule
    from lightning_draft.methods.draft import DraftModule
    from lightning_draft.methods.forward_process import ForwardProcessModule
    from lightning_draft.methods.gradient_matching import GradientMatchingModule
    from lightning_draft.methods.old_policy import OldPolicy
    from lightning_draft.methods.policy_gradient import PolicyGradientModule
    from lightning_draft.models.base import DiffusionModel
    from lightning_draft.models.decoder import Memory
    from lightning_draft.models.guidance import Guidance
    from lightning_draft.models.lora import LoRA
    from lightning_draft.models.lora_base import convert_lora, read_lora, read_loras
    from lightning_draft.models.lora_edit import anneal_lora, lora_info, mix_loras, resize_lora, scale_lora
    from lightning_draft.models.lora_merge import merge_lora
    from lightning_draft.models.lora_writing import write_lora
    from lightning_draft.models.scale_schedule import ScaleSchedule
    from lightning_draft.models.text_encoding import TextEncoding
    from lightning_draft.objectives import APA, PPO, PRDP, Objective, Reinforce
    from lightning_draft.preferences import BradleyTerry, WinRate
    from lightning_draft.prompt import Prompt
    from lightning_draft.rewards.base import Reward
    from lightning_draft.rewards.combine import WeightedReward, WeightedSum
    from lightning_draft.rewards.latent import LatentReward
    from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE, Sampler
    from lightning_draft.stochastic_flow import DanceSDE, FlowCPS
    from lightning_draft.surrogates import DirectAlign, FlowBPBridge, FlowBPLagrange, LeapAlign
    from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation
    from lightning_draft.trust_region import FlowDPPO, GRPOGuard, SampleDropout
    from lightning_draft.value_baseline import ValueBaseline
    from lightning_draft.windows import RandomWindow, SlidingWindow, StepWindow

__version__ = "0.1.0"

_MODULES = {
    "advantages": ("AdvantageEstimator", "GroupRelative", "LeaveOneOut", "PerPromptStatistics"),
    "data": ("PromptDataModule",),
    "diversity": ("DiversityAware",),
    "errors": ("ConfigurationError",),
    "forward_objectives": ("AWM", "DiffusionNFT", "ForwardObjective", "RWR"),
    "gradient_matching": ("AdjointMatching", "GradientMatching", "NablaGFlowNet", "VGGFlow"),
    "group_objectives": ("CRD", "DGPO", "OnlineDPO"),
    "guide.best_of_n": ("best_of_n",),
    "guide.gradient": ("gradient_guidance", "norm_matched_guidance"),
    "guide.latent_score": ("latent_score",),
    "guide.noise": ("dno", "reno"),
    "kl_gate": ("KLGate", "MovingReference"),
    "methods.anchor": ("Anchor",),
    "methods.base": ("RewardModule",),
    "methods.draft": ("DraftModule",),
    "methods.forward_process": ("ForwardProcessModule",),
    "methods.gradient_matching": ("GradientMatchingModule",),
    "methods.old_policy": ("OldPolicy",),
    "methods.policy_gradient": ("PolicyGradientModule",),
    "models.base": ("DiffusionModel",),
    "models.decoder": ("Memory",),
    "models.guidance": ("Guidance",),
    "models.lora": ("LoRA",),
    "models.lora_base": ("convert_lora", "read_lora", "read_loras"),
    "models.lora_edit": ("anneal_lora", "lora_info", "mix_loras", "resize_lora", "scale_lora"),
    "models.lora_merge": ("merge_lora",),
    "models.lora_writing": ("write_lora",),
    "models.scale_schedule": ("ScaleSchedule",),
    "models.text_encoding": ("TextEncoding",),
    "objectives": ("APA", "Objective", "PPO", "PRDP", "Reinforce"),
    "preferences": ("BradleyTerry", "WinRate"),
    "prompt": ("Prompt",),
    "rewards.base": ("Reward",),
    "rewards.combine": ("WeightedReward", "WeightedSum"),
    "rewards.latent": ("LatentReward",),
    "samplers": ("DDIM", "DPMSolverPlusPlus", "FlowEuler", "FlowSDE", "Sampler"),
    "stochastic_flow": ("DanceSDE", "FlowCPS"),
    "surrogates": ("DirectAlign", "FlowBPBridge", "FlowBPLagrange", "LeapAlign"),
    "truncation": ("DRTune", "Full", "LastK", "LowVariance", "RandomK", "RandomSteps", "ReFL", "Truncation"),
    "trust_region": ("FlowDPPO", "GRPOGuard", "SampleDropout"),
    "value_baseline": ("ValueBaseline",),
    "windows": ("RandomWindow", "SlidingWindow", "StepWindow"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "APA",
    "AWM",
    "CRD",
    "DDIM",
    "DGPO",
    "DiversityAware",
    "KLGate",
    "MovingReference",
    "PPO",
    "PRDP",
    "RWR",
    "AdjointMatching",
    "AdvantageEstimator",
    "Anchor",
    "BradleyTerry",
    "ConfigurationError",
    "DPMSolverPlusPlus",
    "DRTune",
    "DanceSDE",
    "DiffusionModel",
    "DiffusionNFT",
    "DirectAlign",
    "DraftModule",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowCPS",
    "FlowDPPO",
    "FlowEuler",
    "FlowSDE",
    "ForwardObjective",
    "ForwardProcessModule",
    "Full",
    "GRPOGuard",
    "GradientMatching",
    "GradientMatchingModule",
    "GroupRelative",
    "Guidance",
    "LastK",
    "LatentReward",
    "LeapAlign",
    "LeaveOneOut",
    "LoRA",
    "LowVariance",
    "Memory",
    "NablaGFlowNet",
    "Objective",
    "OldPolicy",
    "OnlineDPO",
    "PerPromptStatistics",
    "PolicyGradientModule",
    "Prompt",
    "PromptDataModule",
    "RandomK",
    "RandomSteps",
    "RandomWindow",
    "ReFL",
    "Reinforce",
    "Reward",
    "RewardModule",
    "SampleDropout",
    "Sampler",
    "ScaleSchedule",
    "SlidingWindow",
    "StepWindow",
    "TextEncoding",
    "Truncation",
    "VGGFlow",
    "ValueBaseline",
    "WeightedReward",
    "WeightedSum",
    "WinRate",
    "anneal_lora",
    "best_of_n",
    "convert_lora",
    "dno",
    "gradient_guidance",
    "latent_score",
    "lora_info",
    "merge_lora",
    "mix_loras",
    "norm_matched_guidance",
    "read_lora",
    "read_loras",
    "reno",
    "resize_lora",
    "scale_lora",
    "write_lora",
]
__all__ += list(FAMILIES)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    module = FAMILIES[name].module if name in FAMILIES else _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    """List the public names for tab completion."""
    return sorted({*globals(), *__all__})
