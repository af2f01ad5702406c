"""The command `plan`: long chains from short ones, options that lower the peak, the largest batch, sizes of cards."""

import json
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from lightning_draft.cli import plan as command
from lightning_draft.cli.plan_alternatives import ALTERNATIVES, distinct
from lightning_draft.cli.plan_report import report, size
from lightning_draft.errors import ConfigurationError
from lightning_draft.plan import EmbeddingPlan, StepPlan


@pytest.fixture
def counted_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command count real steps, which gives the same and is faster."""
    monkeypatch.setattr(command, "without_weights", nullcontext)


def run(folder: Path, *options: str) -> command._Run:
    return command._plan(
        [
            *("--model.model", "StableDiffusion", "--model.model.pretrained", str(folder)),
            *("--model.reward", "ColorTarget", "--data.prompts", '["a cat"]', "--data.val_size", "0"),
            *("--model.sampler", "DDIM", "--data.batch_size", "1", *options),
        ]
    )


@pytest.mark.usefixtures("counted_with_weights")
def test_refl_is_planned_although_it_needs_more_steps_than_have_a_gradient(
    small_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model.sampler.num_steps", "3", "--model.truncation", "ReFL", "--model.truncation.m", "3")
    plan = run(small_sd, *options).plan
    monkeypatch.setattr(command, "_steps_needed", lambda module: module.sampler.num_steps)
    whole = run(small_sd, *options).plan
    assert (plan.live, plan.flops, plan.calls) == (whole.live, whole.flops, whole.calls)


@pytest.mark.usefixtures("counted_with_weights")
@pytest.mark.parametrize("truncation", ["LastK", "Full"])
def test_plan_of_a_long_chain_from_short_ones_equals_the_whole_count(
    small_sd: Path, truncation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, counted, count = ("--model.sampler.num_steps", "6", "--model.truncation", truncation), [], command._count

    def noted(cli: Any, module: Any, *rest: Any) -> StepPlan:
        counted.append(module.sampler.num_steps)
        return count(cli, module, *rest)

    monkeypatch.setattr(command, "_count", noted)
    short = run(small_sd, *options)
    assert max(counted) < 6
    monkeypatch.setattr(command, "_LONG", 6)
    monkeypatch.setattr(command, "_steps_needed", lambda module: module.sampler.num_steps)
    whole = run(small_sd, *options)
    assert (short.plan.live, short.plan.flops, short.plan.calls) == (
        whole.plan.live,
        whole.plan.flops,
        whole.plan.calls,
    )


@pytest.mark.usefixtures("counted_with_weights")
@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        (("--model.window", "SlidingWindow", "--model.window.size", "3"), 3),
        (
            (
                *("--model.kl_weight", "0.1", "--model.kl_gate", "{}", "--model.kl_reference", "{}"),
                *("--model.eval_rewards", '{"bright": {"class_path": "Brightness"}}'),
                *("--model.advantage_estimator", "DiversityAware"),
            ),
            6,
        ),
    ],
    ids=["window", "gardo"],
)
def test_plan_of_a_policy_with_many_steps_equals_the_whole_count(
    small_sd: Path, options: tuple[str, ...], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer step is a rollout in the short chains, too."""
    settings = (
        *("--model", "PolicyGradientModule", "--model.sampler.num_steps", "6", "--model.sampler.eta", "1.0"),
        *("--model.samples_per_prompt", "2", "--model.timesteps_per_minibatch", "1"),
        *("--trainer.accumulate_grad_batches", str(accumulate), *options),
    )
    short = run(small_sd, *settings).plan
    monkeypatch.setattr(command, "_LONG", 6)
    whole = run(small_sd, *settings).plan
    assert (short.flops, short.calls) == (whole.flops, whole.calls)
    assert short.live == pytest.approx(whole.live, rel=1e-4)  # some scalars live shorter in the second plan


