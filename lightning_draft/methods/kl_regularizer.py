"""The KL term of methods with rollouts: its weight, the samples that have it, and its reference."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_draft.arguments import at_least
from lightning_draft.distributed import all_gather_objects
from lightning_draft.errors import ConfigurationError
from lightning_draft.kl_gate import KLGate, MovingReference, disagreement, nonnegative, suspicious
from lightning_draft.methods.old_policy import on_their_devices, parameters_replaced
from lightning_draft.models.base import DiffusionModel

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class KLState:
    """What the term remembers of earlier rollouts.

    Args:
        reference: Parameters of the reference by name; empty if it is the base model.
        rollouts: Number of rollouts that were collected with it.
        kl: Mean divergence from it in the last optimizer step of this process.
        fraction: Fraction of suspicious samples that are regularized; 0 before the first rollout.
        recent: Means of the disagreement in earlier rollouts.
    """

    reference: Mapping[str, Tensor] = field(default_factory=dict)
    rollouts: int = 0
    kl: float | Tensor = 0.0
    fraction: float = 0.0
    recent: tuple[float, ...] = ()


class KLRegularizer:
    """`weight * mean_i gate_i KL_i`, with `gate_i` equal to 1 for all samples, or for those that a `KLGate` selects.

    Args:
        weight: Weight of the term, at least 0.
        gate: Selects the samples.
        reference: When the reference is replaced by the current model.

    Attributes:
        state: What it remembers, replaced and never changed in place.

    Raises:
        ConfigurationError: The weight is negative, or 0 with a gate or a moving reference.
    """

    def __init__(self, weight: float, gate: KLGate | None = None, reference: MovingReference | None = None) -> None:
        self.weight = at_least("kl_weight", weight, 0)
        self.gate, self.reference = gate, reference
        self.state = KLState()
        for name, option in {"kl_gate": gate, "kl_reference": reference}.items():
            if option is not None:
                self.check_used(name, "null")

    def check_used(self, name: str, off: str) -> None:
        """Check that the KL term is on, which an option changes.

        Args:
            name: The option.
            off: Its value without effect.

        Raises:
            ConfigurationError: The weight is 0.
        """
        if self.weight == 0:
            raise ConfigurationError(
                f"{name} changes the KL term, and kl_weight=0 turns it off; write for example kl_weight=0.04, or set "
                f"{name} to {off}"
            )

    def check(self, eval_rewards: Sequence[str]) -> None:
        """Check that the module has the evaluation rewards of the gate.

        Args:
            eval_rewards: Names of the module's evaluation rewards.

        Raises:
            ConfigurationError: An evaluation reward is missing.
        """
        if self.gate is not None and not eval_rewards:
            raise ConfigurationError(
                "kl_gate compares the trained reward with eval_rewards, and the module has none; give it rewards that "
                "are not trained on, or set kl_gate to null"
            )
        unknown = [name for name in self.gate_rewards(eval_rewards) if name not in eval_rewards]
        if unknown:
            raise ConfigurationError(
                f"kl_gate.rewards contains {', '.join(unknown)}, which is not one of eval_rewards; write some of "
                f"{', '.join(eval_rewards)}"
            )

    def gate_rewards(self, eval_rewards: Sequence[str]) -> list[str]:
        """Return the names of the evaluation rewards that are computed on the samples of a rollout."""
        if self.gate is None:
            return []
        return list(eval_rewards) if self.gate.rewards is None else self.gate.rewards

    @torch.no_grad()
    def start_rollout(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Replace the reference by the trained parameters, given by name, if it is outdated on average."""
        if self.reference is None:
            return
        values = all_gather_objects(float(self.state.kl))
        if self.reference.is_outdated(sum(values) / len(values), self.state.rollouts):
            copies = {name: value.detach().clone() for name, value in parameters.items()}
            self.state = replace(self.state, reference=copies, rollouts=0, kl=0.0)
        self.state = replace(self.state, rollouts=self.state.rollouts + 1)

    def select(self, trained: Tensor, evaluated: Scores, rank: int) -> tuple[Tensor | None, dict[str, float]]:
        """Return which samples of this process have a KL term, bool `(N,)`, and metrics; `None` for all.

        Args:
            trained: Trained rewards of this process, `(N,)`.
            evaluated: Evaluation rewards by name.
            rank: This process.

        Raises:
            ConfigurationError: There is only one sample.
        """
        if self.gate is None:
            return None, {}
        gathered = all_gather_objects([trained.cpu(), *(values.cpu() for values in evaluated.values())])
        first, *others = (torch.cat(each) for each in zip(*gathered, strict=True))
        if len(first) < 2:
            raise ConfigurationError(
                "kl_gate compares the samples of a rollout, and there is one; set samples_per_prompt to 2 or more"
            )
        values = disagreement(first, others)
        mean = float(nonnegative(values).nanmean())
        fraction = self.gate.adapt(self.state.fraction or self.gate.fraction, mean, self.state.recent)
        recent = (*self.state.recent, mean)[-self.gate.history :]
        self.state = replace(self.state, fraction=fraction, recent=recent)
        start = sum(len(each[0]) for each in gathered[:rank])
        chosen = suspicious(values, fraction)
        own = chosen[start : start + len(trained)].to(trained.device)
        return own, {"train/kl_gated": float(chosen.double().mean()), "train/kl_disagreement": mean}

    def penalty(self, kl: Tensor, gate: Tensor | None) -> Tensor:
        """Return the term of divergences `(..., B)`, a scalar; a gate is `(B,)`."""
        return self.weight * (kl if gate is None else kl * gate).mean()

    def record_kl(self, kl: Tensor | None) -> None:
        """Remember the mean divergence of the current optimizer step, if it decides on the reference."""
        if kl is not None and self.reference is not None and self.reference.max_kl is not None:
            self.state = replace(self.state, kl=kl.detach())  # read before the next rollout, so that GPUs do not wait

    @property
    def needs_base(self) -> bool:
        """Whether there is a term and its reference is the base model."""
        return self.weight > 0 and not self.state.reference

    def reference_model(
        self, model: DiffusionModel, parameters: Mapping[str, nn.Parameter]
    ) -> AbstractContextManager[Any] | None:
        """Return a context in which the model is the reference, for calls without a graph; `None` without a term.

        A copied reference is moved to the devices of the parameters and stays there.

        Args:
            model: The diffusion model.
            parameters: Its trained parameters by name.
        """
        if self.weight == 0:
            return None
        if self.needs_base:
            return model.base()
        self.state = replace(self.state, reference=on_their_devices(self.state.reference, parameters))
        return parameters_replaced(parameters, self.state.reference)

    def state_dict(self, state: KLState) -> dict[str, Any]:
        """Return a state as types that can be loaded with `weights_only=True`, the same on every process."""
        values = all_gather_objects(float(state.kl)) if self.reference is not None else [float(state.kl)]
        reference = {name: value.cpu() for name, value in state.reference.items()}
        kl = sum(values) / len(values)
        return {**vars(state), "reference": reference, "recent": list(state.recent), "kl": kl}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, without its reference if this run has a fixed one; that of a run without one is empty."""
        reference = {} if self.reference is None else state.get("reference", {})
        self.state = KLState(**{**state, "reference": reference, "recent": tuple(state.get("recent", ()))})
