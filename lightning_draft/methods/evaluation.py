"""Sampling, scoring and validation of a diffusion model on rewards, as a LightningModule."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, cast

import lightning as L
import torch
from torch import Tensor, nn

from lightning_draft.arguments import prompt_list
from lightning_draft.chain import SamplingChain
from lightning_draft.distributed import shard, uses_fsdp
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.batches import to_prompts
from lightning_draft.methods.stop_iteration import stop_iteration_is_error
from lightning_draft.methods.validation_record import KEPT_IMAGES, ValidationRecord
from lightning_draft.models.base import DiffusionModel
from lightning_draft.rewards.base import Reward, check_name, check_scores
from lightning_draft.rewards.samples import Samples
from lightning_draft.samplers import DDIM, Sampler
from lightning_draft.seeds import check_seed, derive_seed, scoring, seeded

_VALIDATION = 0  # does not depend on the module's seed, so that runs with different seeds can be compared
_STEP_NOISE = 1  # makes the noise of a sampler's steps differ from the starting noise of the same seed


class EvaluationModule(L.LightningModule):
    """Generate images for prompts and score them.

    A batch is a list of prompts, a list of rows with a `prompt` column, or a mapping of such columns.

    Args:
        model: The diffusion model.
        reward: The reward that `val/reward` reports.
        sampler: The sampler; `DDIM(50)` by default.
        eval_rewards: Further rewards by name.
        seed: Seed of the noise of training and, by default, of `generate`, in `0..2^63 - 1`; `None` is 0. The noise of
            validation does not depend on it.

    Attributes:
        validation: Paired scores and first images of this process's last validation, of the first data loader;
            None before the first one.

    Raises:
        ConfigurationError: An evaluation reward has the name of another log key, or the seed is out of range.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampler: Sampler | None,
        eval_rewards: dict[str, Reward] | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.reward = _frozen(reward)
        eval_rewards = eval_rewards or {}
        taken = {"reward", "gain"} & eval_rewards.keys()
        if taken:
            raise ConfigurationError(
                f"eval_rewards: `{taken.pop()}` is a log key of the trained reward; give the evaluation reward another "
                "name"
            )
        self.eval_reward_names = [check_name(name) for name in eval_rewards]
        self.eval_rewards = nn.ModuleList(_frozen(other) for other in eval_rewards.values())
        self.sampler = DDIM(50) if sampler is None else sampler
        self.seed = 0 if seed is None else check_seed(seed)
        self.strict_loading = False
        self._base_scores: dict[tuple[Any, ...], tuple[dict[str, Tensor], Tensor]] = {}
        self.validation: ValidationRecord | None = None

    def setup(self, stage: str) -> None:
        """Drop the cached scores of the base model: sampler, guidance and data may have changed."""
        self.clear_base_scores()

    def configure_model(self) -> None:
        """Shard the denoiser over the processes if the Trainer's strategy shards."""
        shard(self, self.model, self.model.denoiser)
        if uses_fsdp(self._trainer):
            self.model.on_sharded()

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of all submodules except rewards, whose scores would be changed by dropout."""
        super().train(mode)
        self.reward.eval()
        self.eval_rewards.eval()
        return self

    @stop_iteration_is_error
    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor | None = None, seed: int | None = None) -> Samples:
        """Generate latents and images; the images are not clamped, and the caller's random state is not changed.

        Args:
            prompts: `B` prompts.
            noise: Starting latents `(B, ...)`; by default sampled with `seed`.
            seed: Seed of the starting noise and, separately, of a stochastic sampler's noise; by default the module's.
        """
        latents = self.generate_latents(prompts, noise, seed)
        return Samples(latents, self.model.decode(latents))

    @stop_iteration_is_error
    @torch.no_grad()
    def generate_latents(self, prompts: Sequence[str], noise: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Generate clean latents `(B, ...)`; arguments are those of `generate`."""
        prompts = prompt_list(prompts)
        seed = self.seed if seed is None else seed
        with self._random_state(derive_seed(seed, _STEP_NOISE)):
            if noise is None:
                noise = self.model.noise(len(prompts), torch.Generator().manual_seed(seed))
            chain = SamplingChain(self.model, self.sampler, self.model.encode(prompts))
            return chain.advance(chain.start(noise)).x

    def decoded(self, latents: Tensor, names: Sequence[str] = (), images: bool = False) -> Samples:
        """Return samples for the trained reward and some evaluation rewards.

        Args:
            latents: Clean latents `(B, ...)`.
            names: Names of the evaluation rewards.
            images: Whether images are needed, which are not clamped; else only if one of the rewards scores images.
        """
        named = zip(self.eval_reward_names, cast(Iterable[Reward], self.eval_rewards), strict=True)
        rewards = [self.reward, *(reward for name, reward in named if name in names)]
        decodes = images or any(reward.uses_images for reward in rewards)
        return Samples(latents, self.model.decode(latents).float() if decodes else None)

    @stop_iteration_is_error
    @torch.no_grad()
    def score(self, samples: Samples | Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return scores `(B,)` of images clamped to [0, 1]: `reward`, its components, and the evaluation rewards.

        Random numbers of the rewards are the same at each call.

        Args:
            samples: From `generate`; images `(B, 3, H, W)` are sufficient if no reward scores latents.
            prompts: `B` prompts.

        Raises:
            ConfigurationError: Images have another type, shape or range.
        """
        samples = Samples.of(samples).clamped()
        with scoring(self.device):
            total, components = self.reward.breakdown(samples, prompts)
        check_scores(total, len(prompts), self.reward)
        evaluated = self.eval_scores(samples, prompts, self.eval_reward_names)
        return {"reward": total, **{f"reward/{name}": value for name, value in components.items()}, **evaluated}

    @torch.no_grad()
    def eval_scores(self, samples: Samples, prompts: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores `(B,)` of samples, with images in [0, 1], by some of the evaluation rewards."""
        evaluated = {}
        for name, reward in zip(self.eval_reward_names, self.eval_rewards, strict=True):
            if name in names:
                with scoring(self.device):
                    evaluated[name] = check_scores(reward(samples, prompts), len(prompts), reward)
        return evaluated

    @stop_iteration_is_error
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score images of validation prompts from fixed noise; `val/gain` is the reward minus that of the base model.

        Log keys of the first data loader start with `val/`, those of further loaders with `val_1/`, `val_2/` and so on.
        """
        prompts = to_prompts(batch)
        seed = derive_seed(_VALIDATION, dataloader_idx, batch_idx, self.global_rank)
        samples = self.generate(prompts, seed=seed)
        scores = self.score(samples, prompts)
        is_first = dataloader_idx == batch_idx == 0
        base, base_images = self._score_base(prompts, seed, KEPT_IMAGES if is_first else 0)
        if is_first:
            self.validation = ValidationRecord(prompts, samples.content, base_images)
        if dataloader_idx == 0 and self.validation is not None:
            self.validation.add(scores, base)
        prefix = f"val_{dataloader_idx}" if dataloader_idx else "val"
        values = {f"{prefix}/{name}": value.mean() for name, value in scores.items()}
        values[f"{prefix}/gain"] = (scores["reward"] - base["reward"]).mean()
        self.log_dict(values, on_epoch=True, batch_size=len(prompts), sync_dist=True, add_dataloader_idx=False)

    def _score_base(self, prompts: list[str], seed: int, kept: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the base model's scores for prompts and noise, and its first `kept` images, if possible cached."""
        key = (seed, *prompts)
        if key not in self._base_scores:
            with self.model.base():
                samples = self.generate(prompts, seed=seed)
                self._base_scores[key] = self.score(samples, prompts), samples.content[:kept].cpu()
        return self._base_scores[key]

    def clear_base_scores(self) -> None:
        """Drop the cached scores of the base model."""
        self._base_scores.clear()

    def _random_state(self, seed: int) -> AbstractContextManager[None]:
        """Return a context in which torch's generators are seeded, and after which they are restored."""
        return seeded(seed, self.device)


def _frozen(reward: Reward) -> Reward:
    return reward.eval().requires_grad_(False)
