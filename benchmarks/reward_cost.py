"""Seconds and megabytes per image of every reward, forward and backward, at the size of the real architectures.

    python -m benchmarks.reward_cost
    python -m benchmarks.reward_cost --rewards HPSv2 PickScore --device cuda --batch 8

The weights are random and are written to a temporary folder in the published format, one reward at a time, so that the
constructor of the reward reads them. The seconds are those of a call after the first, when prompt features are cached;
on the CPU they are CPU time. The megabytes do not include the weights: on CUDA they are the peak of the allocator, on
the CPU that of live tensors. Black boxes have no backward pass.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
import transformers
from torch import Tensor

import lightning_draft.rewards as rewards
from benchmarks import common, memory
from benchmarks.random_rewards import (
    B32,
    BERT_WORDS,
    CLIP_WORDS,
    H14,
    L14,
    image_reward_shapes,
    open_clip_shapes,
    random_tensors,
    tower,
    write_bert_words,
    write_clip,
    write_clip_words,
    write_model,
)
from examples.judge_server import Server, redness
from lightning_draft.rewards import Reward

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A reward to measure.

    Args:
        reward: Name of its class.
        architecture: Description of the network.
        build: Writes the weights to a folder and opens the reward.
    """

    reward: str
    architecture: str
    build: Callable[[Path], Reward]


def hps(folder: Path) -> Reward:
    """Open HPSv2 from a file in the published layout."""
    write_clip_words(folder)
    torch.save({"state_dict": random_tensors(open_clip_shapes())}, folder / "random.pt")
    return rewards.HPSv2(weights=str(folder / "random.pt"), tokenizer=str(folder))


def image_reward(folder: Path) -> Reward:
    """Open ImageReward from files in the published layout."""
    config = {**tower(768, 12, 12), "vocab_size": BERT_WORDS + 2, "max_position_embeddings": 512}
    (folder / "med_config.json").write_text(
        json.dumps({**config, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0})
    )
    torch.save(random_tensors(image_reward_shapes()), folder / "random.pt")
    return rewards.ImageReward(str(folder / "random.pt"), tokenizer=write_bert_words(folder))


def aesthetic(folder: Path) -> Reward:
    """Open LAION's first predictor, a linear layer on CLIP features."""
    torch.save(random_tensors({"weight": (1, 768), "bias": (1,)}), folder / "head.pth")
    return rewards.AestheticScore("v1", write_clip(folder, **L14), str(folder / "head.pth"))


def owl(folder: Path, version: str = "OwlViT", patch: int = 32, size: int = 768) -> str:
    """Write an OWL-ViT or OWLv2 of the base size."""
    config = getattr(transformers, f"{version}Config")(
        text_config={**tower(512, 12, 8), "vocab_size": CLIP_WORDS, "max_position_embeddings": 16},
        vision_config={**tower(768, 12, 12), "image_size": size, "patch_size": patch},
        projection_dim=512,
    )
    words = write_clip_words(folder, 16)
    processor = getattr(transformers, f"{version}ImageProcessor")(size={"height": size, "width": size})
    return write_model(folder, f"{version}ForObjectDetection", config, processor, words)


def yolos(folder: Path) -> str:
    """YOLOS-tiny."""
    config = transformers.YolosConfig(
        **tower(192, 12, 3), image_size=[800, 1333], num_labels=91, use_mid_position_embeddings=False
    )
    size = {"shortest_edge": 512, "longest_edge": 1333}
    return write_model(folder, "YolosForObjectDetection", config, transformers.YolosImageProcessor(size=size))


def vit(folder: Path) -> str:
    """Write a ViT-B/16 for ImageNet."""
    config = transformers.ViTConfig(num_labels=1000)
    return write_model(folder, "ViTForImageClassification", config, transformers.ViTImageProcessor())


def resnet(folder: Path) -> str:
    """Write a ResNet-50 for ImageNet."""
    config = transformers.ResNetConfig(num_labels=1000)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 224})
    return write_model(folder, "ResNetForImageClassification", config, processor)


@contextmanager
def reward_service() -> Iterator[str]:
    """Start the example service on this machine, and yield its address."""
    server = Server(redness)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def mean_pixel(images: Tensor, prompts: list[str]) -> Tensor:
    """Return the mean pixel, as a minimal Python function."""
    return images.mean((1, 2, 3))


