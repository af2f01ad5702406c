"""Sharding strategies on the command line, after the failure of a process, and with settings that they reject."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_draft.__main__ import main
from lightning_draft.callbacks import LoRAExport
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models.lora import LoRA
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import Full
from tests.two_processes import CPUFSDP, CPUDeepSpeed, data, draft, fsdp2, together, trainer


def test_the_command_line_trains_resumes_and_validates(tmp_path: Path, tiny_sd_v: Path) -> None:
    (tmp_path / "sharded.yaml").write_text(SHARDED.format(model=tiny_sd_v))
    assert together(command, tmp_path, tiny_sd_v) == [0, 0]
    checkpoint = torch.load(tmp_path / "runs" / "sharded" / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 2
    assert {name.rsplit(".", 3)[1] for name in checkpoint["state_dict"]} == {"lora_A", "lora_B"}
    assert (tmp_path / "runs" / "sharded" / "lora" / "last.safetensors").is_file()


def command(rank: int, folder: Path, pipeline: Path) -> None:
    os.chdir(folder)
    assert main(["fit", "--config", "sharded.yaml"]) == 0
    assert main(["fit", "--config", "sharded.yaml", "--ckpt_path", "last", "--trainer.max_steps", "2"]) == 0
    assert main(["validate", "--config", "sharded.yaml", "--ckpt_path", "last"]) == 0


SHARDED = """\
model:
  class_path: DraftModule
  init_args:
    model:
      class_path: StableDiffusion
      init_args: {{pretrained: {model}, guidance: {{scale: 2.0}}, dtype: bfloat16, lora: {{rank: 2}}}}
    sampler: {{class_path: DDIM, init_args: {{num_steps: 2}}}}
    truncation: {{class_path: LastK, init_args: {{k: 2}}}}
    reward: {{class_path: Brightness, init_args: {{target: 0.9}}}}
data:
  prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer, a bar]
  val_size: 2
  batch_size: 2
trainer:
  max_steps: 1
  accelerator: cpu
  devices: 2
  precision: bf16-mixed
  limit_val_batches: 1
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {{data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}}
gradients: {{figure_every_n_steps: 0}}
"""


def test_the_config_of_sharded_full_fine_tuning_with_prdp_runs(
    tmp_path: Path, tiny_sd_v: Path, tiny_clip: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat {number}" for number in range(20)))
    assert together(sharded_prdp, tmp_path, tiny_sd_v, tiny_clip) == [0, 0]
    weights = torch.load(tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    before = StableDiffusion(str(tiny_sd_v), trainable="full").state_dict()
    assert weights.keys() == {f"model.{name}" for name in before if name.startswith("unet.")}
    changed = [not torch.equal(value, before[name.removeprefix("model.")]) for name, value in weights.items()]
    assert sum(changed) > 0.9 * len(changed)


def sharded_prdp(rank: int, folder: Path, pipeline: Path, reward: Path) -> None:
    os.chdir(folder)
    values = {
        "model.model.pretrained": pipeline,
        "model.reward.pretrained": reward,
        "model.reward.processor": reward,
        "model.sampler.num_steps": 2,
        "model.samples_per_prompt": 2,
        "model.inner_epochs": 2,
        "model.micro_batch_size": 2,
        "data.batch_size": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy.data_parallel_size": 2,
        "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": 6,
        "trainer.max_steps": 3,
        "trainer.limit_val_batches": 1,
    }
    options = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    assert main(["fit", "--config", "sd15_prdp_full", "--name", "tiny", *options]) == 0


class Fail(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise RuntimeError("one process fails")


def fail(rank: int, root: Path, pipeline: Path) -> None:
    writers = [LoRAExport(every_n_steps=1), LastCheckpoint(every_n_steps=1), Fail()]
    try:
        trainer(root, fsdp2(), *writers, limit_val_batches=0).fit(draft(pipeline), data())
    except RuntimeError:
        (root / f"failed-{rank}").touch()


def test_a_process_that_fails_alone_exits_without_waiting_for_the_others(tmp_path: Path, tiny_sd_v: Path) -> None:
    """It ends at once, which also ends the other process; the files are those of the last export."""
    codes = together(fail, tmp_path, tiny_sd_v, patience=60.0)
    assert codes[1] == 0
    assert codes[0] is not None
    assert (tmp_path / "failed-1").exists()
    assert (tmp_path / "lora" / "last.safetensors").is_file()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 1


def expect_error(rank: int, root: Path, module: Any, strategy: Any, options: dict[str, Any]) -> None:
    try:
        trainer(root, strategy, **options).fit(module, data())
    except ConfigurationError as error:
        (root / f"{rank}.txt").write_text(str(error))


def no_denoiser(folder: Path) -> DraftModule:
    return DraftModule(LinearModel(0.1), LinearReward(), truncation=Full())


def half(folder: Path) -> DraftModule:
    return draft(folder, model=StableDiffusion(str(folder), dtype="bfloat16", lora=LoRA(rank=2)))


INVALID: dict[str, tuple[Callable[[Path], Any], Callable[[], Any], dict[str, Any]]] = {
    "has no child module that is its denoiser; add a property": (no_denoiser, fsdp2, {}),
    "tensor_parallel_size: 1": (draft, lambda: fsdp2(data_parallel_size=1, tensor_parallel_size=2), {}),
    "write save_distributed_checkpoint: false": (draft, lambda: fsdp2(save_distributed_checkpoint=True), {}),
    "write precision: bf16-mixed": (half, CPUFSDP, {}),
}
if find_spec("deepspeed"):
    INVALID |= {
        "not called equally often on all processes": (draft, lambda: CPUDeepSpeed(stage=3), {}),
        "write precision: 32-true": (draft, lambda: CPUDeepSpeed(stage=2), {"precision": "bf16-mixed"}),
        "write dtype: float32 on the model": (half, lambda: CPUDeepSpeed(stage=2), {}),
    }


def expect_errors(rank: int, root: Path, pipeline: Path) -> None:
    for number, (make, strategy, options) in enumerate(INVALID.values()):
        place = root / str(number)
        place.mkdir(exist_ok=True)
        expect_error(rank, place, make(pipeline), strategy(), options)


def test_unsupported_strategies_are_rejected_before_training(tmp_path: Path, tiny_sd_v: Path) -> None:
    assert together(expect_errors, tmp_path, tiny_sd_v) == [0, 0]
    for number, message in enumerate(INVALID):
        for rank in range(2):
            assert message in (tmp_path / str(number) / f"{rank}.txt").read_text()
