"""A second copy of a network's weights, for sampling that needs no gradient: adapters merged in, reduced precision.

Sampling with merged weights costs no adapter products. The copy's storage never moves, so that captured CUDA graphs
keep reading the right weights after `refresh`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from tempflow.common.tensors import whole
from tempflow.models.network.adapters import NAME, adapted_layers
from tempflow.models.network.float8 import Float8Linear, describe_layers, takes_float8


class MergedNetwork:
    """A network computing what `module` computes with its adapters, of which it has none.

    All weights that training leaves alone are shared with `module`. With full training every parameter is copied in
    `dtype`, unless it has that precision already: then it is shared as well.

    In bf16 the copy needs no autocast, which on a GPU would give norms and softmaxes fp32 outputs: they round to bf16,
    as every product after them does anyway. (Not in fp16, whose range these fp32 outputs may exceed.)

    Args:
        apart: nothing is shared, since the weights of `module` are going to be shared out over processes.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, apart: bool = False):
        shared = {} if apart else {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self.source, self.module = module, copy.deepcopy(module, shared)
        self.adapted = adapted_layers(module)
        self.cast: list[str] = []
        self.float8: dict[str, Float8Linear] = {}
        for name, layer in self.adapted.items():
            self._take_adapter_off(name, layer.get_base_layer(), apart)
        if not self.adapted:
            self.cast = [name for name, p in module.named_parameters() if apart or p.dtype != dtype]
            for name in self.cast:
                value = self.module.get_parameter(name).detach().to(dtype)
                self._put(name, Parameter(value, requires_grad=False))
        if apart:
            self.module.requires_grad_(False)
        self.all_bf16 = all(parameter.dtype == torch.bfloat16 for parameter in self.module.parameters())
        self.refresh()

    def _take_adapter_off(self, name: str, base: nn.Module, apart: bool) -> None:
        """Replaces an adapted layer of the copy by a plain one with a weight of its own."""
        plain = copy.deepcopy(base, {} if apart else {id(tensor): tensor for tensor in base.parameters()})
        plain.weight = Parameter(base.weight.detach().clone(), requires_grad=False)
        self._put(name, plain)

    def _put(self, name: str, part: nn.Module | Parameter) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, part)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the trained weights, in place: W + scale B A in fp32, then rounded to the copy's precision."""
        for name, layer in self.adapted.items():
            self._store(name, "weight", layer.get_base_layer().weight.float() + layer.get_delta_weight(NAME).float())
        for name in self.cast:
            self._store(*name.rpartition(".")[::2], self.source.get_parameter(name))

    def _store(self, name: str, parameter: str, value: Tensor) -> None:
        """Puts a value into a parameter of the layer `name`, wherever that layer keeps it."""
        if name in self.float8 and parameter == "weight":
            self.float8[name].refresh(whole(value))
            return
        target = getattr(self.module.get_submodule(name), parameter)
        target.copy_(value if hasattr(target, "full_tensor") else whole(value))

    def quantise(self, smallest: int) -> str:
        """Turns the linear layers of the repeated blocks with sides of at least `smallest` to fp8; says which.

        Once, before the copy is first used; weights are rounded from fp32 sums at every refresh.
        """
        linear = {name: part for name, part in self.module.named_modules() if type(part) is nn.Linear}
        inside = {name: part for name, part in linear.items() if self._in_a_block(name)}
        for name, part in inside.items():
            if takes_float8(name, part, smallest):
                self.float8[name] = Float8Linear(part.weight, part.bias)
                self._put(name, self.float8[name])
        self.refresh()
        return describe_layers(self.float8, inside.keys() - self.float8.keys())

    def _in_a_block(self, name: str) -> bool:
        return isinstance(getattr(self.module, name.split(".")[0], None), nn.ModuleList)
