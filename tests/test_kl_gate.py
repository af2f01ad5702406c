"""The gated KL term, its moving reference, and diversity-aware advantages, against straight-line implementations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_draft.advantages import GroupRelative, PerPromptStatistics
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.callbacks.lora_header import describe
from lightning_draft.diversity import DiversityAware
from lightning_draft.errors import ConfigurationError
from lightning_draft.forward_objectives import RWR
from lightning_draft.kl_gate import KLGate, MovingReference, disagreement, suspicious
from lightning_draft.methods.kl_regularizer import KLRegularizer, KLState
from lightning_draft.objectives import PPO
from lightning_draft.rewards import Brightness, ColorTarget
from lightning_draft.value_baseline import ValueBaseline
from lightning_draft.weightless import without_weights
from tests import tiny_forward_process
from tests.tiny_policy_gradients import Cut, Recorder, fit, linear, trainer_of
from tests.tiny_runs import PROMPTS, data

MOVING = MovingReference(max_rollouts=1)


def values(seed: int, count: int = 12) -> Tensor:
    """Scores with ties."""
    return torch.randint(0, 6, (count,), generator=torch.Generator().manual_seed(seed)).float()


def gated(**options: Any) -> Any:
    settings = {"eval_rewards": {"bright": Brightness(), "red": ColorTarget(1.0, 0.0, 0.0)}, "kl_weight": 0.5}
    return linear(**{**settings, "kl_gate": KLGate(fraction=0.5, max_fraction=0.5), "samples_per_prompt": 4, **options})


def test_disagreement_is_the_difference_of_win_rates() -> None:
    trained, others = values(0), [values(1), values(2), values(3)]
    found = disagreement(trained, others)

    def win_rate(scores: Tensor, i: int) -> float:
        wins = [1.0 if scores[i] > score else 0.5 if scores[i] == score else 0.0 for score in scores]
        return (sum(wins) - 0.5) / (len(scores) - 1)

    for i in range(len(trained)):
        expected = win_rate(trained, i) - np.mean([win_rate(scores, i) for scores in others])
        assert found[i].item() == pytest.approx(expected, abs=1e-12)
    assert not disagreement(trained, [3 * trained + 1] * 3).any()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_suspicious_samples_exceed_the_percentile_of_the_nonnegative_values(fraction: float) -> None:
    found = disagreement(values(4, 40), [values(5, 40)])
    threshold = np.percentile([value for value in found.tolist() if value >= 0], 100 * (1 - fraction))
    chosen = suspicious(found, fraction)
    assert chosen.tolist() == [value > threshold + 1e-12 for value in found.tolist()]
    assert 0 < chosen.sum() <= 40 * fraction
    assert not suspicious(torch.zeros(5, dtype=torch.float64), fraction).any()


def test_fraction_follows_the_disagreement_within_its_range() -> None:
    gate = KLGate(fraction=0.1, min_fraction=0.05, max_fraction=0.12, history=2)
    regularizer, recent, expected = KLRegularizer(1.0, gate), [], 0.1
    for seed in range(8):
        trained, evaluated = values(seed), {"a": values(seed + 100)}
        found = disagreement(trained, [evaluated["a"]])
        mean = float(found[found >= 0].mean())
        if recent:
            grown = 1.1 if mean > max(recent) else 0.9 if mean < min(recent) else 1.0
            expected = min(max(expected * grown, 0.05), 0.12)
        recent = [*recent, mean][-2:]
        chosen, logs = regularizer.select(trained, evaluated, 0)
        assert regularizer.state.fraction == pytest.approx(expected)
        assert regularizer.state.recent == pytest.approx(tuple(recent))
        assert torch.equal(chosen, suspicious(found, expected))
        assert logs == {
            "train/kl_gated": pytest.approx(chosen.double().mean()),
            "train/kl_disagreement": pytest.approx(mean),
        }
    assert expected not in (0.1, 0.05)


def test_only_suspicious_samples_have_a_kl_term() -> None:
    """Also the gradient, and in minibatches; the divergence is logged over all samples."""
    module, plain = gated(), linear(samples_per_prompt=4, kl_weight=0.5)
    for each in (module, plain):
        each.model.theta.data += 0.05
    rollout = module.collect_rollout(PROMPTS[:2])
    images = module.model.decode(rollout.latents[-1]).float().clamp(0, 1)
    scores = [reward(images, rollout.prompts) for reward in module.eval_rewards]
    assert torch.equal(rollout.kl_gate, suspicious(disagreement(rollout.rewards, scores), 0.5))
    assert 0 < rollout.kl_gate.sum() < 8
    loss, logs = module.loss_and_logs(PROMPTS[:2], rollout, *module.minibatches(2))
    each = []
    for i in range(8):
        alone = plain.policy.evaluate(
            [rollout.prompts[i]], rollout.latents[:, i : i + 1], plain.policy.steps, plain.model.base()
        )
        each.append(alone.kl.mean())
    gate = rollout.kl_gate.float()
    penalty = 0.5 * (torch.stack(each) * gate).mean()
    assert loss.item() == pytest.approx((logs["train/policy_loss"] + penalty).item(), rel=1e-5)
    assert logs["train/loss"].item() == pytest.approx(loss.item())
    assert logs["train/kl"].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    without, _ = module.loss_and_logs(PROMPTS[:2], replace(rollout, kl_gate=gate * 0), *module.minibatches(2))
    slopes = [
        torch.autograd.grad(value, theta)[0]
        for value, theta in ((loss, module.model.theta), (without, module.model.theta), (penalty, plain.model.theta))
    ]
    assert slopes[0].item() - slopes[1].item() == pytest.approx(slopes[2].item(), rel=1e-3)


@pytest.mark.parametrize("options", [{"micro_batch_size": 3, "timesteps_per_minibatch": 1}, {"checkpointing": "step"}])
def test_minibatches_and_recomputation_give_the_same_gradient(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for accumulate, some in ((1, {}), (9 if "micro_batch_size" in options else 1, options)):
        module = gated(kl_reference=MovingReference(max_rollouts=1), **some)
        found.append(fit(tmp_path, module, steps=3, accumulate_grad_batches=accumulate).gradients[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


class Thetas(Recorder):
    """Also records the model and the reference's divergence at the first step on each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        reference = pl_module.regularizer.state.reference
        self.references.append(reference["model.theta"].item() if reference else 0.1)


