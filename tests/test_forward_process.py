"""The forward-process module: network calls, minibatches, rollouts, the old policy, and training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError
from lightning_draft.forward_objectives import AWM, RWR, DiffusionNFT, ForwardObjective
from lightning_draft.group_objectives import CRD, DGPO
from lightning_draft.methods.checkpointing import Checkpointing
from lightning_draft.methods.forward_process import ForwardProcessModule
from lightning_draft.methods.old_policy import OldParameters, OldPolicy
from lightning_draft.models.base import Conditioning
from lightning_draft.objectives import PRDP, Reinforce
from lightning_draft.samplers import DDIM, DPMSolverPlusPlus, FlowEuler, Sampler
from lightning_draft.schedules import RectifiedFlow, VariancePreserving
from lightning_draft.seeds import derive_seed
from lightning_draft.testing import GaussianModel, LinearModel
from tests.tiny_forward_process import BASE, GROUP, PROMPTS, THETA, battery, linear, moved
from tests.tiny_policy_gradients import MILD, Cut, Recorder, trainer_of
from tests.tiny_runs import data, values


@battery
def test_number_of_network_calls(objective: ForwardObjective) -> None:
    """One call with gradient per time; one without for the base, and for a different old policy."""
    module = linear(objective=objective)
    rollout = module.collect_rollout(PROMPTS)
    (minibatch,) = module.minibatches(2)
    for has_moved in (False, True):
        module.model.calls_with_gradient = module.model.calls_without_gradient = 0
        module.loss_and_logs(PROMPTS, rollout, minibatch, moved=has_moved)
        assert module.model.calls_with_gradient == 4
        others = objective.needs_reference + (objective.needs_old and has_moved)
        assert module.model.calls_without_gradient == 4 * others


@battery
def test_minibatch_gradients_add_up_to_that_of_the_rollout(objective: ForwardObjective) -> None:
    gradients = []
    for options in ({}, {"micro_batch_size": GROUP, "timesteps_per_minibatch": 3}):
        module = linear(objective=objective, kl_weight=0.1, **options)
        rollout = moved(module)
        every = module.minibatches(2)
        losses = [each.fraction * module.loss_and_logs(PROMPTS, rollout, each)[0] for each in every]
        gradients.append(torch.autograd.grad(torch.stack(losses).sum(), module.model.theta)[0])
    assert len(every) == 4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("checkpointing", "calls"), [("none", 4), ("auto", 8)])
def test_default_recomputes_each_time_with_the_same_gradient(checkpointing: Checkpointing, calls: int) -> None:
    module = linear(objective=DiffusionNFT(), kl_weight=0.1, checkpointing=checkpointing)
    stored = linear(objective=DiffusionNFT(), kl_weight=0.1, timesteps_per_minibatch=4, checkpointing="none")
    gradients = []
    for each in (stored, module):
        rollout = moved(each)
        each.model.calls_with_gradient = 0
        loss = each.loss_and_logs(PROMPTS, rollout, each.minibatches(2)[0])[0]
        gradients.append(torch.autograd.grad(loss, each.model.theta)[0])
    assert torch.equal(*gradients)
    assert module.model.calls_with_gradient == calls


# Rollouts and the old policy.


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [(FlowEuler(4), RectifiedFlow()), (DDIM(3), MILD), (DDIM(3, eta=1.0), MILD), (DPMSolverPlusPlus(3), None)],
    ids=["flow", "ddim", "ddpm", "multistep"],
)
def test_rollouts_equal_samples_of_the_chain_for_any_micro_batch_size(sampler: Sampler, schedule: Any) -> None:
    model = LinearModel(BASE, "flow" if isinstance(schedule, RectifiedFlow) else "epsilon", schedule, (3, 2, 2))
    whole = linear(model=model, sampler=sampler).collect_rollout(PROMPTS)
    parts = linear(model=model, sampler=sampler, micro_batch_size=2).collect_rollout(PROMPTS)
    assert torch.equal(parts.latents, whole.latents)
    assert whole.latents.shape == (1, 2 * GROUP, 3, 2, 2)
    if sampler.step(model.schedule, torch.zeros(1), torch.zeros(1), *sampler.grid(model.schedule)[0])[0].std == 0:
        noise = model.noise(sampler.num_steps + 1, torch.Generator().manual_seed(derive_seed(0, 0, 0, 4)))[:1]
        chain = SamplingChain(model, sampler, model.encode(["a cat"]))
        assert torch.allclose(chain.advance(chain.start(noise)).x[0], whole.latents[0, 4], rtol=1e-6)


def test_the_old_policy_follows_the_parameters_and_samples_the_rollouts() -> None:
    """`theta_old <- d theta_old + (1 - d) theta` with a decay that grows from step 10 on, up to 0.5."""
    policy = OldPolicy(max_decay=0.5, rate=0.04, start=10)
    assert [policy.decay(step) for step in (0, 10, 15, 20, 100)] == pytest.approx([0, 0, 0.2, 0.4, 0.5])
    module = linear(old_policy=policy)
    module.collect_rollout(PROMPTS, 0, step=0)
    module.model.theta.data.fill_(0.9)
    rollout = module.collect_rollout(PROMPTS, 1, step=15)
    old = 0.2 * BASE + 0.8 * 0.9
    assert module.old.values["model.theta"].item() == pytest.approx(old)
    assert module.model.theta.item() == 0.9
    same = linear(model=LinearModel(old, "flow", RectifiedFlow(), (3, 2, 2))).collect_rollout(PROMPTS, 1)
    torch.testing.assert_close(rollout.latents, same.latents)


def test_old_values_of_a_checkpoint_are_moved_once_to_the_devices_of_the_parameters() -> None:
    old, saved = OldParameters(OldPolicy()), torch.ones(2)
    parameters = {"w": nn.Parameter(torch.zeros(2, device="meta"))}
    old.values = {"w": saved}
    found = []
    for _ in range(2):
        with old.in_use(parameters):
            found.append(old.values["w"])
    assert found[0].device.type == "meta"
    assert found[1] is found[0]


def test_a_run_without_an_old_policy_samples_with_the_model_also_after_a_resume() -> None:
    module = linear(objective=RWR())
    state = {"model.theta": torch.tensor(THETA, dtype=torch.float64)}
    module.on_load_checkpoint({"state_dict": state, "trained": ["model.theta"], "old_policy": {"model.theta": state}})
    assert module.old.values == {}


def test_old_and_current_values_are_not_confused_under_autocast() -> None:
    """Autocast keeps rounded parameters by their identity."""
    layer, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    parameters, old = dict(layer.named_parameters()), OldParameters(OldPolicy())
    layer.weight.data.fill_(2.0)
    old.update(parameters, 0)
    layer.weight.data.fill_(3.0)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with torch.no_grad(), old.in_use(parameters):
                found.append(layer(x).item())
            found.append(layer(x).item())
        assert torch.is_autocast_cache_enabled()
    assert found == [2.0, 3.0, 2.0, 3.0]


def test_training_times_cover_the_grid_or_the_schedule() -> None:
    grid = linear(sampler=FlowEuler(6), num_times=6)
    assert sorted(grid.training_times(0, 0)) == sorted(t for t, _ in FlowEuler(6).grid(RectifiedFlow()))
    assert grid.training_times(0, 0) != grid.training_times(1, 0) != grid.training_times(1, 1)
    assert len(set(linear(sampler=FlowEuler(6), num_times=2).training_times(0, 0))) == 2
    times = linear(times="uniform", num_times=10).training_times(3, 0)
    assert [int(10 * t) for t in times] == list(range(10))
    table = VariancePreserving(tuple(1 - i / 20 for i in range(1, 20)))
    discrete = linear(model=LinearModel(BASE, schedule=table), sampler=DDIM(2), times="uniform", num_times=19)
    assert discrete.training_times(0, 0) == list(range(19))


# Training.


def fit(folder: Path, module: ForwardProcessModule, steps: int, *callbacks: Callback, **options: Any) -> Recorder:
    recorder = Recorder()
    ckpt = options.pop("ckpt_path", None)
    trainer = trainer_of(folder, recorder, *callbacks, max_steps=steps, **options)
    trainer.fit(module, data(), ckpt_path=ckpt)
    return recorder


class Shifted(GaussianModel):
    """The exact denoiser of `N(mean, std^2)` with a trained mean."""

    def __init__(self) -> None:
        super().__init__(0.5, 0.3, RectifiedFlow(), (3, 1, 1))
        self.shift = nn.Parameter(torch.zeros(()))
        self.in_base = False

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the posterior mean for shifted data."""
        shift = self.shift * (not self.in_base)
        return super().forward(x - (1 - t) * shift, t, conditioning) + shift

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the shift is 0."""
        self.in_base = True
        yield
        self.in_base = False


@battery
def test_reward_without_gradient_increases(tmp_path: Path, objective: ForwardObjective) -> None:
    """The reward is the brightness, and the mean of the model increases."""
    module = linear(model=Shifted(), sampler=FlowEuler(3), objective=objective, samples_per_prompt=8)
    fit(tmp_path, module, 8)
    assert module.reward_queries == 8 * 16
    assert module.model.shift > 0.02


SETTINGS: dict[str, Any] = {
    "objective": DiffusionNFT(0.5),
    "old_policy": OldPolicy(0.5, rate=0.2),
    "inner_epochs": 2,
    "timesteps_per_minibatch": 2,
    "kl_weight": 0.1,
    "seed": 4,
}


@pytest.mark.parametrize("stop", [3, 4], ids=["within a rollout", "between rollouts"])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, stop: int) -> None:
    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> Any:
        module = linear(**SETTINGS)
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt}
        recorder = fit(tmp_path, module, steps, *callbacks, **options)
        return values(module), module.old.values["model.theta"], recorder.of("train/loss")

    straight = run(6)
    first = run(stop, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    torch.manual_seed(99)
    resumed = run(6, ckpt=str(tmp_path / f"step={stop}.ckpt"))
    assert [*first[2], *resumed[2]] == straight[2]
    assert torch.equal(resumed[0]["model.theta"], straight[0]["model.theta"])
    assert torch.equal(resumed[1], straight[1])
    assert not torch.equal(straight[1], straight[0]["model.theta"])


def test_a_run_interrupted_in_the_first_minibatch_of_a_rollout_resumes_bitwise(tmp_path: Path) -> None:
    """The old policy was updated for this rollout, and is updated again."""

    def run(*callbacks: Callback, ckpt: Path | None = None) -> Any:
        module = linear(**SETTINGS)
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt}
        fit(tmp_path, module, 6, LastCheckpoint(dirpath=str(tmp_path)), *callbacks, **options)
        return module.model.theta.item(), module.old.values["model.theta"].item()

    straight = run()
    with pytest.raises(SystemExit):
        run(Cut(9))
    assert run(ckpt=tmp_path / "last.ckpt") == straight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionNFT(0.0), "beta=0.0 must be a positive number"),
        (lambda: AWM(PRDP()), "policy=PRDP must be an objective of single steps"),
        (lambda: AWM(power=-1.0), "power=-1.0 must be at least 0"),
        (lambda: RWR(temperature=0.0), "temperature=0.0 must be a positive number"),
        (lambda: DGPO(reference="new"), "reference='new' is not a valid choice"),  # type: ignore[arg-type]
        (lambda: CRD(beta=-1.0), "beta=-1.0 must be a positive number"),
        (lambda: OldPolicy(max_decay=1.0), "old_policy.max_decay=1.0 must be at least 0 and less than 1"),
        (lambda: linear(times="random"), "times='random' is not a valid choice"),
        (lambda: linear(num_times=5), "num_times=5 exceeds the sampler's num_steps=4"),
    ],
)
def test_invalid_options_are_configuration_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"samples_per_prompt": 1}, {}, "GroupRelative compares samples of the same prompt"),
        ({"objective": CRD(), "micro_batch_size": 2}, {}, "micro_batch_size=2 splits them; set .* multiple of .*=3"),
        ({"objective": AWM(Reinforce()), "inner_epochs": 2}, {}, "AWM is on-policy"),
        (
            {"timesteps_per_minibatch": 1},
            {"accumulate_grad_batches": 3},
            "optimizer steps would not end",
        ),
    ],
)
def test_invalid_combinations_are_errors_before_training(
    tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, linear(**options), 1, **trainer)
