"""Example of a custom reward; `custom_reward.yaml` uses it instead of the reward of a shipped config.

    lightning-draft fit --config quickstart --config examples/custom_reward.yaml

A class `Mine` in a file `my_rewards.py` in the current folder is named `my_rewards.Mine`.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_draft.rewards import Reward


class Warmth(Reward):
    """`-(mean red - mean blue - target)^2`, at most 0.

    Args:
        target: -1 is pure blue, 0 is neutral, 1 is pure red or yellow.
    """

    def __init__(self, target: float = 0.3) -> None:
        super().__init__()
        self.target = target

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores `(B,)` for images `(B, 3, H, W)`."""
        red, _, blue = images.float().mean((2, 3)).unbind(1)
        return -((red - blue - self.target) ** 2)
