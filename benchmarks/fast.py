"""Training steps of DRaFT-1 in exact and fast mode, compared with a step of TRL's AlignProp with one step trained.

    python -m benchmarks.fast
    python -m benchmarks.fast --model sd15 --device cuda --dtype bfloat16 --steps 50 --guidance-scale 7.5

`trl_loss` follows `AlignPropTrainer` of TRL 0.11 with `truncated_backprop_timestep = T - 1`: it embeds the prompts in
each step, and calls the network with a graph and activation checkpointing in every sampling step, also in those that it
detaches. The same network, adapters, reward and optimizer are used. Steps of all settings alternate; seconds are CPU
time of the process (elapsed time on a GPU), the minimum of all repeats.

Images of each setting are compared with those of exact mode, from the same noise and with random adapters, and scored.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import common
from benchmarks.step_cost import seconds
from lightning_draft.methods.direct import Checkpointing
from lightning_draft.methods.draft import DraftModule
from lightning_draft.models import StableDiffusion
from lightning_draft.prompt_sources import read_prompts
from lightning_draft.rewards import ImageQuality
from lightning_draft.rewards.base import Reward
from lightning_draft.rewards.color import ColorTarget
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import LastK


@dataclass(frozen=True)
class Setting:
    """A setting of the training step.

    Args:
        name: Name in the table.
        checkpointing: The option `checkpointing`, `None` for the step of TRL.
        merge: The option `lora.merge`.
        interval: The option `guidance.interval`.
    """

    name: str
    checkpointing: Checkpointing | None = "none"
    merge: bool = False
    interval: tuple[float, float] = (0.0, 1.0)

    def apply(self, module: DraftModule) -> None:
        """Set the options of the module and its model."""
        model: Any = module.model
        module.checkpointing = self.checkpointing or "auto"
        model.lora = replace(model.lora, merge=self.merge)
        model.guidance = replace(model.guidance, interval=self.interval)


SETTINGS = [
    Setting("TRL's AlignProp", None),
    Setting("exact, step recomputed (default)", "auto"),
    Setting("exact, nothing recomputed"),
    Setting("lora.merge", merge=True),
    Setting("guidance.interval [0, 0.5]", interval=(0.0, 0.5)),
    Setting("both", merge=True, interval=(0.0, 0.5)),
]


def trl_loss(module: DraftModule, prompts: Sequence[str], noise: Tensor) -> Tensor:
    """Return the loss of a step of TRL's AlignProp with one step trained, with a graph."""
    model: Any = module.model
    pipeline, guidance = model.pipeline, model.guidance.scale
    steps = module.sampler.num_steps
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        text = pipeline.encode_prompt(list(prompts), model.device, 1, False)[0]
        if guidance != 1:
            text = torch.cat([model.encode(prompts).negative.tensors["text"].to(text), text])
    latents = noise
    for i, t in enumerate(scheduler.timesteps):
        x = latents if guidance == 1 else torch.cat([latents] * 2)
        call = checkpoint(model.unet, x.to(text.dtype), t, text, return_dict=False, use_reentrant=False)
        output = call[0].to(latents.dtype)
        if i < steps - 1:
            output = output.detach()
        if guidance != 1:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(output, t, latents).prev_sample
    images = model.vae.decode(latents.to(model.vae.dtype) / model.vae.config.scaling_factor, return_dict=False)[0]
    return -module.reward((images.float() / 2 + 0.5), list(prompts)).mean()


def loss(module: DraftModule, setting: Setting, prompts: list[str], seed: int) -> Tensor:
    """Return the loss of a training step, with a graph."""
    setting.apply(module)
    torch.manual_seed(seed)
    if setting.checkpointing is None:
        return trl_loss(module, prompts, module.model.noise(len(prompts)))
    return module.loss_and_logs(prompts)[0]


def train_step(module: DraftModule, optimizer: torch.optim.Optimizer, compute: Callable[[], Tensor]) -> float:
    """Take one training step, and return its seconds."""
    start = seconds(module.device)
    compute().backward()
    torch.nn.utils.clip_grad_norm_(module.trainable_parameters().values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return seconds(module.device) - start


def times(module: DraftModule, prompts: list[str], repeats: int) -> dict[str, float]:
    """Return the seconds of a training step of each setting."""
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-6)
    found: dict[str, list[float]] = {setting.name: [] for setting in SETTINGS}
    for number in range(1 + repeats):
        for each in SETTINGS:
            spent = train_step(module, optimizer, lambda each=each: loss(module, each, prompts, 0))  # type: ignore[misc]
            found[each.name] += [spent] if number else []
    return {name: min(values) for name, values in found.items()}


def generated(module: DraftModule, setting: Setting, held_out: list[str]) -> tuple[Tensor, float]:
    """Return images that are sampled in a setting, and their mean reward."""
    setting.apply(module)
    images = module.generate(held_out, seed=1).images.clamp(0, 1)
    return images, module.score(images, held_out)["reward"].mean().item()


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, steps=20, batch=4)
    parser.set_defaults(model="emoji64", guidance_scale=3.0)
    parser.add_argument("--repeats", type=int, default=4, help="number of timed steps of each setting")
    parser.add_argument("--images", type=int, default=16, help="number of images that are compared and scored")
    arguments = parser.parse_args()
    common.quiet()
    model: StableDiffusion = common.open_model(arguments)
    shipped = arguments.model == "emoji64"
    reward: Reward = ImageQuality("emoji64-judge") if shipped else ColorTarget()
    module = DraftModule(model, reward, DDIM(arguments.steps, spacing="trailing"), LastK(1)).to(arguments.device)
    prompts, held_out = list(read_prompts("emoji64")), list(read_prompts("emoji64_eval"))[: arguments.images]
    spent = times(module, prompts[: arguments.batch], arguments.repeats)
    for name, value in module.trainable_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)  # adapters without an update would be merged exactly
    exact, _ = generated(module, SETTINGS[2], held_out)
    rows = []
    for setting in SETTINGS:
        images, reward_now = generated(module, setting, held_out)
        own, distance = spent[setting.name], (images - exact).square().mean().sqrt().item()
        cells = [f"{own:.3f}", f"{spent[SETTINGS[0].name] / own:.2f}", f"{distance:.1e}", f"{reward_now:.3f}"]
        rows.append([setting.name, *cells])
    head = ["setting", "s / step", "TRL / setting", "RMS difference of images", "reward"]
    title = f"T = {arguments.steps}, K = 1. {common.describe(arguments, model)}."
    common.show(f"{title}\n\n{common.table(head, rows)}", arguments.output)


if __name__ == "__main__":
    main()
