"""Seeds that are not written take the value of `seed_everything`; written and saved ones are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lightning_draft.cli.build import BuildCLI
from lightning_draft.cli.process import process_arguments
from lightning_draft.cli.run_seeds import chosen_at_random, fill_seeds, set_seeds
from lightning_draft.errors import ConfigurationError

NAMES = ("model.seed", "model.model.lora.seed", "data.seed")


def parsed(everything: int | bool, written: dict[str, int], has_lora: bool = True) -> Namespace:
    """Return options as the parser does, with `None` for a seed that is not written."""
    method, adapters, data = (Namespace(seed=written.get(name)) for name in NAMES)
    method.model = Namespace(class_path="StableDiffusion", init_args=Namespace(lora=adapters if has_lora else None))
    return Namespace(seed_everything=everything, model=Namespace(class_path="DraftModule", init_args=method), data=data)


def seeds(options: Any) -> tuple[Any, ...]:
    """Return the seeds of a configuration: of the method, the adapters and the data."""
    method = options["model"]["init_args"]
    adapters = method["model"]["init_args"]["lora"]
    return method["seed"], adapters and adapters["seed"], options["data"]["seed"]


@pytest.mark.parametrize(
    ("everything", "written", "saved", "expected"),
    [
        (0, {}, {}, (0, 0, 0)),
        (7, {}, {}, (7, 7, 7)),
        (False, {}, {}, (0, 0, 0)),
        (7, {"model.seed": 0}, {}, (0, 7, 7)),
        (7, {"model.model.lora.seed": 0}, {}, (7, 0, 7)),
        (7, {"data.seed": 3}, {}, (7, 7, 3)),
        (7, {"data.seed": 3}, dict.fromkeys(NAMES, 5), (5, 5, 3)),
        (7, {}, {"model.seed": 5, "model.model.lora.seed": None}, (5, None, 7)),
    ],
)
def test_unwritten_seed_is_that_of_the_checkpoint_or_of_seed_everything(
    everything: Any, written: dict[str, int], saved: dict[str, Any], expected: tuple[int, ...]
) -> None:
    options = parsed(everything, written)
    fill_seeds(options, saved)
    assert seeds(options) == expected


def test_model_without_adapters_has_no_seed_of_adapters() -> None:
    options = parsed(7, {}, has_lora=False)
    fill_seeds(options, {})
    assert seeds(options) == (7, None, 7)


def test_random_seed_is_new_in_each_run_and_the_same_in_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is set by the first process of a run, and is still set in a second run of the same process."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert len({5, chosen_at_random(), chosen_at_random()}) == 3
    assert chosen_at_random(num_nodes=2) == 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen_at_random() == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    with pytest.raises(ConfigurationError, match=r"seed_everything=true .* write a number"):
        chosen_at_random()


@pytest.mark.parametrize(
    ("everything", "before", "expected"), [(True, 5, 5), (1, 5, 1), (False, 5, False), (0, None, 0)]
)
def test_resumed_run_keeps_its_random_seed(everything: Any, before: Any, expected: Any) -> None:
    options = Namespace(trainer=Namespace(num_nodes=1), **vars(parsed(everything, {})))
    with torch.random.fork_rng():
        set_seeds(options, {} if before is None else {"seed_everything": before, "model.seed": before})
        assert expected is False or torch.initial_seed() == expected
    assert options["seed_everything"] == expected
    assert seeds(options)[0] == (expected if before is None else before)


def test_seed_changes_noise_adapters_and_prompt_order_but_not_the_held_out_prompts(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*options: str) -> BuildCLI:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        with process_arguments(["fit", "--config", str(config), *options]):
            return BuildCLI("fit")

    first, second = built(), built("--seed_everything", "true")
    assert seeds(first.config["fit"]) == (first.model.seed, 0, first.datamodule.seed) == (0, 0, 0)
    assert set(seeds(second.config["fit"])) == {second.config["fit"]["seed_everything"]} == {second.model.seed}
    adapters = [
        torch.cat([value.flatten() for value in cli.model.trainable_parameters().values()]) for cli in (first, second)
    ]
    assert not torch.equal(*adapters)
    orders = []
    for cli in (first, second):
        batches = cli.datamodule.train_dataloader()
        orders.append([batches.batch(number) for number in range(20)])
    assert orders[0] != orders[1]
    assert first.datamodule.val_prompts == second.datamodule.val_prompts


def test_seeds_are_recorded_and_kept_by_a_resumed_run(command: Callable, config: Path, finished: Path) -> None:
    def fit(*options: object) -> tuple[torch.Tensor, tuple[Any, ...]]:
        optimizer = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.05", "--trainer.limit_val_batches", 0)
        written = ("--data.seed", 0, "--model.model.lora.seed", 0, "--samples", "null")
        result = command("fit", "--config", config, *optimizer, *written, *options)
        assert result.status == 0, result.err
        assert "--model.seed" not in result.out + result.err
        assert "differs from an uninterrupted one" not in result.out + result.err
        return outcome(Path(result.out.split("run folder: ")[1].split()[0]))

    (other, recorded), (weights, default) = fit("--seed_everything", 1), outcome(finished / "runs/small")
    assert (default, recorded) == ((0, 0, 0), (1, 0, 0))
    assert not torch.equal(weights, other)  # the runs differ in their noise alone
    assert fit("--ckpt_path", "runs/small/checkpoints/last.ckpt", "--trainer.max_steps", 3)[1] == (1, 0, 0)


def outcome(folder: Path) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Return the trained adapters of a run and its recorded seeds."""
    state = torch.load(folder / "checkpoints/last.ckpt")["state_dict"]
    adapters = torch.cat([value.flatten() for key, value in state.items() if "lora_B" in key])
    return adapters, seeds(yaml.safe_load((folder / "config.yaml").read_text()))
