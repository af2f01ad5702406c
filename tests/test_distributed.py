"""Sharding strategies on two processes without a GPU give the same training, files and resumed runs as DDP."""

import multiprocessing
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap

from lightning_draft.__main__ import main
from lightning_draft.callbacks import AdapterEMA, GradientNormMonitor, LoRAExport, OverOptimizationGuard, SampleLogger
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.data import PromptDataModule
from lightning_draft.distributed import blocks, gather_full, local_shard
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.lora import LoRA
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.objectives import PPO
from lightning_draft.rewards.color import Brightness, ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward
from lightning_draft.truncation import Full

PROMPTS = ["a cat", "a red cat", "red", "a bed", "a cab", "bread", "a deer", "a car", "a tree", "a bar"]


CLIP = 1e-4


class CPUFSDP(FSDPStrategy):
    """FSDP without its default requirement of a GPU."""

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        options = {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu"), **self.kwargs}
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **options):
            yield


class CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed with DDP's set-up instead of the check for a GPU, and without compiling an operator."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        import deepspeed.comm.comm  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        self._process_group_backend = "gloo"
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def fsdp2(**options: Any) -> ModelParallelStrategy:
    defaults = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**{**defaults, **options})


STRATEGIES: dict[str, Callable[[], Any]] = {"fsdp2": fsdp2, "fsdp": CPUFSDP}
if find_spec("deepspeed"):
    STRATEGIES |= {f"deepspeed_stage_{stage}": lambda stage=stage: CPUDeepSpeed(stage=stage) for stage in (1, 2)}


def together(work: Callable[..., None], *args: Any, patience: float = 240.0) -> list[int | None]:
    """Call `work(rank, ...)` in two processes as torchrun does; return exit codes, `None` for a process that hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
        code = 1
        try:
            work(rank, *args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for each in processes:
        each.start()
    end = time.monotonic() + patience
    for each in processes:
        each.join(max(0.0, end - time.monotonic()))
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    return codes


class Note(L.Callback):
    """Records for every process gradient norms, the number of its denoiser values, and a checkpoint."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.held = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.held = sum(local_shard(value).numel() for value in pl_module.model.denoiser.parameters())

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if trainer.is_global_zero and trainer.global_step == 1 and last.exists():
            (shutil.copytree if last.is_dir() else shutil.copyfile)(last, last.with_name("first.ckpt"))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.norms.append(float(trainer.callback_metrics["train/gradient_norm/total"]))


def draft(folder: Path, **options: Any) -> DraftModule:
    defaults = {
        "model": StableDiffusion(
            str(folder), guidance=Guidance(2.0), lora=LoRA(rank=3, target_modules=["to_q"], seed=0)
        ),
        "reward": ColorTarget(1.0, 0.0, 0.0),
        "eval_rewards": {"brightness": Brightness(0.5)},
        "sampler": DDIM(2),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=50.0, momentum=0.9),
    }
    return DraftModule(**{**defaults, **options})


def policy(folder: Path) -> PolicyGradientModule:
    return PolicyGradientModule(
        model=StableDiffusion(str(folder), guidance=Guidance(1.0), lora=LoRA(rank=3, target_modules=["to_q"], seed=0)),
        reward=ColorTarget(1.0, 0.0, 0.0),
        eval_rewards={"brightness": Brightness(0.5)},
        sampler=DDIM(2, eta=1.0),
        objective=PPO(),
        samples_per_prompt=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=50.0, momentum=0.9),
    )


METHODS: dict[str, Callable[[Path], Any]] = {
    "all steps": lambda folder: draft(folder, truncation=Full(), checkpointing="step"),
    "policy": policy,
}


def trainer(root: Path, strategy: Any, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 2,
        "max_steps": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        "default_root_dir": root,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "gradient_clip_val": CLIP,
    }
    return L.Trainer(strategy=strategy, callbacks=list(callbacks), **{**defaults, **options})


def data() -> PromptDataModule:
    return PromptDataModule(PROMPTS, batch_size=2, val_size=2)


def fit(rank: int, root: Path, strategy: str, module: Any, **options: Any) -> None:
    """Train with all callbacks, and store the results of this process."""
    note, guard = Note(), OverOptimizationGuard(max_prompts=1, samples_per_prompt=2)
    observers = [SampleLogger(every_n_steps=2, max_samples=1), GradientNormMonitor(figure_every_n_steps=0), note]
    writers = [AdapterEMA(decay=0.5), LoRAExport(every_n_steps=2), guard, LastCheckpoint(every_n_steps=1)]
    resume = options.pop("ckpt_path", None)
    how = "ddp" if strategy == "ddp" else STRATEGIES[strategy]()
    trainer(root, how, *observers, *writers, **options).fit(module, data(), ckpt_path=resume, weights_only=False)
    found = {"whole": gather_full(module), "norms": note.norms, "held": note.held, "history": guard.history}
    torch.save(found, root / f"{rank}.pt")


