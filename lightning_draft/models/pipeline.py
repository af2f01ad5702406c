"""What the wrappers of diffusers' text-to-image pipelines share: guidance, text, decoding and adapters.

References:
    Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import lora as adapters
from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.loading import Family, Precision
from lightning_draft.models.lora import LoRA

GuidanceGradient = Literal["full", "conditional"]


class PipelineModel(DiffusionModel):
    """A text-to-image pipeline, frozen, with trainable adapters on its denoiser.

    A family's wrapper sets the class attributes, embeds one prompt in `_embed`, and calls its network in `_network`.

    Args:
        pipeline: Opened by `load_pipeline`.
        pretrained: Where it came from.
        lora: The adapters; `None` for none at all, and then nothing is trainable.
        guidance_scale: `w` in `e_u + w (e_c - e_u)`.
        negative_prompt: What the unconditional branch is given.
        guidance_gradient: `full` differentiates both branches, `conditional` only the one with the prompt.
        block_checkpointing: Recompute the activations inside the denoiser's blocks in the backward pass.
        decode_chunk: Decode this many images at a time; by default all at once.
        checkpoint_decoder: Recompute the decoder's activations in the backward pass, chunk by chunk.
        vae_dtype: What the autoencoder is run in, whatever the Trainer's precision is.

    Attributes:
        family: Which pipelines these are.
        vae: The autoencoder.
        text_encoder: The first text encoder, `None` once released.
    """

    family: ClassVar[Family]
    embedded: ClassVar[tuple[str, ...]]
    """Names of what a prompt becomes in a `Conditioning`."""
    embedded_negative: ClassVar[tuple[str, ...]]
    """The same for the negative prompt."""
    cached_prompts: ClassVar[int]
    """How many embeddings are remembered without being asked for."""

    vae: AutoencoderKL
    text_encoder: nn.Module | None

    def __init__(
        self,
        pipeline: Any,
        pretrained: str,
        *,
        lora: LoRA | None,
        guidance_scale: float,
        negative_prompt: str,
        guidance_gradient: GuidanceGradient,
        block_checkpointing: bool,
        decode_chunk: int | None,
        checkpoint_decoder: bool,
        vae_dtype: Precision | None,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.lora = lora
        for name in self.family.parts:
            setattr(self, name, getattr(pipeline, name))
        self.requires_grad_(False).eval()
        if lora is not None:
            lora.attach(self.denoiser, self.family.adapted)
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.guidance_gradient = guidance_gradient
        self.block_checkpointing = block_checkpointing
        self.decode_chunk = decode_chunk
        self.checkpoint_decoder = checkpoint_decoder
        self._vae_dtype = vae_dtype
        self._embeddings: dict[str, tuple[Tensor, ...]] = {}

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is trained."""
        network: ModelMixin = getattr(self, self.family.denoiser)
        return network

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self._weight.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    @property
    def block_checkpointing(self) -> bool:
        """Whether the blocks' activations are recomputed in the backward pass; may be set."""
        return bool(self.denoiser.is_gradient_checkpointing)

    @block_checkpointing.setter
    def block_checkpointing(self, enabled: bool) -> None:
        if enabled:
            self.denoiser.enable_gradient_checkpointing(_checkpoint_block)
        else:
            self.denoiser.disable_gradient_checkpointing()

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
        embeddings = zip(*(self._embedding(str(prompt)) for prompt in prompts), strict=True)
        negatives = self._embedding(self.negative_prompt)
        tensors = {}
        for name, negative_name, parts, negative in zip(
            self.embedded, self.embedded_negative, embeddings, negatives, strict=True
        ):
            tensors[name] = torch.stack(parts).to(self.device)
            tensors[negative_name] = negative.to(self.device).expand_as(tensors[name])
        return Conditioning(tensors)

    def precompute(self, prompts: Iterable[str]) -> None:
        """Embed prompts, and the negative prompt, ahead of time and keep all of them."""
        for prompt in {self.negative_prompt: None, **{str(prompt): None for prompt in prompts}}:
            self._embeddings[prompt] = self._embedding(prompt)

    def release_text_encoder(self) -> None:
        """Forget the text encoders to free their memory; from then on only remembered prompts can be used."""
        self._embedding(self.negative_prompt)
        for name in self.family.text_encoders:
            setattr(self, name, None)

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gaussian latents, float32 `(batch_size, C, H, W)`, drawn where the generator is."""
        device = self.device if generator is None else generator.device
        shape = (batch_size, *self.latent_shape)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.device)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """The network's output after guidance, in the dtype of `x`."""
        given = [conditioning.tensors[name] for name in self.embedded]
        negative = [conditioning.tensors[name] for name in self.embedded_negative]
        if self.guidance_scale == 1:
            return self._denoised(x, t, *given)
        if self.guidance_gradient == "conditional" and torch.is_grad_enabled():
            with torch.no_grad():
                unconditional = self._denoised(x, t, *negative)
            conditional = self._denoised(x, t, *given)
        else:
            texts = [torch.cat(pair) for pair in zip(negative, given, strict=True)]
            unconditional, conditional = self._denoised(torch.cat([x, x]), t, *texts).chunk(2)
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
        with adapters.disabled(self.denoiser):
            yield

    @contextmanager
    def adapter_scale(self, scale: float) -> Iterator[None]:
        """Within this context the weights are `theta + scale dW`; 0 is the base, 1 the tuned model. For sampling."""
        self._check_adapters("adapter_scale")
        with self.base() if scale == 0 else adapters.scaled(self.denoiser, scale):
            yield

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and values of all that is trained: the adapters."""
        return [(name, value) for name, value in self.named_parameters() if value.requires_grad]

    def save_lora(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapters to a `.safetensors` file that the pipeline's `load_lora_weights` opens.

        Args:
            path: The file; folders on the way are made.
            metadata: Text to keep in its header.
            values: The full adapters by their names in this model, from `distributed.gather_full`; for sharded models.
        """
        self._check_adapters("save_lora")
        if values is not None:
            values = {name.removeprefix(f"{self.family.denoiser}."): value for name, value in values.items()}
        adapters.save(self.denoiser, path, metadata or {}, self.family, values)

    def load_lora(self, path: str | os.PathLike[str]) -> None:
        """Copy a LoRA file, written by `save_lora` or by diffusers, into the adapters.

        Raises:
            ConfigurationError: There is no such file, or its rank or layers are not those of `lora`.
        """
        self._check_adapters("load_lora")
        adapters.load(self.denoiser, path, self.family)

    @property
    @abstractmethod
    def _weight(self) -> Tensor:
        """One of the denoiser's frozen weights, whose device and dtype are the denoiser's."""

    @abstractmethod
    def _network(self, x: Tensor, time: Tensor, *texts: Tensor) -> Tensor:
        """The network's output for `x` and texts in its dtype and `time`, a scalar."""

    @abstractmethod
    def _embed(self, prompt: str) -> tuple[Tensor, ...]:
        """What `embedded` names, for one prompt, without a batch."""

    def _denoised(self, x: Tensor, t: float, *texts: Tensor) -> Tensor:
        """The raw network's output, in the dtype of `x`."""
        dtype = self._weight.dtype
        time = torch.full((), self.schedule.network_time(t), device=x.device)
        return self._network(x.to(dtype), time, *(text.to(dtype) for text in texts)).to(x.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        dtype = self.vae.decoder.conv_in.weight.dtype
        autocast = torch.is_autocast_enabled(latents.device.type) and self._vae_dtype is None
        with torch.autocast(latents.device.type, enabled=autocast):
            images: Tensor = self.vae.decode(latents.to(dtype), return_dict=False)[0]
        return images.to(latents.dtype)

    def _embedding(self, prompt: str) -> tuple[Tensor, ...]:
        """The prompt's embeddings on the CPU, remembered while there is room.

        Each prompt is embedded on its own, so that its embedding does not depend on the batch it first came in.
        """
        known = self._embeddings.get(prompt)
        if known is not None:
            return known
        if self.text_encoder is None:
            raise RuntimeError(
                f"the text encoder was released and {prompt!r} has no embedding; pass every prompt, those of "
                "validation and of the sample logger too, to precompute() before release_text_encoder()"
            )
        device = next(self.text_encoder.parameters()).device.type
        # An embedding made in inference mode could not be used in training later; one under autocast would be rounded.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            embedding = tuple(part.cpu() for part in self._embed(prompt))
        if len(self._embeddings) < self.cached_prompts:
            self._embeddings[prompt] = embedding
        return embedding

    def _check_adapters(self, what: str) -> None:
        if self.lora is None:
            raise ConfigurationError(f"{what} needs adapters, and this model has none; build it with lora=LoRA()")


def tokens(tokenizer: Any, prompt: str, length: int, warn: bool = True) -> Any:
    """A prompt as a batch of one, filled up or cut to `length` tokens; a warning says that it was cut."""
    words = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if warn and len(words) > length:
        warnings.warn(f"the model reads {length} tokens and cuts: {prompt}", stacklevel=6)
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def check_options(guidance_scale: float, guidance_gradient: str, decode_chunk: int | None) -> None:
    """Refuse values that cannot be meant, before anything is loaded.

    Raises:
        ConfigurationError: One of them.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ConfigurationError(f"guidance_scale={guidance_scale} must be at least 0; write 1 for no guidance")
    if guidance_gradient not in get_args(GuidanceGradient):
        raise ConfigurationError(f"guidance_gradient={guidance_gradient!r} is not known; write full or conditional")
    if decode_chunk is not None and decode_chunk < 1:
        raise ConfigurationError(f"decode_chunk={decode_chunk} must be at least 1; leave it out to decode all at once")


def _checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)
