"""The base class of diffusers' text-to-image pipelines."""

import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import lora as adapters
from lightning_draft.models.base import Conditioning, DiffusionModel
from lightning_draft.models.decoder import Memory, decode
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.loading import Family
from lightning_draft.models.lora import LoRA


class PipelineModel(DiffusionModel):
    """A text-to-image pipeline, frozen, with trainable adapters on its denoiser.

    A family's wrapper sets the class attributes, embeds one prompt in `_embed`, and calls its network in `_network`.

    Args:
        pipeline: Opened by `load_pipeline`.
        pretrained: Where it came from.
        lora: The adapters; `None` for none at all, and then nothing is trainable.
        guidance: Classifier-free guidance.
        memory: Options that lower the decoder's peak memory.

    Attributes:
        family: Which pipelines these are.
        vae: The autoencoder.
        text_encoder: The first text encoder, `None` once released.
    """

    family: ClassVar[Family]
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
        guidance: Guidance,
        memory: Memory,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.lora = lora
        for name in self.family.parts:
            setattr(self, name, getattr(pipeline, name))
        self.requires_grad_(False).eval()
        if lora is not None:
            lora.attach(self.denoiser, self.family.adapted)
        self.guidance = guidance.or_default(self.family.guidance_scale)
        self.memory = memory
        self._embeddings: dict[str, Mapping[str, Tensor]] = {}

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

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """Set whether the backward pass recomputes the activations inside the denoiser's blocks."""
        if enabled == self.block_checkpointing:
            return
        if enabled:
            self.denoiser.enable_gradient_checkpointing(_checkpoint_block)
        else:
            self.denoiser.disable_gradient_checkpointing()
        self.block_checkpointing = enabled

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
        negative = self._collate([self._embedding(self.guidance.negative_prompt)] * len(prompts))
        return replace(self._collate([self._embedding(str(prompt)) for prompt in prompts]), negative=negative)

    def precompute(self, prompts: Iterable[str]) -> None:
        """Embed prompts, and the negative prompt, ahead of time and keep all of them."""
        for prompt in {self.guidance.negative_prompt: None, **{str(prompt): None for prompt in prompts}}:
            self._embeddings[prompt] = self._embedding(prompt)

    def release_text_encoder(self) -> None:
        """Forget the text encoders to free their memory; from then on only remembered prompts can be used."""
        self._embedding(self.guidance.negative_prompt)
        for name in self.family.text_encoders:
            setattr(self, name, None)

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gaussian latents, float32 `(batch_size, C, H, W)`, drawn where the generator is."""
        device = self.device if generator is None else generator.device
        shape = (batch_size, *self.latent_shape)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.device)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """The network's output after guidance, in the dtype of `x`."""
        return self.guidance.apply(lambda x, conditioning: self._denoised(x, t, conditioning), x, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in the latents' dtype, around [0, 1] and not clamped."""
        return decode(self.vae, latents, self.memory)

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
    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the network with `x` and conditioning in its dtype, and `time`, a scalar."""

    @abstractmethod
    def _embed(self, prompt: str) -> Mapping[str, Tensor]:
        """Embed one prompt: what `_network` is given, by name and without a batch dimension."""

    def _collate(self, embeddings: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Stack the embeddings of single prompts; a family whose embeddings differ in shape overrides it."""
        return Conditioning(
            {name: torch.stack([each[name] for each in embeddings]).to(self.device) for name in embeddings[0]}
        )

    def _denoised(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the network's prediction without guidance, in the dtype of `x`."""
        dtype = self._weight.dtype
        time = torch.full((), self.schedule.network_time(t), device=x.device)
        return self._network(x.to(dtype), time, conditioning.to(dtype)).to(x.dtype)

    def _embedding(self, prompt: str) -> Mapping[str, Tensor]:
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
            embedding = {name: tensor.cpu() for name, tensor in self._embed(prompt).items()}
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


def _checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)
