"""Compare two traces: identical, equal to rounding, or different."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.traces.record import Trace

TOLERANCE = 1e-4
COSTS = ("network_forwards", "network_forwards_with_grad")
LEAST_LOSS = 1e-3
"""Scale of losses that are rounding errors around 0, as PPO's before the first step; gradients tell what they miss."""
INPUTS = "network_sha256"


@dataclass(frozen=True)
class Verdict:
    """Result of the comparison of two traces of a case.

    Args:
        outcome: `identical`, `equal to rounding` or `different`.
        detail: The difference.
    """

    outcome: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the result is valid for a refactoring."""
        return self.outcome != "different"


def compare(expected: Trace, found: Trace, tolerance: float = TOLERANCE) -> Verdict:
    """Compare a trace with a recorded one.

    Floats are compared relative to the largest of their kind in the trace. Different SHA-256 sums are not a difference
    if all floats agree; costs are only reported.

    Args:
        expected: The recorded trace.
        found: The new one.
        tolerance: Largest relative difference that counts as rounding.
    """
    ours, theirs = dict(_flat(found)), dict(_flat(expected))
    costs = _costs(theirs, ours)
    if ours.get(INPUTS) != theirs.get(INPUTS):
        return Verdict("different", "the network before training has other weights" + costs)
    missing = sorted(theirs.keys() ^ ours.keys())
    if missing:
        return Verdict("different", f"only one trace has {', '.join(missing)}" + costs)
    lengths = [name for name, value in theirs.items() if isinstance(value, list) and len(value) != len(ours[name])]
    if lengths:
        return Verdict("different", f"{lengths[0]} has {len(ours[lengths[0]])} batches" + costs)
    changed = [name for name, value in theirs.items() if value != ours[name] and not name.endswith(COSTS)]
    if not changed:
        return Verdict("identical", costs.lstrip("; "))
    differences = {name: _difference(name, theirs[name], ours[name]) for name in changed if not name.endswith("sha256")}
    worst = max(differences, key=lambda name: differences[name], default="")
    if not worst:
        return Verdict("equal to rounding", f"only {', '.join(changed)} changed" + costs)
    outcome = "equal to rounding" if differences[worst] <= tolerance else "different"
    return Verdict(outcome, f"{worst}: relative difference {differences[worst]:.1e}" + costs)


def _flat(trace: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in trace.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _difference(name: str, expected: Any, found: Any) -> float:
    pairs = list(zip(_listed(expected), _listed(found), strict=True))
    least = LEAST_LOSS if name.endswith("loss") else 0.0
    scale = max(least, *(abs(value) for pair in pairs for value in pair))
    differences = [abs(a - b) / scale if a != b else 0.0 for a, b in pairs]
    return max((d if d == d else float("inf")) for d in differences)


def _listed(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _costs(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    changed = [
        f"; {name} {expected[name]} -> {found[name]}" for name in COSTS if expected.get(name) != found.get(name, None)
    ]
    return "".join(changed)
