"""Random states and checkpoints of DRaFT: a seed repeats a run, and a resumed run continues it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import LoRA
from lightning_draft.samplers import DDIM
from lightning_draft.transition import Transition
from lightning_draft.truncation import LowVariance, RandomSteps
from tests.tiny_draft import TARGETS, Recorder, linear, make, trainer_of
from tests.tiny_runs import PROMPTS, data, values


def test_random_state_of_the_caller_is_not_changed(tmp_path: Path) -> None:
    module = linear(truncation=LowVariance(2), sampler=DDIM(4, eta=1.0))
    torch.manual_seed(8)
    before = torch.get_rng_state()
    trainer_of(tmp_path, max_steps=3, limit_val_batches=None).fit(module, data())
    module.generate(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_step_depends_only_on_seed_and_position(tmp_path: Path) -> None:
    def rewards(seed: int, state: int) -> list[float]:
        recorder = Recorder()
        torch.manual_seed(state)
        module = linear(truncation=RandomSteps(), sampler=DDIM(4, eta=1.0), seed=seed)
        trainer_of(tmp_path, recorder, max_steps=3).fit(module, data())
        return recorder.of("train/reward")

    assert rewards(0, 1) == rewards(0, 2) != rewards(1, 1)
    assert len(set(rewards(0, 1))) == 3


def test_noise_of_validation_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    images = []
    for seed in (0, 1):
        module = linear(sampler=DDIM(4, eta=1.0), seed=seed)
        trainer_of(tmp_path, limit_val_batches=None).validate(module, data(), verbose=False)
        assert module.validation is not None
        images.append(module.validation.images["fine-tuned"])
    assert torch.equal(*images)


def test_generate_uses_its_seed() -> None:
    module = linear(sampler=DDIM(4, eta=1.0))
    images = module.generate(PROMPTS, seed=5).images
    assert torch.equal(module.generate(PROMPTS, seed=5).images, images)
    assert not torch.equal(module.generate(PROMPTS, seed=6).images, images)
    assert not torch.equal(module.generate(PROMPTS).images, images)
    assert not images.requires_grad
    noise = torch.randn(len(PROMPTS), 3, 4, 4)
    assert not torch.equal(module.generate(PROMPTS, noise=noise, seed=5).images, images)


def test_noise_of_the_steps_differs_from_the_starting_noise() -> None:
    """With a sampler that returns the noise of a step as the latent."""

    class Forgetful(DDIM):
        def step(self, schedule: Any, x: Tensor, *_: Any) -> Any:
            return Transition(torch.zeros_like(x), 1.0), None

    module = linear(sampler=Forgetful(1))
    start = module.model.noise(len(PROMPTS), torch.Generator().manual_seed(5))
    for images in (module.generate(PROMPTS, seed=5).images, module.generate(PROMPTS, noise=start, seed=5).images):
        assert not torch.isclose(images, module.model.decode(start)).any()


# Checkpoints.


@pytest.mark.parametrize(
    ("stop", "pipeline", "options"),
    [
        (2, False, {}),
        (3, True, {"limit_val_batches": None, "val_check_interval": 1}),
        (3, False, {"accumulate_grad_batches": 2}),
    ],
    ids=["at the end of an epoch", "within an epoch, validating", "accumulating"],
)
def test_resumed_run_equals_uninterrupted_run(
    tiny_sd: Path, tmp_path: Path, stop: int, pipeline: bool, options: dict[str, Any]
) -> None:
    """Compared are parameters, optimizer, rewards, and thereby noise, prompts and random choices."""
    settings: dict[str, Any] = {"truncation": RandomSteps(), "sampler": DDIM(2, eta=1.0), "seed": 4}

    def run(steps: int, *callbacks: Callback, ckpt: str | None = None) -> Any:
        module = make(tiny_sd, **settings) if pipeline else linear(**settings)
        recorder = Recorder()
        saving = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
        trainer = trainer_of(tmp_path, recorder, *callbacks, max_steps=steps, **{**options, **saving})
        trainer.fit(module, data(), ckpt_path=ckpt)
        return values(module), trainer.optimizers[0].state_dict()["state"], recorder.of("train/reward")

    straight = run(5)
    first = run(stop, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    torch.manual_seed(99)
    resumed = run(5, ckpt=str(tmp_path / f"step={stop}.ckpt"))
    assert [*first[2], *resumed[2]] == straight[2]
    for name, value in straight[0].items():
        assert torch.equal(resumed[0][name], value), name
    for index, moments in straight[1].items():
        for name, value in moments.items():
            assert torch.equal(resumed[1][index][name], value), (index, name)


def test_checkpoint_contains_the_trained_parameters_and_loads_with_weights_only(tiny_sd: Path, tmp_path: Path) -> None:
    module = make(tiny_sd)
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    trained = module.trainable_parameters()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    other = make(tiny_sd, model={"lora": LoRA(rank=4, target_modules=["to_q"])})
    with pytest.raises(ConfigurationError, match="other trainable parameters than this model .*the folder of that run"):
        trainer_of(tmp_path, max_steps=2).fit(other, data(), ckpt_path=str(tmp_path / "run.ckpt"))
    wider = make(tiny_sd, model={"lora": LoRA(rank=6, target_modules=TARGETS)})
    message = r"^the checkpoint's '\S+lora_A\S+' has shape \(4, \d+.*\) and this model's \(6, \d+.*LoRA ranks differ"
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(tmp_path, max_steps=2).fit(wider, data(), ckpt_path=str(tmp_path / "run.ckpt"))