def test_reference_is_replaced_by_the_model_when_it_is_old(tmp_path: Path) -> None:
    recorder = Thetas()
    module = linear(kl_weight=1e-3, kl_reference=MovingReference(max_rollouts=2))
    before: list[float] = []

    class Before(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            before.append(pl_module.model.theta.item())

    trainer_of(tmp_path, recorder, Before(), max_steps=6).fit(module, data())
    assert recorder.references == [0.1, 0.1, before[2], before[2], before[4], before[4]]
    assert [kl == 0 for kl in recorder.of("train/kl")] == [True, False, True, False, True, False]


def test_reference_is_replaced_by_the_model_when_it_is_far(tmp_path: Path) -> None:
    """The divergence that counts is the mean of the last optimizer step, here of 4 minibatches."""
    module = linear(kl_weight=1e-3, kl_reference=MovingReference(max_kl=1e-5, max_rollouts=None))
    module.timesteps_per_minibatch, recorder = 1, Recorder()
    trainer_of(tmp_path, recorder, max_steps=6, accumulate_grad_batches=3).fit(module, data())
    kl = recorder.of("train/kl")
    assert max(kl) > 1e-5
    assert [now == 0 for now in kl[1:]] == [then > 1e-5 for then in kl[:-1]]


@pytest.mark.parametrize("interrupted", [False, True], ids=["saved", "interrupted"])
def test_resumed_run_equals_uninterrupted_run(interrupted: bool, tmp_path: Path) -> None:
    def run(*callbacks: Any, ckpt: str | None = None) -> Any:
        module = gated(
            kl_reference=MovingReference(max_kl=1e-4, max_rollouts=2),
            objective=PPO(clip=1e-2),
            inner_epochs=2,
            timesteps_per_minibatch=1,
        )
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_steps": 8, "accumulate_grad_batches": 3, "enable_checkpointing": True}
        trainer_of(tmp_path, every, LastCheckpoint(dirpath=str(tmp_path)), *callbacks, **options).fit(
            module, data(), ckpt_path=ckpt
        )
        state = module.regularizer.state
        return (
            module.model.theta.item(),
            {name: value.item() for name, value in state.reference.items()},
            *list(vars(state).values())[1:],
        )

    straight = run()
    assert straight[1]
    if interrupted:
        with pytest.raises(SystemExit):
            run(Cut(14))
    assert run(ckpt=str(tmp_path / ("last.ckpt" if interrupted else "step=3.ckpt"))) == straight


def test_reference_of_a_checkpoint_is_moved_once_to_the_devices_of_the_parameters() -> None:
    parameters, regularizer = {"w": nn.Parameter(torch.zeros(2, device="meta"))}, KLRegularizer(1.0, None, MOVING)
    regularizer.load_state_dict({"reference": {"w": torch.ones(2)}, "rollouts": 1})
    found = []
    for _ in range(2):
        with regularizer.reference_model(linear().model, parameters):
            found.append(regularizer.state.reference["w"])
    assert found[0].device.type == "meta"
    assert found[1] is found[0]
    assert regularizer.state.rollouts == 1


def test_resumed_run_without_a_moving_reference_has_the_base_model_as_reference() -> None:
    module, other = linear(kl_weight=1.0), linear(kl_weight=1.0, kl_reference=MOVING)
    other.regularizer.state = KLState({"model.theta": torch.tensor(0.7, dtype=torch.float64)}, fraction=0.2)
    module.regularizer.load_state_dict(other.regularizer.state_dict(other.regularizer.state))
    module.model.theta.data += 0.05
    with module.regularizer.reference_model(module.model, module.trainable_parameters()):
        found = module.model.denoise(x := module.model.noise(1), 500, module.model.encode(["a"]))
    with module.model.base():
        assert torch.equal(found, module.model.denoise(x, 500, module.model.encode(["a"])))
    assert module.regularizer.state.fraction == 0.2


def test_gate_of_a_plan_has_no_values() -> None:
    with without_weights():
        scores = torch.zeros(6)
        chosen, logs = KLRegularizer(1.0, KLGate()).select(scores, {"a": torch.ones(6)}, 0)
        advantages = DiversityAware().from_features(scores, torch.zeros(6, 3, 2, 2), 3)
    assert (chosen.shape, advantages.shape, len(logs)) == ((6,), (6,), 2)


class Keep(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        rollout, state = pl_module.buffer.rollout.state_dict(), pl_module.regularizer.state
        kept = {"theta": pl_module.model.theta.detach(), "reference": dict(state.reference), "rollout": rollout}
        torch.save({**kept, "fraction": state.fraction}, self.folder / f"{trainer.global_rank}.pt")


def test_processes_share_the_quantile_and_the_reference(tmp_path: Path) -> None:
    module = gated(kl_reference=MovingReference(max_kl=1e-6, max_rollouts=None))
    trainer_of(tmp_path, Keep(tmp_path), max_steps=3, strategy="ddp_fork", devices=2).fit(module, data())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["theta"], two["theta"])
    assert one["reference"]
    assert one["reference"] == two["reference"]
    assert one["fraction"] == two["fraction"]
    rollouts = [each["rollout"] for each in (one, two)]
    images = [each["latents"][-1].clamp(0, 1).float() for each in rollouts]
    scores = [
        torch.cat([r(x, each["prompts"]) for x, each in zip(images, rollouts, strict=True)])
        for r in (Brightness(), ColorTarget(1.0, 0.0, 0.0))
    ]
    found = disagreement(torch.cat([each["rewards"] for each in rollouts]), scores)
    assert torch.equal(torch.cat([each["kl_gate"] for each in rollouts]), suspicious(found, one["fraction"]))


def test_forward_process_has_the_same_term(tmp_path: Path) -> None:
    """Its first reference is the base model; later ones are copies of the model, for the KL term only."""
    options = {
        "eval_rewards": {"red": ColorTarget(1.0, 0.0, 0.0)},
        "kl_weight": 0.5,
        "kl_gate": KLGate(fraction=0.9, max_fraction=1.0),
    }
    module = tiny_forward_process.linear(**options, kl_reference=MovingReference(max_rollouts=1))
    prompts = tiny_forward_process.PROMPTS
    for number in (0, 1):
        rollout = tiny_forward_process.in_float64(module.collect_rollout(prompts, number))
        reference = module.model.theta.item() if number else tiny_forward_process.BASE
        module.model.theta.data += 0.05
        loss, logs = module.loss_and_logs(prompts, rollout, *module.minibatches(2))
        plain = replace(rollout, kl_gate=torch.zeros(len(rollout.rewards)))
        other, _ = module.loss_and_logs(prompts, plain, *module.minibatches(2))
        kl = torch.zeros(len(rollout.rewards), dtype=torch.float64)
        times = module.training_times(number, 0)
        for index, t in enumerate(times):
            alpha, sigma = module.model.schedule.coefficients(t)
            noise = module._noise(number, range(len(kl)), 0, index)
            x = alpha * rollout.latents[-1] + sigma * noise
            kl += ((module.model.theta.item() - reference) * x).square().flatten(1).mean(1) / len(times)
        assert 0 < rollout.kl_gate.sum() < len(kl)
        assert (loss - other).item() == pytest.approx(0.5 * (kl * rollout.kl_gate).mean().item(), rel=1e-6)
        assert logs["train/kl"].item() == pytest.approx(kl.mean().item(), rel=1e-6)


def test_diversity_multiplies_good_samples_by_their_relative_distance() -> None:
    """Three images at 0, 0.1 and 0.5: nearest distances 0.1, 0.1, 0.4, of mean 0.2."""
    images = torch.tensor([0.0, 0.1, 0.5])[:, None, None, None].expand(3, 3, 2, 2)
    rewards = torch.tensor([1.0, 4.0, 4.0], dtype=torch.float64)
    found = DiversityAware().from_features(rewards, images, 3)
    assert found.tolist() == pytest.approx([-2.0, 1.0 * 0.5, 1.0 * 2.0], rel=1e-5)
    same = torch.cat([images, torch.zeros_like(images)])
    found = DiversityAware().from_features(rewards.repeat(2), same, 3)
    assert found.tolist() == pytest.approx([-2.0, 0.5, 2.0, -2.0, 1.0, 1.0], rel=1e-5)


def test_diversity_of_features_is_that_of_cosines() -> None:
    """Directions at 0, 60 and 180 degrees: nearest distances 0.5, 0.5 and 1.5."""
    angles = torch.tensor([0.0, torch.pi / 3, torch.pi])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [5.0]])
    found = DiversityAware().from_features(torch.tensor([4.0, 1.0, 4.0]), features, 3)
    assert found.tolist() == pytest.approx([1 * 0.5 / (2.5 / 3), -2, 1.5 / (2.5 / 3)], rel=1e-5)


