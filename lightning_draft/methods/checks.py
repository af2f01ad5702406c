"""What a method must be able to do, tried before the first step.

A run that cannot learn is refused here with the reason and the fix, instead of after an hour of flat curves.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_draft.chain import SamplingChain, State
from lightning_draft.distributed import uses_deepspeed, uses_fsdp
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards.base import check_scores
from lightning_draft.truncation import LastK, LowVariance, RandomK

if TYPE_CHECKING:
    import lightning as L

    from lightning_draft.methods.base import RewardModule
    from lightning_draft.methods.draft import DraftModule
    from lightning_draft.methods.policy_gradient import PolicyGradientModule

_CUT = (
    "keep to tensor operations (no .item(), .detach(), numpy, PIL or no_grad), or set `differentiable = False` on it "
    "and list it under `eval_rewards`"
)
_MORE_STEPS = "set the sampler's spacing to trailing where it has one, or train more steps, e.g. LastK(k=2)"
_FAINT = 0.02  # of the coefficients in use, DRaFT's own grid of 50 steps has -0.134


def check_setup(module: DraftModule) -> None:
    """Check what needs no computation: the reward has a gradient, something is trained, the sampler fits.

    Raises:
        ConfigurationError: One of them does not hold.
    """
    name = type(module.reward).__name__
    if not module.reward.differentiable:
        raise ConfigurationError(
            f"the reward {name} is not differentiable, and a direct method back-propagates through it; "
            f"choose a differentiable reward for training and list {name} under `eval_rewards`, or train with the "
            "policy-gradient method, which needs no gradient: PolicyGradientModule in the place of "
            f"{type(module).__name__}"
        )
    _check_trainable(module)
    _check_sampler(module)
    _check_final_step(module)


def check_gradient_flow(module: DraftModule, prompt: str | None = None) -> None:
    """Run the method once on one prompt, in the Trainer's precision, and look at every link of the gradient's way.

    The random state, the parameters and their gradients are left untouched. Where parameters are sharded, or a gradient
    scaler has yet to find its scale, the gradient's arrival at the parameters is not looked at.

    Raises:
        ConfigurationError: The gradient is cut, zero or not finite; the message says where.
    """
    prompts = [_first_prompt(module) if prompt is None else prompt]
    _check_precision(module)
    probed, module.probes = module.probes, []
    trainer = module._trainer
    try:
        with (
            module._random_state(module.seed),
            torch.enable_grad(),
            nullcontext() if trainer is None else trainer.precision_plugin.forward_context(),
        ):
            chain = module.chain(prompts, torch.Generator().manual_seed(module.seed))
            latents = module.truncation(chain, module.model.noise(1))
            _check_latents(module, latents)
            _check_reward(module, latents, prompts)
            if not (uses_fsdp(trainer) or uses_deepspeed(trainer) or _scaled(trainer)):
                _check_parameters(module, latents, prompts)
    finally:
        module.probes = probed


def check_policy(module: PolicyGradientModule) -> None:
    """The same for a policy gradient: the sampler has log-probabilities, groups and optimiser steps fit the objective.

    Raises:
        ConfigurationError: One of them does not hold.
    """
    _check_trainable(module)
    _check_sampler(module)
    name = type(module.sampler).__name__
    try:
        stochastic = module.policy.steps
    except ValueError as error:
        raise ConfigurationError(f"the sampler does not suit policy gradients: {error}; use DDIM or FlowSDE") from error
    if not stochastic:
        raise ConfigurationError(
            f"{name} adds no noise here, and a policy gradient needs steps with a log-probability; use a stochastic "
            "sampler: DDIM(eta=1), or FlowSDE for a rectified flow"
        )
    for part in (module.objective, module.advantage_estimator):
        if module.samples_per_prompt < part.min_group:
            raise ConfigurationError(
                f"{type(part).__name__} compares samples of the same prompt, and samples_per_prompt="
                f"{module.samples_per_prompt}; set samples_per_prompt to {part.min_group} or more"
            )
    batch_size = getattr(getattr(module.trainer, "datamodule", None), "batch_size", None)
    if isinstance(batch_size, int):
        check_accumulation(module, batch_size)


def check_accumulation(module: PolicyGradientModule, batch_size: int) -> None:
    """Check that the Trainer's optimiser steps end where parts, passes or rollouts do, as the objective needs it.

    Raises:
        ConfigurationError: They do not; the message says what to set.
    """
    accumulate = module.trainer.accumulate_grad_batches
    parts, steps = len(module.minibatches(batch_size)), module.training_steps_per_batch(batch_size)
    name = type(module.objective).__name__
    found = f"accumulate_grad_batches={accumulate} and a rollout is trained on in {steps} parts"
    if module.inner_epochs > 1:
        found += f" ({module.inner_epochs} inner epochs of {parts})"
    if module.objective.on_policy and accumulate % steps:
        once = "" if module.inner_epochs == 1 else "inner_epochs to 1 and "
        raise ConfigurationError(
            f"{name} is on-policy: its gradient holds for the parameters that drew the rollout alone, and more than "
            f"one optimiser step would be made of it, as {found}; set {once}trainer.accumulate_grad_batches to "
            f"{parts}, or use PPO, which corrects for reuse"
        )
    if not module.objective.separable and accumulate != parts and (module.inner_epochs > 1 or accumulate % parts):
        raise ConfigurationError(
            f"{name} couples all parts of a rollout, and an optimiser step would not take in each of them once, as "
            f"{found}; set trainer.accumulate_grad_batches to {parts}"
        )
    if steps % accumulate and accumulate % steps:
        raise ConfigurationError(
            f"optimiser steps would straddle rollouts, as {found}; set trainer.accumulate_grad_batches to {parts}, or "
            "to a number that divides it"
        )


def check_log_prob_gradient(module: PolicyGradientModule) -> None:
    """Look at one step of one prompt: the gradient of its log-probability must reach what is trained.

    The random state, the parameters and their gradients are left untouched.

    Raises:
        ConfigurationError: It is cut, zero or not finite.
    """
    _check_precision(module)
    trainer = module._trainer
    context = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
    with module._random_state(module.seed), torch.enable_grad(), context:
        chain = SamplingChain(module.model, module.sampler, module.model.encode([_first_prompt(module)]))
        mean = chain.transition(State(module.model.noise(1), module.policy.steps[-1])).mean
        if not (uses_fsdp(trainer) or uses_deepspeed(trainer) or _scaled(trainer)):
            _check_reach((mean * torch.randn_like(mean)).sum(), module, "log-probability")


def _check_trainable(module: RewardModule) -> None:
    if not module.trainable_parameters():
        raise ConfigurationError("the model has no trainable parameters; give it adapters, e.g. lora.rank=8")


def _check_sampler(module: RewardModule) -> None:
    try:
        module.sampler.grid(module.model.schedule)
    except ValueError as error:
        raise ConfigurationError(f"the sampler does not fit the model: {error}") from error


def _check_final_step(module: DraftModule) -> None:
    """Methods that train the last step alone learn nothing where that step ignores the network, or nearly does."""
    only_last = isinstance(module.truncation, LowVariance) or (
        isinstance(module.truncation, (LastK, RandomK))
        and module.truncation.gradient_steps(module.sampler.num_steps) == 1
    )
    if not only_last:
        return
    name, weight = type(module.truncation).__name__, abs(module.sampler.final_coefficient(module.model.schedule))
    if weight < 1e-8:
        raise ConfigurationError(
            f"{name} trains the last sampling step alone, but on this timestep grid that step does not use the "
            f"network's output (its coefficient is 0); {_MORE_STEPS}"
        )
    if weight < _FAINT:
        rank_zero_warn(
            f"{name} trains the last sampling step alone, and on this timestep grid the network's output counts there "
            f"by a factor of {weight:.2g} only, so training will change the pictures very little; {_MORE_STEPS}"
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
    if not images.isfinite().all():
        raise ConfigurationError(
            "decoding gave images that are not finite; use a wider dtype for the model (bfloat16 or float32)"
        )
    images = images.detach().requires_grad_()
    try:
        reward = check_scores(module.reward(images, prompts * len(images)), len(images), module.reward)
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        raise ConfigurationError(f"the reward {name} left the graph ({error}); {_CUT}") from error
    gradient = torch.autograd.grad(reward.sum(), images, allow_unused=True)[0] if reward.requires_grad else None
    if gradient is None:
        raise ConfigurationError(
            f"the reward {name} returned a score without a gradient although it says it is differentiable; {_CUT}"
        )
    _check_gradient(
        gradient,
        f"the gradient of the reward {name} with respect to the images",
        "look for a sqrt, a norm, a log or a division at 0 in the reward, and add a small number under it",
    )


def _check_parameters(module: DraftModule, latents: Tensor, prompts: list[str]) -> None:
    """The reward's gradient with respect to what is trained; that the loss map is flat here is only worth a warning."""
    rewards, _, _ = module._rewards(latents, prompts * len(latents))
    _check_reach(rewards.sum(), module, "reward")
    scores = rewards.detach().requires_grad_()
    (slope,) = torch.autograd.grad(module.loss(scores).sum(), scores)
    if not slope.any():
        rank_zero_warn(
            f"{type(module.loss).__name__} is flat at the first prompt's reward ({scores[0].item():.4g}): images that "
            "score like this teach nothing; if most do, move its threshold"
        )


