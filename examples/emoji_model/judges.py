"""Train the two small judges that tell clean pictures from degraded ones, on real pictures only.

    python -m examples.emoji_model.judges --folder runs/emoji

They are of different kinds and see different halves of the names: `convnet` (group norm, strided) is the reward,
`resnet` (batch norm, max pooling) is kept for evaluation. Half of the pictures have passed through the autoencoder, so
that its small errors do not count as degradation. Channels are permuted and colors faded or strengthened at random, so
that no color is a sign of quality.
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
"""Architecture of each judge, and which half of the names it sees."""


class Pool:
    """Pairs of a clean picture and a degraded copy, as drawn and as the autoencoder returns them.

    Attributes:
        clean: float16 `(2, N, 3, 64, 64)`: as drawn, and decoded.
        degraded: The same of one degraded copy each.
        half: int64 `(N,)`, 0 or 1: which half of the names the picture belongs to.
    """

    def __init__(self, emoji: Emoji, vae: AutoencoderKL) -> None:
        torch.manual_seed(0)
        composed = [scene for kind in ("two", "ground", "pair") for scene in scenes(emoji)[kind]]
        pictures = torch.cat([emoji.images, torch.stack([render(s, emoji) for s in composed])])
        names = [*emoji.names, *(scene.names[0] for scene in composed)]
        order = {name: i for i, name in enumerate(sorted(set(names)))}
        self.half = torch.tensor([order[name] % 2 for name in names])
        self.clean, self.degraded = (_with_decoded(x, vae) for x in (pictures, degrade_all(pictures)))

    def batch(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Draw pictures `(size, 3, 64, 64)` of `rows` and their targets `(size,)`: 1 for clean, 0 for degraded.

        A fifth are blends of the two, with the target between.
        """
        chosen, version = rows[torch.randint(len(rows), (size,))], torch.randint(2, (size,))
        clean, degraded = self.clean[version, chosen].float(), self.degraded[version, chosen].float()
        kind = torch.rand(size)
        amount = torch.where(kind < 0.4, 0.0, torch.where(kind < 0.8, 1.0, torch.rand(size)))
        pictures = clean + amount.view(-1, 1, 1, 1) * (degraded - clean)
        return augment(pictures), (1 - amount).clamp(0.03, 0.97)


@torch.no_grad()
def _with_decoded(pictures: Tensor, vae: AutoencoderKL) -> Tensor:
    decoded = [vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5 for x in pictures.split(32)]
    return torch.stack([pictures, torch.cat(decoded)]).half()


def augment(pictures: Tensor) -> Tensor:
    """Mirror, shift, permute the channels, change the saturation and the gains, and add faint noise; `(B, 3, H, W)`."""
    count = len(pictures)
    pictures = torch.where(torch.rand(count, 1, 1, 1) < 0.5, pictures, pictures.flip(-1))
    shift = torch.randint(-3, 4, (2,)).tolist()
    pictures = torch.roll(pictures, shift, (2, 3))
    order = torch.rand(count, 3).argsort(1).view(count, 3, 1, 1)
    pictures = torch.gather(pictures, 1, order.expand_as(pictures))
    gray = pictures.mean(1, keepdim=True)
    pictures = gray + (pictures - gray) * torch.empty(count, 1, 1, 1).uniform_(0.4, 1.15)
    gains = torch.empty(count, 3, 1, 1).uniform_(0.95, 1.03)
    return pictures * gains + torch.randn_like(pictures) * 0.02 * torch.rand(count, 1, 1, 1)


def train(kind: str, pool: Pool, steps: int, batch_size: int = 48, lr: float = 2e-3) -> torch.nn.Module:
    """Train one judge on its half of the names by binary cross-entropy."""
    torch.manual_seed(JUDGES[kind])
    judge = network(kind).train()
    rows = torch.nonzero(pool.half == JUDGES[kind]).squeeze(1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        pictures, target = pool.batch(rows, batch_size)
        loss = F.binary_cross_entropy_with_logits(judge(pictures * 2 - 1).squeeze(1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            print(kind, step, f"{loss.item():.4f}", flush=True)
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Callable[[Tensor], Tensor], pool: Pool, rows: Tensor) -> dict[str, float]:
    """Return the shares of `rows` judged rightly, clean and degraded, as drawn and decoded."""
    figures = {}
    for version, label in enumerate(("drawn", "decoded")):
        for name, pictures, sign in (("clean", pool.clean, 1), ("degraded", pool.degraded, -1)):
            logits = torch.cat([judge(x.float() * 2 - 1).squeeze(1) for x in pictures[version, rows].split(64)])
            figures[f"{name}, {label}"] = (sign * logits > 0).float().mean().item()
    return figures


def main() -> None:
    """Train both judges, print their accuracy on the other half of the names and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    emoji = Emoji.load(prepare(arguments.folder))
    pool = Pool(emoji, export.autoencoder(arguments.folder / "vae" / "last.ckpt"))
    print(f"{pool.clean.shape[1]} pairs", flush=True)
    for kind, half in JUDGES.items():
        judge = train(kind, pool, arguments.steps)
        unseen = torch.nonzero(pool.half == 1 - half).squeeze(1)
        unseen = unseen[torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))[:600]]
        print(json.dumps({kind: accuracy(judge, pool, unseen)}), flush=True)
        out = arguments.folder / "judges" / kind
        out.mkdir(parents=True, exist_ok=True)
        save_file(judge.half().state_dict(), out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"architecture": kind, "size": emoji.images.shape[-1]}) + "\n")


if __name__ == "__main__":
    main()
