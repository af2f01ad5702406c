"""The base class of all models that use diffusers' text-to-image pipelines."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_draft.arguments import given, integer
from lightning_draft.errors import ConfigurationError
from lightning_draft.models.adapted import AdaptedModel
from lightning_draft.models.base import Conditioning
from lightning_draft.models.base_hash import weights_sha256
from lightning_draft.models.decoder import Memory, Precision, decode
from lightning_draft.models.guidance import Guidance
from lightning_draft.models.loading import load_pipeline, public_name, save_pipeline
from lightning_draft.models.lora import LoRA, with_current_scales
from lightning_draft.models.lora_content import LoRABase
from lightning_draft.models.precisions import network_dtypes, set_decoder_precision
from lightning_draft.models.quantization import Quantization, check_quantization
from lightning_draft.models.text_cache import TextCache
from lightning_draft.models.text_encoding import TextEncoding
from lightning_draft.models.text_store import TextStore, fingerprint
from lightning_draft.models.trainable import Trainable, check_trainable
from lightning_draft.weightless import is_without_weights, shapes_only


class PipelineModel(AdaptedModel):
    """A text-to-image pipeline, frozen except for its adapters or for the chosen weights of its denoiser.

    A family sets the class attribute `family`, reads its pipeline in `_configure`, embeds one prompt in `_embed`, and
    calls its denoiser in `_network`. It may be defined outside this package.

    Args:
        pretrained: A shipped name (`emoji64`), a diffusers pipeline folder, a hub id, or, for families that support it,
            a `.safetensors` file in the original layout.
        lora: The adapters; `None` for no adapters, so that nothing is trained until `load_lora` adds those of a file.
        trainable: `lora` trains adapters; `full` trains all weights of the denoiser; a list trains the weights in
            whose dotted names one of its names is a complete part, such as `[attn2, conv_out]`. The argument
            `lora` is used only with `lora`.
        dtype: Precision of the frozen networks. Adapters, a denoiser whose own weights are trained, and latents are
            float32.
        quantization: Library and format in which the frozen weights of the denoiser's and the text encoders' linear
            layers are stored, `torchao-int8` or `bitsandbytes-nf4`; by default they are not quantized.
        guidance: Classifier-free guidance.
        text: How prompts are embedded.
        memory: Options that lower the decoder's peak memory.
        height: Height of the images in pixels, with `width`; by default the size that the denoiser was trained for.
        width: Width of the images in pixels.
        pretrained_config: For a single file: the folder or hub id of a pipeline with the same architecture; by default
            it is recognized, and its configuration comes from the hub.
        omit: Names of components that are not loaded, among those that the family can do without, such as
            `text_encoder_3` of Stable Diffusion 3; the tokenizer of an omitted text encoder is omitted too.

    Attributes:
        family: The description of its pipelines.
        pipeline: The pipeline of diffusers, which shares this model's networks.
        vae: The autoencoder.
        omitted: Components that were not loaded because of `omit`.
    """

    vae: Any
    _in_interval: bool = True

    def __init__(
        self,
        pretrained: str,
        *,
        lora: LoRA | None = LoRA(),  # noqa: B008 (frozen)
        trainable: Trainable = "lora",
        dtype: Precision = "float32",
        quantization: Quantization | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        text: TextEncoding = TextEncoding(),  # noqa: B008 (frozen)
        memory: Memory = Memory(),  # noqa: B008 (frozen)
        height: int | None = None,
        width: int | None = None,
        pretrained_config: str | None = None,
        omit: Sequence[str] = (),
    ) -> None:
        super().__init__()
        text.check(self.family)
        check_trainable(trainable)
        for name, pixels in given(height=height, width=width).items():
            integer(name, pixels, "write a number of pixels such as 512")
        self._check_omitted(omit)
        if quantization is not None:
            check_quantization(quantization, trainable, is_without_weights())
        self.pretrained = pretrained
        self.pretrained_config = pretrained_config
        self.lora = lora
        self.trainable = trainable
        self.quantization = quantization
        self.text = text
        self.memory = memory
        self.omitted = (*omit, *(name.replace("text_encoder", "tokenizer") for name in omit))
        self._dtypes = network_dtypes(self.family, dtype, memory, trains_weights=trainable != "lora")
        without = () if text.cache is None else self.family.text_encoders
        self.pipeline = self._load((*self.omitted, *without))
        self.vae = None
        for name in self.family.networks:
            setattr(self, name, getattr(self.pipeline, name))
        self.memory.check(self.vae)
        self._check_clip_skip()
        self.guidance = guidance.or_default(self._published_scale, self.family.embedded_guidance)
        self._latent_size = self.family.latents.size(self.vae, self.denoiser, height, width)
        self._configure(self.pipeline)
        self.memory = set_decoder_precision(self.family, self.vae, dtype, memory)
        self.requires_grad_(False).eval()
        with shapes_only():
            self._prepare_training()

    @property
    def denoiser(self) -> Any:
        """The denoising network, which is trained."""
        return getattr(self, self.family.denoiser)

    @property
    def decoder(self) -> Any:
        """The autoencoder, `None` for families that sample pixels."""
        return self.vae

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return self._weight.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return (self.family.latents.channels(self.denoiser), *self._latent_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        factor = self.family.latents.factor(self.vae)
        return self._latent_size[0] * factor, self._latent_size[1] * factor

    @contextmanager
    def at_step(self, step: int, num_steps: int) -> Iterator[None]:
        """Within this context, adapters and guidance are those of one step of a chain."""
        before, self._in_interval = self._in_interval, self.guidance.covers(step, num_steps)
        try:
            with super().at_step(step, num_steps):
                yield
        finally:
            self._in_interval = before

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
        """Keep every network in eval mode, so that frozen networks have no dropout in training."""
        super().train(False)
        self.training = mode
        return self

    def noise(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample standard Gaussian latents, float32 `(batch_size, C, H, W)`, on the generator's device."""
        device = self.device if generator is None else generator.device
        shape = (batch_size, *self.latent_shape)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.device)

    def forward(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction after guidance, in the dtype of `x`."""

        def network(x: Tensor, conditioning: Conditioning) -> Tensor:
            return self._predict(x, t, conditioning)

        if not self._in_interval:
            return self.interpolated(lambda: network(x, conditioning))
        rescale = self.family.rescale_guidance
        return self.interpolated(lambda: self.guidance.apply(network, x, conditioning, rescale))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into images `(B, 3, H, W)` in their dtype, in [0, 1] by convention and not clamped."""
        scaled = latents if self.vae is None else self.family.latents.unscale(self.vae, latents)
        return decode(self.vae, scaled, self.memory, self.image_size, self.family.latents.decode)

    @property
    def source(self) -> str:
        """The pretrained pipeline: a folder, a file or a hub id."""
        return str(self.pretrained)

    @property
    def public_name(self) -> str:
        """The pretrained pipeline without local folders: a shipped name, a hub id, or a folder's own name."""
        return public_name(self.source)

    @property
    def source_sha256(self) -> str | None:
        """SHA-256 of the file with the denoiser's weights, `None` if it is not on this disk; see `weights_sha256`."""
        folder = getattr(self.denoiser.config, "_name_or_path", None)
        return weights_sha256(Path(self.source).expanduser(), None if folder is None else Path(folder))

    def save_pipeline(
        self,
        folder: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the whole pipeline with its trained denoiser as a folder that `from_pretrained` opens.

        Args:
            folder: Folder to write; an existing one is replaced when the new one is complete.
            metadata: Text for its `training.json`.
            values: The full trained weights by their names in this model, for sharded models.
        """
        if self._original is None:
            raise ConfigurationError(
                "save_pipeline needs a denoiser whose own weights were trained; build the model with "
                "trainable='full', or write the adapters with save_lora"
            )
        trained = self._denoiser_names(values or dict(self.trainable_parameters()))
        pipeline = self._load(self.omitted)
        save_pipeline(pipeline, Path(folder), self.family, trained or {}, metadata or {})

    @property
    def _lora_base(self) -> LoRABase:
        config, name = self.denoiser.config, self.public_name
        return LoRABase(self.family, config, self.source, name, self.pretrained_config)

    def _open_cache(self) -> TextCache:
        if self.text.cache is None or is_without_weights():
            return super()._open_cache()
        tokenizers = {name: name.replace("text_encoder", "tokenizer") for name in self.family.text_encoders}
        encoders = [name for name, tokenizer in tokenizers.items() if getattr(self.pipeline, tokenizer) is not None]
        settings = (self.family.pipeline_name, self._text_length, self.text.clip_skip, *map(self._dtypes.get, encoders))
        settings += () if self.quantization is None else (self.quantization,)
        file = Path(self.source).expanduser()
        name = fingerprint(self.pipeline, encoders, settings, file if file.is_file() else None)
        return TextStore(Path(self.text.cache).expanduser() / name)

    def _load(self, omit: Sequence[str]) -> Any:
        """Open the pipeline without some of its components."""
        options = (self.pretrained_config, omit, self.quantization)
        return load_pipeline(self.family, self.pretrained, self._dtypes, *options)

    def _load_text_encoders(self, device: torch.device | str) -> None:
        others = [name for name in self.family.networks if name not in self.family.text_encoders]
        omit = (*self.omitted, *others)
        pipeline = self._load(omit)
        for name in self.family.text_encoders:
            encoder = getattr(pipeline, name)
            if encoder is not None:
                nn.Module.to(encoder.requires_grad_(False).eval(), device)
            setattr(self, name, encoder)
            setattr(self.pipeline, name, encoder)
        self._check_clip_skip()

    def _check_omitted(self, omit: Sequence[str]) -> None:
        possible = self.family.optional
        if isinstance(omit, str):
            advice = f"write [{', '.join(possible)}], or leave it out" if possible else "leave it out"
            raise ConfigurationError(
                f"omit={omit!r} must be a list of names of components that {self.family.title} can do without; {advice}"
            )
        for name in omit:
            if name not in possible:
                advice = f"write {' or '.join(possible)}, or leave omit out" if possible else "leave omit out"
                raise ConfigurationError(
                    f"omit={name} is no component that {self.family.title} can do without; {advice}"
                )

    def _check_clip_skip(self) -> None:
        encoders = [each for name in self.family.text_encoders if (each := getattr(self, name)) is not None]
        if self.text.clip_skip and encoders:
            self.text.check_layers(min(each.config.num_hidden_layers for each in encoders))

    @property
    def _published_scale(self) -> float:
        """The default guidance scale; a family overrides it if it depends on the loaded pipeline."""
        return self.family.guidance_scale

    @abstractmethod
    def _configure(self, pipeline: Any) -> None:
        """Set `schedule`, `prediction` and tokenizers from the pipeline; the networks are attributes already.

        Raises:
            ConfigurationError: The pipeline has a property that this family does not support.
        """

    @abstractmethod
    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the denoiser with `x` and conditioning in its dtype, and `time`, a scalar."""

    @property
    def _weight(self) -> Tensor:
        """A weight of the denoiser, from which the denoiser's device and dtype are read.

        It is found by name, because under FSDP a denoiser has no parameters of its own between its calls.
        """
        weight: Tensor = attrgetter(self._weight_name)(self.denoiser)
        return weight

    def _predict(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction without guidance, in the dtype of `x`."""
        dtype = self._weight.dtype
        if not dtype.is_floating_point:  # quantized
            dtype = self._dtypes[self.family.denoiser]
        time = torch.full((), self.schedule.network_time(t), device=x.device)
        return self._network(x.to(dtype), time, conditioning.to(dtype)).to(x.dtype)


def _checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(with_current_scales(block), *inputs, use_reentrant=False)