def results(root: Path) -> list[dict[str, Any]]:
    return [torch.load(root / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def battery(rank: int, root: Path, pipeline: Path) -> None:
    """Run every method with every strategy, and a run that is resumed."""
    for strategy in ("ddp", *STRATEGIES):
        for method, make in METHODS.items():
            place = root / strategy / method
            place.mkdir(parents=True, exist_ok=True)
            fit(rank, place, strategy, make(pipeline))
    for strategy in STRATEGIES:
        place = root / strategy / "resumed"
        place.mkdir(exist_ok=True)
        half_way = root / strategy / "all steps" / "checkpoints" / "first.ckpt"
        fit(rank, place, strategy, METHODS["all steps"](pipeline), ckpt_path=half_way)


@pytest.fixture(scope="module")
def ran(tiny_sd_v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every strategy and method."""
    root = tmp_path_factory.mktemp("sharding")
    assert together(battery, root, tiny_sd_v) == [0, 0]
    return root


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_and_files_equal_those_of_ddp(strategy: str, method: str, ran: Path) -> None:
    ours, theirs = results(ran / strategy / method), results(ran / "ddp" / method)
    assert_close(ours[0]["whole"], theirs[0]["whole"])
    assert all(torch.equal(ours[1]["whole"][name], value) for name, value in ours[0]["whole"].items())
    assert ours[0]["norms"] == ours[1]["norms"] == pytest.approx(theirs[0]["norms"], rel=1e-4)
    assert min(ours[0]["norms"]) > CLIP
    for step, look in theirs[0]["history"].items():
        assert ours[0]["history"][step].reward == pytest.approx(look.reward, abs=1e-5)
    for name in ("last", "best", "guarded"):
        files = [load_file(ran / each / method / "lora" / f"{name}.safetensors") for each in (strategy, "ddp")]
        assert_close(*files)
        assert any(value.any() for key, value in files[0].items() if "lora_B" in key or "lora.up" in key)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_each_process_holds_only_its_shard_of_the_denoiser(strategy: str, ran: Path) -> None:
    (whole_size,) = {each["held"] for each in results(ran / "ddp" / "all steps")}
    held = [each["held"] for each in results(ran / strategy / "all steps")]
    assert whole_size <= sum(held) < 1.05 * whole_size
    assert max(held) < 0.6 * whole_size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_the_uninterrupted_one(strategy: str, ran: Path) -> None:
    resumed, straight = (results(ran / strategy / name) for name in ("resumed", "all steps"))
    for rank in range(2):
        assert_close(resumed[rank]["whole"], straight[rank]["whole"], 1e-7)
        assert resumed[rank]["norms"] == pytest.approx(straight[rank]["norms"][1:], rel=1e-6)
    files = [load_file(ran / strategy / name / "lora" / "last.safetensors") for name in ("resumed", "all steps")]
    assert_close(*files, 1e-7)  # of the moving average


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_equal_those_of_ddp(strategy: str, ran: Path) -> None:
    for step in (0, 2):
        files = [ran / each / "all steps" / "samples" / f"step_{step:06d}.png" for each in (strategy, "ddp")]
        ours, theirs = (torch.frombuffer(bytearray(image_data(file)), dtype=torch.uint8).int() for file in files)
        assert (ours - theirs).abs().float().mean() < 0.5


def image_data(file: Path) -> bytes:
    from PIL import Image

    return Image.open(file).convert("RGB").tobytes()


def test_diffusers_opens_the_files_of_a_sharded_run(ran: Path, tiny_sd_v: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_v)
    pipe.load_lora_weights(str(ran / "fsdp2" / "all steps" / "lora" / "last.safetensors"))
    loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(results(ran / "fsdp2" / "all steps")[0]["whole"])


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


def command(rank: int, folder: Path, pipeline: Path) -> None:
    os.chdir(folder)
    assert main(["fit", "--config", "sharded.yaml"]) == 0
    assert main(["fit", "--config", "sharded.yaml", "--ckpt_path", "last", "--trainer.max_steps", "2"]) == 0
    assert main(["validate", "--config", "sharded.yaml", "--ckpt_path", "last"]) == 0


def test_the_command_line_trains_resumes_and_validates(tmp_path: Path, tiny_sd_v: Path) -> None:
    (tmp_path / "sharded.yaml").write_text(SHARDED.format(model=tiny_sd_v))
    assert together(command, tmp_path, tiny_sd_v) == [0, 0]
    checkpoint = torch.load(tmp_path / "runs" / "sharded" / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 2
    assert {name.rsplit(".", 3)[1] for name in checkpoint["state_dict"]} == {"lora_A", "lora_B"}
    assert (tmp_path / "runs" / "sharded" / "lora" / "last.safetensors").is_file()


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


def test_blocks_are_the_units_that_are_gathered(tiny_sd_v: Path, tiny_sd3: Path) -> None:
    from lightning_draft.models import StableDiffusion3

    unet = StableDiffusion(str(tiny_sd_v)).denoiser
    assert blocks(unet) == [*unet.down_blocks, *unet.up_blocks, unet.mid_block]
    transformer = StableDiffusion3(str(tiny_sd3)).denoiser
    assert blocks(transformer) == list(transformer.transformer_blocks)
