"""Train the 64x64 text-to-image model and the small CLIP, from random weights.

    python -m examples.emoji_model.data
    python -m examples.emoji_model.train vae  --steps 4400 --batch-size 8
    python -m examples.emoji_model.train unet --steps 11500 --batch-size 16 --degraded 0.2
    python -m examples.emoji_model.train unet --steps 14400 --batch-size 16
    python -m examples.emoji_model.train clip --steps 3600 --batch-size 64
    python -m examples.emoji_model.judges
    python -m examples.emoji_model.export

The denoiser learns the shapes first, mostly on clean images, then the mixture, three quarters of which are degraded:
on the mixture alone its shapes were still vague after 7,800 steps, and clear 2,600 steps later on mostly clean images.
Each training saves a checkpoint every 200 steps as `runs/emoji/<part>/last.ckpt`, from which the same command goes on.
The denoiser and the classifiers use the latents and the decoded images of the autoencoder: if it changes, delete
`runs/emoji/latents.pt` and train both again. The results in the model card, the README and the docs are made by

    python -m examples.emoji_model.evaluate --count 200 --sheet examples/results/emoji64_samples.png
    lightning-draft fit --config quickstart
    python -m examples.before_after --lora runs/quickstart/lora/best.safetensors --out examples/results/quickstart.png
    lightning-draft fit --config compositions
    python -m examples.before_after --lora runs/compositions/lora/best.safetensors --prompts emoji64_pairs_eval \
        --out examples/results/compositions.png
    python -m examples.over_optimization
    cp runs/over_optimization/over_optimization.* examples/results
"""

import argparse
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTokenizer

from examples.emoji_model import export, latents, parts
from examples.emoji_model.data import Emoji, prepare
from examples.emoji_model.mixture import DEGRADED, Captioned, RenderedImages, captions


class Part(L.LightningModule):
    """Base of the three trainings: AdamW with warm-up and cosine decay."""

    def __init__(self, network: nn.Module, lr: float, steps: int, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.network = network
        self.lr, self.steps, self.weight_decay = lr, steps, weight_decay

    def on_train_start(self) -> None:
        """Seed each process differently, and differently again when the training continues from a checkpoint."""
        torch.manual_seed(self.global_step * self.trainer.world_size + self.global_rank)

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
    """L1 and squared error of pixels, L1 of the differences of neighbors, and a weak KL to the unit Gaussian.

    The log variances of the latents start at -6, because more noise delays the decoder.

    Attributes:
        latent_std: Moving average of the standard deviation of the latents, for the scaling factor.
    """

    latent_std: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__(parts.autoencoder(), 2e-3, steps)
        parts.initialize(self.network)
        nn.init.constant_(self.network.quant_conv.bias[4:], -6)
        self.register_buffer("latent_std", torch.ones(()))

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        """`images` is float32 `(B, 3, 64, 64)` in [0, 1]."""
        images = _flip(images) * 2 - 1
        posterior = self.network.encode(images).latent_dist
        self.latent_std.lerp_(posterior.mean.detach().std(), 0.01)
        decoded = self.network.decode(posterior.sample()).sample
        l1, mse = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"l1": l1, "mse": mse, "kl": kl, "std": self.latent_std}, prog_bar=True)
        return l1 + 0.5 * edges + 4 * mse + 1e-3 * kl


