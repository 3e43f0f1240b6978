"""What a model family adds to a diffusers pipeline: shapes, schedule, text rows, network inputs, guidance, decoding.

A family is a small subclass in a file of its own. It holds no weights of its own and calls the pipeline's own methods;
loading, precision, placement, caching and training stand once, in the other modules of this folder.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.models.weights.origin import Origin
from tempflow.settings.fields import ModelConfig, SampleConfig


def scaling(vae: ModelMixin) -> tuple[float, float]:
    """An autoencoder's scale and shift: it decodes `latents / scale + shift`; 1 and 0 where its class has none."""
    return vae.config.get("scaling_factor", 1.0), vae.config.get("shift_factor") or 0.0


def check_scaling(vae: ModelMixin, origin: Origin) -> None:
    """Whether an autoencoder's scale, shift and spread are numbers that latents can be decoded with.

    Raises:
        BadInput: a scale that is no positive number, or a shift that is none.
    """
    scale, shift = scaling(vae)
    spread, means = vae.config.get("latents_std") or [1.0], vae.config.get("latents_mean") or [0.0]
    for name, values in (("scaling_factor", [scale]), ("latents_std", spread)):
        if not all(_is_number(value) and value > 0 for value in values):
            raise origin.refusal(f"the configuration of its autoencoder has {name}={values[0]}; give a positive number")
    for name, values in (("shift_factor", [shift]), ("latents_mean", means)):
        if not all(map(_is_number, values)):
            raise origin.refusal(f"the configuration of its autoencoder has {name}={values[0]}; give a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Family:
    """One loaded pipeline at one image size. Subclasses override what differs; the defaults are those of FLUX.

    Latents are (R, D...) with D = `latent_shape`; text rows are dicts of tensors with a leading row axis.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """parts that the pipeline can do without"""
    lora_targets: ClassVar[tuple[str, ...]]
    """ends of the names of the layers that get adapters"""
    max_text_tokens: ClassVar[int] = 512
    """as the pipeline's own limit"""
    padded_text: ClassVar[bool] = False
    """text rows are padded and masked: the attention backend has to take a mask"""
    blank: ClassVar[str] = ""
    """the text of unconditional rows"""

    def __init__(self, pipeline: DiffusionPipeline, model: ModelConfig, sample: SampleConfig, device: torch.device):
        self.pipeline, self.device, self._origin = pipeline, device, Origin("model.path", model.path)
        self.text_tokens, self.guidance = model.text_tokens, sample.guidance
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            found = type(pipeline.scheduler).__name__
            raise BadInput("model.path", model.path, f"its scheduler is {found}, not FlowMatchEulerDiscreteScheduler")
        if model.text_tokens > self.max_text_tokens:
            raise BadInput("model.text_tokens", model.text_tokens, f"this model takes at most {self.max_text_tokens}")
        if self.distilled and sample.guidance > 1:
            raise BadInput("sample.guidance", sample.guidance, "this model is distilled to none; leave it at 1")
        check_scaling(pipeline.vae, self._origin)
        self.height = self._pixels("sample.height", sample.height)
        self.width = self._pixels("sample.width", sample.width)
        self.image_shape = (3, self.height, self.width)

    def _pixels(self, field: str, size: int | None) -> int:
        size = size or self.default_pixels
        if size % self.pixel_multiple:
            raise BadInput(field, size, f"this model takes multiples of {self.pixel_multiple} pixels")
        if size > self.max_pixels:
            raise BadInput(field, size, f"this model has positions for at most {self.max_pixels} pixels")
        return size

    # Shapes

    @property
    def default_pixels(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def pixel_multiple(self) -> int:
        """Pixels on one side of an image token."""
        return self.pipeline.vae_scale_factor * 2

    @property
    def max_pixels(self) -> float:
        return float("inf")

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens in height and width."""
        return self.height // self.pixel_multiple, self.width // self.pixel_multiple

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent: (tokens, channels) where the pipeline packs its latents."""
        rows, columns = self.grid
        return rows * columns, self.pipeline.transformer.config.in_channels

    # Schedule

    def sigmas(self, num_steps: int) -> Tensor:
        """(T+1,) float64, those of the pipeline's own scheduler.

        Raises:
            BadInput: its configuration does not give sigmas that fall to 0.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        with self._origin.one_line():
            scheduler.set_timesteps(num_steps, **self.timestep_arguments(num_steps))
        sigmas = scheduler.sigmas.double()
        if len(sigmas) != num_steps + 1 or not (sigmas.diff() < 0).all() or not 0 < sigmas[0] < 2 or sigmas[-1] != 0:
            shown = [round(sigma, 4) for sigma in sigmas.tolist()[:4]]
            raise self._origin.refusal(f"its scheduler gives the sigmas {shown}..., which do not fall to 0")
        return sigmas

    def timestep_arguments(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline gives to its scheduler: evenly falling sigmas and the shift of this image size."""
        return {"sigmas": torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).numpy(), "mu": self.shift()}

    def shift(self) -> float:
        """The scheduler's `mu`, a function of the number of image tokens; without effect if its shift is static."""
        rows, columns = self.grid
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        config = self.pipeline.scheduler.config
        return calculate_shift(rows * columns, *(config.get(name, default) for name, default in names.items()))

    # Text and network

    @property
    def distilled(self) -> bool:
        """The model takes no guidance of any kind."""
        return False

    @property
    def classifier_free(self) -> bool:
        """A velocity costs two network rows, with and without the text."""
        return self.guidance > 1

    def encode(self, text: str) -> dict[str, Tensor]:
        """The row (1, ...) of one text, of the same shape for every text."""
        raise NotImplementedError

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Tensor]:
        """Arguments of the transformer: latents (R, D...) in its precision, sigma (R,) fp32, text rows."""
        raise NotImplementedError

    def velocity(self, output: Tensor) -> Tensor:
        """What the transformer gave, as `noise - data`."""
        return output

    def guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Classifier-free guidance of velocities (R, D...) fp32."""
        return uncond + self.guidance * (cond - uncond)

    def decode(self, latents: Tensor, vae: ModelMixin | None = None) -> Tensor:
        """(R, D...) fp32 -> images (R, 3, H, W) in -1 .. 1, any precision, by `vae` or by the pipeline's own."""
        vae = vae or self.pipeline.vae
        scale, shift = scaling(vae)
        scaled = self.spatial(latents) / scale + shift
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0]

    def spatial(self, latents: Tensor) -> Tensor:
        """(R, D...) -> latents (R, C, h, w) as autoencoders take them, but for the two numbers of `scaling`."""
        raise NotImplementedError

    def timestep(self, sigma: Tensor) -> Tensor:
        """The scheduler's timestep, (R,) fp32."""
        return sigma * self.pipeline.scheduler.config.num_train_timesteps
