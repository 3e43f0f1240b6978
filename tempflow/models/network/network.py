"""A diffusers transformer under training: low-rank adapters or all parameters, its reference and its merged copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tempflow.common.errors import BadInput
from tempflow.common.precision import DTYPES
from tempflow.common.tensors import gather, repeated_blocks
from tempflow.models.network.adapters import (
    adapted_layers,
    adapter_state,
    add_adapters,
    load_adapters,
    save_adapters,
)
from tempflow.models.network.float8 import why_not
from tempflow.models.network.merged import MergedNetwork
from tempflow.settings.fields import ModelConfig


class Spread(Protocol):
    """How networks are shared out over processes (`tempflow.parallel.shards.Shards`)."""

    device: torch.device
    merged: str | None
    """the merged copy: whole in each process, sharded, or none"""

    def apply(self, module: nn.Module, widen: bool = False) -> None:
        """Shares a network out; with `widen` its parameters become fp32 on the way."""
        ...


class TrainedNetwork:
    """The transformer, its trainable parameters (fp32), its reference and its merged copy.

    With adapters the reference is the same network with them off. With full training it is a frozen copy.

    Args:
        spread: shares these networks out; None where each process holds them whole.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ModelConfig,
        pipeline_class: type[DiffusionPipeline],
        default_targets: tuple[str, ...],
        keep_reference: bool,
        spread: Spread | None = None,
    ):
        self.module = module.requires_grad_(False).eval()
        self.config, self.pipeline_class, self.dtype = config, pipeline_class, DTYPES[config.dtype]
        self.frozen: nn.Module | None = None
        self._merged: MergedNetwork | None = None
        self._kind, self._spread = type(module), spread
        if config.train == "lora":
            add_adapters(module, config, default_targets)
            if config.lora is not None:
                load_adapters(module, pipeline_class, config)
        else:
            self.frozen = copy.deepcopy(module) if keep_reference else None
            module.requires_grad_(True)
            if spread is None:
                module.float()
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        if spread is not None:
            self._share_out(spread)
        self.active = module
        """the module that `forward` calls: the trained one, or within a context the reference or the merged copy"""

    def _share_out(self, spread: Spread) -> None:
        """The merged copy first, as long as the weights are whole."""
        if spread.merged is not None:
            self._merged = MergedNetwork(self.module, self.dtype, apart=True)
        spread.apply(self.module, widen=self.config.train == "full")
        if self.frozen is not None:
            spread.apply(self.frozen)
        if spread.merged == "sharded":
            spread.apply(self._merged.module)
        elif self._merged is not None:
            self._merged.module.to(spread.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def forward(self, inputs: dict[str, Any], device: torch.device) -> Tensor:
        """The network's output, fp32; in autocast where its precision is not fp32, but for a merged copy in bf16."""
        # No cache of weights in the lower precision where they are shared out: it would hold all of them at once.
        cached = self._spread is None
        with torch.autocast(device.type, self.dtype, enabled=self._in_autocast(), cache_enabled=cached):
            return self.active(**inputs, return_dict=False)[0].float()

    def _in_autocast(self) -> bool:
        merged = self._merged is not None and self.active is self._merged.module
        return self.dtype != torch.float32 and not (merged and self._merged.all_bf16)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context `forward` is that of the network before training."""
        if self.config.train == "lora":
            trained = self.trainable().values()
            self.module.disable_adapters()
            for parameter in trained:  # peft freezes them meanwhile; shares are trained as they were at the first call
                parameter.requires_grad_(True)
            try:
                yield
            finally:
                self.module.enable_adapters()
            return
        assert self.frozen is not None, "a reference is kept only where objective.kl > 0"
        with self._serving(self.frozen):
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within this context `forward` uses the merged copy, made at the first use and as old as its last refresh."""
        if self._merged is None:
            self._merged = MergedNetwork(self.module, self.dtype)
        with self._serving(self._merged.module):
            yield

    @contextmanager
    def _serving(self, module: nn.Module) -> Iterator[None]:
        before, self.active = self.active, module
        try:
            yield
        finally:
            self.active = before

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the network that `forward` uses in the present context."""
        return repeated_blocks(self.active)

    def quantise_merged(self, smallest: int) -> str:
        """Turns large linear layers of the merged copy to fp8; says which.

        Raises:
            BadInput: the GPU or the network's precision does not allow it.
        """
        problem = why_not(next(self.module.parameters()).device, self.dtype)
        if problem:
            raise BadInput("tails.fp8", "true", problem)
        with self.merged():
            return self._merged.quantise(smallest)

    def merged_weights(self) -> list[nn.Parameter]:
        """The parameters of which a merged copy has its own; it shares the rest."""
        if self.config.train == "lora":
            return [layer.get_base_layer().weight for layer in adapted_layers(self.module).values()]
        return [parameter for parameter in self.module.parameters() if parameter.dtype != self.dtype]

    def refresh_merged(self) -> None:
        """Brings the merged copy, if there is one, up to the trained weights, in place."""
        if self._merged is not None:
            self._merged.refresh()

    def whole_weights(self, keep: bool) -> dict[str, Tensor]:
        """What `save` writes, in full and in main memory: the adapters', or all weights.

        Args:
            keep: False in processes that only take part in gathering what is shared out.
        """
        if self.config.train == "lora":
            return gather(adapter_state(self.module)[0], keep)
        return gather(self.module.state_dict(), keep)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Adapters for `load_lora_weights`, or the transformer for `from_pretrained`; `weights` of `whole_weights`."""
        if self.config.train == "lora":
            save_adapters(self.module, self.pipeline_class, folder, weights)
            return
        with torch.device("meta"):
            fresh = self._kind.from_config(self.module.config)
        fresh.load_state_dict(weights, assign=True)
        fresh.save_pretrained(folder)
