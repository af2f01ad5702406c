"""The old policy: a slowly moving copy of the trained parameters that samples rollouts."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_draft.arguments import at_least, in_range, integer_at_least


@dataclass(frozen=True)
class OldPolicy:
    """How the old policy follows the trained parameters `theta`.

    Before each rollout, after `n` optimizer steps,

        theta_old <- d theta_old + (1 - d) theta,  d = min(max_decay, rate max(0, n - start)).

    Args:
        max_decay: Largest `d`, in [0, 1); with 0 the old policy is the model before the rollout.
        rate: Growth of `d` per optimizer step, at least 0.
        start: Optimizer step until which `d` is 0, at least 0.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Zheng et al., "DiffusionNFT", arXiv:2509.16117; the authors' settings are `max_decay=0.5, rate=0.001` and
        `max_decay=0.999, rate=0.0075, start=75`.
    """

    max_decay: float = 0.0
    rate: float = 0.001
    start: int = 0

    def __post_init__(self) -> None:
        in_range("old_policy.max_decay", self.max_decay, 0, 1, "write for example 0.5", below_high=True)
        at_least("old_policy.rate", self.rate, 0)
        integer_at_least("old_policy.start", self.start, 0)

    def decay(self, step: int) -> float:
        """Return `d` after `step` optimizer steps."""
        return min(self.max_decay, self.rate * max(0, step - self.start))


class OldParameters:
    """The old policy's copy of the trained parameters.

    Args:
        policy: How the copy follows the trained parameters.

    Attributes:
        values: The copies by name, which are replaced and never changed in place; empty before the first update.
    """

    def __init__(self, policy: OldPolicy) -> None:
        self.policy = policy
        self.values: Mapping[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Update the copy with the trained parameters, given by name, after `step` optimizer steps."""
        decay = self.policy.decay(step) if self.values else 0.0
        copies = {name: value.detach().clone() for name, value in parameters.items()}
        if decay > 0:
            copies = {name: value.lerp(self.values[name].to(value), decay) for name, value in copies.items()}
        self.values = copies

    def in_use(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context in which the parameters have the old values, if there are any.

        They are moved to the devices of the parameters and stay there.
        """
        self.values = on_their_devices(self.values, parameters)
        return parameters_replaced(parameters, self.values)


def on_their_devices(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return values by name on the devices of the parameters; those of a checkpoint are on the CPU."""
    return {name: value.to(parameters[name].device) for name, value in values.items()}


@contextmanager
def parameters_replaced(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context, the parameters have other values, given by name; for calls without a graph.

    Autocast caches rounded copies of parameters by object identity, so it would use new values in this context, or old
    values after it; its cache is therefore disabled in this context.
    """
    own = {name: parameter.data for name, parameter in parameters.items()}
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        for name, value in values.items():
            parameters[name].data = value.to(own[name])
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps)
        for name, parameter in parameters.items():
            parameter.data = own[name]