@pytest.mark.parametrize("pretrained", [None, "emoji64-clip"])
def test_rollout_advantages_use_the_images(pretrained: str | None) -> None:
    estimator = DiversityAware(pretrained)
    module = linear(advantage_estimator=estimator, samples_per_prompt=4, micro_batch_size=3)
    rollout = module.collect_rollout(PROMPTS[:2])
    images = module.model.decode(rollout.latents[-1]).float().clamp(0, 1)
    expected = estimator.from_features(rollout.rewards, estimator.features(images), 4)
    torch.testing.assert_close(rollout.advantages, expected, rtol=1e-4, atol=1e-6)
    plain = GroupRelative()(rollout.rewards, rollout.prompts, 4)
    assert torch.equal(rollout.advantages.sign(), plain.sign())
    assert not torch.allclose(rollout.advantages, plain)


def test_file_headers_name_the_options_of_the_kl_term_and_the_baseline() -> None:
    module = gated(
        kl_reference=MovingReference(),
        value_baseline=ValueBaseline(2),
        advantage_estimator=DiversityAware("emoji64-clip"),
    )
    found = {name: describe(part) for name, part in module.strategies().items()}
    assert found["kl_gate"].startswith("KLGate(fraction=0.5, min_fraction=0.02, max_fraction=0.5, ")
    assert found["kl_reference"] == "MovingReference(max_rollouts=15)"
    assert found["value_baseline"] == "ValueBaseline(pool=2, ridge=1.0, decay=0.9)"
    assert found["advantage_estimator"] == "DiversityAware(pretrained='emoji64-clip')"
    assert not {"kl_gate", "kl_reference", "value_baseline", "window"} & linear().strategies().keys()


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, None])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: linear(kl_weight=1.0, kl_reference=MOVING), "kl_reference"),
        (lambda: tiny_forward_process.linear(kl_weight=1.0, kl_reference=MOVING, objective=RWR()), "kl_reference"),
        (tiny_forward_process.linear, "DiffusionNFT"),
    ],
)
def test_copies_of_parameters_are_rejected_with_sharding(make: Callable[[], Any], name: str, strategy: Any) -> None:
    module = make()
    module._trainer = SimpleNamespace(strategy=strategy and strategy(), datamodule=None)
    if strategy is None:
        module.check_configuration()
        return
    with pytest.raises(ConfigurationError, match=f"{name} needs a copy of the trained parameters, .* strategy to ddp"):
        module.check_configuration()


