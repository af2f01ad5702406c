"""Invalid input ends with exit status 2 and one message that names the option, the value and what to write."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_draft.cli.checkpoint_file import find_checkpoint
from lightning_draft.cli.option_checks import CHECKS, check_options
from lightning_draft.cli.run_folder import check_name
from lightning_draft.errors import ConfigurationError

USER_CODE = """
from lightning_draft.rewards import Reward
class Redness(Reward):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = gain
    def forward(self, images, prompts):
        return self.gain * images[:, 0].mean((1, 2))
class Abstract(Reward):
    pass
"""

PARSED = [
    # Unknown options
    (["--model.truncation.kk", "5"], ["--model.truncation.kk: LastK", "did you mean k"]),
    (["--model.truncaton", "Full"], ["--model.truncaton: DraftModule", "did you mean truncation"]),
    (["--model.model.lora.ranks", "3"], ["--model.model.lora.ranks: LoRA", "did you mean rank"]),
    (["--model.model.guidence", "3"], ["--model.model.guidence: StableDiffusion", "did you mean guidance"]),
    (["--model.sampler.steps", "3"], ["--model.sampler.steps: DDIM", "num_steps"]),
    (["--model.reward.targt", "1"], ["--model.reward.targt: Brightness", "did you mean target"]),
    (["--trainer.max_step", "5"], ["--trainer.max_step: Trainer", "did you mean max_steps"]),
    (["--max_steps", "5"], ["--max_steps", "did you mean --trainer.max_steps"]),
    (["--batch_size", "5"], ["--batch_size", "did you mean --data.batch_size"]),
    (["--data.batchsize", "2"], ["--data.batchsize: PromptDataModule", "did you mean batch_size"]),
    (["--samples.every_n_step", "5"], ["--samples.every_n_step: SampleLogger", "did you mean every_n_steps"]),
    (["--ema.decai", "0.5"], ["--ema.decai: AdapterEMA", "did you mean decay"]),
    (["stray"], ["'stray' is neither an option nor the value of one"]),
    # Types
    (["--model.truncation.k", "five"], ["--model.truncation.k: expected an integer, got 'five'"]),
    (["--model.truncation.k", "1.5"], ["--model.truncation.k: expected an integer, got 1.5"]),
    (["--trainer.max_steps", "many"], ["--trainer.max_steps: expected an integer, got 'many'"]),
    (["--trainer.max_steps"], ["--trainer.max_steps needs a value"]),
    (["--data.batch_size", "x"], ["--data.batch_size: expected an integer, got 'x'"]),
    (["--data.batch_size", "[2]"], ["--data.batch_size: expected an integer, got [2]"]),
    (["--model.kl_weight", "much"], ["--model.kl_weight: expected a number, got 'much'"]),
    (["--model.checkpointing", "steps"], ["--model.checkpointing: expected one of", "did you mean step"]),
    (["--model.sampler.spacing", "trailling"], ["--model.sampler.spacing", "did you mean trailing"]),
    (["--model.sampler.spacing", "null"], ["--model.sampler.spacing", "got null"]),
    (["--model.model.lora", "[1]"], ["--model.model.lora: expected a LoRA or null, got [1]"]),
    (["--model.model.dtype", "bf16"], ["--model.model.dtype: expected one of float32", "'bf16'"]),
    (["--resume", "yes"], ["--resume: expected one of auto or null, got 'yes'"]),
    (["--seed_everything", "abc"], ["--seed_everything: expected true or false or an integer, got 'abc'"]),
    (["--export.mode", "most"], ["--export.mode: expected one of max, min, got 'most'"]),
    # Classes
    (["--model.truncation", "LastKK"], ["--model.truncation: there is no Truncation 'LastKK'", "did you mean LastK"]),
    (["--model.truncation", "Truncation"], ["--model.truncation", "write class_path: one of DRTune, "]),
    (["--model.truncation", "3"], ["--model.truncation"]),
    (["--model.reward", "Brightnes"], ["--model.reward: there is no Reward", "did you mean Brightness"]),
    (["--model.optimizer", "AdamWW"], ["--model.optimizer: there is no Optimizer", "did you mean AdamW"]),
    (["--model.loss", "Hinge"], ["--model.loss"]),
    (["--model", "DraftModul"], ["--model: there is no RewardModule 'DraftModul'", "did you mean DraftModule"]),
    (["--model", "null"], ["--model is missing"]),
    (
        ["--trainer.callbacks", "[EarlyStopin]"],
        ["--trainer.callbacks: there is no Callback", "did you mean EarlyStopping"],
    ),
    (["--trainer.logger", "CSVLoger"], ["--trainer.logger: there is no Logger", "did you mean CSVLogger"]),
    (["--samples", "SampleLoger"], ["--samples: there is no SampleLogger", "did you mean SampleLogger"]),
    (["--model.truncation.help", "LastKK"], ["--model.truncation", "did you mean LastK"]),
    (["--model.reward", "nowhere.Redness"], ["there is no module 'nowhere'", "nowhere.py in the current folder"]),
    (["--model.reward", "mine.Rednes"], ["module 'mine' has no class 'Rednes'; did you mean Redness"]),
    (
        ["--model.reward", "mine.Redness", "--model.reward.gian", "2"],
        ["--model.reward.gian: Redness", "did you mean gain"],
    ),
    (["--model.reward", "mine.Abstract"], ["mine.Abstract is abstract: it has no forward"]),
    (["--model.reward", "lightning_draft.truncation.LastK"], ["--model.reward", "is not a Reward"]),
    (
        ["--model.reward", "{class_path: WeightedSum, init_args: {rewards: {a: {reward: Brightnes}}}}"],
        ["--model.reward.rewards.reward", "did you mean Brightness"],
    ),
    # Values, before anything is loaded
    (["--trainer.max_steps", "0"], ["--trainer.max_steps=0 must be at least 1", "write 200"]),
    (["--name", "../../x"], ["--name='../../x' must be a name inside the folder runs"]),
    (["--ckpt_path", "nowhere.ckpt"], ["there is no checkpoint nowhere.ckpt"]),
    (["--ckpt_path", "last"], ["there is no run runs/small"]),
    (["--resume", "auto", "--ckpt_path", "x.ckpt"], ["--resume auto finds the checkpoint itself"]),
]

BUILT = [
    (["--model.truncation.k", "0"], ["--model.truncation.k=0 must be at least 1"]),
    (["--model.reward", "JPEGSize"], ["JPEGSize is not differentiable"]),
    (["--trainer.strategy", "dpd"], ["strategy", "'dpd'"]),
    (["--data.prompts", "nowhere.txt"], ["there is no file 'nowhere.txt'"]),
    (["--data.val_size", "7"], ["--data.val_size=7"]),
    (["--model.optimizer", "AdamW", "--model.optimizer.betas", "[2.0, 0.9]"], ["Invalid beta"]),
    (
        ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: x, mode: most}}]"],
        ["`mode` can be min, max, got most"],
    ),
]


def _ends_with_one_message(command: Callable, config: Path, options: list[str], parts: list[str]) -> None:
    (config.parent / "mine.py").write_text(USER_CODE)
    result = command("fit", "--config", config, *options)
    assert result.status == 2
    assert all(part in result.err for part in parts), result.err
    errors = [line for line in result.err.splitlines() if line.startswith("lightning-draft: ")]
    assert len(errors) == 1
    assert not {"Union", "jsonargparse", "<class"} & set(result.err.replace("'", " ").split()), result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("options", "parts"), PARSED, ids=[" ".join(options) for options, _ in PARSED])
def test_option_that_cannot_be_read(command: Callable, config: Path, options: list[str], parts: list[str]) -> None:
    _ends_with_one_message(command, config, options, parts)


@pytest.mark.parametrize(("options", "parts"), BUILT, ids=[" ".join(options) for options, _ in BUILT])
def test_option_that_a_class_refuses(command: Callable, config: Path, options: list[str], parts: list[str]) -> None:
    _ends_with_one_message(command, config, options, parts)


EDITS = [
    ("trainer:", "trainr:", ["--trainr", "did you mean trainer"]),
    ("max_steps: 2", "max_step: 2", ["--trainer.max_step: Trainer", "did you mean max_steps"]),
    ("init_args: {k: 2}", "init_args: {kk: 2}", ["--model.truncation.kk: LastK", "did you mean k"]),
    ("      init_args: {k: 2}", "      k: 2", ["--model.truncation", "class_path: one of", "under init_args"]),
    ("max_steps: 2", "max_steps: ${data.batch}", ["small.yaml", "data.batch"]),
    ("max_steps: 2", "max_steps: [", ["small.yaml, line", "not YAML"]),
    ("class_path: Brightness\n      init_args: {target: 0.9}", "{}", ["--model.reward", "class_path: ", "Brightness"]),
    ("pretrained: ", "pretraned: ", ["--model.model.pretraned: StableDiffusion", "did you mean pretrained"]),
    ("prompts: [", "promts: [", ["--data.promts: PromptDataModule", "did you mean prompts"]),
]


@pytest.mark.parametrize(("old", "new", "parts"), EDITS, ids=[new for _, new, _ in EDITS])
def test_config_file_that_cannot_be_read(command: Callable, config: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    _ends_with_one_message(command, config, [], parts)


COMMANDS = [
    (["fit", "--config", "quikstart"], "did you mean quickstart"),
    (["fit", "--conifg", "quickstart"], "there is no option --conifg; did you mean --config"),
    (["fit", "quickstart"], "write lightning-draft fit --config quickstart"),
    (["fit", "--modle.seed", "5"], "there is no option --modle.seed; did you mean --model.seed"),
    (["fit", "--sample.every_n_steps", "5"], "did you mean --samples.every_n_steps"),
    (["fit", "--config", "nowhere.yaml"], "there is no config file nowhere.yaml"),
    (["fit", "--config", "."], "a folder without a config.yaml"),
    (["fit", "--config", "x" * 300], "is not a config"),
    (["fit", "--config", "list.yaml"], "list.yaml must be a mapping"),
    (["fit", "--config", "binary.yaml"], "binary.yaml is not YAML"),
    (["fit", "--config", "deep.yaml"], "deep.yaml is not YAML"),
    (["fit", "--config"], "--config needs a config"),
    (["fti"], "did you mean fit"),
    (["train"], "train with `lightning-draft fit`"),
    (["test"], "score held-out prompts with `lightning-draft validate`"),
    (["predict"], "generate images with `lightning-draft sample`"),
    (["configs", "show", "draft_kk"], "did you mean draft_k"),
    (["configs", "shw"], "write `configs list`"),
    (["sample"], "give a LoRA file"),
    (["sample", "nowhere.safetensors"], "there is no LoRA file nowhere.safetensors"),
    (["sample", "list.yaml"], "list.yaml is damaged or not a safetensors file"),
    (["sample", "."], "has no LoRA file"),
    (["sample", "x.safetensors", "--scales", "1"], "unrecognized arguments: --scales"),
    (["sample", "x.safetensors", "--scale", "nan"], "nan must be finite"),
    (["sample", "x.safetensors", "--scale", "big"], "--scale"),
    (["sample", "x.safetensors", "--max", "0"], "0 must be at least 1"),
    (["sample", "x.safetensors", "--steps", "-1"], "-1 must be at least 1"),
    (["sample", "x.safetensors", "--output", "x.foo"], "x.foo is not an image file"),
    (["sample", "x.safetensors", "--device", "nowhere"], "nowhere is not available"),
]


@pytest.mark.parametrize(("args", "part"), COMMANDS, ids=[" ".join(args)[:40] for args, _ in COMMANDS])
def test_command_line_that_cannot_start(command: Callable, args: list[str], part: str) -> None:
    Path("list.yaml").write_text("- a\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("deep.yaml").write_text("[" * 5000)
    result = command(*args)
    assert result.status == 2
    assert part in result.err
    assert len(result.err.strip().splitlines()) == 1


NAMES = [
    *("../x", "../../x", "..", ".", "", "/tmp/x", "a//b", "a/../b", "a/", "~/x", "~root"),
    *("a\nb", "a\x1b[31mb", "a\tb", "a\u202eb", "a\x00b", " a", "a ", "a\\b", "-rf", "x" * 300),
]


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_run_that_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="--name=.*write a name such as my-run"):
        check_name(name)


@pytest.mark.parametrize("name", ["small", "a.b", "lr[1]", "group/small", "größe", "2024-01-01", "lr=1e-4,k=2"])
def test_name_of_a_run_that_is_accepted(name: str) -> None:
    assert check_name(name) == name


VALUES = [
    *(("trainer.max_steps", value) for value in (0, -2)),
    *(("trainer.max_epochs", value) for value in (0, -5)),
    *(("trainer.accumulate_grad_batches", value) for value in (0, -1)),
    *(("trainer.gradient_clip_val", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
    *(("trainer.log_every_n_steps", value) for value in (0, -3)),
    *(("trainer.val_check_interval", value) for value in (0, 0.0)),
    *(("trainer.strategy", value) for value in ("ddp_spawn", "ddp_spawn_find_unused_parameters_true")),
    ("trainer.num_nodes", 0),
    *(("seed_everything", value) for value in (-1, 2**32, 2**70)),
    *(("model.optimizer.lr", value) for value in (0.0, -1e-3, float("nan"), float("inf"))),
    *(("model.optimizer.weight_decay", value) for value in (-0.1, float("nan"))),
]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_value_that_is_refused(name: str, value: float | str) -> None:
    with pytest.raises(ConfigurationError) as info:
        check_options({name: value})
    assert str(info.value).startswith(f"--{name}={value!r} must")
    assert "write" in str(info.value)


def test_every_check_has_a_value_that_it_refuses_and_one_that_it_accepts() -> None:
    assert {name for name, _ in VALUES} == {check.name for check in CHECKS}
    check_options(dict.fromkeys((check.name for check in CHECKS), 1))
    check_options(dict.fromkeys((check.name for check in CHECKS), None))


def test_config_without_its_secrets_asks_for_them() -> None:
    with pytest.raises(ConfigurationError, match="give the value again with --model.reward.url VALUE"):
        check_options({"model.reward.url": "https://host/?api_key=REDACTED"})


def _write_checkpoints(folder: Path) -> None:
    (folder / "empty.ckpt").touch()
    (folder / "text.ckpt").write_text("not a checkpoint")
    (folder / "folder").mkdir()
    with zipfile.ZipFile(folder / "foreign.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save({"weights": torch.zeros(2)}, folder / "weights.ckpt")
    torch.save({"state_dict": {}, "global_step": 3}, folder / "whole.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "whole.ckpt").read_bytes()[:300])


CHECKPOINTS = [
    ("https://example.org/last.ckpt", "is remote"),
    ("s3://bucket/last.ckpt", "is remote"),
    ("registry", "is remote"),
    ("hpc", "use --resume auto"),
    ("best", "there is no checkpoint best"),
    ("empty.ckpt", "is empty"),
    ("text.ckpt", "is not a checkpoint"),
    ("cut.ckpt", "only part of one"),
    ("foreign.ckpt", "another kind of zip file"),
    ("weights.ckpt", "contains no training step"),
    ("folder", "has no checkpoint"),
]


@pytest.mark.parametrize(("path", "part"), CHECKPOINTS)
def test_checkpoint_that_is_refused(workplace: Path, path: str, part: str) -> None:
    _write_checkpoints(workplace)
    with pytest.raises(ConfigurationError, match=part):
        find_checkpoint(path)
    assert find_checkpoint("whole.ckpt") == Path("whole.ckpt")
