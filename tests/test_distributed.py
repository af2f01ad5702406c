"""Sharding strategies on two processes without a GPU give the same training, files and resumed runs as DDP."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_draft.callbacks import AdapterEMA, GradientNormMonitor, LoRAExport, OverOptimizationGuard, SampleLogger
from lightning_draft.callbacks.last_checkpoint import LastCheckpoint
from lightning_draft.distributed import blocks, gather_full, local_shard
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.lora import LoRA
from lightning_draft.models.stable_diffusion import StableDiffusion
from lightning_draft.objectives import PPO
from lightning_draft.rewards.color import Brightness, ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import Full
from tests.two_processes import CLIP, CPUFSDP, CPUDeepSpeed, data, draft, fsdp2, together, trainer

STRATEGIES: dict[str, Callable[[], Any]] = {"fsdp2": fsdp2, "fsdp": CPUFSDP}
if find_spec("deepspeed"):
    STRATEGIES |= {f"deepspeed_stage_{stage}": lambda stage=stage: CPUDeepSpeed(stage=stage) for stage in (1, 2)}


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


def test_blocks_are_the_units_that_are_gathered(tiny_sd_v: Path, tiny_sd3: Path) -> None:
    from lightning_draft.models import StableDiffusion3

    unet = StableDiffusion(str(tiny_sd_v)).denoiser
    assert blocks(unet) == [*unet.down_blocks, *unet.up_blocks, unet.mid_block]
    transformer = StableDiffusion3(str(tiny_sd3)).denoiser
    assert blocks(transformer) == list(transformer.transformer_blocks)
