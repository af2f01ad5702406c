"""A reward of your own, in ten lines; the config beside this file puts it in the place of a shipped config's reward.

    lightning-draft fit --config quickstart --config examples/custom_reward.yaml

Any file in the folder that you start from will do: for a class Mine in my_rewards.py, write class_path my_rewards.Mine.
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
        """Score `(B, 3, H, W)` to `(B,)`."""
        red, _, blue = images.float().mean((2, 3)).unbind(1)
        return -((red - blue - self.target) ** 2)
