"""A cache of prompt embeddings on the CPU."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Embedding = Mapping[str, Tensor]

CAPACITY = 4 * 2**30
"""Size in bytes up to which embeddings are cached without an explicit request."""


class TextCache:
    """A cache of prompt embeddings.

    Each prompt is embedded separately, so that its embedding does not depend on the other prompts of a batch.

    Args:
        capacity: Size in bytes; beyond it, new embeddings are cached only on request.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._size = 0
        self._embeddings: dict[Hashable, Embedding] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Return whether the embedding is cached."""
        return key in self._embeddings

    def get(self, key: Hashable, embed: Callable[[], Embedding], device: str, keep: bool = False) -> Embedding:
        """Return an embedding, which is computed if it is not cached.

        Args:
            key: Key of the prompt.
            embed: Computes the embedding.
            device: Device type on which `embed` runs.
            keep: Cache it even beyond the capacity.
        """
        if key in self._embeddings:
            return self._embeddings[key]
        embedding = computed(embed, device)
        size = sum(tensor.nbytes for tensor in embedding.values())
        if keep or self._size + size <= self.capacity:
            self._embeddings[key] = embedding
            self._size += size
        return embedding

    def check_space(self, size: int) -> None:
        """Check that there is space for more embeddings; a cache in memory has a fixed capacity and needs no check.

        Args:
            size: Their size in bytes.

        Raises:
            ConfigurationError: There is too little.
        """

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within this context, embeddings are computed."""
        yield


def computed(embed: Callable[[], Embedding], device: str) -> Embedding:
    """Return an embedding on the CPU.

    Args:
        embed: Computes the embedding.
        device: Device type on which `embed` runs.
    """
    # An embedding computed in inference mode could not be used in training; one under autocast would be rounded.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return {name: tensor.cpu() for name, tensor in embed().items()}
