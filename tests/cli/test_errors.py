"""A person's mistake is one message and exit status 2; a bug keeps its traceback."""

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_draft.cli.failures import is_mendable, unwrapped

OWN = """
from lightning_draft.rewards import Reward
class Redness(Reward):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = gain
    def forward(self, images, prompts):
        return self.gain * images[:, 0].mean((1, 2))
class Abstract(Reward):
    pass
class Buggy(Reward):
    def __init__(self):
        super().__init__()
        self.table = {}["nothing"]
    def forward(self, images, prompts):
        return images.flatten(1).mean(1)
"""

MISTAKES = [
    (["--model.truncation", "LastKK"], ["model.truncation", "LastKK", "did you mean LastK"]),
    (["--model.truncation.k", "five"], ["model.truncation.k", "an integer", "'five'"]),
    (["--model.truncation.kk", "5"], ["model.truncation (LastK)", "'kk'", "did you mean k"]),
    (["--model.truncation.k", "0"], ["k=0 must be at least 1"]),
    (["--model.truncation.k", "60"], ["k=60", "num_steps=3"]),
    (["--model.truncaton", "Full"], ["model (DraftModule)", "did you mean truncation"]),
    (["--model.checkpointing", "steps"], ["model.checkpointing", "did you mean step"]),
    (["--model.model.lora.ranks", "3"], ["model.model.lora", "did you mean rank"]),
    (["--model.model.lora.rank", "0"], ["rank=0 must be at least 1"]),
    (["--model.model.pretrained", "./nowhere"], ["./nowhere does not exist"]),
    (["--model.optimizer", "AdamWW"], ["model.optimizer", "did you mean AdamW"]),
    (["--model.reward", "nowhere.Redness"], ["there is no module 'nowhere'", "nowhere.py in the current folder"]),
    (["--model.reward", "mine.Rednes"], ["module 'mine'", "did you mean Redness"]),
    (["--model.reward", "mine.Redness", "--model.reward.gian", "2"], ["(Redness)", "did you mean gain"]),
    (["--model.reward", "mine.Abstract"], ["mine.Abstract", "no forward"]),
    (["--model.reward", "mine.Rewar"], ["module 'mine' has no class 'Rewar'\n"]),
    (["--model.reward", "lightning_draft.truncation.LastK"], ["is not a Reward"]),
    (["--model.reward", "JPEGSize"], ["JPEGSize is not differentiable"]),
    (
        ["--model.reward", "{class_path: WeightedSum, init_args: {rewards: {a: {reward: Brightnes}}}}"],
        ["model.reward.rewards.a.reward", "did you mean Brightness"],
    ),
    (["--trainer.max_step", "5"], ["trainer", "'max_step'", "did you mean max_steps"]),
    (["--max_steps", "5"], ["'max_steps'", "did you mean trainer.max_steps"]),
    (["--batch_size", "5"], ["'batch_size'", "did you mean data.batch_size"]),
    (["--trainer.strategy", "dpd"], ["strategy='dpd'"]),
    (["--model.sampler.spacing", "null"], ["--model.sampler.spacing", "no null this deep"]),
    (["--model.truncation.help", "LastKK"], ["model.truncation", "did you mean LastK"]),
    (["--trainer.val_check_interval", "0"], ["for no validation write trainer.limit_val_batches=0"]),
    (["--trainer.max_steps", "many"], ["trainer.max_steps", "an integer", "'many'"]),
    (["--trainer.callbacks", "[EarlyStopin]"], ["trainer.callbacks[0]", "did you mean EarlyStopping"]),
    (["--samples.every_n_step", "5"], ["samples (SampleLogger)", "did you mean every_n_steps"]),
    (["--data.prompts", "nowhere.txt"], ["there is no file 'nowhere.txt'"]),
    (["--data.prompts", "annimals"], ["did you mean animals"]),
    (["--data.batchsize", "2"], ["data", "did you mean batch_size"]),
    (["--modle.seed", "5"], ["'modle'", "did you mean model"]),
    (["stray"], ["'stray'"]),
    (["--ckpt_path", "nowhere.ckpt"], ["there is no checkpoint nowhere.ckpt"]),
    (["--ckpt_path", "best"], ["there is no checkpoint best"]),
    (["--ckpt_path", "small.yaml"], ["small.yaml is not a checkpoint"]),
    (["--ckpt_path", "last"], ["there is no checkpoint in runs/small"]),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistake_on_the_command_line(command: Callable, config: Path, options: list[str], said: list[str]) -> None:
    (config.parent / "mine.py").write_text(OWN)
    result = command("fit", "--config", config, *options)
    assert result.status == 2
    assert all(part in result.err for part in said), result.err
    message = result.err.partition("lightning-draft: ")[2]
    assert len(message.strip().splitlines()) == 1
    assert "Union" not in result.err
    assert "Traceback" not in result.err
    assert not list(config.parent.glob("runs/*"))


EDITS = [
    ("trainer:", "trainr:", ["'trainr'", "did you mean trainer"]),
    ("init_args: {k: 2}", "init_args: {kk: 2}", ["model.truncation (LastK)", "did you mean k"]),
    ("      init_args: {k: 2}", "      k: 2", ["model.truncation", "k must stand under init_args"]),
    ("max_steps: 2", "max_steps: ${data.batch}", ["small.yaml", "data.batch"]),
    ("max_steps: 2", "max_steps: [", ["small.yaml, line", "not YAML"]),
    ("class_path: Brightness\n      init_args: {target: 0.9}", "{}", ["model.reward", "class_path: ", "Brightness"]),
]


@pytest.mark.parametrize(("old", "new", "said"), EDITS, ids=[new for _, new, _ in EDITS])
def test_mistake_in_a_file(command: Callable, config: Path, old: str, new: str, said: list[str]) -> None:
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    result = command("fit", "--config", config)
    assert result.status == 2
    assert all(part in result.err for part in said), result.err
    assert "Union" not in result.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", "--config", "quikstart"], "did you mean quickstart"),
        (["fit", "--config", "nowhere.yaml"], "no config file nowhere.yaml"),
        (["fit", "--config"], "needs a config"),
        (["fit"], "start from a config"),
        (["fti"], "did you mean fit"),
        (["configs", "show", "draft_kk"], "did you mean draft_k"),
        (["configs", "shw"], "configs list"),
        (["sample"], "give a LoRA file"),
        (["sample", "nowhere.safetensors"], "no LoRA file nowhere.safetensors"),
        (["sample", "x.safetensors", "--scales", "1"], "unrecognized arguments"),
        (["sample", "x.safetensors", "--scale", "nan"], "nan must be finite"),
        (["sample", "x.safetensors", "--output", "x.foo"], "x.foo must end as a picture does"),
        (["sample", "x.safetensors", "--device", "nowhere"], "nowhere is not here"),
    ],
)
def test_mistake_before_anything_is_read(command: Callable, args: list[str], said: str) -> None:
    result = command(*args)
    assert result.status == 2
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_every_mistake_is_named_at_once(command: Callable, config: Path) -> None:
    result = command("fit", "--config", config, "--model.truncation.kk", "2", "--data.batchsize", "3")
    assert "did you mean k\n" in result.err
    assert "did you mean batch_size" in result.err


