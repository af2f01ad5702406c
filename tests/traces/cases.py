"""The cases, and all names of the package that the traces use: constructors, attributes and logged metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_draft.advantages import GroupRelative, LeaveOneOut, PerPromptStatistics
from lightning_draft.callbacks import AdapterEMA, LoRAExport
from lightning_draft.data import PromptDataModule
from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT
from lightning_draft.gradient_matching import AdjointMatching, NablaGFlowNet, VGGFlow
from lightning_draft.group_objectives import CRD, DGPO, OnlineDPO
from lightning_draft.losses import Distance, Hinge, SoftHinge
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.gradient_matching import GradientMatchingModule
from lightning_draft.methods.old_policy import OldPolicy
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, Memory, StableDiffusion, StableDiffusion3, TextEncoding
from lightning_draft.objectives import APA, PPO, PRDP, Reinforce
from lightning_draft.rewards import (
    Brightness,
    CLIPClassification,
    ColorBalance,
    GradientNormSum,
    JPEGSize,
    WeightedReward,
    WeightedSum,
    ZScoreSum,
)
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, FlowSDE
from lightning_draft.stochastic_flow import DanceSDE, FlowCPS
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL
from tests.tiny_pipelines import STABLE_DIFFUSION_15, write_pipeline, write_sd3_pipeline
from tests.traces.record import Case

ASSETS = Path(__file__).parents[1] / "assets"
PROMPTS = ["a red cat", "a cat", "red", "cat dog", "tree", "a dog", "a car", "bread"]

METRICS = {
    "reward": "train/reward",
    "drift": "train/prediction_drift",
    "kl": "train/kl",
    "ratio": "train/ratio",
    "clip_fraction": "train/clip_fraction",
    "val_reward": "val/reward",
    "val_gain": "val/gain",
}
"""What the package logs, by the name in the trace."""


def write_pipelines(folder: Path) -> None:
    """Write the random pipelines that the cases load."""
    write_pipeline(folder / "sd", DDIMScheduler(**STABLE_DIFFUSION_15, clip_sample=False))
    velocity = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}
    write_pipeline(folder / "sd_v", DDIMScheduler(**velocity, clip_sample=False, steps_offset=1))
    write_sd3_pipeline(folder / "sd3")


def denoiser(module: Any) -> nn.Module:
    """The network whose calls are counted."""
    return module.model.denoiser


def trainable(module: Any) -> dict[str, Tensor]:
    """What is optimized."""
    return dict(module.trainable_parameters())


def exported(folder: Path) -> list[Path]:
    """The LoRA files in the folder of a run, without those for ComfyUI."""
    return sorted(path for path in (folder / "lora").glob("*.safetensors") if ".comfy" not in path.name)


def prompts(batch_size: int = 2) -> PromptDataModule:
    return PromptDataModule(PROMPTS, batch_size=batch_size, val_size=2)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def stirred(module: Any) -> Any:
    """Give the adapters values, so that the model is not its base and both factors have a gradient."""
    generator = torch.Generator().manual_seed(3)
    for value in trainable(module).values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator).to(value)
    return module


def lora(*targets: str) -> LoRA:
    return LoRA(4, alpha=8.0, target_modules=list(targets), seed=0)


def sd(folder: Path, name: str = "sd", **options: Any) -> StableDiffusion:
    defaults: dict[str, Any] = {"guidance": Guidance(1.0), "lora": lora("to_v", "conv_out")}
    return StableDiffusion(str(folder / name), **{**defaults, **options})


def sd3(folder: Path, **options: Any) -> StableDiffusion3:
    defaults: dict[str, Any] = {"guidance": Guidance(1.0), "lora": lora("to_v", "to_q"), "text": TextEncoding(16)}
    return StableDiffusion3(str(folder / "sd3"), **{**defaults, **options})


Make = Callable[[Path], Any]


def draft(model: Make = sd, lr: float = 1.0, **options: Any) -> Make:
    """Direct back-propagation through the last two of four steps, unless options say otherwise."""
    defaults: dict[str, Any] = {"sampler": DDIM(4), "truncation": LastK(2)}

    def make(folder: Path) -> DraftModule:
        settings = {"reward": ColorBalance, **defaults, **options}
        settings["reward"] = settings["reward"]()
        return stirred(DraftModule(model(folder), optimizer=sgd(lr), **settings))

    return make


def policy(model: Make = sd, lr: float = 1.0, **options: Any) -> Make:
    """Policy gradients on four noisy steps with two samples per prompt."""
    defaults: dict[str, Any] = {"sampler": DDIM(4, eta=1.0), "samples_per_prompt": 2, "checkpointing": "none"}

    def make(folder: Path) -> PolicyGradientModule:
        settings = {"reward": ColorBalance, **defaults, **options}
        settings |= {name: settings[name]() for name in ("reward", "advantage_estimator") if name in settings}
        return stirred(PolicyGradientModule(model(folder), optimizer=sgd(lr), **settings))

    return make


def forward(model: Make = sd, lr: float = 0.03, **options: Any) -> Make:
    """The forward process of two deterministic samples a prompt, trained on twice."""
    defaults: dict[str, Any] = {"sampler": DDIM(4), "samples_per_prompt": 2, "inner_epochs": 2, "num_times": 2}

    def make(folder: Path) -> ForwardProcessModule:
        settings = {"reward": ColorBalance(), "checkpointing": "none", **defaults, **options}
        return stirred(ForwardProcessModule(model(folder), optimizer=sgd(lr), **settings))

    return make


def matching(strategy: Any, model: Make = sd, **options: Any) -> Make:
    """Gradient matching at two of four noisy steps."""

    def make(folder: Path) -> GradientMatchingModule:
        settings = {"sampler": DDIM(4, eta=1.0), "trained_steps": 2, **options}
        return stirred(
            GradientMatchingModule(model(folder), ColorBalance(), matching=strategy, optimizer=sgd(0.01), **settings)
        )

    return make


def with_options(model: Make, **options: Any) -> Make:
    return lambda folder: model(folder, **options)


def velocity(folder: Path) -> StableDiffusion:
    return sd(folder, "sd_v")


def emoji(folder: Path) -> StableDiffusion:
    return StableDiffusion(str(ASSETS / "emoji32"), guidance=Guidance(1.0), lora=LoRA(rank=4, seed=0))


def emoji_clip() -> CLIPClassification:
    return CLIPClassification(pretrained=str(ASSETS / "emoji32-clip"), captions=str(ASSETS / "prompts" / "emoji32.txt"))


def emoji_prompts() -> PromptDataModule:
    return PromptDataModule(
        str(ASSETS / "prompts" / "emoji32.txt"),
        val_prompts=str(ASSETS / "prompts" / "emoji32_unseen.txt"),
        batch_size=2,
    )


def direct(make: Make, **options: Any) -> Case:
    return Case(make, prompts, **options)


def rewards(cls: Any) -> Any:
    parts = {
        "color": WeightedReward(ColorBalance(), 1.0),
        "light": WeightedReward(Brightness(0.4), 0.5, threshold=-0.1),
    }
    return cls(parts)


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


TRUNCATIONS = {
    "full": Full(),
    "last_k_1": LastK(1),
    "last_k_2": LastK(2),
    "low_variance_1": LowVariance(1),
    "low_variance_2": LowVariance(2),
    "refl_3": ReFL(3),
    "random_k": RandomK(),
    "random_k_2": RandomK(2),
    "random_steps": RandomSteps(),
    "drtune_1_1": DRTune(1, 1),
    "drtune_2_3": DRTune(2, 3, coverage="end"),
}
SAMPLERS = {
    "ddim_eta_0": (sd, DDIM(4)),
    "ddim_eta_half": (sd, DDIM(4, eta=0.5)),
    "ddim_eta_1": (sd, DDIM(4, eta=1.0)),
    "ddim_trailing": (sd, DDIM(4, spacing="trailing")),
    "ddim_linspace": (sd, DDIM(4, spacing="linspace")),
    "ddim_v_prediction": (velocity, DDIM(4)),
    "dpm_solver_plus_plus": (sd, DPMSolverPlusPlus(4)),
    "dpm_solver_plus_plus_v_prediction": (velocity, DPMSolverPlusPlus(4)),
    "flow_euler": (sd3, FlowEuler(4)),
    "flow_sde": (sd3, FlowSDE(4)),
}
LOSSES = {"hinge": Hinge(0.5, 2.0), "soft_hinge": SoftHinge(0.1, 0.2), "distance": Distance(0.3)}
MODELS = {
    "guidance/full": with_options(sd, guidance=Guidance(3.0)),
    "guidance/conditional": with_options(sd, guidance=Guidance(3.0, gradient="conditional")),
    "guidance/negative_prompt": with_options(sd, guidance=Guidance(3.0, "a tree")),
    "guidance/below_1": with_options(sd, guidance=Guidance(0.5)),
    "decoder/chunks": with_options(sd, memory=Memory(decode_chunk=1)),
    "decoder/checkpointed": with_options(sd, memory=Memory(decode_chunk=1, checkpoint_decoder=True)),
}
OBJECTIVES = {
    "reinforce": ({"objective": Reinforce(), "lr": 0.03}, 3),
    "ppo": ({"objective": PPO(), "lr": 0.03, "inner_epochs": 2}, 4),
    "prdp": ({"objective": PRDP(), "lr": 1e-5, "inner_epochs": 2}, 4),
}
BASELINES = {
    "group_mean": GroupRelative,
    "group_mean_std": lambda: GroupRelative(divide_by_std=True),
    "leave_one_out": LeaveOneOut,
    "per_prompt": lambda: PerPromptStatistics(buffer_size=8, min_count=2),
}
VARIANTS = {
    "reinforce_sum": ({"objective": Reinforce("sum"), "lr": 1e-4}, 3),
    "ppo_sum": ({"objective": PPO(0.3, "sum"), "lr": 1e-4, "inner_epochs": 2}, 4),
    "ppo_clip_only": ({"objective": PPO(form="clip_only"), "lr": 0.03, "inner_epochs": 2}, 4),
    "ppo_advantage_clip": ({"objective": PPO(0.1, advantage_clip=1e-3), "lr": 0.3, "inner_epochs": 2}, 4),
    "apa": ({"objective": APA(10.0), "lr": 0.03, "inner_epochs": 2}, 4),
    "prdp_sum": ({"objective": PRDP(0.01, 0.1, "sum"), "lr": 1e-10, "inner_epochs": 2}, 4),
    "prdp_beta": ({"objective": PRDP(beta=0.1, clip=1e-3), "lr": 1e-5, "inner_epochs": 2}, 4),
}
FORWARD = {
    "nft": {"objective": DiffusionNFT(), "old_policy": OldPolicy(0.5, rate=0.2), "kl_weight": 0.1},
    "awm": {"objective": AWM()},
    "rwr": {"objective": RWR(), "times": "uniform"},
    "online_dpo": {"objective": OnlineDPO(), "lr": 1e-3},
    "dgpo": {"objective": DGPO()},
    "crd": {"objective": CRD()},
}
TWO_EPOCHS: dict[str, Any] = {"objective": PPO(), "lr": 0.03, "inner_epochs": 2}
STEPWISE: dict[str, Any] = {
    "objective": PPO(),
    "lr": 0.03,
    "inner_epochs": 2,
    "timesteps_per_minibatch": 1,
    "advantage_estimator": LeaveOneOut,
}

CASES: dict[str, Case] = {
    **{f"truncation/{name}": direct(draft(truncation=each), steps=5) for name, each in TRUNCATIONS.items()},
    **{f"sampler/{name}": direct(draft(model, sampler=each)) for name, (model, each) in SAMPLERS.items()},
    **{f"loss/{name}": direct(draft(loss=each)) for name, each in LOSSES.items()},
    **{name: direct(draft(model)) for name, model in MODELS.items()},
    "guidance/sd3_full": direct(draft(with_options(sd3, guidance=Guidance(3.0)), sampler=FlowEuler(4))),
    "guidance/sd3_conditional": direct(
        draft(with_options(sd3, guidance=Guidance(3.0, gradient="conditional")), sampler=FlowEuler(4))
    ),
    **{
        f"checkpointing/{mode}": direct(draft(truncation=Full(), checkpointing=mode))
        for mode in ("none", "step", "block", "both", "auto")
    },
    "checkpointing/sd3_both": direct(draft(sd3, sampler=FlowEuler(4), truncation=Full(), checkpointing="both")),
    "micro_batch/last_k_2": direct(draft(micro_batch_size=1)),
    "micro_batch/low_variance_2": direct(draft(micro_batch_size=1, truncation=LowVariance(2))),
    "drift/last_k_1": direct(draft(kl_weight=0.1, truncation=LastK(1))),
    "drift/full_ddim_eta_1": direct(draft(kl_weight=0.1, truncation=Full(), sampler=DDIM(4, eta=1.0))),
    "drift/low_variance_2": direct(draft(kl_weight=0.1, truncation=LowVariance(2))),
    "drift/drtune_micro_batch": direct(draft(kl_weight=0.1, truncation=DRTune(2, 3), micro_batch_size=1)),
    "trainer/accumulate_2": direct(draft(), trainer={"accumulate_grad_batches": 2}),
    "trainer/gradient_clipping": direct(draft(), trainer={"gradient_clip_val": 1e-3}),
    "trainer/validation": direct(draft(), trainer={"limit_val_batches": 1, "val_check_interval": 1}),
    "reward/weighted_sum": direct(draft(reward=lambda: rewards(WeightedSum))),
    "reward/gradient_norm_sum": direct(draft(reward=lambda: rewards(GradientNormSum))),
    "export/last_k_2": direct(draft(), callbacks=lambda: [LoRAExport(every_n_steps=1)]),
    "export/sd3": direct(draft(sd3, sampler=FlowEuler(4)), callbacks=lambda: [LoRAExport(every_n_steps=1)]),
    "export/ema": direct(
        draft(),
        callbacks=lambda: [AdapterEMA(decay=0.5), LoRAExport(every_n_steps=1)],
        trainer={"limit_val_batches": 1, "val_check_interval": 1},
    ),
    **{
        f"objective/{objective}/{baseline}": direct(policy(**options, advantage_estimator=make), steps=steps)
        for objective, (options, steps) in OBJECTIVES.items()
        for baseline, make in BASELINES.items()
    },
    **{
        f"objective/{name}": direct(policy(**options, advantage_estimator=GroupRelative), steps=steps)
        for name, (options, steps) in VARIANTS.items()
    },
    **{f"forward/{name}": direct(forward(**options), steps=3) for name, options in FORWARD.items()},
    **{
        f"matching/{name}": direct(make, trainer={"gradient_clip_val": 1.0})
        for name, make in {
            "adjoint": matching(AdjointMatching(1.0)),
            "adjoint_flow": matching(AdjointMatching(1.0), sd3, sampler=FlowSDE(4, 2**0.5)),
            "nabla_gflownet": matching(NablaGFlowNet(1.0)),
            "vgg_flow": matching(VGGFlow(1.0)),
        }.items()
    },
    "forward/flow": direct(forward(sd3, sampler=FlowEuler(4)), steps=3),
    "policy/kl": direct(policy(**TWO_EPOCHS, kl_weight=0.1), steps=4),
    "policy/kl_sum": direct(policy(**{**TWO_EPOCHS, "objective": PPO(0.3, "sum"), "lr": 1e-4}, kl_weight=0.1), steps=4),
    "policy/inner_epochs_2": direct(policy(**TWO_EPOCHS), steps=4),
    "policy/one_step_at_a_time": direct(policy(**STEPWISE), trainer={"accumulate_grad_batches": 4}, steps=3),
    "policy/prdp_minibatches": direct(
        policy(
            objective=PRDP(),
            lr=1e-5,
            micro_batch_size=2,
            timesteps_per_minibatch=2,
            advantage_estimator=GroupRelative,
            inner_epochs=2,
        ),
        trainer={"accumulate_grad_batches": 4},
        steps=2,
    ),
    "policy/micro_batch": direct(
        policy(objective=Reinforce(), lr=0.03, micro_batch_size=2), trainer={"accumulate_grad_batches": 2}
    ),
    "policy/guidance": direct(policy(with_options(sd, guidance=Guidance(3.0)), **TWO_EPOCHS), steps=4),
    "policy/flow_sde": direct(
        policy(sd3, **TWO_EPOCHS, sampler=FlowSDE(4), advantage_estimator=BASELINES["group_mean_std"]), steps=4
    ),
    "policy/flow_cps": direct(
        policy(sd3, **TWO_EPOCHS, sampler=FlowCPS(4), advantage_estimator=LeaveOneOut, share_start_noise=True), steps=2
    ),
    "policy/dance_sde": direct(
        policy(
            sd3, **TWO_EPOCHS, sampler=DanceSDE(4), advantage_estimator=LeaveOneOut, kl_weight=0.1, kl_per_time=True
        ),
        steps=2,
    ),
    "policy/black_box": direct(policy(**TWO_EPOCHS, reward=lambda: JPEGSize(quality=50)), steps=4),
    "policy/validation": direct(
        policy(objective=Reinforce(), lr=0.03), trainer={"limit_val_batches": 1, "val_check_interval": 1}
    ),
    "resume/last_k_2": direct(draft(), steps=4, resume_after=2),
    "resume/drtune_2_3": direct(draft(truncation=DRTune(2, 3)), steps=4, resume_after=2),
    "resume/ema": direct(
        draft(),
        steps=4,
        resume_after=2,
        callbacks=lambda: [AdapterEMA(decay=0.5), LoRAExport(every_n_steps=1)],
    ),
    "resume/z_score_sum": direct(draft(reward=lambda: rewards(ZScoreSum)), steps=4, resume_after=2),
    "resume/within_a_rollout": direct(
        policy(**TWO_EPOCHS, advantage_estimator=BASELINES["per_prompt"]), steps=4, resume_after=3
    ),
    "resume/prdp": direct(
        policy(objective=PRDP(), lr=1e-5, inner_epochs=2, advantage_estimator=GroupRelative), steps=4, resume_after=3
    ),
    "distributed/fsdp2_full": direct(draft(truncation=Full(), checkpointing="step"), strategy=fsdp2, steps=2),
    "distributed/fsdp2_ppo": direct(policy(**TWO_EPOCHS), strategy=fsdp2, steps=2),
    "distributed/ddp_full": direct(draft(truncation=Full(), checkpointing="step"), strategy=lambda: "ddp", steps=2),
    "shipped/emoji_last_k_1": Case(
        draft(
            emoji,
            lr=1e-3,
            truncation=LastK(1),
            reward=emoji_clip,
        ),
        emoji_prompts,
        steps=2,
    ),
    "shipped/emoji_ppo": Case(
        policy(emoji, lr=1e-3, reward=emoji_clip, inner_epochs=2),
        emoji_prompts,
        steps=2,
    ),
}
"""Cases by names that never change."""
