"""Train the shipped text-to-image model and the small CLIP that rewards it.

    python -m examples.emoji_model.train vae  --batch-size 8 --steps 2600
    python -m examples.emoji_model.train clip --batch-size 128 --steps 2000
    python -m examples.emoji_model.train unet --batch-size 32 --steps 10000

Each part checkpoints every 500 steps under `runs/emoji/<part>` and continues from there when started again. With
`--pipeline FOLDER` the denoiser trains on that pipeline's autoencoder, tokenizer and text encoder instead of those of
the first two trainings.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji_model import parts
from examples.emoji_model.data import Emoji, prepare
from examples.emoji_model.export import standardised_autoencoder, weights


class Batches(IterableDataset[Tensor]):
    """Endless batches of indices, drawn without replacement within an epoch."""

    def __init__(self, indices: Tensor, batch_size: int) -> None:
        self.indices, self.batch_size = indices, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 `(batch_size,)`."""
        pool = torch.empty(0, dtype=torch.long)
        while True:
            while len(pool) < self.batch_size:
                pool = torch.cat([pool, self.indices[torch.randperm(len(self.indices))]])
            yield pool[: self.batch_size]
            pool = pool[self.batch_size :]


class Part(L.LightningModule):
    """What the three trainings share: AdamW with warm-up and cosine decay."""

    def __init__(self, network: nn.Module, lr: float, steps: int, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.network = network
        self.lr, self.steps, self.weight_decay = lr, steps, weight_decay

    def configure_optimizers(self) -> Any:
        """AdamW; 2 % of linear warm-up, then a cosine to 2 % of the peak."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay, fused=True
        )

        def scale(step: int) -> float:
            warm = step / (0.02 * self.steps)
            return min(warm, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Autoencoder(Part):
    """L1 on pixels and on their differences, with a weak KL to the unit Gaussian."""

    def __init__(self, emoji: Emoji, steps: int) -> None:
        super().__init__(parts.autoencoder().to(memory_format=torch.channels_last), 2e-3, steps)
        self.images = emoji.images

    def training_step(self, index: Tensor, batch_index: int) -> Tensor:
        """`index` is int64 `(B,)`."""
        images = _shift(_flip(self.images[index])) * 2 - 1
        posterior = self.network.encode(images).latent_dist
        decoded = self.network.decode(posterior.sample()).sample
        l1 = F.l1_loss(decoded, images)
        edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"l1": l1, "mse": F.mse_loss(decoded, images), "kl": kl}, prog_bar=True)
        return l1 + 0.5 * edges + F.mse_loss(decoded, images) + 1e-4 * kl


class Denoiser(Part):
    """v-prediction on the autoencoder's latents; the text encoder starts as the CLIP's and trains along.

    What is exported is the weights' exponential moving average.
    """

    def __init__(self, emoji: Emoji, steps: int, vae: AutoencoderKL, words: CLIPTokenizer, text: CLIPTextModel) -> None:
        super().__init__(nn.ModuleDict({"unet": parts.unet(), "text": text}), 1e-3, steps, 1e-3)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
        self.average.requires_grad_(False)
        self.network["unet"].to(memory_format=torch.channels_last)
        schedule = parts.scheduler()
        self.register_buffer("alphas", schedule.alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigmas", (1 - schedule.alphas_cumprod).sqrt(), persistent=False)
        self.tokens = words([*emoji.captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.latents = encode(emoji, vae)

    def training_step(self, index: Tensor, batch_index: int) -> Tensor:
        """`index` is int64 `(B,)`; one caption in ten is dropped, for classifier-free guidance."""
        latents = self.latents[index].to(memory_format=torch.channels_last)
        dropped = torch.rand(len(index)) < 0.1
        tokens = self.tokens[torch.where(dropped, len(self.tokens) - 1, index)]
        # One draw from each of B equal strata, for less variance; then towards noise, where the caption decides.
        u = (torch.rand(len(index)) + torch.arange(len(index))) / len(index)
        t = (1000 * (1 - (1 - u) ** 2)).long().clamp_max(999)
        noise = torch.randn_like(latents)
        alpha, sigma = self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)
        target = alpha * noise - sigma * latents
        hidden = self.network["text"](tokens).last_hidden_state
        predicted = self.network["unet"](alpha * latents + sigma * noise, t, hidden).sample
        loss = F.mse_loss(predicted, target)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Fold the new weights into the average."""
        self.average.update_parameters(self.network)


class Contrast(Part):
    """CLIP's symmetric contrastive loss, over pictures augmented so that its gradient means something."""

    def __init__(self, emoji: Emoji, steps: int, folder: Path) -> None:
        words = parts.tokenizer(sorted(set(emoji.captions)), folder / "tokenizer")
        super().__init__(parts.clip(words), 1e-3, steps, 0.05)
        self.images = emoji.images
        self.tokens = words(emoji.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def training_step(self, index: Tensor, batch_index: int) -> Tensor:
        """`index` is int64 `(B,)`."""
        images = _shift(self.images[index])
        tint = torch.empty(len(index), 3, 1, 1).uniform_(0.85, 1.1)
        images = images * tint + torch.randn_like(images) * 0.1 * torch.rand(len(index), 1, 1, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        output = self.network(input_ids=self.tokens[index], pixel_values=(images - mean) / std, return_loss=True)
        accuracy = (output.logits_per_image.argmax(1) == torch.arange(len(index))).float().mean()
        self.log_dict({"loss": output.loss, "accuracy": accuracy}, prog_bar=True)
        return output.loss


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def encode(emoji: Emoji, vae: AutoencoderKL) -> Tensor:
    """Latents of every picture, float32 `(N, 4, 16, 16)`."""
    return torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in emoji.images.split(128)])


def _flip(images: Tensor) -> Tensor:
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(-1))


