"""One battery for the newer model families: each is compared with diffusers' own pipeline on a small random one."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_draft.chain import SamplingChain
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.base import RewardModule
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, PipelineModel, StableDiffusion
from lightning_draft.models.families import FAMILIES
from lightning_draft.models.family import Family
from lightning_draft.rewards.color import ColorBalance
from lightning_draft.samplers import Sampler
from lightning_draft.surrogates import DirectAlign, FlowBPBridge, FlowBPLagrange, LeapAlign
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation
from tests.family_cases import (
    CASES,
    STEPS,
    Case,
    diffusers_images,
    images,
    opened,
    plain,
    prepared,
    sampler,
    starting_noise,
)
from tests.tiny_families import WRITERS


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_the_diffusers_pipeline(folders: Callable, name: str) -> None:
    """With guidance on and off, a negative prompt, two different prompts, and at a non-square size."""
    case, folder = CASES[name], folders(name)
    pipeline, wide = plain(folder, case), case.side * 2
    variants: list[tuple[Guidance, tuple[int, int]]] = [(Guidance(1.0), (case.side, case.side))]
    if case.guidance is None and case.size:
        variants += [(Guidance(1.0), (case.side, wide))]
    if case.guidance is not None:
        variants += [(Guidance(3.0), (case.side, case.side)), (Guidance(3.0, "tree"), (case.side, wide))]
    seen = []
    for guidance, (height, width) in variants:
        size = {"height": height, "width": width} if case.size else {}
        model = opened(folder, case, lora=None, guidance=guidance, **size)
        ours = images(model, case)
        theirs = diffusers_images(pipeline, model, case, guidance.scale or 1.0, guidance.negative_prompt)
        assert ours.shape == (2, 3, height, width)
        torch.testing.assert_close(ours.clamp(0, 1), theirs, rtol=0, atol=2e-5)
        assert ((ours > 0) & (ours < 1)).float().mean() > 0.05
        assert name == "pixels" or (ours[0] - ours[1]).abs().max() > 1e-3
        seen.append(ours)
    assert all((other[..., : case.side] - seen[0]).abs().max() > 1e-3 for other in seen[1:])


def with_peft(folder: Path, family: Family, file: Path) -> Any:
    """Return a pipeline without `load_lora_weights` in which the code of docs/lora.md has loaded a LoRA file."""
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.M) if "peft" in block]
    changes = {
        "DDPMPipeline": family.pipeline_name,
        "google/ddpm-cifar10-32": str(folder),
        "runs/ddpm_cifar10_color/lora/best.safetensors": str(file),
        "unet": family.denoiser,
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["pipe"]


@pytest.mark.parametrize("name", CASES)
def test_an_exported_lora_gives_our_images_in_a_plain_pipeline(folders: Callable, name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], folders(name)
    model = opened(folder, case, lora=LoRA(4, alpha=6.0), guidance=Guidance(2.0 if case.guidance else 1.0))
    model.save_lora(tmp_path / "lora.safetensors")
    pipeline = plain(folder, case)
    base = diffusers_images(pipeline, model, case, 2.0)
    if model.family.loads_lora:
        pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    else:
        pipeline = prepared(with_peft(folder, model.family, tmp_path / "lora.safetensors"), case)
    ours = images(model, case).clamp(0, 1)
    torch.testing.assert_close(ours, diffusers_images(pipeline, model, case, 2.0), rtol=0, atol=2e-4)
    assert (ours - base).abs().mean() > 0.001


def method(kind: str, model: PipelineModel, case: Case) -> RewardModule:
    """A direct method or a policy gradient."""
    if kind == "last_k":
        return DraftModule(model, ColorBalance(), sampler(case), LastK(2))
    return PolicyGradientModule(model, ColorBalance(), sampler(case, stochastic=True), samples_per_prompt=2)


STABLE_DIFFUSION = {
    "tiny_sd": Case("StableDiffusion", ("a cat", "a red dog"), flow=False),
    "tiny_sdxl": Case("StableDiffusionXL", ("a cat", "a red dog"), flow=False),
    "tiny_sd3": Case("StableDiffusion3", ("a cat", "a red dog")),
}
"""The older families, by the fixtures that write their pipelines; their images are compared in their own files."""


def check_training(folder: Path, case: Case, kind: str, dtype: Any, tmp_path: Path) -> None:
    """Train for one step, and check which weights change."""
    guidance = Guidance(1.0 if case.guidance is None else 2.0)
    model = opened(folder, case, dtype=dtype, guidance=guidance, lora=LoRA(2, seed=0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(method(kind, model, case), PromptDataModule([*case.prompts] * 2, batch_size=2, val_size=1))
    trained = {key for key, _ in model.trainable_parameters()}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert trained
    assert changed == trained
    assert {before[key].dtype for key in trained} == {torch.float32}


@pytest.mark.parametrize(("kind", "dtype"), [("last_k", "bfloat16"), ("ppo", "float32")])
@pytest.mark.parametrize("name", CASES)
def test_training_changes_the_adapters_alone(
    folders: Callable, name: str, kind: str, dtype: Any, tmp_path: Path
) -> None:
    check_training(folders(name), CASES[name], kind, dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["last_k", "ppo"])
@pytest.mark.parametrize("fixture", STABLE_DIFFUSION)
def test_training_changes_the_adapters_alone_in_stable_diffusion(
    fixture: str, kind: str, dtype: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    check_training(request.getfixturevalue(fixture), STABLE_DIFFUSION[fixture], kind, dtype, tmp_path)


TRUNCATIONS = [
    Full(),
    LastK(2),
    LowVariance(),
    ReFL(STEPS),
    RandomK(),
    RandomSteps(),
    DRTune(2, m=2),
    FlowBPBridge(2),
    LeapAlign(),
    FlowBPLagrange(),
    DirectAlign(),
]


def check_gradients(model: PipelineModel, sampler: Sampler, prompts: Sequence[str]) -> None:
    parameters = [value for _, value in model.trainable_parameters()]
    for truncation in TRUNCATIONS:
        torch.manual_seed(0)
        chain = SamplingChain(model, sampler, model.encode(prompts))
        loss = model.decode(truncation(chain, starting_noise(model))).square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms = torch.stack([each.norm() for each in gradients if each is not None])
        assert norms.isfinite().all(), truncation
        assert norms.max() > 0, truncation


@pytest.mark.parametrize("name", CASES)
def test_every_truncation_has_a_gradient_in_every_family(folders: Callable, name: str) -> None:
    case = CASES[name]
    model = opened(folders(name), case, lora=LoRA(2), guidance=Guidance(1.0))
    check_gradients(model, sampler(case), case.prompts)


@pytest.mark.parametrize("fixture", STABLE_DIFFUSION)
def test_every_truncation_has_a_gradient_in_stable_diffusion(fixture: str, request: pytest.FixtureRequest) -> None:
    case = STABLE_DIFFUSION[fixture]
    model = opened(request.getfixturevalue(fixture), case, lora=LoRA(2), guidance=Guidance(1.0))
    check_gradients(model, sampler(case), case.prompts)


def subclasses(kind: type) -> set[type]:
    return {kind for child in kind.__subclasses__() for kind in (child, *subclasses(child))}


def test_the_battery_has_every_truncation() -> None:
    shipped = {kind for kind in subclasses(Truncation) if kind.__module__.startswith("lightning_draft.")}
    assert {type(each) for each in TRUNCATIONS} == shipped


@pytest.mark.parametrize("name", CASES)
def test_the_right_class_is_named_for_a_pipeline_of_another_family(folders: Callable, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"open it with {CASES[name].model}$"):
        StableDiffusion(str(folders(name)))


def test_every_family_has_a_case() -> None:
    assert {case.model for case in (*CASES.values(), *STABLE_DIFFUSION.values())} == set(FAMILIES)
    assert set(CASES) == set(WRITERS)
