"""Which exceptions become a message, and which keep their traceback."""

import os
import re
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.utilities.migration.utils import _get_version

from lightning_draft.__main__ import main
from lightning_draft.cli.explain import _EXTRAS
from lightning_draft.cli.messages import as_configuration_error, flatten, printable, root_cause, with_option_name
from lightning_draft.errors import ConfigurationError
from lightning_draft.prompt_sources import read_prompts
from tests.bad_input.cases import BUILT

TOOLS = ("dev", "docs", "test")
"""Extras of contributors, whose packages no class imports."""
BUGGY = """
from lightning_draft.rewards import Reward
class Buggy(Reward):
    def __init__(self):
        super().__init__()
        self.table = {}["nothing"]
    def forward(self, images, prompts):
        return images.flatten(1).mean(1)
"""


def test_error_in_a_user_constructor_keeps_only_its_own_traceback(command: Callable, config: Path) -> None:
    (config.parent / "mine.py").write_text(BUGGY)
    with pytest.raises(KeyError, match="nothing") as info:
        command("fit", "--config", config, "--model.reward", "mine.Buggy")
    assert info.traceback[-1].path.name == "mine.py"
    shown = "".join(traceback.format_exception(info.value))
    assert shown.count("Traceback") == 1
    assert "Union" not in shown


