"""A diffusers transformer under training: low-rank adapters or all parameters, and the way back to the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from tempflow.errors import BadInput
from tempflow.settings import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainedNetwork:
    """The transformer, its trainable parameters (fp32) and its reference.

    With adapters the reference is the same network with them off. With full training it is a frozen copy.
    """

    def __init__(self, module: nn.Module, config: ModelConfig, default_targets: Sequence[str], keep_reference: bool):
        self.module = module.requires_grad_(False).eval()
        self.config = config
        self.frozen: nn.Module | None = None
        if config.train == "lora":
            self._add_adapters(list(config.lora_targets or default_targets))
        else:
            self.frozen = copy.deepcopy(module) if keep_reference else None
            module.requires_grad_(True).float()
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        self.active = module

    def _add_adapters(self, targets: list[str]) -> None:
        found = {name for name, _ in self.module.named_modules()}
        missing = [target for target in targets if not any(n == target or n.endswith(f".{target}") for n in found)]
        if missing:
            raise BadInput("model.lora_targets", targets, f"the transformer has no layer called {missing[0]}")
        lora = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,
            target_modules=targets,
            init_lora_weights="gaussian",
        )
        self.module.add_adapter(lora)
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def forward(self, **inputs: Tensor) -> Tensor:
        """The network's output, in autocast where its precision is not fp32."""
        dtype = DTYPES[self.config.dtype]
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return self.active(**inputs, return_dict=False)[0]

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.config.train == "lora":
            self.module.disable_adapters()
            try:
                yield
            finally:
                self.module.enable_adapters()
            return
        assert self.frozen is not None, "a reference is kept only where learn.kl > 0"
        self.active = self.frozen
        try:
            yield
        finally:
            self.active = self.module

    def adapter_state(self) -> tuple[dict[str, Tensor], dict]:
        """Adapter weights and their configuration, as diffusers' savers take them."""
        weights = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(self.module).items()}
        return weights, self.module.peft_config["default"].to_dict()