def running(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: fit(folder, linear(**options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: KLGate(fraction=0.0), "kl_gate.fraction=0.0 must be a positive number"),
        (lambda folder: KLGate(fraction=1.5), "kl_gate.fraction=1.5 must be between 0 and 1"),
        (lambda folder: KLGate(min_fraction=0.3), "kl_gate.min_fraction=0.3 must be between 0 and 0.1"),
        (lambda folder: KLGate(max_fraction=0.05), "kl_gate.max_fraction=0.05 must be between 0.1 and 1"),
        (lambda folder: KLGate(growth=1.0), "kl_gate.growth=1.0 must be at least 0 and less than 1"),
        (lambda folder: KLGate(rewards=[]), "kl_gate.rewards=\\[\\] is empty"),
        (lambda folder: MovingReference(max_kl=0.0), "kl_reference.max_kl=0.0 must be a positive number"),
        (lambda folder: MovingReference(max_rollouts=0), "kl_reference.max_rollouts=0 must be at least 1"),
        (lambda folder: MovingReference(None, None), "max_kl and max_rollouts are null"),
        (running(kl_gate=KLGate()), "kl_gate changes the KL term, and kl_weight=0 turns it off"),
        (running(kl_reference=MovingReference()), "kl_reference changes the KL term, and kl_weight=0"),
        (running(kl_gate=KLGate(), kl_weight=0.1), "kl_gate compares the trained reward with eval_rewards"),
        (
            running(kl_gate=KLGate(["red"]), kl_weight=0.1, eval_rewards={"bright": Brightness()}),
            "kl_gate.rewards contains red, which is not one of eval_rewards; write some of bright",
        ),
        (
            lambda _: gated(samples_per_prompt=1, advantage_estimator=PerPromptStatistics()).collect_rollout(["a"]),
            "kl_gate compares the samples of a rollout, and there is one; set samples_per_prompt to 2 or more",
        ),
        (
            lambda folder: DiversityAware()(torch.zeros(2), ["a", "a"], 2),
            "DiversityAware needs the images of the samples",
        ),
    ],
)  # fmt: skip
def test_invalid_settings_are_configuration_errors(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(tmp_path)
