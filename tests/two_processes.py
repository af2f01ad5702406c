"""Two processes on the CPU, sharding strategies that run there, and a trainer and a DRaFT module for them."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap

from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.data import PromptDataModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.lora import LoRA
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.rewards.color import Brightness, ColorTarget
from lightning_draft.samplers import DDIM

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


def together(work: Callable[..., None], *args: Any, patience: float = 240.0) -> list[int | None]:
    """Call `work(rank, ...)` in two processes as torchrun does; return exit codes, `None` for a process that hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
        torch.set_num_threads(1)  # a fork loses torch's threads; loading restores them in several threads at once
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
