"""Distill the shipped model to 4 steps, then to 2, by progressive distillation (https://arxiv.org/abs/2202.00512).

    python -m examples.emoji_model.few_step --num-steps 4
    python -m examples.emoji_model.few_step --num-steps 2 --teacher runs/emoji_few_step/4 --substeps 2

One step of the student reproduces several DDIM steps of the teacher. On a variance-preserving schedule with
`alpha = cos(phi)` and `sigma = sin(phi)`, a DDIM step of v-prediction is a rotation,

    x(phi') = cos(phi - phi') x(phi) - sin(phi - phi') v(x(phi), phi),

so the student regresses on the velocity that reaches the teacher's result `x'` in one step:

    E |v_student(x, phi) - (cos(phi - phi') x - x') / sin(phi - phi')|^2.

No images are needed: the samples of a batch stand at different steps of the teacher's own chains, which start from
noise. A checkpoint is saved every 100 training steps, from which the same command goes on.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from examples.emoji_model.evaluate import open_pipeline
from examples.emoji_model.train import Part
from lightning_draft.assets import FOLDER
from lightning_draft.prompt_sources import read_prompts

PROMPTS = ("emoji64", "emoji64_scenes")


def angles(schedule: DDIMScheduler, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the timesteps `(N,)` of a DDIM chain and its angles `(N + 1,)`, which end at 0; N divides 1000."""
    schedule.set_timesteps(num_steps)
    timesteps = schedule.timesteps
    phi = torch.arccos(schedule.alphas_cumprod[timesteps].double().sqrt())
    return timesteps, torch.cat([phi, phi.new_zeros(1)]).float()


def rotate(x: Tensor, v: Tensor, angle: Tensor) -> Tensor:
    """Return `cos(angle) x - sin(angle) v`, one DDIM step over `angle` `(B,)`."""
    angle = angle.view(-1, 1, 1, 1)
    return angle.cos() * x - angle.sin() * v


class Captions(IterableDataset[list[str]]):
    """Endless batches of random captions."""

    def __init__(self, captions: list[str], batch_size: int) -> None:
        self.captions, self.batch_size = captions, batch_size

    def __iter__(self) -> Iterator[list[str]]:
        """Yield lists of captions."""
        while True:
            yield [self.captions[i] for i in torch.randint(len(self.captions), (self.batch_size,)).tolist()]


class Distillation(Part):
    """Train the denoiser of `pipe` for `num_steps`; each step stands for `substeps` steps of a copy, the teacher.

    Attributes:
        x: Samples `(B, 4, 16, 16)` of the teacher's chains.
        position: The student's step `(B,)` at which each sample stands.
        hidden: Embeddings `(B, 16, D)` of the captions.
    """

    x: Tensor
    position: Tensor
    hidden: Tensor
    timesteps: Tensor
    phi: Tensor

    def __init__(self, pipe: StableDiffusionPipeline, num_steps: int, substeps: int, batch: int, steps: int) -> None:
        super().__init__(pipe.unet, 3e-4, steps, 1e-3)
        self.num_steps, self.substeps, self.words = num_steps, substeps, pipe.tokenizer
        self.text_encoder = pipe.text_encoder.requires_grad_(False)
        self.teacher = copy.deepcopy(pipe.unet).requires_grad_(False)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        self.average.requires_grad_(False)
        timesteps, phi = angles(pipe.scheduler, num_steps * substeps)
        self.register_buffer("timesteps", timesteps, persistent=False)
        self.register_buffer("phi", phi, persistent=False)
        self.register_buffer("x", torch.randn(batch, 4, 16, 16))
        self.register_buffer("position", torch.zeros(batch, dtype=torch.long))
        self.register_buffer("hidden", torch.zeros(batch, 16, pipe.text_encoder.config.hidden_size))

    @torch.no_grad()
    def restart(self, captions: list[str]) -> None:
        """Give the samples at the start of their chains new noise and new captions."""
        tokens = self.words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        hidden, noise = self.text_encoder(tokens.to(self.device))[0], torch.randn_like(self.x)
        start = (self.position == 0).view(-1, 1, 1)
        self.hidden = torch.where(start, hidden, self.hidden)
        self.x = torch.where(start[..., None], noise, self.x)

    @torch.no_grad()
    def teacher_step(self) -> Tensor:
        """Return the samples after `substeps` DDIM steps of the teacher."""
        x, start = self.x, self.position * self.substeps
        for i in range(self.substeps):
            v = self.teacher(x, self.timesteps[start + i], self.hidden).sample
            x = rotate(x, v, self.phi[start + i] - self.phi[start + i + 1])
        return x

    def spread(self, captions: list[str]) -> None:
        """Start all samples, and move each to another step of its chain."""
        self.restart(captions)
        last = torch.arange(len(captions), device=self.device) % self.num_steps
        for _ in range(self.num_steps - 1):
            moved = self.position < last
            self.x = torch.where(moved.view(-1, 1, 1, 1), self.teacher_step(), self.x)
            self.position = self.position + moved

    def training_step(self, captions: list[str], batch_index: int) -> Tensor:
        """Regress on the velocity of the teacher's step, and move the samples on."""
        if not self.hidden.any():
            self.spread(captions)
        self.restart(captions)
        target, start = self.teacher_step(), self.position * self.substeps
        angle = self.phi[start] - self.phi[start + self.substeps]
        velocity = self.network(self.x, self.timesteps[start], self.hidden).sample
        weight = angle.sin().view(-1, 1, 1, 1)
        loss = F.mse_loss(rotate(self.x, velocity, angle) / weight, target / weight)
        self.log("loss", loss, prog_bar=True)
        self.x, self.position = target, (self.position + 1) % self.num_steps
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the average with the new weights."""
        self.average.update_parameters(self.network)


def main() -> None:
    """Distill, and write the student as a diffusers pipeline in float16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, required=True, help="steps of the student")
    parser.add_argument("--substeps", type=int, help="steps of the teacher for one of the student; default: 20 in all")
    parser.add_argument("--teacher", type=Path, default=FOLDER / "emoji64", help="folder of a pipeline")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_few_step"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    substeps = arguments.substeps or max(1, 20 // max(1, arguments.num_steps))
    if min(arguments.num_steps, substeps) < 1 or 1000 % (arguments.num_steps * substeps):
        parser.error(
            f"--num-steps {arguments.num_steps} times --substeps {substeps} must divide 1000, the number of timesteps; "
            "write for example --num-steps 4 --substeps 5"
        )
    torch.set_num_threads(arguments.threads)
    L.seed_everything(0, verbose=False)
    pipe = open_pipeline(arguments.teacher)
    module = Distillation(pipe, arguments.num_steps, substeps, arguments.batch_size, arguments.steps)
    where = arguments.out / f"{arguments.num_steps}_training"
    captions = [str(prompt) for name in PROMPTS for prompt in read_prompts(name)]
    trainer = L.Trainer(
        default_root_dir=where,
        max_steps=arguments.steps,
        callbacks=[ModelCheckpoint(where, save_last=True, every_n_train_steps=100, save_top_k=0)],
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    last = where / "last.ckpt"
    loader = DataLoader(Captions(captions, arguments.batch_size), batch_size=None)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    pipe.unet.load_state_dict(module.average.module.state_dict())
    pipe.to(torch.float16).save_pretrained(arguments.out / str(arguments.num_steps))


if __name__ == "__main__":
    main()
