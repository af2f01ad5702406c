"""Adapters of a pipeline: attach, load, scale and write them, and disable them for the base model."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_draft.errors import ConfigurationError
from lightning_draft.models import lora as adapters
from lightning_draft.models import lora_copy, lora_edit, lora_files, lora_writing
from lightning_draft.models.lora import LoRA
from lightning_draft.models.lora_content import LoRABase, LoRAFile
from lightning_draft.models.lora_text import TextUpdates
from lightning_draft.models.prompt_embedding import PromptEmbedding
from lightning_draft.models.quantization import Quantization
from lightning_draft.models.scale_schedule import SCHEDULE, ScaleSchedule, header_of
from lightning_draft.models.trainable import OriginalWeights, Trainable, unfreeze
from lightning_draft.progress import Progress


class AdaptedModel(PromptEmbedding):
    """Base class that adds adapters to a pipeline, or makes the denoiser's own weights trainable.

    Attributes:
        lora: The adapters' settings, `None` without adapters.
        trainable: `lora`, `full` or names of the trained parameters.
        quantization: Library and format of the frozen weights.
        text_updates: The part of a LoRA file for the text encoders.
    """

    lora: LoRA | None
    trainable: Trainable
    quantization: Quantization | None
    text_updates: TextUpdates
    _original: OriginalWeights | None = None
    _initial: OriginalWeights | None = None
    _weight_name: str
    _prediction_weight: float = 1.0

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The denoising network, which is trained."""

    @property
    @abstractmethod
    def _lora_base(self) -> LoRABase:
        """The description of this pipeline for LoRA files."""

    @property
    def text_scale(self) -> float:
        """The scale of the text encoders' part of a LoRA; embeddings are cached for each scale."""
        return self.text_updates.scale if self.text_updates.updates else 1.0

    def precompute(
        self, prompts: Iterable[str], device: torch.device | str = "cpu", progress: Progress | None = None
    ) -> None:
        """Embed prompts and the negative prompt ahead of time, and cache all of them, also for the base model."""
        prompts = list(prompts)
        super().precompute(prompts, device, progress)
        if self.text_updates.updates:
            with self.text_updates.scaled(0.0):
                super().precompute(prompts, device)

    def release_text_encoder(self) -> None:
        """Free the text encoders' memory; afterwards only prompts with cached embeddings can be used."""
        super().release_text_encoder()
        self.text_updates.release()

    @property
    def has_comfy_names(self) -> bool:
        """Whether the names that ComfyUI reads are known for the adapted components."""
        names = self.family.comfy
        return names is not None and names.prefixes.keys() >= self.text_updates.updates.keys()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context, the model is the base model.

        It is bitwise equal to the pipeline that was loaded, or with `lora.reference: init` to that pipeline with the
        LoRA from which training started.
        """
        with self._pretrained() if self._initial is None else self._initial.scaled(0.0):
            yield

    def on_sharded(self) -> None:
        """Keep only this process's shards of the weights from which training started.

        Raises:
            ConfigurationError: `lora.merge` is set, which needs whole weights.
        """
        adapters.check_not_merged(self.lora)
        for copies in filter(None, (self._original, self._initial)):
            copies.shard()

    @contextmanager
    def adapter_scale(self, scale: float) -> Iterator[None]:
        """Within this context, the weights are `theta_0 + scale dW`; 0 is the pretrained model, 1 the fine-tuned one.

        This is for sampling. If a LoRA file has a part for the text encoders, encode prompts within the context, too.
        """
        if self._original is not None:
            with self._original.scaled(scale):
                yield
            return
        self._check_adapters("adapter_scale")
        if scale == 0:
            with self._pretrained():
                yield
            return
        with adapters.scaled(self.denoiser, scale), self.text_updates.scaled(scale):
            yield

    @contextmanager
    def at_step(self, step: int, num_steps: int) -> Iterator[None]:
        """Within this context, the adapters have the scale of one step of a chain, by `lora.scale_schedule`.

        Args:
            step: Number of the step, from 0, the noisiest one.
            num_steps: Number of steps of the chain.
        """
        schedule = None if self.lora is None else self.lora.scale_schedule
        weight = 1.0 if schedule is None else schedule.weight(step, num_steps)
        if schedule is not None and schedule.interpolate == "weights":
            with adapters.scaled(self.denoiser, weight):
                yield
            return
        before, self._prediction_weight = self._prediction_weight, weight
        try:
            yield
        finally:
            self._prediction_weight = before

    def without_gradient(self) -> AbstractContextManager[None]:
        """Return a context of several network calls without gradient; adapters are merged in it with `lora.merge`."""
        merges = self.lora is not None and self.lora.merge and self.lora.scale_schedule is None
        return adapters.merged(self.denoiser) if merges else nullcontext()

    def interpolated(self, predict: Callable[[], Tensor]) -> Tensor:
        """Compute `(1 - w) eps_base + w eps_tuned` with the weight of the current step; `eps_tuned` if it is 1.

        Args:
            predict: Returns the prediction of the network with its adapters as they are.
        """
        weight = self._prediction_weight
        if weight == 1 or adapters.is_disabled(self.denoiser):
            return predict()
        with adapters.disabled(self.denoiser):
            base = predict()
        return base if weight == 0 and not torch.is_grad_enabled() else torch.lerp(base, predict(), weight)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable parameters by name."""
        return [(name, value) for name, value in self.named_parameters() if value.requires_grad]

    def save_lora(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        values: Mapping[str, Tensor] | None = None,
        form: lora_writing.Format = "diffusers",
    ) -> None:
        """Write the adapters to a `.safetensors` file, including the text encoders' part of a loaded LoRA.

        Args:
            path: The file; missing folders are created.
            metadata: Text for its header.
            values: The full adapters by their names in this model, from `distributed.gather_full`; for sharded models.
            form: `diffusers` for a file that the pipeline's `load_lora_weights` opens; `comfy` for the names that
                ComfyUI, Forge and AUTOMATIC1111 read.
        """
        self._check_adapters("save_lora")
        own = lora_writing.adapters_of(self.denoiser, self._denoiser_names(values))
        updates = {self.family.denoiser: own, **self.text_updates.updates}
        header = {**(metadata or {}), **header_of(None if self.lora is None else self.lora.scale_schedule)}
        lora_writing.write(path, updates, header, self.family, self.denoiser.config, form)

    def load_lora(self, path: str | os.PathLike[str]) -> None:
        """Copy a LoRA file into the adapters; if the model has none, attach those of the file.

        A part for the text encoders is added to their weights. A scale schedule in the header replaces the model's.

        Args:
            path: A `.safetensors` file written by this package, diffusers, peft, kohya's scripts or for ComfyUI.

        Raises:
            ConfigurationError: The file does not exist, is damaged, is of another kind, or does not fit the adapters.
        """
        if self._original is not None:
            raise ConfigurationError(
                f"load_lora needs adapters, and this model trains its weights (trainable={self.trainable!r}); "
                "build it with trainable='lora'"
            )
        file = self.read_lora(path)
        if self.lora is None:
            self._attach(LoRA(file.rank, target_modules=file.layers))
        self._copy(file)
        self._use_schedule(file)

    def unload_lora(self) -> None:
        """Remove the adapters and the text encoders' part of a loaded LoRA; the model is the pretrained pipeline."""
        self._check_adapters("unload_lora")
        self.text_updates.set_scale(0.0)
        self.text_updates = TextUpdates({}, {})
        adapters.detach(self.denoiser)
        self.lora = self._initial = None
        self._weight_name = _first_name(self.denoiser)
        self.clear_embeddings()

    def set_scale_schedule(self, schedule: ScaleSchedule | None) -> None:
        """Set `lora.scale_schedule`, the scale of the adapters as a function of the sampling step."""
        self._check_adapters("set_scale_schedule")
        assert self.lora is not None
        self.lora = replace(self.lora, scale_schedule=schedule)

    def _use_schedule(self, file: LoRAFile) -> None:
        if SCHEDULE in file.metadata:
            self.set_scale_schedule(ScaleSchedule.from_text(file.metadata[SCHEDULE]))

    def read_lora(self, path: str | os.PathLike[str]) -> LoRAFile:
        """Read a LoRA file of this model, without applying it.

        Raises:
            ConfigurationError: The file does not exist, is damaged, is of another kind, or is for another model.
        """
        file = lora_files.read(path, self._lora_base, self._adaptable())
        if file.encoders and self.quantization is not None:
            reason = f"has a part for the text encoders, which cannot be used with quantization={self.quantization}"
            raise ConfigurationError(f"{path} {reason}; leave quantization out")
        lora_copy.check_layers(self._adaptable(), file, self.family.denoiser)
        return file

    def _prepare_training(self) -> None:
        """Attach the adapters, or make the chosen weights trainable."""
        self.text_updates = TextUpdates({}, {})
        self._weight_name = _first_name(self.denoiser)
        if self.trainable != "lora":
            adapters.check_not_initialized(self.lora, self.trainable)
            self.lora = None
            self._original = unfreeze(self.denoiser, self.trainable)
        elif self.lora is not None and self.lora.init is not None:
            self._start_from(self.lora, self.lora.init)
        elif self.lora is not None:
            self._attach(self.lora)

    def _attach(self, lora: LoRA) -> None:
        lora.attach(self.denoiser, self.family.lora_targets)
        self.lora = lora
        self._weight_name = _first_name(self.denoiser)

    def _start_from(self, lora: LoRA, path: str) -> None:
        """Attach the adapters of a file, at another rank if one is given, with its scale schedule if none is given."""
        file = lora_edit.reduce_rank(self.read_lora(path), lora.rank)
        self._attach(
            replace(lora, rank=lora.rank or file.rank, target_modules=file.layers, init=None, reference="pretrained")
        )
        self._copy(file)
        if lora.scale_schedule is None:
            self._use_schedule(file)
        if lora.reference == "init":
            trained = [name for name, value in self.denoiser.named_parameters() if value.requires_grad]
            self._initial = OriginalWeights(self.denoiser, trained)

    def _copy(self, file: LoRAFile) -> None:
        lora_copy.copy_into(self.denoiser, file)
        self.text_updates.set_scale(0.0)  # the new updates apply to the original weights
        self.text_updates = TextUpdates(self._adaptable(), file.encoders)
        self.text_updates.set_scale(1.0)
        self.clear_embeddings()

    def _adaptable(self) -> dict[str, nn.Module]:
        """Return the denoiser and the text encoders that are loaded."""
        networks = {name: getattr(self, name) for name in (self.family.denoiser, *self.family.text_encoders)}
        return {name: network for name, network in networks.items() if network is not None}

    @contextmanager
    def _pretrained(self) -> Iterator[None]:
        """Within this context, the model is the pipeline that was loaded."""
        if self._original is not None:
            with self._original.scaled(0.0):
                yield
            return
        with adapters.disabled(self.denoiser), self.text_updates.scaled(0.0):
            yield

    def _denoiser_names(self, values: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        prefix = f"{self.family.denoiser}."
        return None if values is None else {name.removeprefix(prefix): value for name, value in values.items()}

    def _check_adapters(self, what: str) -> None:
        if self.lora is None:
            raise ConfigurationError(f"{what} needs adapters, and this model has none; build it with lora=LoRA()")


def _first_name(network: nn.Module) -> str:
    return next(name for name, _ in network.named_parameters())
