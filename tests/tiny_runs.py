"""Prompts, their data module, and copies of parameters, for short runs in tests."""

from torch import Tensor, nn

from lightning_draft.data import PromptDataModule

PROMPTS = ["a red cat", "a cat", "red", "cat dog", "tree", "a dog"]


def data(batch_size: int = 2) -> PromptDataModule:
    return PromptDataModule(PROMPTS, batch_size=batch_size, val_size=2)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}
