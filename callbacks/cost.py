"""The cost of training: reward queries, network passes, seconds."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_draft.distributed import all_gather_objects, world_size
from lightning_draft.pass_counter import PassCounter
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.usage import added, total_usage


class CostMonitor(Callback):
    """Count and log the cost of training after every training step; validation and sample grids are not counted.

    - `usage/reward_queries`: images that the trained reward has scored;
    - `usage/network_forwards`: forward passes of the denoiser for one sample, including recomputed ones;
    - `usage/network_backwards`: backward passes of the denoiser for one sample;
    - `usage/seconds`: time within training steps;
    - `usage/<name>`: what rewards have used, such as the requests, tokens and cost of a `VLMJudge`.

    Passes are counted by hooks on the denoiser. A call with both branches of classifier-free guidance is two passes per
    sample; with `gradient: conditional` only one of them has a backward pass. Counts are multiplied by the number of
    processes, because all processes make the same calls. A resumed run continues the counts. The checkpoint of an
    interrupted optimizer step contains the counts before that step, because the step is repeated, but all that rewards
    have used, because it was paid for.
    """

    def __init__(self) -> None:
        self.reward_queries = 0
        self.network_forwards = 0
        self.network_backwards = 0
        self.seconds = 0.0
        self._rewards: list[Reward] = []
        self._used_before: dict[str, float] = {}  # by earlier processes of a resumed run
        self._passes = PassCounter()
        self._queries_before = 0
        self._started = 0.0
        self._completed: tuple[int, dict[str, Any]] = (-1, self._counts())  # number of optimizer steps, and the counts

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Register the hooks on the network."""
        self._rewards = [pl_module.reward, *pl_module.eval_rewards]
        self._passes.attach(pl_module.model)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remove the hooks."""
        self._passes.detach()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._passes.detach()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Start counting."""
        self._keep_completed(trainer)
        self._queries_before = pl_module.reward_queries
        self._started = time.perf_counter()
        self._passes.start()

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop counting network passes, because passes made by other callbacks are not part of training."""
        self._passes.active = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Add the counts of this training step and log them."""
        self._passes.active = False
        self.seconds += time.perf_counter() - self._started
        self.network_forwards += trainer.world_size * self._passes.forwards
        self.network_backwards += trainer.world_size * self._passes.backwards
        self.reward_queries += trainer.world_size * (pl_module.reward_queries - self._queries_before)
        self._keep_completed(trainer)
        pl_module.log_dict({f"usage/{name}": float(value) for name, value in self._counts().items()})
        used = {f"usage/{name}": value for name, value in self._used().items()}
        pl_module.log_dict(used, sync_dist=True, reduce_fx="sum")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts after the last completed optimizer step, and what rewards have used in all processes."""
        used = self._used()
        everywhere = all_gather_objects(used) if used else []
        return {**self._completed[1], **added(everywhere)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        for name, value in state_dict.items():
            if name in self._completed[1]:
                setattr(self, name, value)
            else:  # logged values are summed over processes
                self._used_before[name] = 0.0 if world_size() > 1 and dist.get_rank() else value
        self._completed = (-1, self._counts())

    def _keep_completed(self, trainer: L.Trainer) -> None:
        if trainer.global_step != self._completed[0]:
            self._completed = trainer.global_step, self._counts()

    def _used(self) -> dict[str, float]:
        """Return what the rewards of this process have used, on the first process also before a resume."""
        return added([self._used_before, total_usage(self._rewards)])

    def _counts(self) -> dict[str, Any]:
        names = ("reward_queries", "network_forwards", "network_backwards", "seconds")
        return {name: getattr(self, name) for name in names}
