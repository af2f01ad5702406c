"""The scale of the adapters as a function of the sampling step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from lightning_draft.callbacks import LoRAExport
from lightning_draft.chain import SamplingChain
from lightning_draft.cli.summary import closing_lines
from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.policy import Policy
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.models.base import Conditioning
from lightning_draft.models.lora_base import read_lora
from lightning_draft.models.lora_content import LoRAFile
from lightning_draft.models.lora_edit import mix_loras
from lightning_draft.models.lora_merge import merge_lora
from lightning_draft.models.scale_schedule import Interpolation, ScaleSchedule
from lightning_draft.recompute import Recompute
from lightning_draft.samplers import DDIM
from lightning_draft.schedules import step_at
from lightning_draft.surrogates import DirectAlign, FlowBPBridge, FlowBPLagrange, LeapAlign
from lightning_draft.testing import LinearModel
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

PROMPTS = ["a red cat", "dog"]
SCALES = (0.0, 0.5, -1.0, 1.5)
START = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
INTERPOLATIONS: list[Interpolation] = ["weights", "predictions"]


@pytest.fixture(scope="module")
def model(tiny_sd: Path) -> StableDiffusion:
    """A model whose adapters do something."""
    options = LoRA(2, alpha=3.0, target_modules=["to_q", "conv1"])
    model = StableDiffusion(str(tiny_sd), lora=options, guidance=Guidance(2.0))
    generator = torch.Generator().manual_seed(3)
    for _, value in model.trainable_parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model


@contextmanager
def scheduled(model: StableDiffusion, **options: Any) -> Iterator[None]:
    """Within this context, the model has this schedule."""
    before, model.lora = model.lora, replace(model.lora or LoRA(), scale_schedule=ScaleSchedule(**options))
    yield
    model.lora = before


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def sampled(model: StableDiffusion, steps: int = len(SCALES)) -> Tensor:
    with torch.no_grad():
        chain = SamplingChain(model, DDIM(steps), model.encode(PROMPTS))
        images: Tensor = model.decode(chain.advance(chain.start(noise())).x).clamp(0, 1)
        return images


def gradients(model: StableDiffusion, truncation: Truncation, recompute: Recompute) -> list[Tensor]:
    chain = SamplingChain(
        model,
        DDIM(len(SCALES)),
        model.encode(PROMPTS),
        recompute=recompute,
        generator=torch.Generator().manual_seed(1),
    )
    parameters = [value for _, value in model.trainable_parameters()]
    return list(torch.autograd.grad(truncation(chain, noise()).square().sum(), parameters))


def test_schedules_have_the_published_weights() -> None:
    """Those of NeMo-Aligner: i / T, its powers, and a step function of i / T."""
    steps = range(5)
    assert [ScaleSchedule().weight(i, 5) for i in steps] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert [ScaleSchedule.from_text("power_2").weight(i, 5) for i in steps] == [(i / 5) ** 2 for i in steps]
    assert [ScaleSchedule.from_text("step_0.6").weight(i, 5) for i in steps] == [0, 0, 0, 1, 1]
    assert [ScaleSchedule.from_text("0, 2,-1").weight(i, 6) for i in range(6)] == [0, 0, 2, 2, -1, -1]
    for text in ("linear", "power_4", "step_0.25", "0,1"):
        schedule = ScaleSchedule.from_text(text)
        assert ScaleSchedule.from_text(schedule.to_text()) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine", "'cosine' is not a scale schedule; write linear, power_2, step_0.6"),
        ("step_1", "scale_schedule.start=1 never uses the adapters"),
        ("step_x", "'step_x' is not a scale schedule"),
        ("power_-1", "scale_schedule.power=-1.0 must be at least 0"),
        ("power_2_3", "'power_2_3' is not a scale schedule"),
        pytest.param('{"scales": ' + "[" * 100_000, "is not a scale schedule", id="nested"),
        ("0,nan", "scale_schedule.scales=nan must be a finite number"),
        ('{"speed": 1}', "is not a scale schedule"),
        ('{"scales": [1], "power": 2}', "scales replaces power and start"),
        ('{"interpolate": "images"}', "interpolate='images' is not a valid choice; write one of weights, predictions"),
    ],
)
def test_invalid_schedules_are_rejected(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("{", r"\{")):
        ScaleSchedule.from_text(text)


@pytest.mark.parametrize("interpolate", INTERPOLATIONS)
def test_constant_scale_1_changes_nothing(model: StableDiffusion, interpolate: Interpolation) -> None:
    images, expected = sampled(model), gradients(model, LastK(2), Recompute())
    with scheduled(model, scales=[1.0], interpolate=interpolate):
        assert torch.equal(sampled(model), images)
        assert all(map(torch.equal, gradients(model, LastK(2), Recompute()), expected))


def test_interpolated_weights_give_the_images_of_diffusers_with_a_scale_for_each_step(
    model: StableDiffusion, tiny_sd: Path, tmp_path: Path
) -> None:
    """The pipeline's own `set_adapters`, called before the first step and at the end of each."""
    model.save_lora(tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="a")
    pipeline.set_adapters("a", SCALES[0])

    def next_scale(pipeline: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline.set_adapters("a", (*SCALES, 1.0)[step + 1])
        return tensors

    options = {"num_inference_steps": len(SCALES), "guidance_scale": 2.0, "latents": noise(), "output_type": "pt"}
    theirs = pipeline(PROMPTS, callback_on_step_end=next_scale, **options).images
    with scheduled(model, scales=SCALES):
        torch.testing.assert_close(sampled(model), theirs, rtol=0, atol=2e-4)
    assert (sampled(model) - theirs).abs().mean() > 1e-3


def test_interpolated_predictions_are_those_of_the_base_and_the_tuned_model(model: StableDiffusion) -> None:
    """`(1 - w) eps_base + w eps_tuned` after guidance."""
    conditioning, x = model.encode(PROMPTS), noise()
    with torch.no_grad():
        tuned = model(x, 301.0, conditioning)
        with model.base():
            base = model(x, 301.0, conditioning)
        for step, weight in enumerate(SCALES):
            with scheduled(model, scales=SCALES, interpolate="predictions"), model.at_step(step, len(SCALES)):
                ours = model(x, 301.0, conditioning)
            torch.testing.assert_close(ours, (1 - weight) * base + weight * tuned, rtol=0, atol=1e-5)
    assert (tuned - base).abs().mean() > 0.01


@pytest.mark.parametrize("interpolate", INTERPOLATIONS)
def test_base_model_is_not_scheduled(model: StableDiffusion, interpolate: Interpolation) -> None:
    with model.base():
        base = sampled(model)
        with scheduled(model, scales=SCALES, interpolate=interpolate):
            assert torch.equal(sampled(model), base)
    with scheduled(model, scales=[0.0], interpolate=interpolate):
        torch.testing.assert_close(sampled(model), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolate", INTERPOLATIONS)
def test_recomputation_uses_the_scale_of_the_step(model: StableDiffusion, interpolate: Interpolation) -> None:
    """Of each step, of each block, and of both with micro-batches; outside of the contexts of the forward pass."""
    with scheduled(model, scales=SCALES, interpolate=interpolate):
        expected = gradients(model, LastK(2), Recompute())
        for recompute in (Recompute(steps=True), Recompute(blocks=True), Recompute(True, True, micro_batch_size=1)):
            for ours, theirs in zip(gradients(model, LastK(2), recompute), expected, strict=True):
                assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    unscheduled = gradients(model, LastK(2), Recompute())
    assert (unscheduled[0] - expected[0]).norm() > 0.1 * expected[0].norm()


class Linear(LinearModel):
    """A network with the parameter `theta_0 + w (theta - theta_0)`."""

    def __init__(self) -> None:
        super().__init__(0.2, shape=(2, 3))
        self.theta.data.fill_(0.35)
        self.scale = 1.0

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        theta: Tensor = 0.2 + self.scale_at(t) * (self.theta - 0.2)
        return theta.to(x) * x

    def scale_at(self, t: float) -> float:
        return self.scale


class ByStep(Linear):
    """The scale is that of the step which the chain states."""

    @contextmanager
    def at_step(self, step: int, num_steps: int) -> Iterator[None]:
        self.scale = ScaleSchedule(scales=SCALES).weight(step, num_steps)
        yield
        self.scale = 1.0


class ByTime(Linear):
    """The scale is found from the time, whatever the chain states."""

    def scale_at(self, t: float) -> float:
        return dict(zip((t for t, _ in DDIM(4).grid(self.schedule)), SCALES, strict=True))[t]


TRUNCATIONS = [
    Full(),
    LastK(2),
    RandomK(4),
    RandomSteps(),
    DRTune(2, m=1),
    ReFL(3),
    LowVariance(2),
    DirectAlign(1, 3),
    FlowBPBridge(2),
    LeapAlign(),
    FlowBPLagrange(),
]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=lambda truncation: type(truncation).__name__)
def test_every_truncation_uses_the_scale_of_each_step(truncation: Truncation) -> None:
    """Its latents and gradient are those of a network that finds the scale from the time."""
    found = []
    for model, recompute in ((ByTime(), False), (ByStep(), False), (ByStep(), True)):
        generator, options = torch.Generator().manual_seed(2), Recompute(steps=recompute)
        chain = SamplingChain(model, DDIM(4), model.encode(["a"]), recompute=options, generator=generator)
        torch.manual_seed(0)
        latents = truncation(chain, START)
        found.append((latents, *torch.autograd.grad(latents.sum(), model.theta)))
    assert all(torch.equal(ours, theirs) for other in found[1:] for ours, theirs in zip(other, found[0], strict=True))
    assert found[0][1] != 0


def test_closed_form_of_a_linear_network_with_a_scale_for_each_step() -> None:
    """A sample is `x_T prod_i (A_i + B_i theta_i)`, and its derivative `x_0 sum_i w_i B_i / (A_i + B_i theta_i)`."""
    model = ByStep()
    chain = SamplingChain(model, DDIM(4), model.encode(["a"]))
    product, slope = 1.0, 0.0
    for (t, s), scale in zip(chain.grid, SCALES, strict=True):
        (alpha, sigma), (next_alpha, next_sigma) = (model.schedule.coefficients(time) for time in (t, s))
        a, b = next_alpha / alpha, next_sigma - next_alpha * sigma / alpha
        factor = a + b * (0.2 + scale * 0.15)
        product, slope = product * factor, slope + scale * b / factor
    latents = Full()(chain, START)
    torch.testing.assert_close(latents, START * product)
    torch.testing.assert_close(torch.autograd.grad(latents.sum(), model.theta)[0], (START * product * slope).sum())


def test_times_between_the_steps_of_a_grid_have_the_scale_of_the_step_before() -> None:
    grid = ((900.0, 600.0), (600.0, 300.0), (300.0, -1.0))
    assert [step_at(grid, t) for t in (999.0, 900.0, 700.0, 600.0, 301.0, 300.0, 0.0)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_policy_gives_a_trajectory_the_log_probabilities_with_which_it_was_sampled() -> None:
    policy = Policy(ByStep(), DDIM(4, eta=1.0), lambda value, _: value, None)
    prompts, seeds = ["a", "b"], [1, 2]
    latents, log_probs, _ = policy.sample(prompts, seeds)
    torch.testing.assert_close(policy.log_probs(prompts, latents), log_probs)
    policy.model = Linear()
    assert (policy.log_probs(prompts, latents) - log_probs).abs().max() > 0.01


def test_exported_files_name_their_schedule_and_loading_applies_it(
    model: StableDiffusion, tiny_sd: Path, tmp_path: Path
) -> None:
    with scheduled(model, power=2.0, interpolate="predictions"):
        model.save_lora(tmp_path / "lora.safetensors")
        expected = sampled(model)
    loaded = StableDiffusion(str(tiny_sd), lora=None, guidance=Guidance(2.0))
    loaded.load_lora(tmp_path / "lora.safetensors")
    assert loaded.lora is not None
    assert loaded.lora.scale_schedule == ScaleSchedule(power=2.0, interpolate="predictions")
    torch.testing.assert_close(sampled(loaded), expected, rtol=0, atol=1e-5)


def test_training_from_a_file_uses_its_schedule_unless_one_is_given(
    model: StableDiffusion, tiny_sd: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    with scheduled(model, power=2.0):
        model.save_lora(file)
        expected = sampled(model)
    started = StableDiffusion(str(tiny_sd), lora=LoRA(init=str(file)), guidance=Guidance(2.0))
    torch.testing.assert_close(sampled(started), expected, rtol=0, atol=1e-5)
    constant = LoRA(init=str(file), scale_schedule=ScaleSchedule(scales=[1.0]))
    started = StableDiffusion(str(tiny_sd), lora=constant, guidance=Guidance(2.0))
    torch.testing.assert_close(sampled(started), sampled(model), rtol=0, atol=1e-5)


@pytest.fixture
def annealed(model: StableDiffusion, tiny_sd: Path, tmp_path: Path) -> Callable[[str], LoRAFile]:
    """Return a LoRA file with a schedule; the empty text gives none."""

    def write(text: str) -> LoRAFile:
        path = tmp_path / f"lora_{text}.safetensors"
        model.save_lora(path, {"scale_schedule": ScaleSchedule.from_text(text).to_text()} if text else {})
        return read_lora(path, str(tiny_sd))

    return write


def test_mixed_files_keep_a_common_schedule_and_reject_different_ones(annealed: Callable[[str], LoRAFile]) -> None:
    a, plain, constant = map(annealed, ("power_2", "", "power_0"))
    mixed, _ = mix_loras([a, a], [0.5, 0.5])
    assert ScaleSchedule.from_text(mixed.metadata["scale_schedule"]) == ScaleSchedule(power=2)
    assert "scale_schedule" not in mix_loras([plain, constant], [1, 1])[0].metadata
    with pytest.raises(ConfigurationError, match="have different scale schedules"):
        mix_loras([plain, a], [1, 1])


def test_files_with_a_schedule_are_not_merged(annealed: Callable[[str], LoRAFile], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has a scale schedule, and merged weights have one scale"):
        merge_lora(annealed("power_2"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_closing_lines_say_that_the_scale_changes_by_step(model: StableDiffusion, tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").touch()
    export = LoRAExport()
    export._folder = tmp_path
    trainer: Any = SimpleNamespace(callbacks=[export])
    module: Any = SimpleNamespace(model=model)
    assert list(closing_lines(trainer, module, tmp_path))[-1].endswith('last.safetensors")')
    with scheduled(model, power=2.0):
        assert list(closing_lines(trainer, module, tmp_path))[-1].endswith(
            '")  # its scale changes by step: see the code in README.md beside it'
        )
