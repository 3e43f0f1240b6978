"""A second copy of a network's weights, for sampling that needs no gradient: adapters merged in, reduced precision.

Sampling with merged weights costs no adapter products. The copy's storage never moves, so that captured CUDA graphs
keep reading the right weights after `refresh`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import Parameter

from tempflow.models.adapters import NAME, adapted_layers


class MergedNetwork:
    """A network computing what `module` computes with its adapters, of which it has none.

    All weights that training leaves alone are shared with `module`. With full training every parameter is copied in
    `dtype`, unless it has that precision already: then it is shared as well.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self.module = copy.deepcopy(module, shared)
        self.adapted = adapted_layers(module)
        self.cast: dict[str, Parameter] = {}
        for name, layer in self.adapted.items():
            self._take_adapter_off(name, layer.get_base_layer())
        if not self.adapted:
            self.cast = {name: p for name, p in module.named_parameters() if p.dtype != dtype}
            for name, source in self.cast.items():
                self._put(name, Parameter(source.detach().to(dtype), requires_grad=False))
        self.refresh()

    def _take_adapter_off(self, name: str, base: nn.Module) -> None:
        """Replaces an adapted layer of the copy by a plain one with a weight of its own."""
        plain = copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})
        plain.weight = Parameter(base.weight.detach().clone(), requires_grad=False)
        self._put(name, plain)

    def _put(self, name: str, part: nn.Module | Parameter) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, part)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the trained weights, in place: W + scale B A in fp32, then rounded to the copy's precision."""
        for name, layer in self.adapted.items():
            merged = layer.get_base_layer().weight.float() + layer.get_delta_weight(NAME).float()
            self.module.get_submodule(name).weight.copy_(merged)
        for name, source in self.cast.items():
            self.module.get_parameter(name).copy_(source)
