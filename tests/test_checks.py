"""What cannot learn is refused before the first step, each with its own reason and fix."""

import math
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
from lightning_draft.methods.checks import check_gradient_flow, check_setup
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
    """Its gradient is infinite where the image is flat."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images - images).flatten(1).norm(dim=1) + (0 * images).flatten(1).sum(1).abs().sqrt()


class Listed(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return list(images.mean((1, 2, 3)))  # type: ignore[return-value]


class OneForAll(Reward):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean()


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
    """Finite latents, and a decoder that overflows."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * math.inf


class Unused(LinearModel):
    """Its parameter takes no part in sampling; the latents still carry a gradient, from the noise."""

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


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "black box",
        {"reward": BlackBox()},
        "BlackBox is not differentiable.*list BlackBox under `eval_rewards`.*policy-gradient",
    ),
    ("nothing trained", {"model": GaussianModel()}, "no trainable parameters; give it adapters"),
    ("wrong sampler", {"sampler": FlowEuler(4)}, "the sampler does not fit the model: .*use DDIM or DPMSolver"),
    (
        "last step does nothing",
        {"model": LinearModel(schedule=DEAD_END), "truncation": LastK(1)},
        r"LastK trains the last sampling step alone.*coefficient is 0.*spacing to trailing.*LastK\(k=2\)",
    ),
    (
        "last step does nothing for the copies",
        {"model": LinearModel(schedule=DEAD_END), "truncation": LowVariance(2)},
        "LowVariance trains the last sampling step alone",
    ),
    (
        "last step does nothing for one random step",
        {"model": LinearModel(schedule=DEAD_END), "truncation": RandomK(max_k=1)},
        "RandomK trains the last sampling step alone",
    ),
    ("detached", {"reward": Detached()}, "Detached returned a score without a gradient.*no .item"),
    ("numpy", {"reward": Numpy()}, "Numpy left the graph .*numpy.*keep to tensor operations"),
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
    ("cut", {"truncation": CutByTheUser()}, "CutByTheUser returned latents without a gradient.*freeze=True"),
    ("white noise", {"model": Undecodable()}, "^decoding gave images that are not finite; use a wider dtype"),
    ("overflow", {"model": Overflowing()}, "sampling gave latents that are not finite; use a wider dtype"),
    ("unused", {"model": Unused()}, "reaches none of the trainable parameters: .*train the denoiser's adapters"),
    ("explosion", {"model": Exploding()}, "with respect to the trainable parameters is not finite; use a wider dtype"),
]


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_what_cannot_learn_is_refused_by_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(make(**options), tmp_path)


@pytest.mark.parametrize(
    "truncation",
    [Full(), LastK(1), LastK(3), LowVariance(2), ReFL(m=3), RandomK(), RandomSteps(), DRTune(k=2, m=2)],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize("sampler", [DDIM(4), DDIM(4, eta=1.0), DPMSolverPlusPlus(4)], ids=["DDIM", "DDPM", "2M"])
def test_what_can_learn_passes(truncation: Truncation, sampler: Any) -> None:
    module = make(truncation=truncation, sampler=sampler)
    check_setup(module)
    check_gradient_flow(module, "a")


def test_a_dead_last_step_is_no_hindrance_to_more_steps() -> None:
    for truncation in (LastK(2), Full(), ReFL(m=1), RandomK(max_k=2)):
        check_setup(make(model=LinearModel(schedule=DEAD_END), truncation=truncation))
    check_setup(make(model=LinearModel(0.1, "flow", RectifiedFlow()), sampler=FlowEuler(1), truncation=LastK(1)))


def test_a_faint_last_step_is_a_warning() -> None:
    """SD 1.x's own grid counts the network by 0.0121 there, a flow of shift 3 by 0.009, DRaFT's grid by 0.134."""
    faint = LinearModel(schedule=scaled_linear(spacing="leading", final_alpha_cumprod=None, steps_offset=1))
    flow = LinearModel(0.1, "flow", RectifiedFlow(shift=3.0))
    for truncation in (LastK(1), LowVariance(2), RandomK(max_k=1)):
        with pytest.warns(UserWarning, match=r"counts there by a factor of 0\.012 only.*trailing.*LastK\(k=2\)"):
            check_setup(make(model=faint, sampler=DDIM(50), truncation=truncation))
    with pytest.warns(UserWarning, match=r"by a factor of 0\.009 only"):
        check_setup(make(model=flow, sampler=FlowEuler(28), truncation=LastK(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_setup(make(model=faint, sampler=DDIM(50), truncation=LastK(2)))
        check_setup(make(model=LinearModel(schedule=scaled_linear()), sampler=DDIM(50), truncation=LastK(1)))


def test_proving_leaves_everything_as_it_was() -> None:
    module = make(truncation=LowVariance(2), sampler=DDIM(4, eta=1.0))
    seen: list[int] = []
    module.probes.append(lambda step, latent: seen.append(step))
    torch.manual_seed(4)
    before, value = torch.get_rng_state(), module.model.theta.detach().clone()
    check_gradient_flow(module, "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module.model.theta, value)
    assert module.model.theta.grad is None
    assert seen == []
    assert len(module.probes) == 1


def test_a_rewards_own_errors_come_through() -> None:
    with pytest.raises(RuntimeError, match="^the reward's own trouble$"):
        check_gradient_flow(make(reward=Broken()), "a")


def test_a_flat_loss_is_a_warning_and_no_refusal() -> None:
    """Or a run whose images have come to pass the hinge could not be resumed."""
    with pytest.warns(UserWarning, match="Hinge is flat at the first prompt's reward .*move its threshold"):
        check_gradient_flow(make(loss=Hinge(threshold=-1e6)), "a")


def test_a_pipeline_passes_and_half_precision_adapters_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    def module(**options: Any) -> DraftModule:
        model = StableDiffusion(str(tiny_sd), guidance=Guidance(2.0), **options)
        return DraftModule(model, Brightness(0.9), DDIM(2), LastK(1))

    check_gradient_flow(module(), "a red cat")
    check_gradient_flow(module(dtype="bfloat16"), "a red cat")
    with pytest.raises(
        ConfigurationError, match='trainable parameters are in bfloat16.*"bf16-mixed" or "32-true".*dtype=bfloat16'
    ):
        fit(module(), tmp_path, precision="bf16-true")


def test_nothing_is_tried_for_validation(tmp_path: Path) -> None:
    """A black-box reward may be reported without being trained on."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    (metrics,) = trainer.validate(make(reward=BlackBox()), PromptDataModule(["a", "b"], val_size=1), verbose=False)
    assert metrics["val/gain"] == 0
