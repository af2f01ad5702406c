"""Pipelines and LoRA files that are damaged, or of another kind."""

import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_draft.models import Guidance, LoRA, Memory, StableDiffusion, StableDiffusion3, TextEncoding
from lightning_draft.models.pixels import PixelDiffusion
from tests.bad_input.cases import Case, Content, parsed, python
from tests.tiny_families import pixels
from tests.tiny_pipelines import STABLE_DIFFUSION_15, write_pipeline

PIPELINES = "Pipelines"
ADAPTERS = "LoRA files"
OPTIONS = "Options of a model"
UNET = "unet/diffusion_pytorch_model.safetensors"


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # removed when the process ends


@functools.cache
def _pipeline() -> Path:
    """Return the folder of a small random pipeline, written once."""
    folder = Path(_temporary().name)
    write_pipeline(folder / "model", PNDMScheduler(**STABLE_DIFFUSION_15, skip_prk_steps=True))
    file = folder / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": False}))
    return folder / "model"


@functools.cache
def _model() -> StableDiffusion:
    return StableDiffusion(str(_pipeline()))


@functools.cache
def _lora() -> Mapping[str, Tensor]:
    """Return the tensors of a valid LoRA file of the pipeline."""
    file = _pipeline().parent / "lora.safetensors"
    _model().save_lora(file)
    return load_file(file)


def _damaged(shown: str, file: str, content: Content | None, *says: str) -> Case:
    """Return a case of a pipeline with other content in a file; `None` removes it."""

    def write(folder: Path) -> None:
        shutil.copytree(_pipeline(), folder)
        path = folder / file
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def open_it(folder: Path) -> StableDiffusion:
        return StableDiffusion(str(folder / "model"))

    return python(PIPELINES, shown, open_it, *says, files={"model": write})


def _config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


def _missing(shown: str, *says: str, **files: Content) -> Case:
    return python(PIPELINES, shown, lambda _: StableDiffusion(shown), *says, files=files)


def _keys(*names: str) -> Callable[[Path], None]:
    return lambda path: save_file({name: torch.zeros(1) for name in names}, path)


def _sd3_file(shown: str, options: dict[str, Any], *says: str, keys: tuple[str, ...] = ()) -> Case:
    """Return a case of a single file of Stable Diffusion 3.5 large with few keys."""
    file = shown if shown.endswith(".safetensors") else "sd3.safetensors"
    files: dict[str, Content] = {
        file: _keys("model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight", *keys),
        "other/model_index.json": '{"_class_name": "FluxPipeline"}',
    }
    return python(PIPELINES, shown, lambda _: StableDiffusion3(file, **options), *says, files=files)


def _adapters(shown: str, content: Content, *says: str, name: str = "a.safetensors") -> Case:
    return python(ADAPTERS, shown, lambda _: _model().load_lora(name), *says, files={name: content})


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = {name: value.clone() for name, value in _lora().items()}
        save_file(change(state) or state, path)

    return write


def _header(settings: str) -> Callable[[Path], None]:
    return lambda path: save_file(dict(_lora()), path, {"lora_adapter_metadata": settings})


def _first(state: dict[str, Tensor], end: str) -> str:
    return next(name for name in state if name.endswith(end))


def _cut(path: Path) -> None:
    _tensors(lambda state: None)(path)
    path.write_bytes(path.read_bytes()[:-100])


def _option(shown: str, options: Mapping[str, Any], *says: str) -> Case:
    return python(OPTIONS, shown, lambda _: StableDiffusion(str(_pipeline()), **options), *says)


def _pixels(shown: str, options: Mapping[str, Any], *says: str) -> Case:
    def open_it(folder: Path) -> PixelDiffusion:
        return PixelDiffusion(str(folder / "model"), **options)

    return python(OPTIONS, shown, open_it, *says, files={"model": pixels})


