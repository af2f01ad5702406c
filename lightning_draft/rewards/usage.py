"""What scoring has used, such as requests and tokens, added over rewards and processes."""

from collections.abc import Iterable, Mapping

from lightning_draft.rewards.base import Reward


def total_usage(rewards: Iterable[Reward]) -> dict[str, float]:
    """Return what rewards and all rewards that they are computed from have used, by name; each is counted once."""
    distinct = {nested for reward in rewards for nested in reward.nested_rewards()}
    return added(each.usage() for each in distinct)


def added(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of numbers with the same name."""
    total: dict[str, float] = {}
    for amount in amounts:
        for name, value in amount.items():
            total[name] = total.get(name, 0.0) + value
    return total
