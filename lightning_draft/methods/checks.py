"""Checks before the first training step, which stop a run that cannot improve the reward.

Each check receives strategies, tensors or parameters and raises `ConfigurationError`; the message says what to change.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_draft.advantages import AdvantageEstimator
from lightning_draft.errors import ConfigurationError
from lightning_draft.forward_objectives import ForwardObjective
from lightning_draft.losses import RewardLoss
from lightning_draft.objectives import RolloutObjective
from lightning_draft.preferences import PreferenceAdvantages
from lightning_draft.rewards.base import Reward, check_scores
from lightning_draft.rewards.pairwise import PairwiseReward
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import Sampler
from lightning_draft.schedules import Schedule
from lightning_draft.trained_steps import last_step_coefficient
from lightning_draft.truncation import Truncation

_KEEP_GRADIENT = (
    "use only tensor operations (no .item(), .detach(), numpy, PIL or no_grad), or set `differentiable = False` on "
    "the class and use it in `eval_rewards`"
)
_MORE_STEPS = "set the sampler's spacing to trailing if it has this option, or train more steps, such as LastK(k=2)"
_SMALL_COEFFICIENT = 0.02  # for comparison: the coefficient of DRaFT's grid of 50 steps is -0.134


def check_differentiable(reward: Reward, method: str) -> None:
    """Raise if the reward has no gradient, which a direct method needs.

    Args:
        reward: The trained reward.
        method: Name of the module, for the message.
    """
    name = type(reward).__name__
    if not reward.differentiable:
        raise ConfigurationError(
            f"the reward {name} is not differentiable, and {method} back-propagates through it; choose a "
            f"differentiable reward for training and use {name} in `eval_rewards`, or train with "
            "PolicyGradientModule, which needs no gradient"
        )


def check_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if nothing is trained."""
    if not parameters:
        raise ConfigurationError(
            "the model has no trainable parameters; give it adapters, such as lora=LoRA(rank=8), or trainable='full'"
        )


def check_sampler(sampler: Sampler, schedule: Schedule) -> None:
    """Raise if the sampler cannot be used with the model's noise schedule."""
    try:
        sampler.grid(schedule)
    except ValueError as error:
        raise ConfigurationError(f"the sampler does not fit the model: {error}") from error


def check_final_step(truncation: Truncation, sampler: Sampler, schedule: Schedule) -> None:
    """Raise if only the last step is trained and it does not use the network's output; warn if the effect is small."""
    coefficient = last_step_coefficient(truncation, sampler, schedule)
    if coefficient is None:
        return
    name, coefficient = type(truncation).__name__, abs(coefficient)
    if coefficient < 1e-8:
        raise ConfigurationError(
            f"{name} trains only the last sampling step, but on this timestep grid that step does not use the "
            f"network's output (its coefficient is 0); {_MORE_STEPS}"
        )
    if coefficient < _SMALL_COEFFICIENT:
        rank_zero_warn(
            f"{name} trains only the last sampling step, and on this timestep grid the coefficient of the network's "
            f"output there is {coefficient:.2g}, so training will change the images very little; {_MORE_STEPS}"
        )