CASES: list[Case] = [
    _damaged(
        "a cut unet/config.json", "unet/config.json", b"{", "unet/config.json is not valid JSON", "copy or download it"
    ),
    _damaged(
        "an empty scheduler config", "scheduler/scheduler_config.json", b"", "scheduler_config.json is not valid JSON"
    ),
    _damaged("a scheduler config of null", "scheduler/scheduler_config.json", b"null", "scheduler_config.json"),
    _damaged("a config that is a list", "unet/config.json", b"[]", "unet/config.json"),
    _damaged("an index that is a list", "model_index.json", b"[]", "model_index.json"),
    _damaged("an index without a class", "model_index.json", b"{}", "model"),
    _damaged("no index", "model_index.json", None, "it has no model_index.json"),
    _damaged(
        "empty VAE weights",
        "vae/diffusion_pytorch_model.safetensors",
        b"",
        "model.safetensors is truncated or not a safetensors file",
        "copy or download it",
    ),
    _damaged(
        "weights of a text encoder with a header only",
        "text_encoder/model.safetensors",
        b"\x08\0\0\0\0\0\0\0{}",
        "model.safetensors is truncated or not",
    ),
    _damaged(
        "weights that are a text",
        UNET,
        b"version https://git-lfs.github.com/spec/v1\n",
        "model.safetensors is truncated or not a safetensors file",
    ),
    _damaged("no unet", "unet", None, "unet is missing, and model_index.json names it"),
    _damaged("no weights of the unet", UNET, None, "unet"),
    _damaged("no vocabulary", "tokenizer/tokenizer.json", None, "tokenizer has no vocabulary", "copy or download it"),
    _damaged(
        "a weight of another shape",
        UNET,
        _weights(lambda s: s.update({"conv_in.bias": torch.zeros(3)})),
        "conv_in.bias",
    ),
    _damaged(
        "a weight that is missing",
        UNET,
        _weights(lambda s: s.pop("conv_in.bias")),
        "unet lacks 1 of its weights, such as conv_in.bias",
    ),
    _damaged(
        "a weight of NaN",
        UNET,
        _weights(lambda s: s["conv_in.bias"].fill_(float("nan"))),
        "not finite, the first in unet: conv_in.bias",
        "use another copy",
    ),
    _damaged("a config of another size", "unet/config.json", _config(block_out_channels=[16, 32]), "expected shape"),
    _damaged(
        "another class of pipeline",
        "model_index.json",
        _config(_class_name="StableDiffusionXLPipeline"),
        "is a StableDiffusionXLPipeline and not",
        "open it with StableDiffusionXL",
    ),
    _damaged(
        "a class of a pipeline of a repository",
        "model_index.json",
        _config(_class_name=["pipeline", "Mine"]),
        "needs a pipeline class from its own repository, whose code is not run",
    ),
    _damaged("thresholding", "scheduler/scheduler_config.json", _config(thresholding=True), "a part of the gradient"),
    _damaged(
        "an unknown prediction type",
        "scheduler/scheduler_config.json",
        _config(prediction_type="flow"),
        "prediction_type='flow'",
        "is not supported",
    ),
    _missing("nowhere/", "nowhere/ does not exist", "give a pipeline folder, a .safetensors file, a hub id"),
    _missing("nowhere.safetensors", "nowhere.safetensors does not exist"),
    _missing("empty/", "it has no model_index.json", **{"empty/readme": "x"}),
    _missing("model.ckpt", "is not a .safetensors file; convert it", **{"model.ckpt": "x"}),
    _missing("text.safetensors", "text.safetensors is damaged or not a safetensors file", **{"text.safetensors": "x"}),
    _missing(
        "empty.safetensors", "empty.safetensors is damaged or not a safetensors file", **{"empty.safetensors": b""}
    ),
    _missing(
        "other.safetensors",
        "other.safetensors",
        **{"other.safetensors": lambda path: save_file({"a": torch.zeros(1)}, path)},
    ),
    _missing(
        "flux_2_dev.safetensors",
        "flux_2_dev.safetensors is a flux-2-dev checkpoint",
        "flux-2-dev is not supported, give a file of a supported family",
        **{"flux_2_dev.safetensors": _keys("single_stream_modulation.lin.weight", "guidance_in.in_layer.weight")},
    ),
    _missing(
        "chroma.safetensors",
        "chroma.safetensors is a chroma checkpoint and not one of",
        "open it with Chroma",
        **{"chroma.safetensors": _keys("distilled_guidance_layer.in_proj.bias")},
    ),
    _sd3_file(
        "sd3.safetensors",
        {},
        "sd3.safetensors has no vae and no text_encoder",
        "set pretrained_config to a complete pipeline",
    ),
    _sd3_file(
        "clips.safetensors",
        {},
        "clips.safetensors has no text_encoder_3; set pretrained_config",
        "or omit: [text_encoder_3]",
        keys=("vae.x", "text_encoders.clip_l.transformer.x", "text_encoders.clip_g.transformer.x"),
    ),
    _sd3_file(
        "fp8_scaled.safetensors",
        {},
        "fp8_scaled.safetensors has quantized weights with scales, such as model.diffusion_model.x.weight_scale",
        "give a file in bfloat16",
        keys=("model.diffusion_model.x.weight_scale",),
    ),
    _sd3_file(
        "pretrained_config of another family",
        {"pretrained_config": "other"},
        "pretrained_config=other is a FluxPipeline and not a StableDiffusion3Pipeline",
        "give such a pipeline, for example stabilityai",
    ),
    _missing("''", "''"),
    _adapters("an empty file", b"", "a.safetensors is damaged or not a safetensors file", "copy it again"),
    _adapters("a text", "not found\n", "a.safetensors is damaged or not a safetensors file"),
    _adapters("a cut file", _cut, "a.safetensors is damaged or not a safetensors file", "copy it again"),
    _adapters(
        "a pickle",
        lambda path: torch.save({"lora": torch.zeros(1)}, path),
        "a.safetensors is damaged or not a safetensors file",
    ),
    _adapters("a header that is cut", _header("{"), "a.safetensors is damaged", "in its header", "copy it again"),
    _adapters("a header that is a list", _header("[]"), "a.safetensors is damaged", "in its header", "copy it again"),
    _adapters(
        "a folder",
        lambda path: path.mkdir(),
        "there is no LoRA file a.safetensors",
        "give the path of a .safetensors file",
    ),
    _adapters(
        "tensors of another kind", _tensors(lambda s: {"weight": torch.zeros(1)}), "a.safetensors contains no LoRA"
    ),
    _adapters("no tensors", _tensors(lambda s: {"x": torch.zeros(0)}), "a.safetensors contains no LoRA"),
    _adapters(
        "NaN",
        _tensors(lambda s: {**s, _first(s, "lora_A.weight"): s[_first(s, "lora_A.weight")] * float("nan")}),
        "not finite, first in",
        "use an earlier file",
    ),
    _adapters(
        "a missing factor",
        _tensors(lambda s: {k: v for k, v in s.items() if k != _first(s, "lora_B.weight")}),
        "a.safetensors is incomplete",
        "has no lora_B",
        "copy it again",
    ),
    _adapters(
        "an alpha of NaN",
        _tensors(lambda s: {**s, _first(s, "lora_A.weight").replace("lora_A.weight", "alpha"): torch.tensor(math.nan)}),
        "a.safetensors is damaged",
        "no valid rank and alpha",
        "copy it again",
    ),
    _adapters(
        "a factor of another shape",
        _tensors(lambda s: {**s, _first(s, "lora_B.weight"): torch.zeros(3, 4)}),
        "a.safetensors is damaged",
        "(3, 4)",
        "copy it again",
    ),
    _adapters(
        "factors of two ranks in a layer",
        _tensors(lambda s: {**s, _first(s, "lora_A.weight"): s[_first(s, "lora_A.weight")][:1].repeat(7, 1)}),
        "a.safetensors is damaged",
        "which are not of one rank",
        "copy it again",
    ),
    _adapters(
        "layers of another model",
        _tensors(lambda s: {f"unet.elsewhere.{k}": v for k, v in s.items()}),
        "for another model",
        "give a file",
    ),
    _adapters(
        "a text encoder's layers",
        _tensors(
            lambda s: {
                **s,
                "text_encoder.layer.lora_A.weight": torch.zeros(4, 4),
                "text_encoder.layer.lora_B.weight": torch.zeros(4, 4),
            }
        ),
        "for another model",
        "give a file",
    ),
    _adapters(
        "a Flux LoRA",
        _tensors(
            lambda s: {
                "transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8),
                "transformer.blocks.0.attn.to_q.lora_B.weight": torch.zeros(8, 4),
            }
        ),
        "a.safetensors",
    ),
    _adapters(
        "DoRA",
        _tensors(lambda s: {**s, "lora_unet_x.dora_scale": torch.zeros(1)}),
        "a.safetensors is DoRA, which is not supported",
        "give a plain LoRA file",
    ),
    _adapters(
        "LoKr",
        _tensors(lambda s: {"lora_unet_x.lokr_w1": torch.zeros(1, 1)}),
        "a.safetensors is LoKr, which is not supported",
    ),
    _adapters(
        "integers",
        _tensors(lambda s: {k: v.to(torch.int8) for k, v in s.items()}),
        "a.safetensors has int8 values",
        "give one in float32",
    ),
    _option("dtype float64", {"dtype": "float64"}, "dtype='float64'", "write one of float32"),
    _option(
        "trainable [nothing]",
        {"trainable": ["nothing"]},
        "'nothing' is not in the name of any parameter of the denoiser",
        "write full, lora",
    ),
    _option("omit: [vae]", {"omit": ["vae"]}, "omit=vae is no component that", "leave omit out"),
    _option("height 7", {"height": 7, "width": 512}, "height=7"),
    _option("height 0", {"height": 0, "width": 512}, "height=0"),
    _option("width -8", {"height": 512, "width": -8}, "width=-8"),
    python(OPTIONS, "LoRA(seed=-1)", lambda _: LoRA(seed=-1), "lora.seed=-1 must be an integer between 0 and"),
    python(OPTIONS, "LoRA(rank=0)", lambda _: LoRA(rank=0), "lora.rank=0 must be at least 1"),
    python(OPTIONS, "LoRA(alpha=-1)", lambda _: LoRA(alpha=-1), "lora.alpha=-1 must be positive"),
    python(OPTIONS, "LoRA(alpha=nan)", lambda _: LoRA(alpha=float("nan")), "lora.alpha=nan"),
    python(
        OPTIONS,
        "LoRA(target_modules='to_q')",
        lambda _: LoRA(target_modules="to_q"),
        "lora.target_modules='to_q' must be a list",
    ),
    _option(
        "target_modules [to_x]",
        {"lora": LoRA(target_modules=["to_x"])},
        "target_modules=to_x cannot be adapted",
        "to_k",
    ),
    python(
        OPTIONS, "Guidance(embedded=nan)", lambda _: Guidance(embedded=math.nan), "guidance.embedded=nan", "write 3.5"
    ),
    python(
        OPTIONS,
        "Guidance(negative_prompt=3)",
        lambda _: Guidance(negative_prompt=3),  # type: ignore[arg-type]
        "guidance.negative_prompt=3 must be text",
        "write ''",
    ),
    python(OPTIONS, "TextEncoding(cache='')", lambda _: TextEncoding(cache=""), "text.cache=''", "write a name"),
    parsed(
        OPTIONS,
        "--model.model.text.clip_skip -1 --model.model.text.cache embeddings",
        "--model.model.text.clip_skip=-1 must be at least 0",
        "write 0",
    ),
    python(OPTIONS, "LoRA(target_modules=[])", lambda _: LoRA(target_modules=[]), "target_modules=[] must be a list"),
    _option(
        "height 16.0",
        {"height": 16.0, "width": 16},
        "height=16.0 must be an integer",
        "write a number of pixels such as 512",
    ),
    _option("omit vae", {"omit": "vae"}, "omit='vae' must be a list of names", "leave it out"),
    python(
        OPTIONS,
        "Guidance(interval=(0, 0.5, 1))",
        lambda _: Guidance(interval=(0, 0.5, 1)),  # type: ignore[arg-type]
        "guidance.interval=[0, 0.5, 1] must be two increasing numbers",
        "write [0, 0.5]",
    ),
    python(
        OPTIONS,
        "Memory(decode_chunk=1.5)",
        lambda _: Memory(decode_chunk=1.5),  # type: ignore[arg-type]
        "memory.decode_chunk=1.5 must be an integer",
        "leave it out",
    ),
    python(
        OPTIONS,
        "Memory(checkpoint_decoder='tile')",
        lambda _: Memory(checkpoint_decoder="tile"),  # type: ignore[arg-type]
        "memory.checkpoint_decoder='tile' must be true, false or block",
        "write block",
    ),
    python(
        OPTIONS,
        "Memory(vae_dtype='int8')",
        lambda _: Memory(vae_dtype="int8"),  # type: ignore[arg-type]
        "memory.vae_dtype='int8'",
        "write one of float32",
    ),
    _pixels("a pixel-space model with memory.tile 32", {"memory": Memory(tile=32)}, "memory.tile=32 has no effect on"),
    _pixels(
        "a pixel-space model with guidance.scale 5",
        {"guidance": Guidance(5.0)},
        "guidance.scale=5.0 cannot be used with pixel-space diffusion models",
        "write 1, or leave guidance.scale out",
    ),
    python(OPTIONS, "Memory(tile=100)", lambda _: Memory(tile=100), "memory.tile=100 must be", "write 512"),
]
