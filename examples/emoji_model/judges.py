"""Train the two small classifiers that distinguish clean from degraded images, on emoji images only.

    python -m examples.emoji_model.judges --folder runs/emoji

They have different architectures and are trained on different halves of the names: `convnet` (group norm, strided) is
the reward, `resnet` (batch norm, max pooling) is for evaluation. Half of the images are decoded by the autoencoder, so
that its small errors do not count as degradation. Channels are permuted and saturation is changed at random, so that
colors do not indicate quality.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from examples.emoji_model import export
from examples.emoji_model.compositions import render
from examples.emoji_model.data import Emoji, prepare
from examples.emoji_model.degradations import degrade_all
from examples.emoji_model.mixture import scenes
from lightning_draft.rewards.quality import network

JUDGES = {"convnet": 0, "resnet": 1}
"""Architecture of each classifier, and the half of the names that it is trained on."""


class Pool:
    """Pairs of a clean image and a degraded copy, as rendered and as decoded by the autoencoder.

    Attributes:
        clean: float16 `(2, N, 3, 64, 64)`: as rendered, and decoded.
        degraded: The same of one degraded copy each.
        half: int64 `(N,)`, 0 or 1: the half of the names to which the image belongs.
    """

    def __init__(self, emoji: Emoji, vae: AutoencoderKL) -> None:
        torch.manual_seed(0)
        composed = [scene for kind in ("two", "ground", "pair") for scene in scenes(emoji)[kind]]
        images = torch.cat([emoji.images, torch.stack([render(s, emoji) for s in composed])])
        names = [*emoji.names, *(scene.names[0] for scene in composed)]
        order = {name: i for i, name in enumerate(sorted(set(names)))}
        self.half = torch.tensor([order[name] % 2 for name in names])
        self.clean, self.degraded = (_with_decoded(x, vae) for x in (images, degrade_all(images)))

    def batch(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Choose images `(size, 3, 64, 64)` of `rows` and their targets `(size,)`: 1 for clean, 0 for degraded.

        A fifth are blends of the two, with the target between.
        """
        chosen, version = rows[torch.randint(len(rows), (size,))], torch.randint(2, (size,))
        clean, degraded = self.clean[version, chosen].float(), self.degraded[version, chosen].float()
        kind = torch.rand(size)
        amount = torch.where(kind < 0.4, 0.0, torch.where(kind < 0.8, 1.0, torch.rand(size)))
        images = clean + amount.view(-1, 1, 1, 1) * (degraded - clean)
        return augment(images), (1 - amount).clamp(0.03, 0.97)


@torch.no_grad()
def _with_decoded(images: Tensor, vae: AutoencoderKL) -> Tensor:
    decoded = [vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5 for x in images.split(32)]
    return torch.stack([images, torch.cat(decoded)]).half()


def augment(images: Tensor) -> Tensor:
    """Mirror, shift, permute the channels, change the saturation and the gains, and add faint noise; `(B, 3, H, W)`."""
    count = len(images)
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images, images.flip(-1))
    shift = torch.randint(-3, 4, (2,)).tolist()
    images = torch.roll(images, shift, (2, 3))
    order = torch.rand(count, 3).argsort(1).view(count, 3, 1, 1)
    images = torch.gather(images, 1, order.expand_as(images))
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * torch.empty(count, 1, 1, 1).uniform_(0.4, 1.15)
    gains = torch.empty(count, 3, 1, 1).uniform_(0.95, 1.03)
    return images * gains + torch.randn_like(images) * 0.02 * torch.rand(count, 1, 1, 1)


def train(kind: str, pool: Pool, steps: int, batch_size: int = 48, lr: float = 2e-3) -> torch.nn.Module:
    """Train one classifier on its half of the names by binary cross-entropy."""
    torch.manual_seed(JUDGES[kind])
    classifier = network(kind).train()
    rows = torch.nonzero(pool.half == JUDGES[kind]).squeeze(1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        images, target = pool.batch(rows, batch_size)
        loss = F.binary_cross_entropy_with_logits(classifier(images * 2 - 1).squeeze(1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            print(kind, step, f"{loss.item():.4f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: Callable[[Tensor], Tensor], pool: Pool, rows: Tensor) -> dict[str, float]:
    """Return the fractions of `rows` that are classified correctly, clean and degraded, as rendered and decoded."""
    figures = {}
    for version, label in enumerate(("drawn", "decoded")):
        for name, images, sign in (("clean", pool.clean, 1), ("degraded", pool.degraded, -1)):
            logits = torch.cat([classifier(x.float() * 2 - 1).squeeze(1) for x in images[version, rows].split(64)])
            figures[f"{name}, {label}"] = (sign * logits > 0).float().mean().item()
    return figures


def main() -> None:
    """Train both classifiers, print their accuracy on the other half of the names, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    emoji = Emoji.load(prepare(arguments.folder))
    pool = Pool(emoji, export.autoencoder(arguments.folder / "vae" / "last.ckpt"))
    print(f"{pool.clean.shape[1]} pairs", flush=True)
    for kind, half in JUDGES.items():
        classifier = train(kind, pool, arguments.steps)
        unseen = torch.nonzero(pool.half == 1 - half).squeeze(1)
        unseen = unseen[torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))[:600]]
        print(json.dumps({kind: accuracy(classifier, pool, unseen)}), flush=True)
        out = arguments.folder / "judges" / kind
        out.mkdir(parents=True, exist_ok=True)
        save_file(classifier.half().state_dict(), out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"architecture": kind, "size": emoji.images.shape[-1]}) + "\n")


if __name__ == "__main__":
    main()
