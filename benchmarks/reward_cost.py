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
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import lightning_draft.rewards as rewards
from benchmarks import common, memory
from examples.judge_server import Server, redness
from lightning_draft.rewards import Reward

MIB = 2**20
CLIP_WORDS, BERT_WORDS = 49408, 30522
Shapes = dict[str, tuple[int, ...]]


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


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return random bfloat16 tensors, made of one million repeated numbers; scales of norms are 1."""
    numbers = (0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.long)
        elif len(shape) == 1 and name.endswith(("weight", "var")):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = numbers.repeat(-(-size // len(numbers)))[:size].view(shape).clone()
    return tensors


def write_model(folder: Path, kind: str, config: Any, *parts: Any) -> str:
    """Write a transformers model, its processor and tokenizer, and return the folder."""
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    config.architectures = [kind]
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(random_tensors(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def write_clip_words(folder: Path, length: int = 77) -> Any:
    """Write a tokenizer of letters in CLIP's format, with the full number of tokens."""
    letters = string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"unused{number}" for number in range(CLIP_WORDS - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def write_bert_words(folder: Path) -> str:
    """Write a vocabulary of letters with the length of BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    words += [f"[unused{number}]" for number in range(BERT_WORDS - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


def write_clip(folder: Path, vision: dict[str, Any], text: dict[str, Any], embedding: int) -> str:
    """Write a CLIP with its tokenizer and image processor."""
    config = transformers.CLIPConfig(
        text_config={"vocab_size": CLIP_WORDS, "eos_token_id": CLIP_WORDS - 1, "projection_dim": embedding, **text},
        vision_config={"image_size": 224, "projection_dim": embedding, **vision},
        projection_dim=embedding,
    )
    words = write_clip_words(folder)
    return write_model(folder, "CLIPModel", config, transformers.CLIPImageProcessor(), words)


def tower(width: int, depth: int, heads: int) -> dict[str, int]:
    """Return the config of a transformer whose hidden layers are four times as wide."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }


B32 = {"vision": {**tower(768, 12, 12), "patch_size": 32}, "text": tower(512, 12, 8), "embedding": 512}
L14 = {"vision": {**tower(1024, 24, 16), "patch_size": 14}, "text": tower(768, 12, 12), "embedding": 768}
H14 = {"vision": {**tower(1280, 32, 16), "patch_size": 14}, "text": tower(1024, 24, 16), "embedding": 1024}


def open_clip_shapes(
    vision: tuple[int, int] = (1280, 32),
    text: tuple[int, int] = (1024, 24),
    embedding: int = 1024,
    words: int = CLIP_WORDS,
    places: tuple[int, int] = (257, 77),
    patch: int = 14,
) -> Shapes:
    """Return names and shapes of an open_clip checkpoint, by default of ViT-H-14."""
    width, length = vision[0], text[0]
    found: Shapes = {
        "logit_scale": (),
        "positional_embedding": (places[1], length),
        "text_projection": (length, embedding),
        "token_embedding.weight": (words, length),
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": (places[0], width),
        "visual.proj": (width, embedding),
    }
    norms = [("ln_final", length), ("visual.ln_pre", width), ("visual.ln_post", width)]
    for blocks, (size, depth) in (("visual.transformer.resblocks", vision), ("transformer.resblocks", text)):
        for block in (f"{blocks}.{number}." for number in range(depth)):
            norms += [(f"{block}ln_1", size), (f"{block}ln_2", size)]
            found |= {f"{block}attn.in_proj_weight": (3 * size, size), f"{block}attn.in_proj_bias": (3 * size,)}
            found |= linear(f"{block}attn.out_proj", size, size)
            found |= linear(f"{block}mlp.c_fc", 4 * size, size) | linear(f"{block}mlp.c_proj", size, 4 * size)
    return found | {f"{name}.{kind}": (size,) for name, size in norms for kind in ("weight", "bias")}


def image_reward_shapes(
    vision: tuple[int, int] = (1024, 24), text: tuple[int, int] = (768, 12), words: int = BERT_WORDS + 2, grid: int = 14
) -> Shapes:
    """Return names and shapes of ImageReward.pt, by default of the published file, without unused parts."""
    (width, blocks), (length, layers) = vision, text
    eye, mind = "blip.visual_encoder.", "blip.text_encoder."
    found: Shapes = {
        f"{eye}cls_token": (1, 1, width),
        f"{eye}pos_embed": (1, grid**2 + 1, width),
        f"{eye}patch_embed.proj.weight": (width, 3, 16, 16),
        f"{eye}patch_embed.proj.bias": (width,),
        f"{mind}embeddings.word_embeddings.weight": (words, length),
        f"{mind}embeddings.position_embeddings.weight": (512, length),
    }
    norms = [(f"{eye}norm", width), (f"{mind}embeddings.LayerNorm", length)]
    for block in (f"{eye}blocks.{number}." for number in range(blocks)):
        norms += [(f"{block}norm1", width), (f"{block}norm2", width)]
        found |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        found |= linear(f"{block}mlp.fc1", 4 * width, width) | linear(f"{block}mlp.fc2", width, 4 * width)
    for layer in (f"{mind}encoder.layer.{number}." for number in range(layers)):
        for attention, of in ((f"{layer}attention.", length), (f"{layer}crossattention.", width)):
            found |= linear(f"{attention}self.query", length, length) | linear(f"{attention}self.key", length, of)
            found |= linear(f"{attention}self.value", length, of) | linear(f"{attention}output.dense", length, length)
            norms.append((f"{attention}output.LayerNorm", length))
        found |= linear(f"{layer}intermediate.dense", 4 * length, length)
        found |= linear(f"{layer}output.dense", length, 4 * length)
        norms.append((f"{layer}output.LayerNorm", length))
    widths = (length, 1024, 128, 64, 16, 1)
    for number, of, to in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        found |= linear(f"mlp.layers.{number}", to, of)
    return found | {f"{name}.{kind}": (size,) for name, size in norms for kind in ("weight", "bias")}


def linear(name: str, to: int, of: int) -> Shapes:
    """Return names and shapes of a linear layer."""
    return {f"{name}.weight": (to, of), f"{name}.bias": (to,)}


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
