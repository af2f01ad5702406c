"""What a direct method must be able to do, tried before the first step.

A run that cannot learn is refused here with the reason and the fix, instead of after an hour of flat curves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_draft.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_draft.modules import DraftModule


def check_setup(module: DraftModule) -> None:
    """Check what needs no computation: the reward has a gradient, something is trained, the sampler fits.

    Raises:
        ConfigurationError: One of them does not hold.
    """
    name = type(module.reward).__name__
    if not module.reward.differentiable:
        raise ConfigurationError(
            f"the reward {name} is not differentiable, and a direct method back-propagates through it; "
            f"choose a differentiable reward for training and list {name} under `watch`, or train with a "
            "policy-gradient method, which needs no gradient"
        )
    if not module.trainable_parameters():
        raise ConfigurationError("the model has no trainable parameters; give it adapters, e.g. lora.rank=8")
    try:
        module.sampler.grid(module.model.schedule)
    except ValueError as error:
        raise ConfigurationError(f"the sampler does not fit the model: {error}") from error
    _check_final_step(module)


def prove(module: DraftModule, prompt: str | None = None) -> None:
    """Run the method once on one prompt and look at every link of the gradient's way.

    The random state, the parameters and their gradients are left untouched.

    Raises:
        ConfigurationError: The gradient is cut, zero or not finite; the message says where.
    """
    prompts = [_first_prompt(module) if prompt is None else prompt]
    probed, module.probes = module.probes, []
    try:
        with module._random_state(module.seed), torch.enable_grad():
            chain = module.chain(prompts, torch.Generator().manual_seed(module.seed))
            latents = module.truncation(chain, module.model.noise(1))
            _check_latents(module, latents)
            _check_reward(module, latents, prompts)
            _check_parameters(module, latents, prompts)
    finally:
        module.probes = probed


def _check_final_step(module: DraftModule) -> None:
    """Methods that train the last step alone learn nothing where that step ignores the network."""
    from lightning_draft.truncation import LastK, LowVariance, RandomK

    only_last = isinstance(module.truncation, LowVariance) or (
        isinstance(module.truncation, (LastK, RandomK))
        and module.truncation.gradient_steps(module.sampler.num_steps) == 1
    )
    if only_last and abs(module.sampler.final_coefficient(module.model.schedule)) < 1e-8:
        raise ConfigurationError(
            f"{type(module.truncation).__name__} trains the last sampling step alone, but on this timestep grid that "
            "step does not use the network's output (its coefficient is 0); set the sampler's spacing to trailing, or "
            "train more steps, e.g. LastK(k=2)"
        )


def _check_latents(module: DraftModule, latents: Tensor) -> None:
    name = type(module.truncation).__name__
    if not latents.requires_grad:
        raise ConfigurationError(
            f"the truncation {name} returned latents without a gradient: a step under torch.no_grad() after the steps "
            "with gradient cuts the whole graph; to skip a step's network use chain.advance(..., freeze=True)"
        )
    if not latents.isfinite().all():
        raise ConfigurationError(
            "sampling gave latents that are not finite; use a wider dtype for the model (bfloat16 or float32)"
        )


def _check_reward(module: DraftModule, latents: Tensor, prompts: list[str]) -> None:
    """The reward's own gradient with respect to the images."""
    name = type(module.reward).__name__
    with torch.no_grad():
        images = module.model.decode(latents).float()
    images = images.requires_grad_()
    reward = module.reward(images, prompts * len(images))
    if not reward.requires_grad:
        raise ConfigurationError(
            f"the reward {name} returned a score without a gradient although it says it is differentiable; keep to "
            "tensor operations (no .item(), numpy, PIL or no_grad), or set `differentiable = False` on it"
        )
    (gradient,) = torch.autograd.grad(reward.sum(), images)
    _check_gradient(gradient, f"the gradient of the reward {name} with respect to the images")


def _check_parameters(module: DraftModule, latents: Tensor, prompts: list[str]) -> None:
    """The loss's gradient with respect to what is trained."""
    rewards, _, _ = module._rewards(latents, prompts * len(latents))
    parameters = list(module.trainable_parameters().values())
    gradients = torch.autograd.grad(module.loss(rewards).sum(), parameters, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise ConfigurationError("the reward's gradient reaches none of the trainable parameters")
    _check_gradient(
        torch.stack([gradient.float().norm() for gradient in reached]),
        "the gradient of the loss with respect to the trainable parameters",
    )


def _check_gradient(gradient: Tensor, what: str) -> None:
    if not gradient.isfinite().all():
        raise ConfigurationError(f"{what} is not finite; use a wider dtype, a smaller guidance scale or fewer steps")
    if not gradient.any():
        raise ConfigurationError(
            f"{what} is exactly zero, so nothing can be learnt; look for a clamp, a round or a threshold on the "
            "gradient's path, or a hinge whose threshold every image already passes"
        )


def _first_prompt(module: DraftModule) -> str:
    datamodule = getattr(module.trainer, "datamodule", None)
    prompts = getattr(datamodule, "train_prompts", None)
    return prompts[0] if prompts else "a photo"
