import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_draft.callbacks import AdapterEMA
from lightning_draft.callbacks.ema import averaged
from lightning_draft.errors import ConfigurationError


class Trace(Callback):
    """Records theta after each step, and the theta used in validation."""

    def __init__(self):
        self.trained, self.validated, self.averaged = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(pl_module.model.theta.item())
        with averaged(trainer, pl_module):
            self.averaged.append(pl_module.model.theta.item())
        assert pl_module.model.theta.item() == self.trained[-1]

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(pl_module.model.theta.item())


def _expected(start, values, decay, warmup):
    average, result = start, []
    for n, value in enumerate(values, 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = d * average + (1 - d) * value
        result.append(average)
    return result


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("ema_first", [False, True])
def test_average_equals_the_recursion_for_any_order_of_callbacks(make_module, make_trainer, data, warmup, ema_first):
    trace, ema, module = Trace(), AdapterEMA(0.7, warmup), make_module()
    trainer = make_trainer(*([ema, trace] if ema_first else [trace, ema]), max_steps=5)
    trainer.fit(module, data)
    torch.testing.assert_close(trace.averaged, _expected(0.1, trace.trained, 0.7, warmup), rtol=1e-12, atol=0)


def test_average_is_updated_once_per_optimizer_step_under_accumulation(make_module, make_trainer, data):
    trace, ema = Trace(), AdapterEMA(0.5, warmup=False)
    make_trainer(ema, trace, max_steps=2, accumulate_grad_batches=3).fit(make_module(), data)
    ends = trace.trained[2::3]
    assert trace.averaged[2::3] == pytest.approx(_expected(0.1, ends, 0.5, False), rel=1e-12)


def test_validation_uses_the_average_and_training_does_not(make_module, make_trainer, data):
    trace, ema, module = Trace(), AdapterEMA(0.5, warmup=False), make_module()
    trainer = make_trainer(ema, trace, max_steps=3, val_check_interval=1, num_sanity_val_steps=1)
    trainer.fit(module, data)
    plain, plain_trace = make_module(), Trace()
    make_trainer(plain_trace, max_steps=3).fit(plain, data)
    assert trace.trained == plain_trace.trained
    assert trace.validated == [0.1, *trace.averaged]


def test_average_is_at_least_float32(make_module, make_trainer):
    trainer, module, ema = make_trainer(), make_module(), AdapterEMA(0.999, warmup=False)
    module.model.bfloat16()
    ema.on_train_start(trainer, module)
    module.model.theta.data.fill_(1)
    ema.update(module, 1)
    start = torch.tensor(0.1).bfloat16().item()
    assert ema.average["model.theta"].dtype == torch.float32
    assert ema.average["model.theta"].item() == pytest.approx(0.999 * start + 0.001, rel=1e-6)


def test_resumed_run_equals_the_uninterrupted_one(make_module, make_trainer, data, tmp_path):
    whole = AdapterEMA(0.8)
    make_trainer(whole, max_steps=6).fit(make_module(), copy.deepcopy(data))

    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=3)
    make_trainer(AdapterEMA(0.8), saver, max_steps=3, enable_checkpointing=True).fit(make_module(), copy.deepcopy(data))
    resumed = AdapterEMA(0.8)
    make_trainer(resumed, max_steps=6).fit(make_module(), copy.deepcopy(data), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.updates == whole.updates == 6
    assert torch.equal(resumed.average["model.theta"], whole.average["model.theta"])


def test_validating_a_checkpoint_uses_its_average(make_module, make_trainer, data, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=4)
    ema = AdapterEMA(0.8)
    make_trainer(ema, saver, enable_checkpointing=True).fit(make_module(), data)
    trace, module = Trace(), make_module()
    make_trainer(AdapterEMA(0.8), trace).validate(module, data, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert trace.validated == [ema.average["model.theta"].item()]


def test_interrupted_validation_restores_the_parameters(make_module, make_trainer, data):
    class Interrupt(Trace):
        def on_validation_batch_start(self, *_):
            raise RuntimeError("power cut")

    trace, module = Interrupt(), make_module()
    trainer = make_trainer(AdapterEMA(0.5), trace, val_check_interval=2, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, data)
    assert module.model.theta.item() == trace.trained[-1]


def test_other_adapters_in_the_checkpoint_are_rejected(make_module, make_trainer, data):
    ema = AdapterEMA()
    ema.load_state_dict({"updates": 3, "average": {"model.other": torch.zeros(())}})
    with pytest.raises(ConfigurationError, match="do not match the trained parameters of this model"):
        make_trainer(ema, num_sanity_val_steps=0).fit(make_module(), data)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_invalid_decay_is_rejected(decay):
    with pytest.raises(ConfigurationError, match="decay"):
        AdapterEMA(decay)
