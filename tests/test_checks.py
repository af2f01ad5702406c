"""Checks before the first training step: each error has its own reason and fix."""

import copy
import math
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.losses import Hinge
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import Guidance, StableDiffusion
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.color import Brightness
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler
from lightning_draft.schedules import RectifiedFlow
from lightning_draft.testing import ConstantReward, GaussianModel, LinearModel, LinearReward, scaled_linear
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

DEAD_END = scaled_linear(spacing="leading", final_alpha_cumprod=None)


class BlackBox(LinearReward):
    differentiable = False


class Detached(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.detach().mean((1, 2, 3))


class Numpy(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(images.numpy()).mean((1, 2, 3))


class Elsewhere(Reward):
    """Its score has a gradient, but not with respect to the images."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.detach().requires_grad_().mean((1, 2, 3))


class Rounded(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.round().mean((1, 2, 3))


class SquareRoot(Reward):
    """Its gradient is infinite for constant images."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images - images).flatten(1).norm(dim=1) + (0 * images).flatten(1).sum(1).abs().sqrt()


class Listed(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return list(images.mean((1, 2, 3)))  # type: ignore[return-value]


class OneForAll(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean()


class Infinite(LinearReward):
    """Infinite, with a finite gradient."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().forward(images, prompts) + math.inf


class LastStepOfTheUser(Truncation):
    """A user's own truncation that trains only the last step, and declares nothing."""

    def __call__(self, chain: Any, noise: Tensor) -> Tensor:
        with torch.no_grad():
            state = chain.advance(chain.start(noise), chain.num_steps - 1)
        return chain.advance(state).x


class Broken(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise RuntimeError("the reward's own trouble")


class CutByTheUser(Truncation):
    def __call__(self, chain: Any, noise: Tensor) -> Tensor:
        state = chain.advance(chain.start(noise), chain.num_steps - 1)
        with torch.no_grad():
            return chain.advance(state).x


class Overflowing(LinearModel):
    def forward(self, x: Tensor, t: float, conditioning: Any) -> Tensor:
        return super().forward(x, t, conditioning) * math.inf


class Undecodable(LinearModel):
    """The latents are finite, and the decoder overflows."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * math.inf


class Unused(LinearModel):
    """Its parameter is not used in sampling; the latents have a gradient from the noise only."""

    def forward(self, x: Tensor, t: float, conditioning: Any) -> Tensor:
        return 0.1 * x

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        return super().noise(batch_size, generator).requires_grad_()


class Exploding(LinearModel):
    """A finite output whose gradient in theta is not finite."""

    def forward(self, x: Tensor, t: float, conditioning: Any) -> Tensor:
        return super().forward(x, t, conditioning) + ((self.theta - self.theta.detach()) ** 2).sqrt().to(x)


def make(**options: Any) -> DraftModule:
    defaults: dict[str, Any] = {
        "model": LinearModel(0.1),
        "reward": LinearReward(),
        "sampler": DDIM(4),
        "truncation": Full(),
    }
    return DraftModule(**{**defaults, **options})


def fit(module: DraftModule, folder: Path, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, PromptDataModule(["a", "b", "c"], batch_size=1, val_size=1))
    return trainer


INVALID: list[tuple[str, dict[str, Any], str]] = [
    (
        "black box",
        {"reward": BlackBox()},
        "BlackBox is not differentiable, and DraftModule .*use BlackBox in `eval_rewards`.*PolicyGradientModule",
    ),
    ("nothing trained", {"model": GaussianModel()}, "no trainable parameters; give it adapters"),
    ("wrong sampler", {"sampler": FlowEuler(4)}, "the sampler does not fit the model: .*use DDIM or DPMSolver"),
    (
        "last step does nothing",
        {"model": LinearModel(schedule=DEAD_END), "truncation": LastK(1)},
        r"LastK trains only the last sampling step.*coefficient is 0.*spacing to trailing.*LastK\(k=2\)",
    ),
    (
        "last step does nothing for the copies",
        {"model": LinearModel(schedule=DEAD_END), "truncation": LowVariance(2)},
        "LowVariance trains only the last sampling step",
    ),
    (
        "last step does nothing for one random step",
        {"model": LinearModel(schedule=DEAD_END), "truncation": RandomK(max_k=1)},
        "RandomK trains only the last sampling step",
    ),
    (
        "last step does nothing for a user's own truncation",
        {"model": LinearModel(schedule=DEAD_END), "truncation": LastStepOfTheUser()},
        "LastStepOfTheUser trains only the last sampling step",
    ),
    (
        "infinite score",
        {"reward": Infinite()},
        "the reward Infinite returned nan for an image of '.'; every score must be a finite number",
    ),
    ("detached", {"reward": Detached()}, "Detached returned a score without a gradient.*no .item"),
    ("numpy", {"reward": Numpy()}, "Numpy removes the gradient .*numpy.*use only tensor operations"),
    ("elsewhere", {"reward": Elsewhere()}, "Elsewhere returned a score without a gradient"),
    ("rounded", {"reward": Rounded()}, "reward Rounded with respect to the images is exactly zero.*a clamp, a round"),
    ("constant", {"reward": ConstantReward()}, "ConstantReward with respect to the images is exactly zero"),
    (
        "nan",
        {"reward": SquareRoot()},
        "reward SquareRoot with respect to the images is not finite; look for a sqrt, a norm, a log or a division at 0",
    ),
    ("list", {"reward": Listed()}, r"^Listed.forward returned a list for 1 images; return a tensor of shape \(1,\)"),
    ("one score", {"reward": OneForAll()}, r"OneForAll.forward returned shape \(\) for 1 images; return one score"),
    ("cut", {"truncation": CutByTheUser()}, "CutByTheUser returned latents without a gradient.*output_gain=0"),
    ("white noise", {"model": Undecodable()}, "^the decoded images are not finite; use a wider dtype"),
    ("overflow", {"model": Overflowing()}, "the sampled latents are not finite; use a wider dtype"),
    ("unused", {"model": Unused()}, "reaches none of the trainable parameters: .*train the denoiser's adapters"),
    ("explosion", {"model": Exploding()}, "with respect to the trainable parameters is not finite; use a wider dtype"),
]


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_configurations_that_cannot_improve_the_reward_are_rejected(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(make(**options), tmp_path)


@pytest.mark.parametrize(
    "truncation",
    [Full(), LastK(1), LastK(3), LowVariance(2), ReFL(m=3), RandomK(), RandomSteps(), DRTune(k=2, m=2)],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize("sampler", [DDIM(4), DDIM(4, eta=1.0), DPMSolverPlusPlus(4)], ids=["DDIM", "DDPM", "2M"])
def test_valid_configurations_pass_the_checks(truncation: Truncation, sampler: Any) -> None:
    module = make(truncation=truncation, sampler=sampler)
    module.check_configuration()
    module.check_first_step(["a"])


def test_a_last_step_that_ignores_the_network_is_accepted_if_more_steps_are_trained() -> None:
    for truncation in (LastK(2), Full(), ReFL(m=1), RandomK(max_k=2)):
        make(model=LinearModel(schedule=DEAD_END), truncation=truncation).check_configuration()
    make(
        model=LinearModel(0.1, "flow", RectifiedFlow()), sampler=FlowEuler(1), truncation=LastK(1)
    ).check_configuration()


def test_small_coefficient_of_the_last_step_gives_a_warning() -> None:
    """The coefficient is 0.0121 on SD 1.x's grid, 0.009 for a flow with shift 3, and 0.134 on DRaFT's grid."""
    faint = LinearModel(schedule=scaled_linear(spacing="leading", final_alpha_cumprod=None, steps_offset=1))
    flow = LinearModel(0.1, "flow", RectifiedFlow(shift=3.0))
    for truncation in (LastK(1), LowVariance(2), RandomK(max_k=1)):
        with pytest.warns(UserWarning, match=r"output there is 0\.012, so.*trailing.*LastK\(k=2\)"):
            make(model=faint, sampler=DDIM(50), truncation=truncation).check_configuration()
    with pytest.warns(UserWarning, match=r"output there is 0\.009,"):
        make(model=flow, sampler=FlowEuler(28), truncation=LastK(1)).check_configuration()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(model=faint, sampler=DDIM(50), truncation=LastK(2)).check_configuration()
        make(model=LinearModel(schedule=scaled_linear()), sampler=DDIM(50), truncation=LastK(1)).check_configuration()


def test_the_check_of_the_first_step_changes_nothing() -> None:
    module = make(truncation=LowVariance(2), sampler=DDIM(4, eta=1.0))
    seen: list[int] = []
    module.probes.append(lambda step, latent: seen.append(step))
    torch.manual_seed(4)
    before, value = torch.get_rng_state(), module.model.theta.detach().clone()
    module.check_first_step(["a"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module.model.theta, value)
    assert module.model.theta.grad is None
    assert seen == []
    assert len(module.probes) == 1


def test_errors_of_the_reward_itself_are_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="^the reward's own trouble$"):
        make(reward=Broken()).check_first_step(["a"])


def test_loss_with_zero_gradient_gives_a_warning() -> None:
    """An error would prevent resuming a run whose images already exceed the hinge's threshold."""
    with pytest.warns(UserWarning, match="gradient of Hinge is 0 at the first prompt's reward .*change the threshold"):
        make(loss=Hinge(threshold=-1e6)).check_first_step(["a"])


def test_pipeline_passes_and_half_precision_adapters_are_rejected(tiny_sd: Path, tmp_path: Path) -> None:
    def module(**options: Any) -> DraftModule:
        model = StableDiffusion(str(tiny_sd), guidance=Guidance(2.0), **options)
        return DraftModule(model, Brightness(0.9), DDIM(2), LastK(1))

    module().check_first_step(["a red cat"])
    module(dtype="bfloat16").check_first_step(["a red cat"])
    with pytest.raises(
        ConfigurationError, match='trainable parameters have dtype bfloat16.*"bf16-mixed" or "32-true".*dtype=bfloat16'
    ):
        fit(module(), tmp_path, precision="bf16-true")


def test_nothing_is_checked_for_validation(tmp_path: Path) -> None:
    """A black-box reward can be validated without training."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    (metrics,) = trainer.validate(make(reward=BlackBox()), PromptDataModule(["a", "b"], val_size=1), verbose=False)
    assert metrics["val/gain"] == 0


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_spawn_find_unused_parameters_true"])
def test_processes_by_spawn_are_rejected_before_training(strategy: str, tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="^strategy=ddp_spawn would send the module.*write strategy=ddp"):
        trainer.fit(make(), PromptDataModule(["a", "b", "c"], val_size=1))


def test_a_module_without_lambdas_can_be_pickled_and_copied() -> None:
    module = make(optimizer=torch.optim.Adam)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.model.theta is not module.model.theta
        assert copied.model.theta == module.model.theta
