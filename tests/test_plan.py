"""The plan of a training step: equal to what the step with weights takes, to the byte and to the operation."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.draft import DraftModule
from lightning_draft.methods.policy_gradient import PolicyGradientModule
from lightning_draft.models import Guidance, LoRA, Memory, StableDiffusion, StableDiffusion3, StableDiffusionXL, ZImage
from lightning_draft.models.pixels import PixelDiffusion
from lightning_draft.plan import StepPlan, Tracker, plan_step
from lightning_draft.rewards import LatentNetwork, Reward
from lightning_draft.rewards.clip import CLIPScore
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.rewards.service import HTTPReward
from lightning_draft.samplers import DDIM, FlowEuler
from lightning_draft.truncation import Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation
from lightning_draft.weightless import shapes_only, without_weights
from tests.tiny_families import pixels, write

PROMPTS = ["a cat", "a red dog"]


def test_tracker_counts_the_bytes_of_live_storages() -> None:
    x = torch.zeros(1000)
    with Tracker() as live:
        y = x + 1
        view = y.view(10, 100)[2]
        del y
        assert (live.now, live.peak) == (4000, 4000)
        z = torch.ones(500, dtype=torch.float64)
        del view
        assert (live.now, live.peak) == (4000, 8000)
        z.mul_(2)
        x.t()
        assert (live.now, live.peak) == (4000, 8000)


@pytest.mark.parametrize("swap", [False, True], ids=["contiguous", "transposed"])
def test_results_without_weights_have_the_metadata_of_real_ones(swap: bool) -> None:
    def results() -> list[Tensor]:
        with shapes_only():
            x, row, b = torch.empty(6, 6), torch.empty(6), torch.empty(2, 6, 6, dtype=torch.bfloat16)
            ints = torch.zeros(6, 6, dtype=torch.int64)
        x = x.t() if swap else x
        one = [x + 1, x * 2.5, x / x, x - row, row - x, x + x.t(), x.half() * x, ints + 2, ints / 2, ints * x, 1 - x]
        return [*one, b.mul(3), torch.addmm(row, x, x), torch.mm(x, x), torch.bmm(b, b), x > 0]

    real = results()
    with without_weights():
        planned = results()
    for a, b in zip(real, planned, strict=True):
        assert (b.shape, b.stride(), b.dtype, b.device) == (a.shape, a.stride(), a.dtype, a.device)


def planned(build: Any, weights: bool) -> StepPlan:
    with nullcontext() if weights else without_weights():
        return plan_step(build(), PROMPTS, {})


def draft(folder: Path, **options: Any) -> DraftModule:
    model = StableDiffusion(
        str(folder), guidance=options.pop("guidance", Guidance(1.0)), memory=options.pop("memory", Memory())
    )
    return DraftModule(model, ColorTarget(), DDIM(2), **options)


CASES = {
    "steps recomputed": {"truncation": Full()},
    "decoder recomputed": {
        "truncation": LastK(1),
        "guidance": Guidance(3.0),
        "memory": Memory(decode_chunk=1, checkpoint_decoder=True),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_plan_without_weights_equals_the_count_of_the_real_step(small_sd: Path, case: str) -> None:
    without, real = (planned(lambda: draft(small_sd, **dict(CASES[case])), weights) for weights in (False, True))
    assert without == real
    assert real.live > 0
    assert real.total_flops > 0


def test_plan_of_a_reward_of_latents_has_no_decoder(small_sd: Path) -> None:
    def build(reward: Reward) -> DraftModule:
        return DraftModule(StableDiffusion(str(small_sd), guidance=Guidance(1.0)), reward, DDIM(2), LastK(1))

    def scorer() -> LatentNetwork:
        return LatentNetwork(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(288, 1)))

    without, real = (planned(lambda: build(scorer()), weights) for weights in (False, True))
    decoded = planned(lambda: build(ColorTarget()), weights=False)
    assert without == real
    assert "autoencoder" not in without.calls
    assert decoded.calls["autoencoder"] > 0
    assert without.total_flops < decoded.total_flops


def peak(module: DraftModule) -> int:
    """Return the largest number of bytes of live tensors of a step of four samples."""
    with Tracker() as live:
        module.loss_and_logs(["a cat"] * 4)[0].backward()
    return live.peak


@pytest.mark.parametrize("truncation", [LastK(1), LowVariance(1), ReFL(1)], ids=lambda each: type(each).__name__)
def test_default_recomputes_a_single_step_where_this_lowers_the_peak(small_sd: Path, truncation: Truncation) -> None:
    peaks = {m: peak(draft(small_sd, truncation=truncation, checkpointing=m)) for m in ("auto", "none", "step")}
    assert peaks["auto"] == peaks["step"] < 0.8 * peaks["none"]


def test_default_stores_a_single_step_where_nothing_with_activations_follows(tmp_path: Path) -> None:
    pixels(tmp_path)

    def module(checkpointing: Any) -> DraftModule:
        return DraftModule(PixelDiffusion(str(tmp_path)), ColorTarget(), DDIM(2), checkpointing=checkpointing)

    peaks = {mode: peak(module(mode)) for mode in ("auto", "none", "step")}
    assert peaks["auto"] == peaks["none"] <= 1.01 * peaks["step"]


def test_default_recomputes_the_decoder_of_several_chunks(small_sd: Path) -> None:
    model, peaks = StableDiffusion(str(small_sd)), []
    for memory in (Memory(decode_chunk=1), Memory(decode_chunk=1, checkpoint_decoder=False), Memory()):
        model.memory = memory
        with Tracker() as live:
            model.decode(model.noise(4).requires_grad_()).sum().backward()
        peaks.append(live.peak)
    by_chunk, stored, whole = peaks
    assert by_chunk < 0.5 * stored
    assert stored > 0.95 * whole


def test_chunks_have_at_most_the_pixels_of_one_512_image() -> None:
    sizes = ((64, 64), (512, 512), (512, 256), (1024, 1024))
    assert [Memory().chunk(each) for each in sizes] == [64, 1, 2, 1]
    assert Memory(decode_chunk=3).chunk((1024, 1024)) == 3


def test_a_step_takes_the_whole_batch_and_all_accumulated_batches(small_sd: Path) -> None:
    """FLOPs are proportional to the number of prompts, and activations grow with the batch."""
    one = plan_step(draft(small_sd), PROMPTS[:1], {})
    for prompts, batches in ((2, 1), (1, 3), (2, 2)):
        several = plan_step(draft(small_sd), PROMPTS[:prompts], {"accumulate_grad_batches": batches})
        assert several.flops["denoiser"] == prompts * batches * one.flops["denoiser"]
        assert several.calls["denoiser"] == batches * one.calls["denoiser"]
        assert (several.live > 1.5 * one.live) == (prompts == 2)


@pytest.mark.parametrize("random", [RandomK(), RandomSteps()])
def test_plan_of_a_random_truncation_is_that_of_its_costliest_choice(small_sd: Path, random: Truncation) -> None:
    plans = [plan_step(draft(small_sd, truncation=each), PROMPTS[:1], {}) for each in (random, Full())]
    assert plans[0] == plans[1]


def test_a_reward_that_reads_pixel_values_is_rejected(small_sd: Path) -> None:
    def build() -> PolicyGradientModule:
        return PolicyGradientModule(
            StableDiffusion(str(small_sd)),
            HTTPReward("http://127.0.0.1:9/score"),
            DDIM(2, eta=1.0),
            samples_per_prompt=2,
        )

    with pytest.raises(ConfigurationError, match="reward HTTPReward reads pixel values, which a plan does not have"):
        planned(build, weights=False)


def test_plan_counts_rollouts_minibatches_and_full_fine_tuning(small_sd: Path) -> None:
    def build() -> PolicyGradientModule:
        model = StableDiffusion(str(small_sd), guidance=Guidance(1.0), trainable="full")
        return PolicyGradientModule(
            model, ColorTarget(), DDIM(2, eta=1.0), samples_per_prompt=2, timesteps_per_minibatch=1
        )

    without, real = planned(build, False), planned(build, True)
    assert without == real
    assert real.optimizer > 2 * real.weights["trained"] * 0.99


def test_plan_of_other_families_and_of_clip(tiny_sdxl: Path, tiny_sd3: Path, tiny_clip: Path) -> None:
    def xl() -> DraftModule:
        return DraftModule(StableDiffusionXL(str(tiny_sdxl)), CLIPScore(str(tiny_clip)), DDIM(1), LastK(1))

    def sd3() -> DraftModule:
        model = StableDiffusion3(str(tiny_sd3), lora=LoRA(rank=2, target_modules=["to_q"]))
        return DraftModule(model, CLIPScore(str(tiny_clip)), FlowEuler(1), LastK(1))

    for build in (xl, sd3):
        without, real = planned(build, False), planned(build, True)
        assert (without.weights, without.flops, without.calls) == (real.weights, real.flops, real.calls)
        assert without.live == pytest.approx(real.live, rel=0.01)


def test_plan_of_prompts_that_differ_in_length(tmp_path: Path) -> None:
    """The length is known without weights: it is that of the text encoder's mask."""
    folder = write("z_image", tmp_path / "z_image")

    def build() -> DraftModule:
        model = ZImage(str(folder), lora=LoRA(2), guidance=Guidance(1.0), height=16, width=16)
        return DraftModule(model, ColorTarget(), FlowEuler(1), LastK(1))

    without, real = planned(build, False), planned(build, True)
    assert (without.weights, without.flops, without.calls) == (real.weights, real.flops, real.calls)
    assert without.live == pytest.approx(real.live, rel=0.01)


def test_no_weight_is_read(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    for file in tiny_sd.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.relative_to(tiny_sd)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(tiny_sd)).write_bytes(file.read_bytes())
    with without_weights():
        sizes = [value.nbytes for value in draft(folder).parameters()]
    assert sizes == [value.nbytes for value in draft(tiny_sd).parameters()]


def test_omitted_networks_are_omitted_without_weights_too(tiny_sd3: Path) -> None:
    def build() -> StableDiffusion3:
        return StableDiffusion3(str(tiny_sd3), lora=None, omit=["text_encoder_3"])

    with without_weights():
        planned = build()
    assert planned.text_encoder_3 is None
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (planned, build())]
    assert shapes[0] == shapes[1]


def test_tensors_are_real_again_after_the_context(tiny_sd: Path) -> None:
    with without_weights():
        draft(tiny_sd)
    model = StableDiffusion(str(tiny_sd))
    assert torch.isfinite(model.noise(1)).all()
    assert float(next(model.unet.parameters()).abs().sum()) > 0.5
