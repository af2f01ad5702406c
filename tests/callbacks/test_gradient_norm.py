import json
import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_draft.callbacks import GradientNormMonitor
from lightning_draft.callbacks.gradient_profile import profile_figure
from lightning_draft.chain import SamplingChain
from lightning_draft.errors import ConfigurationError, DivergenceError
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import LastK, LowVariance

PIXELS = 3 * 4 * 4
BATCH = 2


class Weights(Callback):
    """Sets the reward's slope before each step, and records theta and the optimizer's state after it."""

    def __init__(self, slopes):
        self.slopes, self.thetas, self.moments, self.gradients, self.stepped = slopes, [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.slopes:
            pl_module.reward.weight = self.slopes[trainer.global_step]

    def on_validation_start(self, trainer, pl_module):
        pl_module.reward.weight = 1.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = pl_module.model.theta.grad
        self.gradients.append(None if gradient is None else gradient.item())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.thetas.append(pl_module.model.theta.item())
        state = trainer.optimizers[0].state[pl_module.model.theta]
        self.moments.append({name: float(value) for name, value in state.items()})
        self.stepped.append(trainer.global_step)


def arriving(batch, theta=0.1, steps=4):
    """The closed form: the gradient of the mean pixel times the factors of the later steps."""
    model = LinearModel(theta)
    chain = SamplingChain(model, DDIM(steps), model.encode(["x"]))
    state, latents = chain.start(torch.ones(1, 3, 4, 4, dtype=torch.float64)), []
    with torch.no_grad():
        for _ in range(steps):
            state = chain.advance(state, 1)
            latents.append(state.x.flatten()[0].item())
    return {step: abs(latents[-1] / latent) / math.sqrt(batch * PIXELS) for step, latent in enumerate(latents)}


def profile_of(metrics):
    prefix = "train/gradient_norm/step_"
    return {int(k.removeprefix(prefix)): v for k, v in metrics.items() if k.startswith(prefix)}


@pytest.mark.parametrize("checkpointing", ["none", "step"])
@pytest.mark.parametrize("clip", [None, 1e-6])
def test_logs_the_profile_and_the_total_before_clipping(make_module, make_trainer, data, logger, checkpointing, clip):
    weights = Weights([])
    trainer = make_trainer(weights, GradientNormMonitor(), logger=logger, gradient_clip_val=clip, max_steps=3)
    trainer.fit(make_module(checkpointing=checkpointing), data)
    calls = logger.of("train/gradient_norm/")
    assert [step for step, _ in calls] == [0, 1, 2]
    names = ["train/gradient_norm/total", *(f"train/gradient_norm/step_{i}" for i in range(4))]
    assert all(list(metrics) == names for _, metrics in calls)
    assert profile_of(calls[0][1]) == pytest.approx(arriving(BATCH), rel=1e-5)
    totals = [metrics["train/gradient_norm/total"] for _, metrics in calls]
    assert totals == pytest.approx([abs(gradient) for gradient in weights.gradients], rel=1e-6)
    assert trainer.callback_metrics["train/gradient_norm/total"] == pytest.approx(totals[-1])


def test_micro_batches_do_not_change_the_profile(make_module, make_trainer, data, logger):
    make_trainer(GradientNormMonitor(), logger=logger, max_steps=1).fit(make_module(micro_batch_size=1), data)
    assert profile_of(logger.of("train/gradient_norm/")[0][1]) == pytest.approx(arriving(BATCH), rel=1e-5)


def test_only_steps_with_gradient_are_logged(make_module, make_trainer, data, logger):
    make_trainer(GradientNormMonitor(), logger=logger, max_steps=1).fit(make_module(truncation=LastK(2)), data)
    profile = profile_of(logger.of("train/gradient_norm/")[0][1])
    assert profile == pytest.approx({step: arriving(BATCH)[step] for step in (2, 3)}, rel=1e-5)


def test_profile_of_accumulated_batches_is_that_of_their_sum(make_module, make_trainer, data, logger):
    trainer = make_trainer(GradientNormMonitor(), logger=logger, max_steps=2, accumulate_grad_batches=3)
    trainer.fit(make_module(), data)
    calls = logger.of("train/gradient_norm/")
    assert [step for step, _ in calls] == [0, 1]
    expected = {step: value / math.sqrt(3) for step, value in arriving(BATCH).items()}
    assert profile_of(calls[0][1]) == pytest.approx(expected, rel=1e-5)


def test_norms_of_copies_of_a_step_are_combined(make_module, make_trainer, data, logger):
    module = make_module(truncation=LowVariance(copies=2))
    make_trainer(GradientNormMonitor(), logger=logger, max_steps=1).fit(module, data)
    profile = profile_of(logger.of("train/gradient_norm/")[0][1])
    assert profile == pytest.approx({3: math.sqrt(3) * arriving(BATCH)[3]}, rel=1e-5)


def test_profile_is_divided_by_the_gradient_scale(make_module, make_trainer, data, logger):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    module.model.float()
    weights = Weights([])
    make_trainer(weights, GradientNormMonitor(), logger=logger, max_steps=1, plugins=[plugin]).fit(module, data)
    metrics = logger.of("train/gradient_norm/")[0][1]
    assert profile_of(metrics) == pytest.approx(arriving(BATCH), rel=1e-3)
    assert metrics["train/gradient_norm/total"] == pytest.approx(abs(weights.gradients[0]), rel=1e-6)


def test_scalars_and_figures_are_logged_at_their_intervals(make_module, make_trainer, data, logger):
    monitor = GradientNormMonitor(every_n_steps=2)
    make_trainer(monitor, logger=logger, max_steps=5).fit(make_module(), data)
    assert [step for step, _ in logger.of("train/gradient_norm/")] == [0, 2, 4]
    assert len(monitor.history) == 5


def test_monitor_changes_no_gradient_and_removes_its_hooks(make_module, make_trainer, data):
    watched, plain = make_module(), make_module()
    make_trainer(GradientNormMonitor()).fit(watched, data)
    make_trainer().fit(plain, data)
    assert torch.equal(watched.model.theta, plain.model.theta)
    assert watched.probes == []


def test_median_needs_min_history_and_adapts_to_a_new_scale():
    monitor = GradientNormMonitor(factor=3, window=5, min_history=3)
    assert monitor.threshold == math.inf
    monitor.history.extend([1.0, 1.0])
    assert monitor.threshold == math.inf
    monitor.history.extend([1.0, 100.0])
    assert monitor.threshold == 3
    monitor.history.extend([100.0, 100.0])
    assert monitor.threshold == 300


SPIKE = [1.0, 1.0, 1.0, 1000.0, 1.0]


def run_with_spike(make_module, make_trainer, data, logger, action, slopes=SPIKE, **options):
    weights = Weights(slopes)
    monitor = GradientNormMonitor(action, min_history=3, every_n_steps=10, figure_every_n_steps=0)
    after = Weights([])
    trainer = make_trainer(weights, monitor, after, logger=logger, max_steps=len(slopes), **options)
    trainer.fit(make_module(), data)
    return weights, monitor, after, trainer


def events(logger):
    """Counts by the step at which they were logged."""
    counters = {
        f"train/gradient_norm/{name}": name for name in ("warned", "skipped", "clipped", "stopped", "nonfinite")
    }
    found = {
        step: {counters[name]: value for name, value in metrics.items() if name in counters}
        for step, metrics in logger.of("train/gradient_norm/")
    }
    return {step: counts for step, counts in found.items() if counts}


def test_warn_takes_the_step(make_module, make_trainer, data, logger):
    with pytest.warns(UserWarning, match=r"gradient norm .* at step 3 exceeds .*10 times the running median"):
        weights, monitor, after, _ = run_with_spike(make_module, make_trainer, data, logger, "warn")
    assert weights.gradients == after.gradients
    assert weights.thetas[3] != weights.thetas[2]
    assert events(logger) == {3: {"warned": 1}}
    assert monitor.counts == {"warned": 1, "skipped": 0, "clipped": 0, "stopped": 0, "nonfinite": 0}


@pytest.mark.parametrize(("action", "slope"), [("skip", 1000.0), ("skip", math.nan), ("warn", math.inf)])
def test_skip_changes_neither_parameters_nor_optimizer_state(make_module, make_trainer, data, logger, action, slope):
    slopes = [1.0, 1.0, 1.0, slope, 1.0]
    message = "the step is skipped" if math.isfinite(slope) else "not finite at step 3, so the step changes nothing"
    with pytest.warns(UserWarning, match=message):
        weights, *_, trainer = run_with_spike(
            make_module, make_trainer, data, logger, action, slopes, gradient_clip_val=10.0
        )
    assert weights.thetas[3] == weights.thetas[2]
    assert weights.moments[3] == weights.moments[2]
    assert weights.thetas[4] != weights.thetas[3]
    assert trainer.global_step == 5
    expected = {"skipped": 1} if math.isfinite(slope) else {"skipped": 1, "nonfinite": 1}
    assert events(logger) == {3: expected}


def test_clip_scales_the_gradient_to_the_threshold(make_module, make_trainer, data, logger):
    with pytest.warns(UserWarning, match="the gradient is clipped to it"):
        weights, _, after, _ = run_with_spike(make_module, make_trainer, data, logger, "clip")
    median = sorted(abs(gradient) for gradient in weights.gradients[:3])[1]
    assert abs(after.gradients[3]) == pytest.approx(10 * median, rel=1e-6)
    assert math.copysign(1, after.gradients[3]) == math.copysign(1, weights.gradients[3])
    assert events(logger) == {3: {"clipped": 1}}


@pytest.mark.parametrize("slope", [1000.0, math.nan])
def test_stop_ends_training_with_an_error(make_module, make_trainer, data, logger, slope):
    weights = Weights([1.0, 1.0, 1.0, slope, 1.0, 1.0])
    monitor = GradientNormMonitor("stop", min_history=3, every_n_steps=10, figure_every_n_steps=0)
    message = "at step 3.*training stops, and the last checkpoint is kept; lower"
    with pytest.raises(DivergenceError, match=message):
        make_trainer(weights, monitor, logger=logger, max_steps=6).fit(make_module(), data)
    assert weights.stepped == [1, 2, 3]
    expected = {"stopped": 1} if math.isfinite(slope) else {"stopped": 1, "skipped": 1, "nonfinite": 1}
    assert events(logger) == {3: expected}


def test_max_nonfinite_consecutive_steps_end_training(make_module, make_trainer, data):
    weights, monitor = Weights([1.0, math.nan, 1.0] + [math.nan] * 10), GradientNormMonitor(max_nonfinite=4)
    with pytest.raises(DivergenceError, match="not finite in 4 optimizer steps in a row, up to step 6"):
        make_trainer(weights, monitor, max_steps=13).fit(make_module(), data)
    assert weights.stepped[-1] == 6
    assert monitor.counts["nonfinite"] == 5


def test_overflows_of_the_gradient_scaler_do_not_end_training(make_module, make_trainer, data, logger):
    """The first fp16 gradients overflow, and the scaler must still update its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    module.model.float()
    weights = Weights([math.inf, 1.0, 1.0])
    monitor = GradientNormMonitor("stop")
    with pytest.warns(UserWarning, match="so the step changes nothing"):
        make_trainer(
            weights, monitor, logger=logger, max_steps=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
        ).fit(module, data)
    assert scaler.get_scale() == 512
    assert weights.stepped == [1, 2, 3]
    assert weights.thetas[0] == pytest.approx(0.1)
    assert weights.thetas[1] != weights.thetas[0]
    assert monitor.counts == {"warned": 0, "skipped": 1, "clipped": 0, "stopped": 0, "nonfinite": 1}


def test_state_is_restored_from_a_checkpoint():
    monitor, other = GradientNormMonitor(window=20), GradientNormMonitor(window=20)
    monitor.history.extend(range(1, 15))
    monitor.counts["skipped"] = 2
    other.load_state_dict(monitor.state_dict())
    assert (other.history, other.counts, other.threshold) == (monitor.history, monitor.counts, monitor.threshold)


def test_resumed_monitor_decides_as_the_uninterrupted_one(make_module, make_trainer, data, tmp_path):
    trainer = make_trainer(Weights([1.0] * 3), GradientNormMonitor(min_history=3), max_steps=3)
    trainer.fit(make_module(), data)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    weights = Weights([1.0] * 3 + [1000.0])
    monitor = GradientNormMonitor("skip", min_history=3)
    with pytest.warns(UserWarning, match="exceeds"):
        make_trainer(weights, monitor, max_steps=4).fit(make_module(), data, ckpt_path=tmp_path / "three.ckpt")
    assert monitor.counts["skipped"] == 1


class Figures:
    """The used part of TensorBoard's writer."""

    def __init__(self):
        self.calls = []

    def add_figure(self, tag, figure, global_step=None, close=True, walltime=None):
        self.calls.append((tag, figure, global_step))


def test_figures_go_to_tensorboard(make_module, make_trainer, data, logger, monkeypatch):
    writer = Figures()
    monkeypatch.setattr(type(logger), "experiment", writer)
    monitor = GradientNormMonitor(every_n_steps=100, figure_every_n_steps=2)
    make_trainer(monitor, logger=logger, max_steps=3).fit(make_module(), data)
    assert [tag for tag, _, _ in writer.calls] == ["train/gradient_norm/profile"] * 2
    assert [step for _, _, step in writer.calls] == [0, 2]
    (line,) = writer.calls[0][1].axes[0].lines
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == pytest.approx(arriving(BATCH), rel=1e-5)


def test_a_single_step_is_not_plotted(make_module, make_trainer, data, logger, monkeypatch):
    writer = Figures()
    monkeypatch.setattr(type(logger), "experiment", writer)
    monitor = GradientNormMonitor(every_n_steps=100, figure_every_n_steps=1)
    make_trainer(monitor, logger=logger, max_steps=1).fit(make_module(truncation=LastK(1)), data)
    assert writer.calls == []


def test_logger_without_figures_receives_an_image(make_module, make_trainer, data, logger):
    logged = []
    logger.log_image = lambda key, images, step: logged.append((key, images[0], step))
    monitor = GradientNormMonitor(every_n_steps=100, figure_every_n_steps=2)
    make_trainer(monitor, logger=logger, max_steps=3).fit(make_module(), data)
    assert [(key, step) for key, _, step in logged] == [
        ("train/gradient_norm/profile", 0),
        ("train/gradient_norm/profile", 2),
    ]
    assert logged[0][1].mode == "RGB"
    assert len(logged[0][1].getcolors(maxcolors=2**24)) > 2


def test_profile_has_a_logarithmic_axis():
    axes = profile_figure({0: 100.0, 1: 1.0}, step=7).axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "optimizer step 7"


@pytest.mark.filterwarnings("error")
def test_profile_of_zeros_is_plotted():
    """A constant loss has gradient 0, which a logarithmic axis cannot show."""
    figure = profile_figure({0: 0.0, 1: 0.0}, step=0)
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_yscale() == "linear"


class WriteDown(Callback):
    """Each process writes its results to a file, because a forked process cannot return them."""

    def __init__(self, path, monitor):
        self.path, self.monitor = path, monitor

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            pl_module.reward.weight = math.nan

    def on_validation_start(self, trainer, pl_module):
        pl_module.reward.weight = 1.0

    def on_train_end(self, trainer, pl_module):
        theta = pl_module.model.theta.item()
        report = {"theta": theta, "counts": self.monitor.counts, "history": list(self.monitor.history)}
        if trainer.loggers:
            report["profile"] = profile_of(trainer.logger.of("train/gradient_norm/")[0][1])
        (self.path / f"{trainer.global_rank}.json").write_text(json.dumps(report))


def test_processes_take_the_same_action_and_measure_the_global_batch(make_module, make_trainer, data, logger, tmp_path):
    monitor = GradientNormMonitor(figure_every_n_steps=0)
    trainer = make_trainer(
        monitor, WriteDown(tmp_path, monitor), logger=logger, max_steps=4, strategy="ddp_fork", devices=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(make_module(), data)
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero["theta"] == one["theta"]
    assert zero["history"] == one["history"]
    assert zero["counts"] == one["counts"]
    assert zero["counts"]["skipped"] == 1
    profile = {int(step): value for step, value in zero["profile"].items()}
    assert profile == pytest.approx(arriving(2 * BATCH), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "ignore"}, "write one of warn, skip, clip, stop"),
        ({"factor": 1.0}, "factor=1.0 must be greater than 1"),
        ({"min_history": 60}, "min_history=60 must be between 1 and 50"),
        ({"every_n_steps": 0}, "at least 1"),
        ({"max_nonfinite": 0}, "at least 1"),
    ],
)
def test_invalid_arguments_are_rejected(options, message):
    with pytest.raises(ConfigurationError, match=message):
        GradientNormMonitor(**options)
