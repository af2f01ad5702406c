"""Rewards: functions of images and prompts that a model is fine-tuned to increase."""

from lightning_draft.errors import RewardServiceError
from lightning_draft.prompt import Prompt
from lightning_draft.rewards.aesthetic import AestheticScore
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.rewards.blackbox import PythonFunction
from lightning_draft.rewards.classifier import ClassifierTarget
from lightning_draft.rewards.clip import CaptionRetrieval, CLIPClassification, CLIPScore
from lightning_draft.rewards.color import Brightness, ColorBalance, ColorSaturation, ColorTarget, Sharpness, Symmetry
from lightning_draft.rewards.combine import GradientNormSum, WeightedReward, WeightedSum, ZScoreSum
from lightning_draft.rewards.detection import DetectedCount, ObjectAbsent, ObjectCount, ObjectPresent
from lightning_draft.rewards.hps import HPSv2
from lightning_draft.rewards.human import HumanVotes
from lightning_draft.rewards.image_reward import ImageReward
from lightning_draft.rewards.inputs import NonFiniteScoreError
from lightning_draft.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility, JPEGRate, JPEGSize
from lightning_draft.rewards.latent import LatentNetwork, LatentReward
from lightning_draft.rewards.offloaded import Offloaded
from lightning_draft.rewards.pairwise import PairwiseReward
from lightning_draft.rewards.pickscore import PickScore
from lightning_draft.rewards.quality import CleanFraction, ImageQuality
from lightning_draft.rewards.robust import Augmented, Ensemble, Relative
from lightning_draft.rewards.samples import Samples
from lightning_draft.rewards.service import HTTPReward
from lightning_draft.rewards.vlm import VLMJudge
from lightning_draft.rewards.vlm_client import ChatEndpoint

__all__ = [
    "AestheticScore",
    "Augmented",
    "Brightness",
    "CLIPClassification",
    "CLIPScore",
    "CaptionRetrieval",
    "ChatEndpoint",
    "ClassifierTarget",
    "CleanFraction",
    "ColorBalance",
    "ColorTarget",
    "DetectedCount",
    "HPSv2",
    "Ensemble",
    "GradientNormSum",
    "HTTPReward",
    "HumanVotes",
    "ImageQuality",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "JPEGRate",
    "JPEGSize",
    "LatentNetwork",
    "LatentReward",
    "NonFiniteScoreError",
    "ObjectAbsent",
    "ObjectCount",
    "ObjectPresent",
    "Offloaded",
    "PairwiseReward",
    "PickScore",
    "Prompt",
    "PythonFunction",
    "Relative",
    "Reward",
    "RewardServiceError",
    "Samples",
    "ColorSaturation",
    "Sharpness",
    "Symmetry",
    "VLMJudge",
    "WeightedReward",
    "WeightedSum",
    "ZScoreSum",
    "check_scores",
]
