"""Votes of people as a reward."""

import hashlib
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_draft.arguments import positive
from lightning_draft.errors import RewardServiceError
from lightning_draft.rewards.background import run_all
from lightning_draft.rewards.blackbox import to_pil
from lightning_draft.rewards.pairwise import PairwiseReward
from lightning_draft.votes import Pair, VoteFolder, fit_votes, image_key, one_line

if TYPE_CHECKING:
    from PIL import Image

_POLL_SECONDS = 0.5


class HumanVotes(PairwiseReward):
    """Preferences of people, who vote with `lightning-draft vote FOLDER`. Black box: for policy gradients.

    In training, with the advantage estimator `WinRate` or `BradleyTerry`, the pairs of each rollout are written to
    `folder`, and training waits until all of them have a vote. Votes are found by the pixels of the images, so that a
    resumed run does not ask again.

    The score of an image is the Bradley-Terry score fitted to all votes on its prompt so far, 0 for an image without
    votes. It is for existing images that were voted on; validation images have none.

    Args:
        folder: Folder of `votes.csv`, `pairs.csv` and `images`.
        time_limit: Seconds to wait for the votes on a batch, after which the run ends with an error; None to wait
            without a limit.
        prior_std: Standard deviation of the scores' Gaussian prior, positive.

    Raises:
        ConfigurationError: An argument is not valid.
    """

    needs_pairs = True

    def __init__(self, folder: str, time_limit: float | None = None, prior_std: float = 1.0) -> None:
        super().__init__()
        self.folder = folder
        self.time_limit = None if time_limit is None else positive("time_limit", time_limit)
        self.prior_std = positive("prior_std", prior_std)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores `(B,)` of images by the votes so far."""
        scores = fit_votes(VoteFolder(self.folder).votes(), self.prior_std)
        keys = [(one_line(prompt), image_key(image)) for prompt, image in zip(prompts, to_pil(images), strict=True)]
        return torch.tensor([scores.get(key, 0.0) for key in keys], device=images.device)

    def data_version(self) -> str:
        """Return a hash of the votes."""
        votes = VoteFolder(self.folder).votes_file
        return hashlib.sha256(votes.read_bytes()).hexdigest()[:16] if votes.exists() else "no votes"

    def prefer(self, first: "Sequence[Image.Image]", second: "Sequence[Image.Image]", prompts: Sequence[str]) -> Tensor:
        """Ask for votes, wait for them, and return 1, 0 or 0.5 for each pair, `(B,)`; equal images are a tie.

        Args:
            first: `B` images.
            second: `B` images.
            prompts: `B` prompts.

        Raises:
            RewardServiceError: Votes are missing after `time_limit`.
        """
        images = {id(image): image for image in (*first, *second)}
        keys = {number: image_key(image) for number, image in images.items()}
        texts = [one_line(prompt) for prompt in prompts]
        pairs = [Pair(keys[id(a)], keys[id(b)], text) for a, b, text in zip(first, second, texts, strict=True)]
        votes = VoteFolder(self.folder)
        missing = _without_votes(pairs, votes)
        if missing:
            wanted = {key for pair in missing for key in (pair.first, pair.second)}
            votes.request(missing, {keys[number]: image for number, image in images.items() if keys[number] in wanted})
            from lightning.pytorch.utilities import rank_zero_info  # slow to import, and not needed for scores

            rank_zero_info(f"waiting for {len(missing)} votes: lightning-draft vote {self.folder}")
            self._wait(missing, votes)
        found = votes.votes()
        return torch.tensor([_preference(pair, found.get(pair.id)) for pair in pairs])

    def _wait(self, pairs: Sequence[Pair], votes: VoteFolder) -> None:
        stopped = threading.Event()
        try:
            run_all([partial(_wait_for_votes, pairs, votes, stopped)], 1, self.time_limit)
        except TimeoutError as error:
            raise RewardServiceError(
                f"{len(_without_votes(pairs, votes))} of {len(pairs)} pairs have no vote after time_limit="
                f"{self.time_limit:g} s; vote with `lightning-draft vote {self.folder}` and resume the run: votes are "
                "kept"
            ) from error
        finally:
            stopped.set()


def _wait_for_votes(pairs: Sequence[Pair], votes: VoteFolder, stopped: threading.Event) -> None:
    while not stopped.is_set() and _without_votes(pairs, votes):
        time.sleep(_POLL_SECONDS)


def _without_votes(pairs: Sequence[Pair], votes: VoteFolder) -> list[Pair]:
    known = votes.votes()
    return [pair for pair in pairs if pair.id not in known and pair.first != pair.second]


def _preference(pair: Pair, vote: tuple[Pair, float] | None) -> float:
    """Return the preference for the first image of `pair`, which may be the second of the vote."""
    if vote is None:  # the images are equal
        return 0.5
    voted, preference = vote
    return preference if voted.first == pair.first else 1 - preference
