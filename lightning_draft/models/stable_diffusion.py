"""Stable Diffusion 1.x and 2.x.

References:
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
    Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Self, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import lora as adapters
from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.loading import Precision, check_parts, load_pipeline, read_schedule, torch_dtype
from lightning_draft.models.lora import LoRA

GuidanceGradient = Literal["full", "conditional"]

_CACHED_PROMPTS = 16384


class StableDiffusion(DiffusionModel):
    """A Stable Diffusion 1.x or 2.x pipeline, frozen, with trainable adapters on its denoiser.

    Args:
        pretrained: A shipped name (`emoji`), a diffusers pipeline folder, a `.safetensors` file in the original layout,
            or a hub id.
        lora: The adapters; `None` for none at all, and then nothing is trainable.
        dtype: What the frozen denoiser, text encoder and autoencoder are held in. Adapters and latents are float32.
        guidance_scale: `w` in `e_u + w (e_c - e_u)`, at least 0; with 1 the unconditional branch is not evaluated.
        negative_prompt: What the unconditional branch is given.
        guidance_gradient: `full` differentiates both branches, `conditional` only the one with the prompt.
        block_checkpointing: Recompute the activations inside the denoiser's blocks in the backward pass.
        decode_chunk: Decode this many images at a time; by default all at once.
        checkpoint_decoder: Recompute the decoder's activations in the backward pass, chunk by chunk.
        vae_dtype: What the autoencoder is held in, if not in `dtype`, and run in, whatever the Trainer's precision is.
        pretrained_config: For a single file: the folder or hub id of a pipeline with the same architecture; by default
            it is recognised, and its configuration comes from the hub.

    Attributes:
        unet: The denoiser.
        vae: The autoencoder.
        text_encoder: The text encoder, `None` once released.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel | None

    def __init__(
        self,
        pretrained: str,
        *,
        lora: LoRA | None = LoRA(),  # noqa: B008 (frozen)
        dtype: Precision = "float32",
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        guidance_gradient: GuidanceGradient = "full",
        block_checkpointing: bool = False,
        decode_chunk: int | None = None,
        checkpoint_decoder: bool = False,
        vae_dtype: Precision | None = None,
        pretrained_config: str | None = None,
    ) -> None:
        super().__init__()
        _check(guidance_scale, guidance_gradient, decode_chunk)
        dtypes = dict.fromkeys(("unet", "text_encoder", "vae"), torch_dtype(dtype))
        if vae_dtype is not None:
            dtypes["vae"] = torch_dtype(vae_dtype)
        pipeline = load_pipeline(pretrained, dtypes, pretrained_config)
        check_parts(pipeline, pretrained)
        self.pretrained = pretrained
        self.lora = lora
        self.schedule, self.prediction = read_schedule(pipeline)
        self.tokenizer = pipeline.tokenizer
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.requires_grad_(False).eval()
        if lora is not None:
            lora.attach(self.unet)
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.guidance_gradient = guidance_gradient
        self.block_checkpointing = block_checkpointing
        self.decode_chunk = decode_chunk
        self.checkpoint_decoder = checkpoint_decoder
        self._vae_dtype = vae_dtype
        self._embeddings: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.conv_in.weight.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    @property
    def block_checkpointing(self) -> bool:
        """Whether the blocks' activations are recomputed in the backward pass; may be set."""
        return bool(self.unet.is_gradient_checkpointing)

    @block_checkpointing.setter
    def block_checkpointing(self, enabled: bool) -> None:
        if enabled:
            self.unet.enable_gradient_checkpointing(_checkpoint_block)
        else:
            self.unet.disable_gradient_checkpointing()

    def checkpoint_blocks(self) -> None:
        """Turn `block_checkpointing` on."""
        self.block_checkpointing = True

    def train(self, mode: bool = True) -> Self:
        """Every part stays in eval mode: dropout of the frozen networks stays off in training."""
        super().train(False)
        self.training = mode
        return self

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts; each is embedded once and then remembered.

        Raises:
            RuntimeError: The text encoder was released and a prompt is not among those that were precomputed.
        """
        device = self.device
        text = torch.stack([self._embedding(str(prompt)) for prompt in prompts]).to(device)
        negative = self._embedding(self.negative_prompt).to(device).expand_as(text)
        return Conditioning({"text": text, "negative": negative})

    def precompute(self, prompts: Iterable[str]) -> None:
        """Embed prompts, and the negative prompt, ahead of time and keep all of them."""
        for prompt in {self.negative_prompt: None, **{str(prompt): None for prompt in prompts}}:
            self._embeddings[prompt] = self._embedding(prompt)

    def release_text_encoder(self) -> None:
        """Forget the text encoder to free its memory; from then on only remembered prompts can be used."""
        self._embedding(self.negative_prompt)
        self.text_encoder = None

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gaussian latents, float32 `(batch_size, C, H, W)`, drawn where the generator is."""
        device = self.device if generator is None else generator.device
        shape = (batch_size, *self.latent_shape)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.device)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """The network's output after guidance, in the dtype of `x`."""
        text, negative = conditioning.tensors["text"], conditioning.tensors["negative"]
        if self.guidance_scale == 1:
            return self._network(x, t, text)
        if self.guidance_gradient == "conditional" and torch.is_grad_enabled():
            with torch.no_grad():
                unconditional = self._network(x, t, negative)
            conditional = self._network(x, t, text)
        else:
            both = self._network(torch.cat([x, x]), t, torch.cat([negative, text]))
            unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in the latents' dtype, around [0, 1] and not clamped."""
        config = self.vae.config
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        recompute = self.checkpoint_decoder and torch.is_grad_enabled()
        images = [
            checkpoint(self._decode, part, use_reentrant=False, preserve_rng_state=False)
            if recompute
            else self._decode(part)
            for part in scaled.split(self.decode_chunk or max(1, len(scaled)))
        ]
        return torch.cat(images) / 2 + 0.5

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context adapters are not evaluated: the pipeline as it was loaded, bit for bit."""
        with adapters.disabled(self.unet):
            yield

    @contextmanager
    def adapter_scale(self, scale: float) -> Iterator[None]:
        """Within this context the weights are `theta + scale dW`; 0 is the base, 1 the tuned model. For sampling."""
        self._check_adapters("adapter_scale")
        with self.base() if scale == 0 else adapters.scaled(self.unet, scale):
            yield

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and values of all that is trained: the adapters."""
        return [(name, value) for name, value in self.named_parameters() if value.requires_grad]

    def save_lora(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the adapters to a `.safetensors` file that `StableDiffusionPipeline.load_lora_weights` opens.

        Args:
            path: The file; folders on the way are made.
            metadata: Text to keep in its header.
        """
        self._check_adapters("save_lora")
        adapters.save(self.unet, path, metadata or {})

    def load_lora(self, path: str | os.PathLike[str]) -> None:
        """Copy a LoRA file, written by `save_lora` or by diffusers, into the adapters.

        Raises:
            ConfigurationError: There is no such file, or its rank or layers are not those of `lora`.
        """
        self._check_adapters("load_lora")
        adapters.load(self.unet, path)

    def _network(self, x: Tensor, t: float, text: Tensor) -> Tensor:
        """The raw network's output, in the dtype of `x`."""
        dtype = self.unet.conv_in.weight.dtype
        time = torch.full((), self.schedule.network_time(t), device=x.device)
        output: Tensor = self.unet(x.to(dtype), time, encoder_hidden_states=text.to(dtype), return_dict=False)[0]
        return output.to(x.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        dtype = self.vae.decoder.conv_in.weight.dtype
        autocast = torch.is_autocast_enabled(latents.device.type) and self._vae_dtype is None
        with torch.autocast(latents.device.type, enabled=autocast):
            images: Tensor = self.vae.decode(latents.to(dtype), return_dict=False)[0]
        return images.to(latents.dtype)

    def _embedding(self, prompt: str) -> Tensor:
        """The embedding `(tokens, width)` on the CPU, remembered while there is room."""
        known = self._embeddings.get(prompt)
        if known is not None:
            return known
        if self.text_encoder is None:
            raise RuntimeError(
                f"the text encoder was released and {prompt!r} has no embedding; pass every prompt, those of "
                "validation and of the sample logger too, to precompute() before release_text_encoder()"
            )
        embedding = self._embed(prompt, self.text_encoder)
        if len(self._embeddings) < _CACHED_PROMPTS:
            self._embeddings[prompt] = embedding
        return embedding

    def _embed(self, prompt: str, encoder: CLIPTextModel) -> Tensor:
        """Embed one prompt on its own, so that its embedding does not depend on the batch it first came in."""
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        words = self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        if len(words) > tokens.input_ids.shape[1]:
            warnings.warn(f"the model reads {tokens.input_ids.shape[1]} tokens and cuts: {prompt}", stacklevel=5)
        weight = next(encoder.parameters())
        mask = tokens.attention_mask.to(weight.device) if _uses_mask(encoder) else None
        # An embedding made in inference mode could not be used in training later; one under autocast would be rounded.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return encoder(tokens.input_ids.to(weight.device), attention_mask=mask)[0][0].cpu()

    def _check_adapters(self, what: str) -> None:
        if self.lora is None:
            raise ConfigurationError(f"{what} needs adapters, and this model has none; build it with lora=LoRA()")


def _uses_mask(encoder: CLIPTextModel) -> bool:
    return bool(getattr(encoder.config, "use_attention_mask", False))


def _checkpoint_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return output


def _check(guidance_scale: float, guidance_gradient: str, decode_chunk: int | None) -> None:
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ConfigurationError(f"guidance_scale={guidance_scale} must be at least 0; write 1 for no guidance")
    if guidance_gradient not in get_args(GuidanceGradient):
        raise ConfigurationError(f"guidance_gradient={guidance_gradient!r} is not known; write full or conditional")
    if decode_chunk is not None and decode_chunk < 1:
        raise ConfigurationError(f"decode_chunk={decode_chunk} must be at least 1; leave it out to decode all at once")