def check_dtype(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if a trainable parameter is not at least float32, because usual updates would round to 0."""
    coarse = {value.dtype for value in parameters.values()} & {torch.bfloat16, torch.float16}
    if coarse:
        name = str(coarse.pop()).removeprefix("torch.")
        raise ConfigurationError(
            f"the trainable parameters have dtype {name}, in which small updates round to zero; set the Trainer's "
            f'precision to "bf16-mixed" or "32-true", and dtype={name} on the model for its frozen parts'
        )


def check_latents(latents: Tensor, truncation: Truncation) -> None:
    """Raise if the latents of a truncation are not finite or have no gradient."""
    if not latents.requires_grad:
        raise ConfigurationError(
            f"the truncation {type(truncation).__name__} returned latents without a gradient: a step under "
            "torch.no_grad() after the steps with gradient removes the whole graph; to detach only the network of a "
            "step use chain.advance(..., output_gain=0)"
        )
    if not latents.isfinite().all():
        raise ConfigurationError(
            "the sampled latents are not finite; use a wider dtype for the model (bfloat16 or float32)"
        )


def check_reward(reward: Reward, samples: Samples, prompts: Sequence[str]) -> None:
    """Raise if the reward's score or its gradient with respect to its input is missing, zero or not finite.

    Args:
        reward: The trained reward.
        samples: Latents, and images if the reward scores images.
        prompts: `B` prompts.
    """
    name = type(reward).__name__
    if samples.images is not None and not samples.images.isfinite().all():
        raise ConfigurationError(
            "the decoded images are not finite; use a wider dtype for the model (bfloat16 or float32)"
        )
    samples = samples.leaves()
    used = {"images": samples.images if reward.uses_images else None}
    used |= {"latents": samples.latents if reward.uses_latents else None}
    inputs = {kind: tensor for kind, tensor in used.items() if tensor is not None}
    try:
        scores = check_scores(reward(samples, prompts), len(samples), reward)
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        raise ConfigurationError(f"the reward {name} removes the gradient ({error}); {_KEEP_GRADIENT}") from error
    if not scores.isfinite().all():
        raise ConfigurationError(
            f"the reward {name} returned {scores[~scores.isfinite()][0].item()} for an image of {str(prompts[0])!r}; "
            "every score must be a finite number"
        )
    found = torch.autograd.grad(scores.sum(), [*inputs.values()], allow_unused=True) if scores.requires_grad else ()
    gradients = [each.flatten() for each in found if each is not None]
    if not gradients:
        raise ConfigurationError(
            f"the reward {name} returned a score without a gradient although its attribute `differentiable` is True; "
            f"{_KEEP_GRADIENT}"
        )
    _check_gradient(
        torch.cat(gradients),
        f"the gradient of the reward {name} with respect to the {' and '.join(inputs)}",
        "look for a sqrt, a norm, a log or a division at 0 in the reward, and add a small number under it",
    )


def check_loss(loss: RewardLoss, scores: Tensor) -> None:
    """Warn if the gradient of the loss is 0 at the scores; this is no error, because a resumed run may start there."""
    scores = scores.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(scores).sum(), scores)
    if not slope.any():
        rank_zero_warn(
            f"the gradient of {type(loss).__name__} is 0 at the first prompt's reward ({scores[0].item():.4g}), so "
            "images with such a reward have no effect on training; if most images have such a reward, change the "
            "threshold"
        )


def check_gradient(value: Tensor, parameters: Iterable[nn.Parameter], name: str) -> None:
    """Raise if the gradient of a scalar with respect to the trainable parameters is missing, zero or not finite.

    Args:
        value: Scalar with a graph.
        parameters: The trainable parameters; their `grad` is not changed.
        name: Name of the scalar, for the message.
    """
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True) if value.requires_grad else ()
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise ConfigurationError(
            f"the {name}'s gradient reaches none of the trainable parameters: they are not part of the network that "
            "samples, or the model runs it without a graph; train the denoiser's adapters"
        )
    _check_gradient(
        torch.stack([gradient.float().norm() for gradient in reached]),
        f"the gradient of the {name} with respect to the trainable parameters",
        "use a wider dtype, a smaller guidance scale or fewer steps",
    )


def check_stochastic(sampler: Sampler, stochastic_steps: Sequence[int]) -> None:
    """Raise if no step of the sampler adds noise, because only such steps have a log-probability."""
    if not stochastic_steps:
        raise ConfigurationError(
            f"{type(sampler).__name__} adds no noise, and a policy gradient needs steps with a log-probability; use a "
            "stochastic sampler: DDIM(eta=1), or FlowSDE for a rectified flow"
        )


def check_group_size(samples_per_prompt: int, users: Iterable[RolloutObjective | AdvantageEstimator]) -> None:
    """Raise if there are fewer samples of each prompt than the objective or the advantage estimator compares."""
    for user in users:
        if samples_per_prompt < user.min_group:
            raise ConfigurationError(
                f"{type(user).__name__} compares samples of the same prompt, and samples_per_prompt="
                f"{samples_per_prompt}; set samples_per_prompt to {user.min_group} or more"
            )


def check_comparisons(reward: Reward, estimator: AdvantageEstimator) -> None:
    """Raise if a reward that only compares images is used for its scores."""
    for part in reward.nested_rewards():
        if not isinstance(part, PairwiseReward) or not part.needs_pairs:
            continue
        if part is not reward or not isinstance(estimator, PreferenceAdvantages):
            raise ConfigurationError(
                f"{type(part).__name__} only compares images: use it as the reward itself, with advantage_estimator "
                "WinRate or BradleyTerry"
            )


def check_same_prompts(collected: Sequence[str], prompts: Sequence[str], training_steps: int) -> None:
    """Raise if the prompts of a training step are not those for which its rollout was collected.

    Args:
        collected: The prompts of the rollout, one per sample.
        prompts: Those of the training step.
        training_steps: Number of training steps on a rollout.
    """
    if list(collected) != [str(prompt) for prompt in prompts]:
        raise ConfigurationError(
            f"a rollout is used for {training_steps} training steps, and the prompts changed before that; use "
            "PromptDataModule, or a loader that repeats each batch that often"
        )


def check_complete_groups(objective: ForwardObjective, micro_batch_size: int | None, samples_per_prompt: int) -> None:
    """Raise if a minibatch would contain only a part of the samples of a prompt, and the objective compares them."""
    if objective.couples_group and micro_batch_size is not None and micro_batch_size % samples_per_prompt:
        raise ConfigurationError(
            f"{type(objective).__name__} compares the samples of a prompt, and micro_batch_size={micro_batch_size} "
            f"splits them; set micro_batch_size to a multiple of samples_per_prompt={samples_per_prompt}"
        )


def warn_of_large_parts(samples: tuple[int | None, int], steps: tuple[int | None, int] = (None, 0)) -> None:
    """Warn if `micro_batch_size` or `timesteps_per_minibatch` has no effect; each is given with the total number."""
    named = {"micro_batch_size": (*samples, "samples"), "timesteps_per_minibatch": (*steps, "timesteps")}
    for name, (size, total, unit) in named.items():
        if size is not None and size > total:
            rank_zero_warn(
                f"{name}={size} has no effect, because a batch has {total} {unit}; write less than {total}, or null"
            )


def check_reuse(objective: RolloutObjective) -> None:
    """Raise if the objective does not allow to train on a rollout again after an optimizer step."""
    if objective.on_policy:
        raise ConfigurationError(
            f"the Trainer made an optimizer step before all minibatches of a rollout were used, and "
            f"{type(objective).__name__} is on-policy; leave out limit_train_batches, or make it a multiple of "
            "accumulate_grad_batches"
        )


def check_accumulation(objective: RolloutObjective, accumulate: int, minibatches: int, inner_epochs: int) -> None:
    """Raise if optimizer steps do not end with minibatches, epochs or rollouts as the objective requires.

    Args:
        objective: The objective.
        accumulate: The Trainer's `accumulate_grad_batches`.
        minibatches: Number of minibatches of a rollout.
        inner_epochs: Number of epochs on each rollout.
    """
    name, steps = type(objective).__name__, minibatches * inner_epochs
    found = f"accumulate_grad_batches={accumulate} and a rollout is used in {steps} training steps"
    if inner_epochs > 1:
        found += f" ({inner_epochs} inner epochs of {minibatches})"
    if objective.on_policy and accumulate % steps:
        once = "" if inner_epochs == 1 else "inner_epochs to 1 and "
        raise ConfigurationError(
            f"{name} is on-policy: its gradient is correct only for the parameters that sampled the rollout, and "
            f"there would be more than one optimizer step per rollout, because {found}; set {once}"
            f"trainer.accumulate_grad_batches to {minibatches}, or use PPO, which corrects for reuse"
        )
    if not objective.separable and accumulate != minibatches and (inner_epochs > 1 or accumulate % minibatches):
        raise ConfigurationError(
            f"{name} couples all minibatches of a rollout, and an optimizer step would not use each of them once, "
            f"because {found}; set trainer.accumulate_grad_batches to {minibatches}"
        )
    if steps % accumulate and accumulate % steps:
        raise ConfigurationError(
            f"optimizer steps would not end with rollouts, because {found}; set trainer.accumulate_grad_batches to "
            f"{minibatches}, or to a number that divides it"
        )


def _check_gradient(gradient: Tensor, name: str, advice: str) -> None:
    if not gradient.isfinite().all():
        raise ConfigurationError(f"{name} is not finite; {advice}")
    if not gradient.any():
        raise ConfigurationError(
            f"{name} is exactly zero, so training has no effect; look for a clamp, a rounding or a threshold in the "
            "reward or the truncation"
        )