def _check_reach(value: Tensor, module: RewardModule, what: str) -> None:
    """The gradient of a scalar with respect to what is trained."""
    parameters = list(module.trainable_parameters().values())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise ConfigurationError(
            f"the {what}'s gradient reaches none of the trainable parameters: they are not part of the network that "
            "samples, or the model runs it without a graph; train the denoiser's adapters"
        )
    _check_gradient(
        torch.stack([gradient.float().norm() for gradient in reached]),
        f"the gradient of the {what} with respect to the trainable parameters",
        "use a wider dtype, a smaller guidance scale or fewer steps",
    )


def _check_gradient(gradient: Tensor, what: str, cure: str) -> None:
    if not gradient.isfinite().all():
        raise ConfigurationError(f"{what} is not finite; {cure}")
    if not gradient.any():
        raise ConfigurationError(
            f"{what} is exactly zero, so nothing can be learnt; look for a clamp, a round or a threshold on the "
            "gradient's path"
        )


def _check_precision(module: RewardModule) -> None:
    """Below float32, an optimiser step of the usual learning rates is less than the spacing of the numbers."""
    coarse = {value.dtype for value in module.trainable_parameters().values()} & {torch.bfloat16, torch.float16}
    if coarse:
        name = str(coarse.pop()).removeprefix("torch.")
        raise ConfigurationError(
            f"the trainable parameters are in {name}, in which small updates round to nothing; set the Trainer's "
            f'precision to "bf16-mixed" or "32-true", and dtype={name} on the model for its frozen parts'
        )


def _scaled(trainer: L.Trainer | None) -> bool:
    return trainer is not None and getattr(trainer.precision_plugin, "scaler", None) is not None


def _first_prompt(module: RewardModule) -> str:
    prompts = getattr(getattr(module._trainer, "datamodule", None), "train_prompts", None)
    return prompts[0] if prompts else "a photo"