def _shift(images: Tensor, most: int = 2) -> Tensor:
    """Move each picture by up to `most` pixels, filling with its white border."""
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4, value=1.0)
    dx, dy = torch.randint(0, 2 * most + 1, (2, len(images)))
    return torch.stack([p[:, y : y + size, x : x + size] for p, x, y in zip(padded, dx, dy, strict=True)])


def denoiser(emoji: Emoji, steps: int, folder: Path, pipeline: Path | None) -> Denoiser:
    """The denoiser's training, on the other parts of `pipeline`, or on those that were trained under `folder`."""
    if pipeline is not None:
        vae = AutoencoderKL.from_pretrained(pipeline / "vae", torch_dtype=torch.float32).eval()
        text = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).train()
        return Denoiser(emoji, steps, vae, CLIPTokenizer.from_pretrained(pipeline / "tokenizer"), text)
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = parts.text_encoder(words)
    text.load_state_dict(weights(folder / "clip" / "last.ckpt", "network.text_model."))
    return Denoiser(emoji, steps, standardised_autoencoder(folder / "vae" / "last.ckpt", emoji), words, text)


def build(part: str, emoji: Emoji, steps: int, folder: Path, pipeline: Path | None) -> tuple[Part, Tensor]:
    """The training of `part`, and the pictures it may see."""
    everything = torch.arange(len(emoji.images))
    if part == "vae":
        return Autoencoder(emoji, steps), everything
    if part == "unet":
        return denoiser(emoji, steps, folder, pipeline), everything[emoji.drawn & ~emoji.held_out]
    return Contrast(emoji, steps, folder), everything


def main() -> None:
    """Run one training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae", "unet", "clip"])
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--pipeline", type=Path, help="a pipeline whose other parts the denoiser is trained on")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--hours", type=float, default=2.0, help="stop after this long, wherever the schedule is")
    parser.add_argument("--batch-size", type=int, default=32, help="a process")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--init", type=Path, help="a checkpoint whose weights to start from, where names agree")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    L.seed_everything(int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
    emoji = Emoji.load(prepare(arguments.folder))
    module, indices = build(arguments.part, emoji, arguments.steps, arguments.folder, arguments.pipeline)
    if arguments.init:
        module.load_state_dict(torch.load(arguments.init, weights_only=True)["state_dict"], strict=False)
    where = arguments.folder / arguments.part
    trainer = L.Trainer(
        default_root_dir=where,
        max_steps=arguments.steps,
        max_time={"seconds": int(3600 * arguments.hours)},
        callbacks=[ModelCheckpoint(where, save_last=True, every_n_train_steps=500, save_top_k=0)],
        accelerator="auto",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    last = where / "last.ckpt"
    loader = DataLoader(Batches(indices, arguments.batch_size), batch_size=None)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)


if __name__ == "__main__":
    main()