class Blocked:
    """Finder of a package that is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


def block(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the import of a package fail, whether it is installed or not."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocked(package), *sys.meta_path])


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [
        ("bitsandbytes", "optim.AdamW8bit", "quantization"),
        ("torchao", "optim.AdamW8bit", "quantization"),
        ("deepspeed", "ops.adam.DeepSpeedCPUAdam", "deepspeed"),
    ],
)
def test_an_optimizer_of_a_library_that_is_not_installed_names_the_extra(
    command: Callable, config: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, extra: str
) -> None:
    block(package, monkeypatch)
    result = command("fit", "--config", config, "--model.optimizer", f"{package}.{name}")
    assert result.status == 2
    message = f"--model.optimizer: {package} is not installed; run pip install 'lightning-draft[{extra}]'"
    assert message in result.err


def test_a_reward_that_imports_a_package_that_is_not_installed_names_the_extra(
    command: Callable, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block("torchvision", monkeypatch)
    (config.parent / "mine.py").write_text(f"import torchvision\n{BUGGY}")
    result = command("fit", "--config", config, "--model.reward", "mine.Buggy")
    assert result.status == 2
    assert "torchvision is not installed; run pip install 'lightning-draft[hpsv2]'" in result.err


def test_a_data_set_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    block("datasets", monkeypatch)
    with pytest.raises(ConfigurationError, match=r"run pip install 'lightning-draft\[datasets\]'$"):
        read_prompts("someone/prompts")


def test_the_extra_of_every_optional_package_is_known() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {name: packages for name, packages in project["optional-dependencies"].items() if name not in TOOLS}
    expected = {re.split("[^a-z0-9]", package)[0]: name for name, packages in extras.items() for package in packages}
    assert expected == _EXTRAS


@pytest.mark.parametrize(("code", "error"), [("def f(:\n", SyntaxError), ("import nowhere_at_all\n", ImportError)])
def test_failing_import_of_a_user_module_raises_its_own_exception(
    command: Callable, config: Path, code: str, error: type[Exception]
) -> None:
    (config.parent / "broken.py").write_text(code)
    with pytest.raises(error, match="invalid syntax|nowhere_at_all"):
        command("fit", "--config", config, "--model.reward", "broken.Redness")


def test_value_errors_of_user_code_are_not_configuration_errors() -> None:
    with pytest.raises(ValueError, match="invalid literal") as info, as_configuration_error():
        int("five")
    assert not isinstance(info.value, ConfigurationError)


def test_errors_of_libraries_and_of_the_file_system_are_configuration_errors(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ConfigurationError, match="Invalid learning rate: -1"), as_configuration_error():
        torch.optim.AdamW([torch.zeros(1)], lr=-1)
    with pytest.raises(ConfigurationError, match=r"full: No space left.*default_root_dir"), as_configuration_error():
        raise OSError(28, "No space left on device", "full")
    with pytest.raises(ConfigurationError, match="wandb.*not met"), as_configuration_error():
        _logger_without_its_package("lightning.pytorch.loggers.wandb")
    with pytest.raises(ConnectionError), as_configuration_error():
        raise ConnectionError("the service is down")


def test_unknown_monitor_of_a_lightning_callback_is_a_configuration_error(command: Callable, config: Path) -> None:
    stopping = "[{class_path: EarlyStopping, init_args: {monitor: val/nothing}}]"
    result = command("fit", "--config", config, "--trainer.callbacks", stopping)
    assert result.status == 2
    assert "Early stopping conditioned on metric `val/nothing` which is not available" in result.err
    assert "Traceback" not in result.err


def test_lightning_s_timer_can_be_used_and_resumed(command: Callable, config: Path) -> None:
    timer = "[{class_path: Timer, init_args: {duration: '00:01:00:00'}}]"
    assert command("fit", "--config", config, "--trainer.callbacks", timer).status == 0
    resumed = command("fit", "--config", "runs/small", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert resumed.status == 0, resumed.err
    assert "interval: step" in Path("runs/small/config.yaml").read_text()


def _logger_without_its_package(module: str) -> None:
    """Raise the exception of Lightning's logger when its package is missing, from the logger's module."""
    exec("raise ModuleNotFoundError('wandb>=0.12.10 not met')", {"__name__": module})


def test_checkpoint_with_other_objects_names_the_option_that_loads_it(tmp_path: Path) -> None:
    import torch

    torch.save({"place": tmp_path}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="--weights_only false .* runs code"), as_configuration_error():
        torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_root_cause_without_a_parser_is_the_exception_itself() -> None:
    error = KeyError("mine")
    assert root_cause(error) is error


def test_messages_contain_the_full_option_name() -> None:
    options = flatten(
        {
            "data": {"val_size": 8, "batch_size": 2},
            "samples": {"class_path": "x.SampleLogger", "init_args": {"every_n_steps": 0}},
            "export": {"class_path": "x.LoRAExport", "init_args": {"every_n_steps": 0}},
        }
    )
    assert with_option_name("val_size=8 of 2 is too much", options) == "--data.val_size=8 of 2 is too much"
    assert with_option_name("val_size=80 of 2", options) == "val_size=80 of 2"
    assert with_option_name("every_n_steps=0 is too small", options) == "every_n_steps=0 is too small"
    named = with_option_name("LoRAExport: every_n_steps=0 must be at least 1", options)
    assert named == "--export.every_n_steps=0 must be at least 1"


def test_control_characters_are_escaped_on_the_screen() -> None:
    assert printable("a\x1b[31mred\x07\r\u202e\u2028b\n\tc") == "a\\x1b[31mred\\x07\\r\\u202e\\u2028b\n\tc"


def test_notices_are_omitted_only_within_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    from lightning_draft.cli.output import quiet_output

    logger = logging.getLogger("lightning.fabric.utilities.seed")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    show, factory = warnings.showwarning, logging.getLogRecordFactory()
    try:
        with quiet_output():
            for text in ("Seed set to 0", "[rank: 1] Seed set to 0", "\x1b[1mkept"):
                logger.warning(text)
            warnings.warn("the \x07 bell", stacklevel=1)
        logger.warning("Seed set to 0")
    finally:
        logger.removeHandler(handler)
    assert seen == ["\\x1b[1mkept", "Seed set to 0"]
    assert "warning: the \\x07 bell\n" in capsys.readouterr().err
    assert (warnings.showwarning, logging.getLogRecordFactory()) == (show, factory)


def test_a_checkpoint_without_a_part_of_the_training_state_is_an_error() -> None:
    lacks = pytest.raises(ConfigurationError, match=r"lacks a part .*pytorch-lightning_version.* last.ckpt")
    with lacks, as_configuration_error():
        _get_version({})
    with pytest.raises(KeyError), as_configuration_error():
        {}["mine"]


def test_a_closed_output_ends_a_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["configs", "list"]) == 1


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("SLURM_NTASKS", ""), ("LOCAL_RANK", "-1")])
def test_a_variable_of_a_launcher_that_is_not_a_number_is_named(
    command: Callable, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    result = command("fit", "--config", "quickstart")
    assert result.status == 2
    assert f"variable {name}={value!r} must be a number" in result.err
    assert f"`unset {name}`" in result.err


POLICY = ["--model", "PolicyGradientModule", "--model.sampler.eta", "1", "--model.samples_per_prompt", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.micro_batch_size", "3"], "micro_batch_size=3 has no effect, because a batch has 2 samples"),
        ([*POLICY, "--model.micro_batch_size", "5"], "micro_batch_size=5 has no effect, because a batch has 4 samples"),
        ([*POLICY, "--model.timesteps_per_minibatch", "9"], "timesteps_per_minibatch=9 has no effect"),
    ],
)
def test_a_size_of_parts_above_the_total_is_a_warning(command: Callable, options: list[str], message: str) -> None:
    Path("small.yaml").write_text(BUILT)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = command("fit", "--config", "small.yaml", *options)
    assert result.status == 0, result.err
    assert message in result.err
