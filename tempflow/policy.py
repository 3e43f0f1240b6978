"""What the trainer may ask of a model. Everything else about models lives in `tempflow/models/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, one row each: whatever tensors the model family needs, indexed together.

    Shapes are the same for every text of a run. Example (SD3): {"embeds": (R, L, C), "pooled": (R, C')}.
    """

    tensors: dict[str, Tensor]
    """name -> (R, ...)"""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor | slice) -> Conditioning:
        """The rows named by a slice or an int64 index, in that order."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Conditioning:
        """Each row `times` in succession: the prompt of N initial noises."""
        return Conditioning({name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()})


class ImageDecoder(Protocol):
    """Latents to images: a policy is one, by the model's own autoencoder, and a light decoder another."""

    device: torch.device
    latent_shape: tuple[int, ...]
    """shape of one latent, batch excluded"""
    image_shape: tuple[int, int, int]
    """(3, height, width) of a decoded image"""
    finite: Tensor | None
    """(R,) bool, on the device: which images of the last call were made of numbers before they were bytes; None where
    nobody looked"""

    def decode(self, latents: Tensor) -> Tensor:
        """(R, D...) -> uint8 images (R, 3, height, width), without gradient, each row by itself."""
        ...


class Policy(ImageDecoder, Protocol):
    """A flow-matching image model whose velocity is being trained."""

    network_rows: int
    """network rows that one velocity costs: 2 with classifier-free guidance, else 1"""
    attention: str
    """the attention backend, and how it was chosen"""

    def sigmas(self, num_steps: int) -> Tensor:
        """(T+1,) float64 from the model's own scheduler at the configured resolution."""
        ...

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encoded prompts, without gradient."""
        ...

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guided: Tensor | bool = True
    ) -> Tensor:
        """Velocity `noise - data`: latents (R, D...) fp32, sigma (R,) fp32 -> (R, D...) fp32.

        Args:
            guided: which rows take guidance, (R,) bool, the others being those of the text alone; or all of them, or
                none, which costs one network row each. Without effect where `network_rows` is 1.
        """
        ...

    def trainable(self) -> dict[str, Parameter]:
        """The parameters under training, by name."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within this context `velocity` is that of the model before training."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Within this context `velocity`, without gradient, uses a second copy of the weights with adapters merged in.

        The copy is made at the first use and is as old as the last `refresh_merged`.
        """
        ...

    def refresh_merged(self) -> None:
        """Brings that copy, if there is one, up to the trained parameters, in place: its storage never moves."""
        ...

    def quantise_merged(self) -> str:
        """Turns large linear layers of that copy to 8-bit floating point, before its first use; says which.

        Raises:
            BadInput: this device or precision does not allow it.
        """
        ...

    def blocks(self) -> list[Module]:
        """The repeated blocks of the network that `velocity` uses in the present context, for compilation."""
        ...

    def prepare_decoder(self, compiled: bool) -> None:
        """Puts the decoder's weights into the layout that is fastest here; compiles it where asked for, per shape."""
        ...

    def light_decoder(self, path: str, compiled: bool) -> ImageDecoder:
        """A decoder of the same latents by the smaller autoencoder at `path`, prepared like the model's own.

        Raises:
            BadInput: there is none that loads, or its latents or images have other sizes or another scale.
        """
        ...

    def export(self, write: bool = True) -> Callable[[Path], None]:
        """What was trained, as it is now: a function that writes it into a folder in the format of the model's own
        library, in another thread while training goes on.

        Args:
            write: a network that is shared out is gathered by all processes, and written by the one that has it true.
        """
        ...
