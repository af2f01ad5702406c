"""Batches of any data loader are converted to prompts, or rejected with the reason."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.batches import to_prompts
from lightning_draft.methods.draft import DraftModule
from lightning_draft.prompt import Prompt
from lightning_draft.rewards.base import Reward
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel

ROWS = [{"prompt": "a cat", "count": 2}, {"prompt": "two dogs", "count": 3}]


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index]


class Seen(Reward):
    """Records its prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[Any] = []

    def forward(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.prompts.append(list(prompts))
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    "batch",
    [ROWS, {"prompt": ["a cat", "two dogs"], "count": [2, 3]}, next(iter(DataLoader(Rows(), batch_size=2)))],
    ids=["rows", "columns", "default collate function"],
)
def test_rows_and_columns_become_prompts_with_metadata(batch: Any) -> None:
    prompts = to_prompts(batch)
    assert prompts == ["a cat", "two dogs"]
    assert [prompt.metadata for prompt in prompts if isinstance(prompt, Prompt)] == [{"count": 2}, {"count": 3}]


def test_strings_and_their_metadata_are_kept() -> None:
    prompt = Prompt("a cat", {"count": 2})
    assert to_prompts(("a", prompt))[1] is prompt


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["a", 1], r"the batch must be a list of strings, and one element is 1 \(int\)"),
        ("a cat", "the batch='a cat' is one string; write a list of strings"),
        ([], "the batch must be a non-empty list of strings"),
        (None, "the batch must be a non-empty list of strings, got NoneType"),
        (torch.ones(2), "the batch must be a non-empty list of strings, got Tensor"),
        ([{"text": "a cat"}], "a row of the batch has the columns 'text'; it needs 'prompt', the text"),
        ({"text": ["a cat"]}, "a mapping with the keys 'text'; it needs 'prompt', a list of strings"),
        ({"prompt": "a cat"}, "it needs 'prompt', a list of strings"),
        ({"prompt": ["a"], "count": [1, 2]}, "column 'count' has 2 values for 1 prompts; give one value for each"),
        ([{"prompt": 3}], r"the batch's prompts must be a list of strings, and one element is 3 \(int\)"),
    ],
)
def test_other_batches_are_rejected(batch: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        to_prompts(batch)


@pytest.mark.parametrize(
    "loader",
    [DataLoader(["a cat", "two dogs"], batch_size=2), DataLoader(Rows(), batch_size=2)],  # type: ignore[arg-type]
    ids=["strings", "rows"],
)
def test_plain_data_loaders_train_and_validate(loader: Any, tmp_path: Path) -> None:
    module = DraftModule(LinearModel(0.1), Seen(), DDIM(2))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader, [loader, loader])
    assert module.reward.prompts[-1] == ["a cat", "two dogs"]
    validated = {name for name in trainer.callback_metrics if "/gain" in name}
    assert validated == {"val/gain", "val_1/gain"}  # one prefix for each validation loader
