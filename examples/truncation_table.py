"""The seven truncations at equal network cost: same model, reward, prompts, seeds and learning rate.

    python -m examples.truncation_table --budget 20000

One unit of cost is one forward or one backward pass of the denoiser over one latent; recomputation counts. Each
truncation trains until the budget is spent. A result is kept as soon as it is there, so an interrupted run goes on
where it stopped; the table is written to `OUT/truncations.md` and the curves to `OUT/truncations.png`.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_draft.data import PromptDataModule, read_prompts
from lightning_draft.models import LoRA, StableDiffusion
from lightning_draft.modules import DraftModule
from lightning_draft.rewards import CaptionRetrieval, CLIPClassification
from lightning_draft.samplers import DDIM
from lightning_draft.truncation import DRTune, Full, LastK, LowVariance, RandomK, RandomSteps, ReFL, Truncation

METHODS: dict[str, Callable[[], Truncation]] = {
    "Full (DRaFT)": Full,
    "LastK(1) (DRaFT-1)": lambda: LastK(1),
    "LowVariance(2) (DRaFT-LV)": lambda: LowVariance(2),
    "ReFL(m=4)": lambda: ReFL(4),
    "RandomK (AlignProp, paper)": RandomK,
    "RandomSteps (AlignProp, code)": RandomSteps,
    "DRTune(k=3, m=4)": lambda: DRTune(3, 4),
}


class NetworkCost(L.Callback):
    """Count the denoiser's passes in training, keep `(cost, reward)` after each step, and stop at the budget.

    Args:
        network: The denoiser.
        budget: Stop once this much is spent.
    """

    def __init__(self, network: nn.Module, budget: int) -> None:
        self.budget = budget
        self.cost = 0
        self.curve: list[tuple[int, float]] = []
        self._training = False
        network.register_forward_pre_hook(self._count_forward)
        network.register_forward_hook(self._count_backward)

    def on_train_batch_start(self, *args: Any) -> None:
        """Count from here."""
        self._training = True

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """To here."""
        self._training = False
        self.curve.append((self.cost, float(trainer.callback_metrics["train/reward"])))
        trainer.should_stop = self.cost >= self.budget

    def _count_forward(self, network: nn.Module, inputs: Sequence[Any]) -> None:
        self.cost += len(inputs[0]) if self._training else 0

    def _count_backward(self, network: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(self._count_gradient)

    def _count_gradient(self, gradient: torch.Tensor) -> None:
        self.cost += len(gradient) if self._training else 0


def build(truncation: Truncation, pretrained: str, clip: str, steps: int, lr: float, seed: int) -> DraftModule:
    """The module that all methods share but for `truncation`."""
    return DraftModule(
        model=StableDiffusion(pretrained, lora=LoRA(rank=8, seed=seed), guidance_scale=1.0),
        reward=CLIPClassification(clip, captions="emoji"),
        sampler=DDIM(steps),
        truncation=truncation,
        watch={"retrieval": CaptionRetrieval(clip, captions="emoji")},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        seed=seed,
    )


def evaluate(module: DraftModule, prompts: Sequence[str], batch_size: int = 64) -> dict[str, float]:
    """Mean scores over `prompts`, from the same noise every time."""
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    scores = [module.score(module.generate(batch, seed=1000 + i), batch) for i, batch in enumerate(batches)]
    return {name: torch.cat([score[name] for score in scores]).mean().item() for name in ("reward", "retrieval")}


def run(truncation: Truncation, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one method and measure it before and after."""
    module = build(truncation, arguments.model, arguments.clip, arguments.sampling_steps, arguments.lr, arguments.seed)
    prompts = read_prompts("emoji")[:: arguments.every]
    before = evaluate(module, prompts)
    cost = NetworkCost(module.model.unet, arguments.budget)
    trainer = L.Trainer(
        max_steps=-1,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[cost],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(module, PromptDataModule("emoji", "emoji_unseen", batch_size=arguments.batch_size))
    seconds = time.perf_counter() - start
    after = evaluate(module, prompts)
    return {
        "steps": trainer.global_step,
        "cost": cost.cost,
        "seconds": seconds,
        "before": before,
        "after": after,
        "curve": cost.curve,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as markdown."""
    lines = [
        "| truncation | steps | network passes | seconds | reward, fresh noise | retrieval, fresh noise |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        before, after = row["before"], row["after"]
        lines.append(
            f"| {name} | {row['steps']} | {row['cost']} | {row['seconds']:.0f} | {before['reward']:.2f} → "
            f"{after['reward']:.2f} | {before['retrieval']:.0%} → {after['retrieval']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Training reward against network passes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in results.items():
        costs, rewards = zip(*row["curve"], strict=True)
        width = max(1, len(rewards) // 15)
        smooth = torch.tensor(rewards).unfold(0, width, 1).mean(1)
        axes.plot(costs[width - 1 :], smooth, label=name)
    axes.set_xlabel("network passes (forward or backward, one latent)")
    axes.set_ylabel("training reward (running mean)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, then write table and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/truncations"))
    parser.add_argument("--budget", type=int, default=20000, help="network passes a method")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--every", type=int, default=8, help="evaluate on every so manyth prompt, from noise never trained on"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "truncations.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name, truncation in METHODS.items():
        if name not in results:
            results[name] = run(truncation(), arguments)
            kept.write_text(json.dumps(results))
            print(table({name: results[name]}).splitlines()[-1], flush=True)
    (arguments.out / "truncations.md").write_text(table(results))
    plot(results, arguments.out / "truncations.png")
    print(table(results))


if __name__ == "__main__":
    main()