def test_a_bug_keeps_its_traceback(command: Callable, config: Path) -> None:
    (config.parent / "mine.py").write_text(OWN)
    with pytest.raises(KeyError, match="nothing") as info:
        command("fit", "--config", config, "--model.reward", "mine.Buggy")
    assert info.traceback[-1].path.name == "mine.py"


def test_a_bug_in_a_constructor_is_shown_alone(command: Callable, config: Path) -> None:
    """Without what the parser said of it on the way."""
    (config.parent / "mine.py").write_text(OWN)
    with pytest.raises(KeyError) as info:
        command("fit", "--config", config, "--model.reward", "mine.Buggy")
    shown = "".join(traceback.format_exception(info.value))
    assert shown.count("Traceback") == 1
    assert "Union" not in shown


def test_a_module_that_cannot_be_imported_says_why(command: Callable, config: Path) -> None:
    (config.parent / "broken.py").write_text("def f(:\n")
    with pytest.raises(SyntaxError, match="invalid syntax"):
        command("fit", "--config", config, "--model.reward", "broken.Redness")


def _raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_only_deliberate_value_errors_are_mendable() -> None:
    class Strict:
        def __init__(self) -> None:
            raise ValueError("write something else")

    def elsewhere() -> None:
        raise ValueError("a library's own")

    assert is_mendable(_raised(Strict))
    assert not is_mendable(_raised(elsewhere))
    assert not is_mendable(_raised(lambda: int("five")))
    assert not is_mendable(_raised(lambda: {}["five"]))


def test_unwrapped_raises_what_passes_unchanged() -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as info, unwrapped():
        raise error
    assert info.value is error
