"""The options of `fit` and `validate`, and the classes that can be written by their short names."""

from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

import lightning_draft.advantages  # noqa: F401 (its classes are known by their short names)
import lightning_draft.diversity  # noqa: F401
import lightning_draft.forward_objectives  # noqa: F401
import lightning_draft.gradient_matching  # noqa: F401
import lightning_draft.group_objectives  # noqa: F401
import lightning_draft.losses  # noqa: F401
import lightning_draft.objectives  # noqa: F401
import lightning_draft.rewards  # noqa: F401
import lightning_draft.samplers  # noqa: F401
import lightning_draft.stochastic_flow  # noqa: F401
import lightning_draft.surrogates  # noqa: F401
import lightning_draft.truncation  # noqa: F401
import lightning_draft.trust_region  # noqa: F401
import lightning_draft.windows  # noqa: F401
from lightning_draft import callbacks, models
from lightning_draft.cli.callback_options import CALLBACK_OPTIONS
from lightning_draft.cli.explain import explain
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.forward_process import ForwardProcessModule  # noqa: F401
from lightning_draft.methods.gradient_matching import GradientMatchingModule  # noqa: F401
from lightning_draft.methods.policy_gradient import PolicyGradientModule  # noqa: F401
from lightning_draft.models.families import FAMILIES

TRAINER_DEFAULTS = {
    "max_steps": 1000,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 100,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
MODELS = tuple(getattr(models, name) for name in FAMILIES)
"""The model families; the parser knows a class by its short name once it is imported."""
FILE_WRITERS = tuple(getattr(callbacks, option.class_name) for option in CALLBACK_OPTIONS if option.writes_files)


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add the run's name, how it resumes, and one option for each callback."""
    parser.set_defaults({"model": {"class_path": _path(DraftModule)}})
    parser.add_argument("--name", type=str | None, default=None, help="The run writes to runs/NAME.")
    parser.add_argument(
        "--resume",
        type=Literal["auto"] | None,
        default=None,
        help="`auto`: continue from the last checkpoint in runs/NAME if there is one, else start a new run there.",
    )
    for option in CALLBACK_OPTIONS:
        kind = getattr(callbacks, option.class_name)
        default = {"class_path": _path(kind)} if option.enabled else None
        parser.add_argument(f"--{option.key}", type=kind | None, default=default, help=f"{option.help}; null for none")


def explain_parser_error(error: BaseException) -> str:
    """Return one message for an exception of the parser."""
    groups = {option.key: getattr(callbacks, option.class_name) for option in CALLBACK_OPTIONS}
    plain = {"seed_everything": bool | int, "name": str | None, "ckpt_path": str | None}
    named = {"resume": Literal["auto"] | None, "weights_only": bool | None}
    return explain(
        error, {"model": RewardModule, "data": PromptDataModule, "trainer": Trainer, **plain, **named, **groups}
    )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
