import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_draft.callbacks import ProgressBar, progress
from lightning_draft.errors import ConfigurationError
from lightning_draft.rewards import Sharpness


class Work(Callback):
    """Advances a fake clock by two seconds per batch, and by thirty after each third step."""

    def __init__(self, clock):
        self.clock, self.now = clock, 0.0
        clock.time = SimpleNamespace(monotonic=lambda: self.now)

    def on_before_backward(self, *_):
        self.now += 2

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            self.now += 30


@pytest.fixture
def work(monkeypatch):
    monkeypatch.setattr(progress, "time", progress.time)
    return Work(progress)


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_plain_lines_show_reward_seconds_per_step_and_time_left(make_module, make_trainer, data, capsys, work):
    """The time of other callbacks is part of the time left but not of the seconds per step, in any order."""
    bar = ProgressBar(every_n_steps=2)
    trainer = make_trainer(work, bar, max_steps=6, enable_progress_bar=True, limit_val_batches=0)
    trainer.fit(make_module(), data)
    shown = [re.sub(r"reward -?[\d.e+-]+", "reward R", line) for line in lines(capsys)]
    assert shown == [
        "step 1/6  reward R  2 s/step  0:10 left",
        "step 2/6  reward R  2 s/step  0:08 left",
        "step 4/6  reward R  2 s/step  0:19 left",
        "step 6/6  reward R  2 s/step  0:00 left",
    ]


def test_reward_is_that_of_the_last_step(make_module, make_trainer, data, capsys):
    trainer = make_trainer(ProgressBar(every_n_steps=1), max_steps=2, enable_progress_bar=True, limit_val_batches=0)
    trainer.fit(make_module(), data)
    assert f"reward {trainer.callback_metrics['train/reward']:.4g}  " in lines(capsys)[-1]


def test_accumulated_batches_count_as_one_step(make_module, make_trainer, data, capsys, work):
    trainer = make_trainer(
        ProgressBar(every_n_steps=1),
        work,
        max_steps=2,
        enable_progress_bar=True,
        accumulate_grad_batches=3,
        limit_val_batches=0,
    )
    trainer.fit(make_module(), data)
    shown = lines(capsys)
    assert [line.split()[1] for line in shown] == ["1/2", "2/2"]
    assert all("  6 s/step  " in line for line in shown)


def test_validation_rewards_are_printed(make_module, make_trainer, data, capsys):
    trainer = make_trainer(ProgressBar(), max_steps=2, enable_progress_bar=True, val_check_interval=2)
    trainer.fit(make_module(), data)
    (line,) = [line for line in lines(capsys) if "val/" in line]
    assert line.startswith("step 2  ")
    assert f"val/reward {trainer.callback_metrics['val/reward']:.4g}" in line
    assert f"val/gain {trainer.callback_metrics['val/gain']:.4g}" in line


def test_terminal_shows_one_bar_over_all_steps(make_module, make_trainer, data, capsys, monkeypatch, work):
    monkeypatch.setattr(ProgressBar, "is_plain", property(lambda self: False))
    bar = ProgressBar()
    trainer = make_trainer(bar, work, max_steps=6, enable_progress_bar=True, limit_val_batches=0)
    trainer.fit(make_module(), data)
    assert trainer.current_epoch > 0
    assert bar.train_progress_bar.n == 6
    last = capsys.readouterr().out.split("\r")[-1]
    assert re.search(r"Training: 100%\|.*\| 6/6, reward -?[\d.e+-]+, 2 s/step, 0:00 left", last), last


def test_resumed_run_continues_counting(make_module, make_trainer, data, capsys, tmp_path, work):
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(make_module(), data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    capsys.readouterr()
    resumed = make_trainer(
        ProgressBar(every_n_steps=1), work, max_steps=6, enable_progress_bar=True, limit_val_batches=0
    )
    resumed.fit(make_module(), data, ckpt_path=tmp_path / "two.ckpt")
    shown = lines(capsys)
    assert shown[0].startswith("step 3/6  ")
    assert shown[0].endswith("  0:06 left")


def test_refresh_rate_0_shows_nothing(make_module, make_trainer, data, capsys):
    make_trainer(ProgressBar(refresh_rate=0), enable_progress_bar=True).fit(make_module(), data)
    assert lines(capsys) == []


def test_invalid_arguments_are_rejected():
    with pytest.raises(ConfigurationError, match="every_n_steps=0"):
        ProgressBar(every_n_steps=0)


@pytest.mark.parametrize("plain", [True, False])
def test_trained_and_evaluation_rewards_are_both_logged(make_module, make_trainer, data, capsys, monkeypatch, plain):
    """In plain lines and above the bar of a terminal."""
    monkeypatch.setattr(ProgressBar, "is_plain", plain)
    trainer = make_trainer(
        ProgressBar(), max_steps=2, val_check_interval=2, num_sanity_val_steps=0, enable_progress_bar=True
    )
    trainer.fit(make_module(eval_rewards={"sharp": Sharpness()}), data)
    (line,) = [line for line in lines(capsys) if "val/" in line]
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("val/reward", "val/sharp"):
        assert f"{name} {values[name]:.4g}" in line
    assert line.startswith("step 2  ")
