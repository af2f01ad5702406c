"""Low-rank updates `dW = s B A` of single layers: norms, sums and truncation, computed from the factors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_draft.arguments import integer_at_least
from lightning_draft.errors import ConfigurationError


@dataclass(frozen=True)
class Update:
    """The update `dW = scale * B A` of one layer.

    Args:
        a: `A`, `(rank, in)`, or `(rank, in, kh, kw)` of a convolution.
        b: `B`, `(out, rank)`, or `(out, rank, 1, 1)` of a convolution.
        scale: The factor of `B A`, `alpha / rank`.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of `A`."""
        return len(self.a)

    @property
    def alpha(self) -> float:
        """The scale as LoRA files write it, `scale * rank`."""
        return self.scale * self.rank

    def times(self, factor: float) -> "Update":
        """Return `factor * dW`."""
        return replace(self, scale=self.scale * factor)

    def dense(self) -> Tensor:
        """Compute `dW` in the shape of the layer's weight, in float32 or in float64 if a factor has this precision."""
        dtype = torch.promote_types(torch.promote_types(self.a.dtype, self.b.dtype), torch.float32)
        product = self.scale * (self.b.to(dtype).flatten(1) @ self.a.to(dtype).flatten(1))
        return product.reshape(len(self.b), *self.a.shape[1:])

    def norm(self) -> float:
        """Compute the Frobenius norm of `dW`: `|B A|^2 = sum_ij (B^T B)_ij (A A^T)_ij`."""
        a, b = self.a.double().flatten(1), self.b.double().flatten(1)
        return abs(self.scale) * float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


def add(updates: Sequence[Update]) -> Update:
    """Compute the sum of updates exactly, in float64: `sum_i s_i B_i A_i = [s_1 B_1, ...] [A_1; ...]`.

    Raises:
        ConfigurationError: They are of layers of different shapes.
    """
    shapes = {(tuple(update.a.shape[1:]), len(update.b)) for update in updates}
    if len(shapes) > 1:
        raise ConfigurationError(
            f"updates of layers of different shapes cannot be added: (in, out) is {sorted(shapes, key=str)}"
        )
    a = torch.cat([update.a.double() for update in updates])
    b = torch.cat([update.scale * update.b.double() for update in updates], 1)
    return Update(a, b)


def truncate(update: Update, rank: int) -> tuple[Update, float]:
    """Compute the closest update of a lower rank in the Frobenius norm, by singular value decomposition.

    The decomposition is that of the small matrix `R_B R_A^T` with `B = Q_B R_B` and `A^T = Q_A R_A`, in float64.

    Args:
        update: The update.
        rank: Rank of the result, at least 1; above the rank of the update, the result is exact and padded with zeros.

    Returns:
        The update in float32 with scale 1, whose factors have the same singular values, and the distance
        `|dW - dW'|` in the Frobenius norm.
    """
    integer_at_least("rank", rank, 1)
    a, b = update.a.double().flatten(1), update.scale * update.b.double().flatten(1)
    basis_b, small_b = torch.linalg.qr(b)
    basis_a, small_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:kept] = root[:, None] * (right[:kept] @ basis_a.T)
    new_b[:, :kept] = (basis_b @ left[:, :kept]) * root
    ones = [1] * (update.b.ndim - 2)
    shaped = Update(new_a.float().reshape(rank, *update.a.shape[1:]), new_b.float().reshape(len(update.b), rank, *ones))
    return shaped, float(values[kept:].square().sum().sqrt())