class Denoiser(Part):
    """v-prediction, `E |v(alpha z + sigma e, t, c) - (alpha e - sigma z)|^2`; the text encoder is trained too.

    The exponential moving average of the weights is exported.
    """

    def __init__(self, steps: int, words: CLIPTokenizer) -> None:
        networks = nn.ModuleDict({"unet": parts.unet(), "text": parts.text_encoder(words)})
        super().__init__(networks, 6e-4, steps, 1e-3)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.997), use_buffers=True)
        self.average.requires_grad_(False)
        schedule = parts.scheduler()
        self.register_buffer("alphas", schedule.alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigmas", (1 - schedule.alphas_cumprod).sqrt(), persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """`batch` is latents `(B, 4, 16, 16)` and token ids `(B, 16)`."""
        latents, tokens = batch
        # One time from each of B equal strata, for less variance; then moved towards noise, because the caption
        # has the most effect there.
        u = (torch.rand(len(latents)) + torch.arange(len(latents))) / len(latents)
        t = (1000 * (1 - (1 - u) ** 1.5)).long().clamp_max(999)
        noise = torch.randn_like(latents)
        alpha, sigma = self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)
        target = alpha * noise - sigma * latents
        hidden = self.network["text"](tokens).last_hidden_state
        predicted = self.network["unet"](alpha * latents + sigma * noise, t, hidden).sample
        loss = F.mse_loss(predicted, target)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the average with the new weights."""
        self.average.update_parameters(self.network)


class Contrast(Part):
    """CLIP's symmetric contrastive loss on augmented images, so that its gradient is useful as a reward.

    Pairs of a batch whose captions fit the same image (a bare name and its styles) are not negatives: captions of a
    batch have different subjects.
    """

    def __init__(self, steps: int, words: CLIPTokenizer) -> None:
        super().__init__(parts.clip(words), 1e-3, steps, 0.05)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """`batch` is images `(B, 3, 64, 64)` in [0, 1] and token ids `(B, 16)`."""
        images, tokens = batch
        images = _shift(images, 4)
        tint = torch.empty(len(images), 3, 1, 1).uniform_(0.85, 1.1)
        images = images * tint + torch.randn_like(images) * 0.1 * torch.rand(len(images), 1, 1, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        output = self.network(input_ids=tokens, pixel_values=(images - mean) / std, return_loss=True)
        accuracy = (output.logits_per_image.argmax(1) == torch.arange(len(images))).float().mean()
        self.log_dict({"loss": output.loss, "accuracy": accuracy}, prog_bar=True)
        return output.loss


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _flip(images: Tensor) -> Tensor:
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(-1))


def _shift(images: Tensor, most: int) -> Tensor:
    """Move each image by up to `most` pixels, filling with the colors of its border."""
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4, mode="replicate")
    dx, dy = torch.randint(0, 2 * most + 1, (2, len(images)))
    return torch.stack([p[:, y : y + size, x : x + size] for p, x, y in zip(padded, dx, dy, strict=True)])


def build(part: str, emoji: Emoji, arguments: argparse.Namespace) -> tuple[Part, IterableDataset[Any]]:
    """Return the training of `part`, and its batches."""
    folder, steps, batch_size = arguments.folder, arguments.steps, arguments.batch_size
    if part == "vae":
        return Autoencoder(steps), RenderedImages(emoji, batch_size)
    if part == "unet":
        words = parts.tokenizer(captions(emoji), folder / "unet" / "tokenizer")
        banks = latents.build(emoji, export.autoencoder(folder / "vae" / "last.ckpt"), folder / "latents.pt")
        return Denoiser(steps, words), latents.Latents(banks, words, batch_size, arguments.degraded)
    words = parts.tokenizer([*captions(emoji), *emoji.captions], folder / "clip" / "tokenizer", 2048)
    return Contrast(steps, words), Captioned(emoji, words, batch_size)


def main() -> None:
    """Run one training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae", "unet", "clip"])
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32, help="a process")
    parser.add_argument("--degraded", type=float, default=DEGRADED, help="fraction of degraded images of the denoiser")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    L.seed_everything(0, verbose=False)
    emoji = Emoji.load(prepare(arguments.folder, 64))
    module, batches = build(arguments.part, emoji, arguments)
    where = arguments.folder / arguments.part
    trainer = L.Trainer(
        default_root_dir=where,
        max_steps=arguments.steps,
        callbacks=[ModelCheckpoint(where, save_last=True, every_n_train_steps=200, save_top_k=0)],
        accelerator="auto",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    last = where / "last.ckpt"
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)


if __name__ == "__main__":
    main()