def cases(url: str) -> list[Case]:
    """Return all rewards to measure, from cheap to expensive."""
    captions = [f"caption {number}" for number in range(100)]
    return [
        Case("Brightness", "-", lambda folder: rewards.Brightness()),
        Case("ColorBalance", "-", lambda folder: rewards.ColorBalance()),
        Case("ColorTarget", "-", lambda folder: rewards.ColorTarget()),
        Case("ColorSaturation", "-", lambda folder: rewards.ColorSaturation()),
        Case("Sharpness", "-", lambda folder: rewards.Sharpness()),
        Case("Symmetry", "-", lambda folder: rewards.Symmetry()),
        Case("JPEGCompressibility", "-", lambda folder: rewards.JPEGCompressibility()),
        Case("JPEGIncompressibility", "-", lambda folder: rewards.JPEGIncompressibility()),
        Case("JPEGRate", "-", lambda folder: rewards.JPEGRate()),
        Case("ImageQuality", "shipped classifier, at 64x64", lambda folder: rewards.ImageQuality("emoji64-judge")),
        Case("CleanFraction", "the same, black box", lambda folder: rewards.CleanFraction("emoji64-judge-eval")),
        Case("JPEGSize", "black box", lambda folder: rewards.JPEGSize()),
        Case("PythonFunction", "black box, a mean", lambda folder: rewards.PythonFunction(mean_pixel, "tensor")),
        Case("HTTPReward", "black box, on this machine", lambda folder: rewards.HTTPReward(url)),
        Case("CLIPScore", "CLIP ViT-B/32", lambda folder: rewards.CLIPScore(write_clip(folder, **B32))),
        Case("CLIPScore", "CLIP ViT-L/14", lambda folder: rewards.CLIPScore(write_clip(folder, **L14))),
        Case(
            "CLIPClassification",
            "CLIP ViT-B/32, 100 captions",
            lambda folder: rewards.CLIPClassification(write_clip(folder, **B32), captions),
        ),
        Case(
            "CaptionRetrieval",
            "CLIP ViT-B/32, black box",
            lambda folder: rewards.CaptionRetrieval(write_clip(folder, **B32), captions),
        ),
        Case("ClassifierTarget", "ResNet-50", lambda folder: rewards.ClassifierTarget(resnet(folder), 0)),
        Case("ClassifierTarget", "ViT-B/16", lambda folder: rewards.ClassifierTarget(vit(folder), 0)),
        Case("ObjectCount", "YOLOS-tiny at 512", lambda folder: rewards.ObjectCount(yolos(folder), "LABEL_0", 2)),
        Case("DetectedCount", "the same, black box", lambda folder: rewards.DetectedCount(yolos(folder), "LABEL_0")),
        Case("ObjectPresent", "OWL-ViT B/32 at 768", lambda folder: rewards.ObjectPresent(owl(folder), "cat")),
        Case(
            "ObjectAbsent",
            "OWLv2 B/16 at 960",
            lambda folder: rewards.ObjectAbsent(owl(folder, "Owlv2", 16, 960), "cat"),
        ),
        Case("AestheticScore", "CLIP ViT-L/14", aesthetic),
        Case("ImageReward", "BLIP ViT-L/16", image_reward),
        Case("HPSv2", "CLIP ViT-H/14", hps),
        Case(
            "PickScore",
            "CLIP ViT-H/14",
            lambda folder: rewards.PickScore(write_clip(folder, **H14), str(folder)),
        ),
    ]


def measure(reward: Reward, images: Tensor, repeats: int) -> tuple[float, float, float]:
    """Return MiB of weights, and seconds and further MiB per image of a forward and backward pass."""
    reward = reward.to(images.device).eval().requires_grad_(False)
    prompts = ["a photo of a cat"] * len(images)

    def step() -> Tensor:
        scores = reward(images, prompts).sum()
        return scores if reward.differentiable else scores + torch.zeros(1, requires_grad=True).sum()

    images = images.requires_grad_(reward.differentiable)
    live = memory.peak(step, images.device)
    seconds = []
    for _ in range(repeats):
        images.grad = None
        start = now(images.device)
        step().backward()
        seconds.append(now(images.device) - start)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*reward.parameters(), *reward.buffers()))
    return weights / MIB, min(seconds) / len(images), live / len(images)


def now(device: torch.device) -> float:
    """Return seconds: wall-clock time on CUDA, CPU time on the CPU, which other programs do not affect."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def line(case: Case, arguments: argparse.Namespace) -> list[str]:
    """Measure a case, and return its row of the table."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        reward = case.build(Path(folder))
        weights, seconds, live = measure(reward, images.to(arguments.device), arguments.repeats)
    return [case.reward, case.architecture, f"{weights:.0f}", f"{live:.1f}", f"{seconds:.4f}"]


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="*", default=[], help="only those whose name starts with one of these")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument(
        "--repeats", type=int, default=1, help="calls after the first, of which the fastest is reported"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    arguments = parser.parse_args()
    common.quiet()
    transformers.logging.set_verbosity_error()
    chosen = tuple(arguments.rewards) or ("",)
    with reward_service() as url:
        rows = [line(case, arguments) for case in cases(url) if case.reward.startswith(chosen)]
    cuda = torch.device(arguments.device).type == "cuda"
    where = torch.cuda.get_device_name(arguments.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = (
        f"One of {arguments.batch} images of {arguments.size}x{arguments.size}, float32, random weights; {where}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}."
    )
    head = ["reward", "architecture", "MiB weights", "MiB per image", "s per image"]
    common.show(f"{title}\n\n{common.table(head, rows)}", arguments.output)


if __name__ == "__main__":
    main()