@pytest.mark.usefixtures("counted_with_weights")
@pytest.mark.parametrize(("accumulate", "prompts"), [(1, 2), (2, 2), (4, 4)])
def test_prompts_of_a_step_are_those_of_its_rollouts(small_sd: Path, accumulate: int, prompts: int) -> None:
    """A rollout of two prompts has two minibatches, one for each step with noise."""
    policy = ("--model.sampler.eta", "1", "--model.sampler.num_steps", "3", "--model.timesteps_per_minibatch", "1")
    found = run(
        small_sd,
        *("--model", "PolicyGradientModule", *policy, "--model.samples_per_prompt", "2", "--data.batch_size", "2"),
        *("--data.prompts", '["a cat", "a dog"]', "--trainer.accumulate_grad_batches", str(accumulate)),
    )
    assert found.prompts == prompts


@pytest.mark.usefixtures("counted_with_weights")
@pytest.mark.parametrize(
    ("batch_size", "options", "omitted"),
    [
        (1, (), {"--model.checkpointing step", "--model.micro_batch_size 1"}),
        (2, ("--model.micro_batch_size", "1"), {"--model.checkpointing step", "--model.micro_batch_size 1"}),
    ],
)
def test_alternatives_that_would_give_the_same_plan_are_not_planned(
    small_sd: Path, batch_size: int, options: tuple[str, ...], omitted: set[str]
) -> None:
    settings = ("--data.batch_size", str(batch_size), "--model.sampler.num_steps", "2", *options)
    planned = run(small_sd, *settings)
    kept = list(distinct(ALTERNATIVES, planned.options))
    assert "--model.checkpointing block" in kept
    assert set(ALTERNATIVES) - set(kept) >= omitted
    for option in omitted:
        assert run(small_sd, *settings, *option.split()).plan == planned.plan


def test_alternatives_are_distinct() -> None:
    options = {"model.checkpointing": "both", "model.model.dtype": "bfloat16", "model.model.memory.decode_chunk": "1"}
    kept = list(distinct(ALTERNATIVES, options))
    assert [each.split(" --")[0].split()[-1] for each in kept if "decoder" in each] == ["true", "block"]
    assert not [each for each in kept if "both" in each or "dtype" in each]


@pytest.mark.parametrize("option", ["--model.model.text.cache embeddings", "--model.model.quantization torchao-int8"])
def test_alternatives_without_weights_are_planned_in_any_environment(small_sd: Path, option: str) -> None:
    """torchao need not be installed, and no embedding is written."""
    assert option in ALTERNATIVES
    options = ("--model.sampler.num_steps", "2")
    plan, other = (run(small_sd, *options, *more).plan for more in ((), option.split()))
    assert sum(other.weights.values()) < 0.9 * sum(plan.weights.values())


