"""Images, finite differences, and small random models in the format of the published ones."""

import importlib
import itertools
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTokenizer,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from lightning_draft.rewards import Reward
from lightning_draft.rewards.quality import network

Check = Callable[[Reward, Tensor, Sequence[str]], Tensor]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = ("red cat", "cat, feline", "bird", "N/A")


@pytest.fixture
def make_images() -> Callable[..., Tensor]:
    """Smooth colored shapes with a little noise, float32 `(count, 3, height, width)` in [0.1, 0.9], whole bytes."""

    def make(count: int, height: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        noise = 0.05 * torch.randn(count, 3, height, width, generator=generator)
        return (0.2 + 0.6 * smooth + noise).clamp(0.1, 0.9).mul(255).round() / 255

    return make


@pytest.fixture
def check_gradient() -> Check:
    """Compare the gradient with central differences in float64, along four random directions, and return it."""

    def check(reward: Reward, images: Tensor, prompts: Sequence[str], step: float = 1e-6) -> Tensor:
        reward = reward.double()
        images = images.double().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                above, below = (reward(images + sign * step * direction, prompts).sum() for sign in (1, -1))
            torch.testing.assert_close(
                (gradient * direction).sum(),
                (above - below) / (2 * step),
                rtol=1e-5,
                atol=1e-8 * float(gradient.norm()),
            )
        assert gradient.isfinite().all()
        assert gradient.any()
        return gradient

    return check


def write(folder: Path, model: Any, *parts: Any, spread: float = 0.2) -> Path:
    """Save a model with random weights, and its processor and tokenizer, in one folder."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    for part in (model.eval(), *parts):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_detectors(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> dict[str, Path]:
    """Detectors by kind: two with text queries, two with a softmax, two with a sigmoid."""
    folder = tmp_path_factory.mktemp("detectors")
    words = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**TOWER, **ends, "vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    owl = {"text_config": text, "vision_config": {**TOWER, "image_size": 16, "patch_size": 4}, "projection_dim": 16}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
    heads = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    heads |= {
        f"{part}_{size}": 2 if size == "attention_heads" else 16
        for part in ("encoder", "decoder")
        for size in ("attention_heads", "ffn_dim")
    }
    stages = {"embedding_size": 8, "layer_type": "basic"}
    resnet = ResNetConfig(**stages, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    detr = {
        **heads,
        **labels,
        "backbone_config": resnet,
        "backbone": None,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    }
    rt_resnet = RTDetrResNetConfig(
        **stages, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    rt_detr = RTDetrConfig(
        **heads,
        **labels,
        backbone_config=rt_resnet,
        encoder_hidden_dim=16,
        encoder_in_channels=[8] * 3,
        decoder_in_channels=[16] * 3,
        feat_strides=[8, 16, 32],
        num_denoising=0,
    )
    yolos = YolosConfig(**TOWER, **labels, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
    square, edges = {"height": 16, "width": 16}, {"shortest_edge": 32, "longest_edge": 64}
    torch.manual_seed(0)
    kinds: dict[str, tuple[Any, ...]] = {
        "owlvit": (OwlViTForObjectDetection(OwlViTConfig(**owl)), OwlViTImageProcessor(size=square), words),
        "owlv2": (Owlv2ForObjectDetection(Owlv2Config(**owl)), Owlv2ImageProcessor(size=square), words),
        "yolos": (YolosForObjectDetection(yolos), YolosImageProcessor(size=edges)),
        "detr": (DetrForObjectDetection(DetrConfig(**detr)), DetrImageProcessor(size=edges)),
        "conditional_detr": (
            ConditionalDetrForObjectDetection(ConditionalDetrConfig(**detr)),
            ConditionalDetrImageProcessor(size=edges),
        ),
        "rt_detr": (RTDetrForObjectDetection(rt_detr), RTDetrImageProcessor(size={"height": 32, "width": 32})),
    }
    return {
        kind: write(folder / kind, *parts, spread=0.2 if kind.startswith("owl") else 0.5)
        for kind, parts in kinds.items()
    }


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with four labels for 16x16 images."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**TOWER, **labels, image_size=16, patch_size=4))
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    return write(tmp_path_factory.mktemp("classifiers") / "vit", model, processor)


@pytest.fixture(scope="session")
def tiny_image_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ImageReward for 32x32 images that the recorded figures were computed with."""
    recorder = runpy.run_path(str(Path(__file__).parent / "recorded" / "image_reward.py"))
    folder: Path = recorder["write"](tmp_path_factory.mktemp("image-reward"))
    return folder


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples.reward_parity`, which has the pipelines of the rewards' authors."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("examples.reward_parity")


@pytest.fixture(scope="session")
def tiny_hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HPSv2 for 32x32 images, with its tokenizer, that the recorded figures were computed with."""
    recorder = runpy.run_path(str(Path(__file__).parent / "recorded" / "hpsv2.py"))
    folder: Path = recorder["write"](tmp_path_factory.mktemp("hps"))
    return folder


@pytest.fixture(scope="session")
def tiny_aesthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads for the embeddings of `tiny_clip`, in the layout of LAION's files: `v1.pth` and `v2.pth`."""
    folder, widths = tmp_path_factory.mktemp("aesthetic"), (8, 14, 12, 10, 6, 1)
    torch.manual_seed(0)
    torch.save(nn.Linear(8, 1).state_dict(), folder / "v1.pth")
    layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
    network = nn.Sequential(
        *(layers[0], nn.Dropout(0.2), layers[1], nn.Dropout(0.2), layers[2], nn.Dropout(0.1), layers[3], layers[4])
    )
    torch.save({f"layers.{name}": tensor for name, tensor in network.state_dict().items()}, folder / "v2.pth")
    return folder


@pytest.fixture(scope="session")
def tiny_quality_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quality classifier with random weights for 64x64 images."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    save_file(network("convnet").state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "convnet", "size": 64}')
    return folder


@pytest.fixture(scope="session")
def tiny(
    tiny_clip: Path,
    tiny_detectors: dict[str, Path],
    tiny_classifier: Path,
    tiny_image_reward: Path,
    tiny_hps: Path,
    tiny_aesthetic: Path,
    tiny_quality_classifier: Path,
) -> dict[str, str]:
    """Folders of small models by kind."""
    folders = {"clip": tiny_clip, "classifier": tiny_classifier, "image_reward": tiny_image_reward, **tiny_detectors}
    folders |= {"hps": tiny_hps, "aesthetic": tiny_aesthetic, "judge": tiny_quality_classifier}
    return {name: str(folder) for name, folder in folders.items()}