@pytest.mark.usefixtures("counted_with_weights")
def test_page_names_the_parts_and_the_options_that_lower_the_peak(
    small_sd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "ALTERNATIVES", ("--model.checkpointing step", "--model.timesteps_per_minibatch 1"))
    config = small_sd.with_name("plan.yaml")
    method = {
        "model": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(small_sd)}},
        "sampler": {"class_path": "DDIM", "init_args": {"num_steps": 2}},
        "truncation": "Full",
        "checkpointing": "none",
        "reward": "ColorTarget",
    }
    data = {"prompts": ["a cat"], "batch_size": 1, "val_size": 0}
    config.write_text(json.dumps({"model": {"class_path": "DraftModule", "init_args": method}, "data": data}))
    assert command.main(["--config", str(config), "--flops", "1e12"]) == 0
    page = capsys.readouterr().out
    assert "Peak memory of a training step" in page
    assert "denoiser" in page
    assert " s\n" in page
    assert "--model.checkpointing step" in page
    assert "timesteps_per_minibatch" not in page


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (100, "of which a tenth is left free: 8 (0.1 KiB)"),
        (2**20, "a GPU of 1 MiB, of which a tenth is left free: more than 65536, the limit of --data.batch_size"),
        (12 * 1024, "of which a tenth is left free: about 1105, extrapolated"),
        (10, "Does not fit a GPU of 9.537e-06 MiB, of which a tenth is left free: a batch of 1 needs 0.0 KiB"),
    ],
)
def test_largest_batch_is_the_last_one_within_nine_tenths_of_the_card(
    memory: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak_of(args: list[str], rollouts: Fraction | None = None) -> command._Run:
        size = int(args[args.index("--data.batch_size") + 1])
        return command._Run("", StepPlan({"denoiser": 5}, 3, 10 * size, {}, {}, {}), size)

    monkeypatch.setattr(command, "_plan", peak_of)
    assert expected in command._largest_batch([], peak_of(["--data.batch_size", "1"]), memory)


POLICY = (
    *("--model", "PolicyGradientModule", "--model.sampler.num_steps", "3", "--model.sampler.eta", "1.0"),
    *("--model.samples_per_prompt", "2", "--model.timesteps_per_minibatch", "1", "--model.micro_batch_size", "2"),
)


@pytest.mark.usefixtures("counted_with_weights")
@pytest.mark.parametrize(
    ("accumulate", "epochs", "prompts", "uses"), [(4, 1, 2, 1), (8, 1, 4, Fraction(1, 2)), (2, 1, 2, 2), (4, 2, 2, 2)]
)
def test_optimizer_steps_that_use_a_rollout_are_counted(
    small_sd: Path, accumulate: int, epochs: int, prompts: int, uses: Fraction
) -> None:
    options = ("--trainer.accumulate_grad_batches", str(accumulate), "--model.inner_epochs", str(epochs))
    found = run(small_sd, *POLICY, *options, "--data.batch_size", "2")
    assert (found.prompts, found.uses) == (prompts, uses)


@pytest.mark.usefixtures("counted_with_weights")
def test_largest_batch_of_an_objective_that_needs_whole_rollouts(small_sd: Path) -> None:
    options = (*POLICY, "--model.objective", "PRDP", "--model.advantage_estimator", "GroupRelative")
    whole = run(small_sd, *options, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "4")
    one = run(small_sd, *options, "--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2")
    args = ["--model.model", "StableDiffusion", "--model.model.pretrained", str(small_sd), "--model.reward"]
    args += ["ColorTarget", "--data.prompts", '["a cat"]', "--data.val_size", "0", "--model.sampler", "DDIM", *options]
    line = command._largest_batch(
        [*args, "--trainer.accumulate_grad_batches", "4"], whole, int(one.plan.peak / 0.9) + 1
    )
    assert "left free: 1 (" in line
    assert "--trainer.accumulate_grad_batches 2." in line


def test_peak_is_that_of_the_embedding_of_prompts_if_it_is_higher() -> None:
    plan = StepPlan({"trained": 10}, 70, 20, {"other": 20}, {}, {}, EmbeddingPlan({"text encoder": 150}, 50))
    page = report("", plan, 1)
    assert (plan.peak, plan.step_peak) == (200, 100)
    assert "Peak memory of the run  0.2 KiB, while the prompts are embedded" in page
    assert "largest: the optimizer state (70% of the peak)" in page
    assert "gradients, sampler and loss" in page


@pytest.mark.usefixtures("counted_with_weights")
def test_embedding_before_the_first_step_is_planned(small_sd: Path, tmp_path: Path) -> None:
    options = ("--model.sampler.num_steps", "2")
    kept = run(small_sd, *options).plan
    cached = run(small_sd, *options, "--model.model.text.cache", str(tmp_path / "embeddings")).plan
    assert kept.embedding is None
    assert cached.embedding is not None
    assert cached.embedding.weights["text encoder"] == kept.weights["text encoder"]
    assert cached.embedding.live > 0
    assert "text encoder" not in cached.weights


@pytest.mark.parametrize(("text", "expected"), [("12GB", 12 * 2**30), ("1.5 GiB", 3 * 2**29), ("800mb", 800 * 2**20)])
def test_sizes_of_cards(text: str, expected: int) -> None:
    assert command.parse_size(text) == expected


@pytest.mark.parametrize("text", ["12", "GB", "-3GB", "0GB", "12TB"])
def test_what_is_no_size_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--memory {text} is not a size; write .*, such as 12GB"):
        command.parse_size(text)


def test_sizes_are_printed_with_their_unit() -> None:
    assert (size(3 * 2**19), size(3 * 2**30)) == ("1.5 MiB", "3.00 GiB")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "fast"])
def test_flops_that_are_not_a_positive_number_are_rejected_before_the_plan(value: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"--flops {value} is not a positive number; write FLOP/s such as 60e12"
    ):
        command.main(["--config", "quickstart", "--flops", value])
